"""Laws of pruning: zeroing is cutting, the plan rebuilds the student, budgets hold, refusals carry reasons."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning import data, program_of, task_of, trained
from torch import Tensor, nn

from pqk.core.costs import count_macs, count_parameters, float_bytes, integer_bytes
from pqk.core.decisions import Journal
from pqk.core.program import Program, Rewrite, replay
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.models.resnet import ChannelPadShortcut, resnet
from pqk.passes.prune.blocks import Edit, edit_costs, find_blocks, without_block
from pqk.passes.prune.channel_group import merge_cuts
from pqk.passes.prune.cuts import Cut, cut_channels, drop_block, kept_channels
from pqk.passes.prune.groups import find_groups
from pqk.passes.prune.importance import input_energies, narrowing_schedule, unit_importance
from pqk.passes.prune.law import check_groups, masked, why_not_exact
from pqk.passes.prune.prune import Prune
from pqk.task.task import Task


class Dense(nn.Module):
    """Concatenation of everything so far, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(20, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation around a depthwise convolution, with hard-swish, then flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.deep, self.squeeze, self.excite = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Linear(16, 4), nn.Linear(4, 16)
        self.project, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.deep(F.hardswish(self.bn(self.stem(x)))))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return self.head(F.silu(self.project(x * gate[:, :, None, None])).flatten(1))


