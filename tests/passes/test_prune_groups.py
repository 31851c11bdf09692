"""Channel groups where tracers stumble: packed projections, shuffles, what torch-pruning does not know.

The right value of a cut is that of the whole network with the channels at zero where they are made, computed here by
hooks and by hand, not by what is tested.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from pruning import data, program_of, task_of, trained
from torch import Tensor, nn

from pqk.passes.prune.channel_group import ChannelGroup, Member
from pqk.passes.prune.cuts import cut_channels
from pqk.passes.prune.dependencies import Dependencies, bounded, trace_dependencies, why_not_consistent
from pqk.passes.prune.follower import trace_channels
from pqk.passes.prune.groups import trace_groups
from pqk.passes.prune.law import check_groups, exact_groups, why_not_cut, why_not_exact
from pqk.passes.prune.prune import Prune


class Net(nn.Module):
    """Layers by name and a function of them."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def half(count: int, forward: Callable[[nn.Module, Tensor], Tensor]) -> Net:
    """A gated projection [B, 16] -> [B, 5] of `count` channels, two of which make one."""
    return Net(forward, up=nn.Linear(16, count), down=nn.Linear(count // 2, 12), head=nn.Linear(12, 5))


def gate(gated: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda m, x: m.head(F.relu(m.down(gated(m.up(x)))))


def by_chunk(y: Tensor) -> Tensor:
    g, u = y.chunk(2, -1)
    return F.silu(g) * u


def by_slice(y: Tensor) -> Tensor:
    n = y.shape[-1] // 2
    return y[..., :n].sigmoid() * y[..., n:]


def by_view(y: Tensor) -> Tensor:
    g, u = y.unflatten(-1, (2, -1)).unbind(-2)
    return F.gelu(g) * u


def by_step(y: Tensor) -> Tensor:
    return y[..., ::2].tanh() * y[..., 1::2]


def image_gate(m: nn.Module, x: Tensor) -> Tensor:
    g, u = m.norm(m.up(x)).chunk(2, 1)
    return m.head(F.relu(m.down(F.silu(g) * u)).mean((2, 3)))


def attention(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.head((x + m.out((q @ k.transpose(1, 2) / 3).softmax(-1) @ v)).mean(1))


def shuffled(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shuffle_net(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    x = F.relu(m.b(shuffled(F.relu(m.a(x)), 4)))
    return m.head(x.mean((2, 3)))


def shuffle_unit(m: nn.Module, x: Tensor) -> Tensor:
    """Half of the channels pass by, as in ShuffleNetV2."""
    one, other = F.relu(m.stem(x)).chunk(2, 1)
    x = shuffled(torch.cat([one, F.relu(m.a(other))], 1), 2)
    return m.head(m.b(x).mean((2, 3)))


def ghost(m: nn.Module, x: Tensor) -> Tensor:
    """Primary features and cheap ones made of them, joined and trimmed, twice, with a shortcut (GhostNet)."""
    x = F.relu(m.stem(x))
    one = F.relu(m.a(x))
    y = torch.cat([one, F.relu(m.cheap_a(one))], 1)[:, :24]
    two = m.b(y)
    return m.head((torch.cat([two, m.cheap_b(two)], 1)[:, :16] + m.past(x)).mean((2, 3)))


def selective(m: nn.Module, x: Tensor) -> Tensor:
    """Two branches weighed against each other by one linear layer (SKNet)."""
    x = F.relu(m.stem(x))
    branches = torch.stack([F.relu(m.a(x)), F.relu(m.b(x))], 1)
    weights = m.select(F.relu(m.squeeze(branches.sum(1).mean((2, 3)))))
    weights = weights.view(len(x), 2, -1, 1, 1).softmax(1)
    return m.head((branches * weights).sum(1).mean((2, 3)))


def cross_stage(m: nn.Module, x: Tensor) -> Tensor:
    """Half of the channels go through blocks, and all are joined again (CSPNet)."""
    one, other = F.relu(m.stem(x)).chunk(2, 1)
    other = other + F.relu(m.b(F.relu(m.a(other))))
    return m.head(F.relu(m.join(torch.cat([other, one], 1))).mean((2, 3)))


def scales(m: nn.Module, x: Tensor) -> Tensor:
    """Each part is added to what came of the one before (Res2Net); here the parts follow the width."""
    parts = F.relu(m.stem(x)).chunk(4, 1)
    outputs = [parts[0]]
    for part, layer in zip(parts[1:], (m.a, m.b, m.c), strict=True):
        outputs.append(F.relu(layer(part + outputs[-1])))
    return m.head(F.relu(m.join(torch.cat(outputs, 1))).mean((2, 3)))


def permuted(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(F.relu(m.a(F.relu(m.stem(x)))).permute(0, 2, 3, 1).flatten(1))


def flipped(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    return m.head((x + m.a(x.flip(1))).mean((2, 3)))


#: network, input, a layer, and the units of its group as channels of that layer
CUT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, list[set[int]]]] = {
    "chunk": (lambda: half(128, gate(by_chunk)), (16,), "up", [{i, i + 64} for i in range(64)]),
    "slices": (lambda: half(48, gate(by_slice)), (16,), "up", [{i, i + 24} for i in range(24)]),
    "view": (lambda: half(48, gate(by_view)), (16,), "up", [{i, i + 24} for i in range(24)]),
    "every other": (lambda: half(48, gate(by_step)), (16,), "up", [{2 * i, 2 * i + 1} for i in range(24)]),
    "glu": (lambda: half(32, gate(lambda y: F.glu(y, -1))), (16,), "up", [{i, i + 16} for i in range(16)]),
    "three axes": (lambda: half(64, gate(by_chunk)), (7, 16), "up", [{i, i + 32} for i in range(32)]),
    "image": (
        lambda: Net(image_gate, up=conv(3, 32), norm=nn.BatchNorm2d(32), down=conv(16, 8), head=nn.Linear(8, 5)),
        (3, 8, 8), "up", [{i, i + 16} for i in range(16)],
    ),
    "attention": (
        lambda: Net(attention, qkv=nn.Linear(16, 36), out=nn.Linear(12, 16), head=nn.Linear(16, 5)),
        (6, 16), "qkv", [{i, i + 12, i + 24} for i in range(12)],
    ),
    "shuffle": (
        lambda: Net(
            shuffle_net, stem=conv(3, 8), a=conv(8, 32, groups=4), b=conv(32, 8, groups=4), head=nn.Linear(8, 5)
        ),
        (3, 8, 8), "a", [{8 * g + 2 * j + i for g in range(4) for j in range(4)} for i in range(2)],
    ),
    "shuffle unit": (
        lambda: Net(shuffle_unit, stem=conv(3, 16), a=conv(8, 8), b=conv(16, 8), head=nn.Linear(8, 5)),
        (3, 8, 8), "stem", [{i, i + 8} for i in range(8)],
    ),
    "ghost": (
        lambda: Net(
            ghost, stem=conv(3, 16), a=conv(16, 12), cheap_a=conv(12, 12, groups=12), b=conv(24, 8),
            cheap_b=conv(8, 8, groups=8), past=conv(16, 16, 1), head=nn.Linear(16, 5),
        ),
        (3, 8, 8), "a", [{i} for i in range(12)],
    ),
    "selective": (
        lambda: Net(
            selective, stem=conv(3, 8), a=conv(8, 12), b=conv(8, 12, 5), squeeze=nn.Linear(12, 6),
            select=nn.Linear(6, 24), head=nn.Linear(12, 5),
        ),
        (3, 8, 8), "a", [{i} for i in range(12)],
    ),
    "cross stage": (
        lambda: Net(
            cross_stage, stem=conv(3, 16), a=conv(8, 12), b=conv(12, 8), join=conv(16, 8), head=nn.Linear(8, 5)
        ),
        (3, 8, 8), "stem", [{i, i + 8} for i in range(8)],
    ),
    "scales": (
        lambda: Net(
            scales, stem=conv(3, 24), a=conv(6, 6), b=conv(6, 6), c=conv(6, 6), join=conv(24, 8), head=nn.Linear(8, 5)
        ),
        (3, 8, 8), "stem", [{i, i + 6, i + 12, i + 18} for i in range(6)],
    ),
    "permuted": (
        lambda: Net(permuted, stem=conv(3, 8), a=conv(8, 6), head=nn.Linear(6 * 16, 5)),
        (3, 4, 4), "a", [{i} for i in range(6)],
    ),
    "flipped": (
        lambda: Net(flipped, stem=conv(3, 8), a=conv(8, 8), head=nn.Linear(8, 5)),
        (3, 4, 4), "stem", [{i} for i in range(8)],
    ),
}  # fmt: skip


@contextmanager
def zeroed(model: nn.Module, channels: dict[str, set[int]]) -> Iterator[None]:
    """`model` with these output channels of its layers at zero."""

    def zeros(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            axis = -1 if isinstance(module, nn.Linear) else 1
            return output.index_fill(axis, torch.tensor(sorted(channels[path])), 0)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(zeros(path)) for path in channels]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def group_of(groups: list[ChannelGroup], layer: str) -> ChannelGroup:
    """The group whose channels `layer` makes."""
    return next(g for g in groups if layer in g.producers)


def units_of(group: ChannelGroup, layer: str) -> list[list[int]]:
    """The units of a group as channels of `layer`, which makes them."""
    places = next(m.places for m in group.members if m.path == layer and m.dim == "out")
    return sorted(sorted(p for c in unit for p in places[c]) for unit in group.units)


@torch.no_grad()
def assert_units_go_alone_and_in_any_company(model: nn.Module, x: Tensor, group: ChannelGroup) -> None:
    draw = torch.Generator().manual_seed(1)
    every = range(len(group.units))
    some = torch.randperm(len(every), generator=draw)[: len(every) // 2].tolist()
    for units in (*([u] for u in every), some, [*every][:-1]):
        cuts = group.cuts(c for u in units for c in group.units[u])
        slim = cut_channels(copy.deepcopy(model), (x,), cuts=cuts)
        with zeroed(model, {c["module"]: {*c["indices"]} for c in cuts if c["dim"] == "out"}):
            torch.testing.assert_close(slim(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CUT)
def test_what_goes_together_is_found_and_any_of_it_may_go(name: str) -> None:
    make, shape, layer, units = CUT[name]
    torch.manual_seed(0)
    model, x = trained(make()), data(shape, 4)
    groups, reasons, _ = exact_groups(model, (x,), trace_groups(model, (x,)))
    group = group_of(groups, layer)
    assert reasons[group.name] is None
    assert units_of(group, layer) == sorted(map(sorted, units))
    assert_units_go_alone_and_in_any_company(model, x, group)


@pytest.mark.parametrize("name", CUT)
def test_what_is_packed_is_pruned(name: str) -> None:
    make, shape, layer, _ = CUT[name]
    torch.manual_seed(0)
    model = trained(make())
    config = Prune(macs_ratio=100.0, multiple=1, floor=0.5, best_effort=True)
    program = config.apply(program_of(model), task_of(model, shape))
    assert layer in program.details["widths"] and program.details["budget"]["reached"] > 1.2


def gated_join(m: nn.Module, x: Tensor) -> Tensor:
    """Two layers side by side, under one gate for all channels (CSPNeXt)."""
    x = torch.cat([F.relu(m.short(x)), F.relu(m.main(x))], 1)
    return m.head(F.relu(m.join(x * m.gate(x.mean((2, 3)))[..., None, None].sigmoid())).mean((2, 3)))


def test_every_layer_of_a_group_keeps_its_floor() -> None:
    """The group has twice as many channels as one of its layers, which are all worth less than the other's."""
    layers = {"short": conv(3, 12), "main": conv(3, 12), "gate": nn.Linear(24, 24), "join": conv(24, 8)}
    model = trained(Net(gated_join, **layers, head=nn.Linear(8, 5)))
    for t in (model.short.weight, model.short.bias, model.gate.weight[:12], model.join.weight[:, :12]):
        t.data.mul_(1e-3)
    for floor, least in ((0.25, 3), (1, 1), (2, 2)):
        config = Prune(macs_ratio=100.0, multiple=1, floor=floor, best_effort=True)
        program = config.apply(program_of(model), task_of(model, (3, 6, 6)))
        widths = [program.student.get_submodule(layer).weight.shape[0] for layer in ("short", "main", "gate")]
        assert min(widths) >= least and widths[2] == sum(widths[:2]) < 24


# ---- what torch-pruning does not know


class Rotary(nn.Module):
    """Rotary positions beside queries of four heads and keys and values of two, then a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)
        angles = torch.arange(6)[:, None] / 10 ** torch.arange(2)
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def rotate(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * self.cos + torch.cat([-other, one], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.rotate(self.q(x).view(b, t, 4, 4).transpose(1, 2))
        k = self.rotate(self.k(x).view(b, t, 2, 4).transpose(1, 2)).repeat_interleave(2, 1)
        v = self.v(x).view(b, t, 2, 4).transpose(1, 2)[:, :, None].expand(b, 2, 2, t, 4).reshape(b, 4, t, 4)
        y = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(b, t, 16))
        return self.head((x + self.down(F.silu(self.gate(x)) * self.up(x))).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.narrow = nn.Conv1d(8, 16, 3, padding=1), nn.Conv1d(16, 12, 1)
        self.cell, self.hidden, self.head = kind(12, 10, batch_first=True), nn.Linear(10, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(F.relu(self.narrow(F.relu(self.conv(x)))).transpose(1, 2))
        return self.head(F.relu(self.hidden(y[:, -1])))


class Sorted(nn.Module):
    """An operator on channels that no rule knows, between layers that can be cut."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 12, 3, padding=1), nn.Conv1d(12, 10, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x))).sort(1).values

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.c = self.Mixed(), nn.Conv1d(10, 12, 1)
        self.cell, self.head = nn.GRU(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(F.relu(self.c(self.mixed(x))).transpose(1, 2))
        return self.head(y[:, -1])


#: network, input, what torch-pruning says, the layers whose channels may go, and for others what their reason says
UNKNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, set[str], dict[str, str]]] = {
    "rotary": (
        Rotary, (6, 16), "'int' and 'NoneType'", {"gate"},
        {"q": "does not run", "o": r"a fixed size.*\(test_prune_groups.py:\d+\)", "head": "the model's output"},
    ),
    "GRU": (
        lambda: Recurrent(nn.GRU), (8, 6), "list index out of range", {"conv", "hidden"},
        {"narrow": 'read by the GRU "cell"', "head": "the model's output"},
    ),
    "sort": (
        Sorted, (8, 6), "list index out of range", {"mixed.a"},
        {"mixed.b": r"aten.sort.*cannot follow \(in .mixed., test_prune_groups.py:\d+\)", "c": 'GRU "cell"'},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_followed_is_left_out_by_name_and_the_rest_is_cut(name: str) -> None:
    make, shape, raised, free, reasons = UNKNOWN[name]
    torch.manual_seed(0)
    model, x = trained(make()), data(shape, 4)
    said = trace_dependencies(model, (x,))
    assert isinstance(said, str) and raised in said
    checks = {c.name: c.reason for c in check_groups(model, (x,))}
    assert {name for name, reason in checks.items() if reason is None} == free
    assert all(re.search(reason, checks[layer] or "") for layer, reason in reasons.items()), checks
    for group in trace_groups(model, (x,)).groups:
        if group.name in free:
            assert_units_go_alone_and_in_any_company(model, x, group)
    program = Prune(macs_ratio=100.0, multiple=1, floor=0.5, best_effort=True).apply(
        program_of(model), task_of(model, shape)
    )
    assert {*program.details["widths"]} >= free
    assert {d.layer for d in program.declined} >= {*reasons}


def test_channels_that_are_written_into_a_part_of_something_else_stay() -> None:
    """The rest of that has no channels; as temporal shifts and partial convolutions do it."""

    def partial(m: nn.Module, x: Tensor) -> Tensor:
        y, z = x.clone(), x.clone()
        y[:, :4] = m.a(x)
        z[:, 4:] += m.b(x)
        return m.head(F.relu(m.c(y + z)).mean((2, 3)))

    layers = {"a": conv(8, 4), "b": conv(8, 4), "c": conv(8, 6), "head": nn.Linear(6, 5)}
    model, x = trained(Net(partial, **layers)), data((8, 4, 4), 4)
    trace = trace_channels(model, (x,))
    for layer, why in (("a", "written into a part"), ("b", "a fixed size")):
        reasons = [trace.reasons().get(number, "") for number in trace.classes((layer, "out")) or []]
        assert len(reasons) == 4 and all(why in r and "test_prune_groups.py" in r for r in reasons)
    assert {c.name for c in check_groups(model, (x,)) if c.reason is None} == {"c"}


def test_weights_that_are_given_by_name_are_no_crash() -> None:
    """`F.linear(x, weight=..., bias=...)` with a layer's own parameters, as fused projections have it."""

    def called(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(F.relu(F.linear(input=F.linear(x, weight=m.a.weight, bias=m.a.bias), weight=m.b.weight)))

    model, x = trained(Net(called, a=nn.Linear(6, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 5))), data((6,), 4)
    reasons = {c.name: c.reason for c in check_groups(model, (x,))}
    assert all(reasons.values()), reasons
    for layer in "ab":
        reason = trace_channels(model, (x,)).reasons()[1 if layer == "a" else 9]
        assert f'a parameter of "{layer}" is read outside of its own call (test_prune_groups.py:' in reason


class Endless(nn.Module):
    """Never comes back where gradients are recorded, as they are for torch-pruning alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += torch.is_grad_enabled()
        while torch.is_grad_enabled():
            pass
        return self.head(F.relu(self.b(F.relu(self.a(x)))))


def test_a_tracer_that_does_not_come_back_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    model, x = trained(Endless()), data((6,), 4)
    threads = threading.active_count()
    traced = trace_groups(model, (x,), seconds=0.2)
    assert threading.active_count() == threads, "the tracer's thread has ended"
    assert "did not come back in 0.2 s" in caplog.text
    assert {g.name: g.reason for g in traced.groups if g.name != "head"} == {"a": None, "b": None}
    narrower = cut_channels(copy.deepcopy(model), (x,), cuts=traced.groups[0].cuts([1]))
    assert [g.channels for g in trace_groups(narrower, (x,), seconds=0.2).groups] == [11, 8, 5]
    assert Endless.calls == 1, "and not asked again"


def test_a_network_of_the_same_layers_is_asked_about_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """What has the layers of one that did not come back, and calls them otherwise."""
    model, x = trained(Endless()), data((6,), 4)
    assert trace_groups(model, (x,), seconds=0.2).groups

    def forward(self: Endless, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))))

    mended = trained(type("Endless", (Endless,), {"forward": forward})())
    assert repr(mended) == repr(model)
    caplog.clear()
    assert trace_groups(mended, (x,)).groups and not caplog.text


def test_bounded_work_returns_raises_and_ends() -> None:
    assert bounded(lambda: 3, 5.0) == 3
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 // 0, 5.0)
    swallowed = []

    def stubborn() -> None:
        while len(swallowed) < 2:
            try:
                while True:
                    pass
            except BaseException as error:
                swallowed.append(error)

    with pytest.raises(TimeoutError):
        bounded(stubborn, 0.1)
    assert len(swallowed) == 2, "code that catches everything is ended by asking again"


def test_a_tracer_that_contradicts_itself_is_not_believed() -> None:
    one = Dependencies([Member("a", "out", 2, ((0,), (1,))), Member("b", "in", 2, ((0,), (1,)))], [])
    two = Dependencies([Member("c", "out", 1, ((0,),)), Member("a", "out", 2, ((1,),))], [])
    apart = Dependencies([Member("c", "out", 1, ((0,),)), Member("b", "in", 2, ((1,),))], [])
    assert why_not_consistent([one, apart]) is None
    assert 'channel 1 of "a" is of the group of "a" and of that of "c"' in (why_not_consistent([one, two]) or "")


# ---- the law


def test_a_lucky_quarter_is_no_proof() -> None:
    """Every fourth channel from 1 on is the same in both halves of 128 channels; {0, 70} is not."""
    model, x = trained(half(128, gate(by_chunk))), data((16,), 4)
    same = tuple((c,) for c in range(128))
    reader = Member("down", "in", 64, tuple(() if c < 64 else (c - 64,) for c in range(128)))
    group = ChannelGroup("up", 128, (Member("up", "out", 128, same), reader), same)
    assert why_not_exact(model, (x,), group.cuts(range(1, 128, 4))) is None
    assert "differ by" in (why_not_exact(model, (x,), group.cuts([0, 70])) or "")
    assert why_not_cut(model, (x,), group) is not None


def test_branches_that_are_at_zero_before_training_hide_nothing() -> None:
    """Norms, scales and last layers that begin at zero, as many do, would let any cut behind them seem right."""
    x = data((16,), 4)
    model = trained(half(128, gate(by_chunk)))
    model.down.weight.data.zero_()
    rezero = Net(
        lambda m, x: m.head(x + m.scale(m.down(by_chunk(m.up(x))))),
        up=nn.Linear(16, 128), scale=nn.LayerNorm(16), down=nn.Linear(64, 16), head=nn.Linear(16, 5),
    )  # fmt: skip
    trained(rezero).scale.weight.data.fill_(1e-6)
    rezero.scale.bias.data.zero_()
    same = tuple((c,) for c in range(128))
    reader = Member("down", "in", 64, tuple(() if c < 64 else (c - 64,) for c in range(128)))
    wrong = ChannelGroup("up", 128, (Member("up", "out", 128, same), reader), same)
    for network in (model, rezero):
        before = copy.deepcopy(network.state_dict())
        assert "differ by" in (why_not_exact(network, (x,), wrong.cuts([0, 70])) or "")
        assert all(t.equal(before[n]) for n, t in network.state_dict().items()), "only copies have other values"
        assert [c.name for c in check_groups(network, (x,)) if c.reason is None and c.name == "up"] == ["up"]


class AsWide(nn.Module):
    """Reads the outputs of one layer in as many rows as another one has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(3, 8), nn.Linear(12, 5)
        self.c, self.d = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        one, other = F.relu(self.a(x)).mean((2, 3)), F.relu(self.b(x))
        rows = other.reshape(len(x), one.shape[1], -1).sum(-1)
        return self.head(F.relu(self.c(one)) + self.d(rows))


def test_groups_that_need_each_other_are_not_tried_only_together() -> None:
    """Cut by as many channels, both would run; what is wrong with each of them must not hide behind the other."""
    torch.manual_seed(0)
    model, x = trained(AsWide()), data((3, 4, 4), 4)
    checks = {c.name: c.reason for c in check_groups(model, (x,))}
    assert {name for name, reason in checks.items() if reason is None} == {"d"}
    assert "does not run" in str(checks["a"]) and "does not run" in str(checks["b"])


class Picky(nn.Module):
    """Does something else with few channels than with many."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x if x.shape[-1] > 10 else 2 * x))
        return self.head(x)


@pytest.mark.parametrize("depth", [False, True])
def test_the_very_cuts_are_held_to_the_law_and_declined_by_name(depth: bool) -> None:
    model = trained(Picky())
    x = data((6,), 4)
    assert [c.name for c in check_groups(model, (x,)) if c.reason is None] == ["a", "b"]
    config = Prune(macs_ratio=100.0, multiple=8 if depth else 1, floor=0.5, depth=depth, best_effort=True)
    program = config.apply(program_of(model), task_of(model, (6,)))
    reasons = {d.layer: d.reason for d in program.declined}
    assert "differ by" in reasons["a"] and {*program.details["widths"]} == {"b"}


class Odd(nn.Module):
    """Runs with even widths only once it has less than ten channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if x.shape[-1] < 10:
            raise RuntimeError("too narrow")
        return self.head(F.relu(self.b(x)))


@pytest.mark.parametrize("depth", [False, True])
def test_a_student_that_does_not_run_with_the_chosen_cuts_is_no_traceback(depth: bool) -> None:
    model = trained(Odd())
    config = Prune(macs_ratio=100.0, multiple=8 if depth else 1, floor=0.5, depth=depth, best_effort=True)
    program = config.apply(program_of(model), task_of(model, (6,)))
    reasons = {d.layer: d.reason for d in program.declined}
    assert "too narrow" in reasons["a"] and {*program.details["widths"]} == {"b"}


class Counting(nn.Module):
    """24 layers in a row, and a count of the passes through this class."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(24))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        type(self).passes += 1
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def test_many_groups_are_tried_in_a_pass() -> None:
    model, x = trained(Counting()), data((8,), 4)
    traced = trace_groups(model, (x,))
    Counting.passes = 0
    groups, reasons, _ = exact_groups(model, (x,), traced)
    assert len(groups) == 25 and [g.name for g in groups if reasons[g.name]] == ["head"]
    assert Counting.passes <= 24, "less than one for each"