class Feed(nn.Module):
    """A pre-norm attention block with one head and a feed-forward block: [B, 6, 16] -> [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o, self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = (self.q(y) @ self.k(y).transpose(1, 2) / 8**0.5).softmax(-1)
        x = x + self.o(scores @ self.v(y))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, dilation=2), nn.PReLU(8),
        nn.ConvTranspose2d(8, 12, 2, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 2, groups=2), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.Sigmoid(),
        nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def linear_only() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5)
    )


NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = [
    (lambda: resnet((2, 2, 2), 8), (3, 16, 16), {"linear"}),
    (plain, (3, 16, 16), {"9"}),
    (Dense, (3, 8, 8), {"head"}),
    (Gated, (3, 8, 8), {"head"}),
    # the layer norm of the residual stream sees other statistics
    (Feed, (6, 16), {"down", "head"}),
    # 5: half of the output is a sigmoid of zero, which is not zero
    (grouped, (3, 10, 10), {"8", "10"}),
    (linear_only, (10,), {"5"}),
]


def rebuilt(program: Program, task: Task) -> nn.Module:
    plan = json.loads(json.dumps([[r.function, r.arguments] for r in program.plan]))
    rewrites = {f.__name__: f for f in Prune.rewrites}
    return replay(copy.deepcopy(program.teacher), task.example, [Rewrite(*r) for r in plan], rewrites)


@pytest.mark.parametrize(("make", "shape", "refused"), NETWORKS)
def test_zeroing_is_cutting_for_every_group_alone_and_together(
    make: Callable[[], nn.Module], shape: tuple[int, ...], refused: set[str]
) -> None:
    torch.manual_seed(0)
    model, x = trained(make()), data(shape, 4)
    checks = check_groups(model, (x,))
    assert {c.name for c in checks if c.reason} == refused
    groups = [g for g in find_groups(model, (x,)) if g.name not in {c.name for c in checks if c.reason}]
    assert groups
    cuts = merge_cuts(cut for g in groups for cut in g.cuts(c for unit in g.units[1::2] for c in unit))
    with torch.no_grad(), masked(model, cuts):
        want = model(x)
    slim = cut_channels(copy.deepcopy(model), (x,), cuts=cuts)
    assert count_parameters(slim) < count_parameters(model)
    torch.testing.assert_close(slim(x), want, rtol=1e-4, atol=1e-5)


def test_stages_of_a_resnet_are_independent_groups() -> None:
    groups = {g.name: g for g in find_groups(resnet((2, 2, 2), 8).eval(), (data((3, 8, 8), 2),))}
    paths = {name: {m.path for m in g.members if m.dim == "out"} for name, g in groups.items()}
    assert not paths["conv1"] & paths["layer2.0.shortcut"]
    assert groups["conv1"].channels == 8 and groups["layer2.0.shortcut"].channels == 16


def test_the_law_catches_a_mapping_straight_through_the_channel_pad() -> None:
    """What torch-pruning does with the functional option A: stage 1's channel c is stage 2's channel c."""
    model, x = trained(resnet((1, 1), 8)), data((3, 8, 8), 2)
    groups = {g.name: g for g in find_groups(model, (x,))}
    right = groups["conv1"].cuts([1, 2])
    assert why_not_exact(model, (x,), right) is None
    wrong = [c for c in right if c["module"] != "layer2.0.shortcut"]
    wrong.append(Cut(module="layer2.0.shortcut", dim="in", indices=[3, 4], of=8))
    assert "differ by" in (why_not_exact(model, (x,), wrong) or "")


@pytest.mark.parametrize(
    "cuts", [[], [("in", [0, 3])], [("out", [0, 15])], [("out", [5, 9]), ("in", [1])], [("out", [*range(12)])]]
)
def test_shortcut_is_its_mapping_and_exports(cuts: list[tuple[str, list[int]]]) -> None:
    shortcut, x = ChannelPadShortcut.centred(8, 16, 2), data((8, 6, 6), 3)
    full = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    kept_in, kept_out = [*range(8)], [*range(16)]
    for dim, indices in cuts:
        shortcut.cut_channels(dim, indices)
        kept = kept_in if dim == "in" else kept_out
        if dim == "in":
            full[:, [4 + kept[i] for i in indices]] = 0
        kept[:] = [c for i, c in enumerate(kept) if i not in indices]
    program = torch.export.export(shortcut, (x[:, kept_in],))
    for run in (shortcut, program.module()):
        assert torch.equal(run(x[:, kept_in]), full[:, kept_out])
    assert not shortcut.state_dict()


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "activation", "bn_scale"])
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_width_meets_the_budget_in_multiples_above_the_floor_and_rebuilds(importance: Any, scope: Any) -> None:
    model = trained(resnet((1, 1, 1), 16))
    task = task_of(model, (3, 8, 8))
    config = Prune(macs_ratio=2, importance=importance, scope=scope, multiple=4, floor=8.0, steps=2)
    program = config.apply(program_of(model), task)
    assert count_macs(program.teacher, task.example) >= 2 * count_macs(program.student, task.example)
    widths = [m.out_channels for m in program.student.modules() if isinstance(m, nn.Conv2d)]
    assert all(w % 4 == 0 and w >= 8 for w in widths) and min(widths) < 16
    again = rebuilt(program, task)
    again.load_state_dict(program.student.state_dict(), strict=True)
    assert torch.equal(again(task.example[0]), program.student(task.example[0]))
    assert {d.layer for d in program.declined} >= {"linear"}
    assert program.details["after"]["macs"] < program.details["before"]["macs"]


def test_kept_channels_compose_and_are_the_teachers() -> None:
    model = trained(resnet((1, 1, 1), 16))
    task = task_of(model, (3, 8, 8))
    program = Prune(parameters_ratio=3, multiple=2, steps=3).apply(program_of(model), task)
    cut = [p for p, m in program.student.named_modules() if isinstance(m, nn.BatchNorm2d)]
    compared = 0
    for path in cut:
        kept = kept_channels(program.plan, path)
        layer, old = program.student.get_submodule(path), model.get_submodule(path)
        if kept is not None:
            compared += 1
            assert torch.equal(layer.running_mean, old.running_mean[kept])
    assert compared and kept_channels(program.plan, "linear") is None


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)) * self.scale)


def residuals() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    blocks = nn.Sequential(*(Residual(s) for s in (1.0, 1e-4, 0.5, 1.0)))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_depth_removes_the_useless_block_first_and_keeps_the_protected() -> None:
    model = trained(residuals())
    task = task_of(model, (3, 8, 8))
    blocks, _ = find_blocks(model, (data((3, 8, 8), 8),))
    assert [b.path for b in blocks] == ["1.0", "1.1", "1.2", "1.3"] and len({b.signature for b in blocks}) == 1
    program = Prune(depth=True, width=False, macs_ratio=1.2).apply(program_of(model), task)
    assert program.details["blocks_removed"] == ["1.1"]
    assert torch.equal(rebuilt(program, task)(task.example[0]), program.student(task.example[0]))
    program = Prune(depth=True, width=False, macs_ratio=1.2, protect=("1.1",)).apply(program_of(model), task)
    assert program.details["blocks_removed"] != ["1.1"]
    assert any(d.layer == "1.1" and "protect" in d.reason for d in program.declined)
    with pytest.raises(InputError, match="is gone"):
        kept_channels([Rewrite("drop_block", {"block": "1.1"})], "1.1.conv")


@torch.no_grad()
def test_cached_prefixes_change_no_cost() -> None:
    model, x = trained(resnet((3, 2), 8)), data((3, 8, 8), 16)
    teacher = trained(resnet((3, 2), 8), seed=1)(x)
    blocks, declined = find_blocks(model, (x,))
    assert "layer2.0" in declined and "from [8, 8, 8] to [16, 4, 4]" in declined["layer2.0"]
    edits = [Edit(b.path, lambda m, p=b.path: without_block(m, p), (b.path,)) for b in blocks]  # type: ignore[misc]
    costs = edit_costs(model, (x,), teacher, edits, [b.path for b in blocks])
    for edit, cost in zip(edits, costs, strict=True):
        slim = drop_block(copy.deepcopy(model), (x,), block=edit.name)
        want = F.kl_div(slim(x).log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
        assert cost == pytest.approx(float(want), rel=1e-4, abs=1e-6)


def test_a_container_keeps_its_blocks_also_when_many_go_at_once() -> None:
    model = trained(residuals())
    task = task_of(model, (3, 8, 8))
    config = Prune(depth=True, width=False, macs_ratio=1.3, keep_blocks={"1": 2}, removals_per_ranking=4)
    program = config.apply(program_of(model), task)
    assert len(program.details["blocks_removed"]) == 2
    with pytest.raises(InputError, match="macs_ratio"):
        replace(config, macs_ratio=50.0).apply(program_of(model), task)
    most = replace(config, macs_ratio=50.0, best_effort=True).apply(program_of(model), task)
    assert len(most.details["blocks_removed"]) == 2
    assert any("out of reach" in d.reason for d in most.declined)


class Scaled(nn.Module):
    """Nothing that could be cut, nor counted."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_network_without_layers_has_nothing_that_could_go() -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % 4
    data = ArrayData(x, y, batch_size=4)
    with pytest.raises(InputError, match="the teacher has no parameters that could go, as it has no layer with"):
        Prune(parameters_ratio=2).apply(program_of(Scaled()), Task(data, data, data))
    left = Prune(macs_ratio=2, best_effort=True).apply(program_of(Scaled()), Task(data, data, data))
    assert left.plan == () and left.declined[-1].reason == "the teacher has no macs that could go"


def test_a_student_that_meets_the_budget_is_left_alone() -> None:
    model = trained(resnet((1, 1), 16))
    task = task_of(model, (3, 8, 8))
    first = Prune(macs_ratio=2.0, multiple=4).apply(program_of(model), task)
    second = Prune(macs_ratio=1.5, multiple=4).apply(first, task)
    assert second.student is first.student and second.plan == first.plan
    assert "already meets the budget: its macs_ratio is 2" in second.declined[-1].reason
    assert second.declined[-1].reason.endswith("the goal 1.5")


def test_best_effort_narrows_as_far_as_is_allowed() -> None:
    model = trained(resnet((1, 1), 16))
    task = task_of(model, (3, 8, 8))
    config = Prune(macs_ratio=1000.0, best_effort=True)
    program = config.apply(program_of(model), task)
    assert program.details["budget"]["reached"] > 1.2 and any("out of reach" in d.reason for d in program.declined)
    with pytest.raises(InputError, match="best_effort"):
        replace(config, best_effort=False).apply(program_of(model), task)


def test_depth_and_width_compete() -> None:
    model = trained(resnet((2, 2), 16))
    task = task_of(model, (3, 8, 8))
    config = Prune(depth=True, macs_ratio=3, multiple=8, removals_per_ranking=3)
    program = config.apply(program_of(model), task)
    assert program.details["blocks_removed"] and program.details["widths"]
    assert torch.equal(rebuilt(program, task)(task.example[0]), program.student(task.example[0]))


@pytest.mark.slow
@pytest.mark.parametrize("first", [{"depth": True, "width": False}, {"ignore": ("layer2.*",)}])
def test_a_second_prune_with_other_groups_measures_its_own(first: dict[str, Any]) -> None:
    """Two prunes that share a run and its journal: what the first one measured is not what the second one asks for."""
    model = trained(resnet((2, 3), 16))
    task, program = task_of(model, (3, 8, 8)), program_of(model)
    common: dict[str, Any] = {"importance": "taylor", "multiple": 4}
    program = Prune(macs_ratio=1.2, **common, **first).apply(program, task)
    program = Prune(macs_ratio=1.9, **common, ignore=("conv1",)).apply(program, task)
    assert program.details["budget"]["reached"] >= 1.9 and "layer2.0.conv1" in program.details["widths"]
    program = Prune(macs_ratio=2.6, **common, depth=True).apply(program, task)
    assert program.details["budget"]["reached"] >= 2.6
    assert torch.equal(rebuilt(program, task)(task.example[0]), program.student(task.example[0]))


def staircase(calls: list[int]) -> Callable[[nn.Module], float]:
    """A deployed latency that only falls in steps of 8 channels, plus a constant for every convolution."""

    def measure(student: nn.Module) -> float:
        calls.append(1)
        convs = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
        return sum(0.01 + 0.001 * -(-m.out_channels // 8) for m in convs)

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("depth", [False, True])
def test_latency_budget_is_measured_and_a_journal_replays_it(depth: bool) -> None:
    model = trained(resnet((3, 3), 16))
    task = task_of(model, (3, 8, 8))
    calls: list[int] = []
    ratio = 2.0 if depth else 1.1
    config = Prune(depth=depth, width=not depth, latency_ratio=ratio, multiple=8)
    journal = Journal()
    base = staircase([])(model)
    oracle = SimpleNamespace(latency=staircase(calls), baseline=lambda: base)
    run = {"journal": journal, "oracle": oracle}
    program = config.apply(program_of(model, **run), task)
    assert base >= ratio * staircase([])(program.student) and calls
    measured = len(calls)
    again = config.apply(program_of(model, **run), task)
    assert again.plan == program.plan and len(calls) == measured


def test_a_rehearsal_measures_what_is_left_and_estimates_single_candidates() -> None:
    """Exporting and timing each candidate takes seconds; what they will cost a compile is noted."""
    model = trained(resnet((2, 2, 2, 2), 8))
    task = task_of(model, (3, 8, 8))
    base = staircase([])(model)
    calls: dict[bool, list[int]] = {False: [], True: []}
    for rough, seen in calls.items():
        oracle = SimpleNamespace(latency=staircase(seen), baseline=lambda: base)
        config = Prune(depth=True, width=False, latency_ratio=1.5)
        config = config.rehearsal(1.0) if rough else config  # type: ignore[assignment]
        program = config.apply(program_of(model, oracle=oracle, rough=rough), task)
        reached = program.details["budget"]["reached"]
        true = base / staircase([])(program.student)
        assert reached >= 1.5 and reached == pytest.approx(true, rel=0.2 if rough else 1e-6)
        estimated = program.details.get("estimated", {"candidates": 0})
        assert (estimated["candidates"] >= 2 and estimated["seconds"] > 0) == rough
    assert len(calls[True]) == 2 < len(calls[False]) - 1, "the student before, and the first that seems to be enough"


def test_recovery_trains_between_steps() -> None:
    model = trained(resnet((1, 1), 8))
    task = task_of(model, (3, 8, 8))
    program = Prune(macs_ratio=1.5, multiple=2, recovery_epochs=1).apply(program_of(model), task)
    assert not torch.equal(rebuilt(program, task).conv1.weight, program.student.conv1.weight)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "exactly one of"),
        ({"macs_ratio": 2, "size_ratio": 2}, "macs_ratio and size_ratio are given"),
        ({"macs_ratio": 0.5}, "greater than 1"),
        ({"macs_ratio": 2, "width": False}, "width and depth are both false"),
        ({"macs_ratio": 2, "floor": 2.5}, "floor = 2.5"),
        ({"macs_ratio": 2, "widht": True}, "widht"),
    ],
)
def test_wrong_configurations_are_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Prune(**fields)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"macs_ratio": 50, "multiple": 4}, "macs_ratio = 50 cannot be met.*times less"),
        (
            {"macs_ratio": 2, "multiple": 64},
            r"no channel group can be cut.*Not cut.*conv1: no multiple of 64 fits",
        ),
        (
            {"macs_ratio": 2, "ignore": ("*",), "multiple": 1},
            r'no channel group.*Not cut.*conv1.*: .*ignore = "\*"',
        ),
        ({"parameters_ratio": 100, "depth": True, "width": False}, "parameters_ratio = 100 cannot be met"),
        ({"latency_ratio": 2}, "latency"),
    ],
)
def test_budgets_that_cannot_be_met_say_what_can(fields: dict[str, Any], what: str) -> None:
    model = trained(resnet((1, 1), 16))
    with pytest.raises(InputError, match=what):
        Prune(**fields).apply(program_of(model), task_of(model, (3, 8, 8)))


def test_ignored_shared_and_foreign_layers_carry_a_reason() -> None:
    model, x = resnet((1, 1), 8).eval(), data((3, 8, 8), 2)
    reasons = {g.name: g.reason for g in find_groups(model, (x,), ["layer2"])}
    assert 'ignore = "layer2"' in (reasons["layer2.0.conv1"] or "") and reasons["layer1.0.conv1"] is None
    tied = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    tied[2].weight = tied[0].weight
    assert all("shared by 0, 2" in (g.reason or "shared by 0, 2") for g in find_groups(tied, (data((6,), 2),)))
    assert [g.name for g in find_groups(tied, (data((6,), 2),)) if g.reason] == ["0", "2"]


def test_a_plan_for_another_network_is_refused() -> None:
    with pytest.raises(InputError, match="has 16 channels and the plan was made for 8"):
        cut_channels(resnet((1,), 16), (), cuts=[Cut(module="conv1", dim="out", indices=[1], of=8)])


def test_the_schedule_is_least_important_first_and_even_per_layer() -> None:
    model = trained(plain())
    groups = find_groups(model, (data((3, 16, 16), 2),))[:2]
    scores = [unit_importance(model, g, "magnitude") for g in groups]
    schedule = narrowing_schedule(list(zip(groups, scores, strict=True)), 4, [4, 4], "global")  # type: ignore[arg-type]
    means = [narrowing.lost / len(narrowing.units) for narrowing in schedule]
    assert means == sorted(means) and {(narrowing.group.name, narrowing.width) for narrowing in schedule} == {
        ("0", 12),
        ("0", 8),
        ("0", 4),
        ("3", 4),
    }
    even = narrowing_schedule(list(zip(groups, scores, strict=True)), 4, [4, 4], "per_layer")  # type: ignore[arg-type]
    shares = [narrowing.width / narrowing.group.channels for narrowing in even]
    assert shares == sorted(shares, reverse=True)


def test_activation_importance_is_the_norm_of_what_a_channel_adds() -> None:
    """Against the sum of (weight * input)² over outputs and samples; a dead unit is worth nothing, heavy or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = data((6,), 40)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0.0, -1.0
        model[2].weight[:, 2] = 100.0
        hidden = model[:2](x)
        added = (hidden.square().mean(0) * model[2].weight.square().sum(0)).sqrt()
    part = ArrayData(x, None)
    task = Task(None, part, validation=part)
    group = next(g for g in find_groups(model, task.example) if g.name == "0")
    scores = unit_importance(model, group, "activation", input_energies(model, task, 40))
    assert isinstance(scores, Tensor) and scores[2] == 0
    torch.testing.assert_close(scores, added / added.mean())
    assert isinstance(unit_importance(model, group, "activation", {}), str)


def test_costs_of_known_networks() -> None:
    model = resnet((3, 3, 3))
    assert count_parameters(model) == 269_722 and count_macs(model, (data((3, 32, 32), 2),)) == 40_551_040
    linear = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    assert float_bytes(linear) == 4 * (200 + 20 + 40 + 40) and integer_bytes(linear) == 200 + 4 * (20 + 40)
    table = nn.Sequential(nn.Embedding(100, 16), nn.LayerNorm(16))
    assert float_bytes(table) == 4 * (1600 + 32) and integer_bytes(table) == 1600 + 4 * 32
    with pytest.raises(InputError, match="at least one sample"):
        count_macs(linear, (torch.zeros(0, 10),))
