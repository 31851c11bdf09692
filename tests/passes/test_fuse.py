"""The fused student: one launch a layer, the same numbers as the INT8 graph, and a reason for all that is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_models as tiny
import torch
import torch.nn.functional as F
from lowered import Encoder, int8_graph, operators
from torch import Tensor, fx, nn
from zoo import NETWORKS

from pqk.core.launches import traffic
from pqk.core.pipeline import run_passes
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.structures import tensors
from pqk.deploy.torch_emitter import emit_torch, load_student
from pqk.kernels.common.epilogue import apply_steps
from pqk.models import encoder as encoders
from pqk.models.resnet import ChannelPadShortcut, resnet
from pqk.passes import Capture, Convert, Fuse, Quantize
from pqk.passes.fuse import rules_weighted as _rules_weighted
from pqk.passes.fuse.fuse import fuse, launches, stands_for
from pqk.passes.fuse.rule import Match
from pqk.target.target import Target
from pqk.verify.fused_parity import check_launches

WHOLE = {"plain", "residual", "separable", "gated", "silu", "grouped", "several", "tokens"}
"""networks of the zoo in which every layer has a kernel and every launch takes in what it can"""


def at(fused: fx.GraphModule, layer: str) -> fx.Node:
    """The launch of a layer."""
    (node,) = (n for n in fused.graph.nodes if stands_for(n) is not None and n.meta["layer"] == layer)
    return node


def value(fused: fx.GraphModule, node: fx.Node, name: str) -> Any:
    """A tensor argument of a launch."""
    return fused.get_buffer(str(node.kwargs[name].target))  # type: ignore[union-attr]


def agree(graph: fx.GraphModule, fused: fx.GraphModule, *inputs: Tensor) -> None:
    """Every launch keeps the contract, and so do the ends, for several samples and for one."""
    rows = check_launches(graph, fused, inputs)
    assert rows and all(r.passed for r in rows), [r for r in rows if not r.passed]
    for part in (inputs, tuple(x[:1] for x in inputs)):
        with torch.no_grad():
            for want, got in zip(tensors(graph(*part)), tensors(fused(*part)), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))


# ---- ResNets


@pytest.fixture(scope="module", params=[("x86-avx2", 3), ("cuda-sm80", 1)], ids=["resnet20-x86", "resnet8-cuda"])
def lowered(request: Any) -> tuple[fx.GraphModule, fx.GraphModule, list[tuple[str, str]], Tensor]:
    """INT8 graph, fused student, what was left out, inputs."""
    torch.manual_seed(0)
    target, blocks = request.param
    x = torch.randn(8, 3, 16, 16)
    graph = int8_graph(resnet((blocks,) * 3), x, target=target)
    return graph, *fuse(graph), x


@pytest.mark.slow
def test_a_resnet_is_one_launch_a_layer(lowered: Any) -> None:
    graph, fused, declined, x = lowered
    convolutions = sum(n.target is torch.ops.aten.conv2d.default for n in graph.graph.nodes)
    assert convolutions in (7, 19)
    want = ["quantize_static", *["int8_conv2d"] * convolutions, "int8_pool", "int8_linear"]
    assert operators(fused, (x,)) == want
    assert declined == []


def test_pixels_come_first_from_end_to_end(lowered: Any) -> None:
    """The image is turned as it is quantized, by strides; nothing is turned after that."""
    _, fused, _, _ = lowered
    moved = [n for n in fused.graph.nodes if n.op == "call_function" and stands_for(n) is None]
    assert [n.target._opname for n in moved] == ["permute", "flatten"]


def test_a_residual_block_rounds_in_registers(lowered: Any) -> None:
    _, fused, _, _ = lowered
    second = at(fused, "layer1.0.conv2")
    assert second.kwargs["steps"] == "requantize,add,quantize"
    assert second.kwargs["residual"] is at(fused, "conv1") and second.kwargs["x"] is at(fused, "layer1.0.conv1")
    assert at(fused, "linear").kwargs["steps"] == "" and at(fused, "linear").kwargs["out_dtype"] == torch.float32


def test_a_shortcut_between_stages_is_read_not_written(lowered: Any) -> None:
    _, fused, _, _ = lowered
    wide = at(fused, "layer2.0.conv2")
    assert wide.kwargs["residual_stride"] == 2
    assert value(fused, wide, "residual_channels").tolist() == [-1] * 8 + [*range(16)] + [-1] * 8
    assert wide.kwargs["residual"] is at(fused, "layer2.0.conv1").kwargs["x"]


def test_a_resnet_computes_what_the_int8_graph_does(lowered: Any) -> None:
    graph, fused, _, x = lowered
    agree(graph, fused, x)
    with torch.no_grad():
        want, got = graph(x), fused(x)
    assert float(want.std()) > 0.1 and torch.equal(want.argmax(1), got.argmax(1))


def test_it_launches_and_moves_far_less(lowered: Any) -> None:
    graph, fused, _, x = lowered
    before, after = traffic(graph, (x[:1],)), traffic(fused, (x[:1],))
    assert 3 * after.launches < before.launches and 5 * after.bytes < before.bytes


def test_the_student_stays_as_it_is(lowered: Any) -> None:
    graph, _, _, _ = lowered
    before, code = copy.deepcopy(graph.state_dict()), graph.code
    fuse(graph)
    assert graph.code == code and list(graph.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in graph.state_dict().items())


# ---- other networks


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_the_same(name: str) -> None:
    network = NETWORKS[name]
    inputs = network.inputs(16)
    graph = int8_graph(network.teacher(), *inputs)
    fused, declined = fuse(graph)
    agree(graph, fused, *inputs)
    assert (declined == []) == (name in WHOLE), declined
    ours = [op for op in operators(fused, inputs) if not op.startswith("aten::")]
    if name in WHOLE:
        assert ours == operators(fused, inputs)
    one = tuple(x[:1] for x in inputs)
    assert traffic(fused, one).launches < traffic(graph, one).launches


def test_a_function_of_one_value_is_looked_up() -> None:
    """SiLU, hard-swish, hard sigmoid and leaky ReLU, however they are written, are a step of the layer before."""
    found = {}
    for name in ("silu", "gated", "grouped"):
        network = NETWORKS[name]
        inputs = network.inputs(8)
        fused, _ = fuse(int8_graph(network.teacher(), *inputs))
        found[name] = [(o.removeprefix("int8_"), s) for o, s in steps_of(fused, inputs)]
    conv, table, head = ("conv2d", "quantize"), ("conv2d", "table,quantize"), [("pool", "quantize"), ("linear", "")]
    assert found["silu"] == [table, table, *head]
    assert found["gated"] == [table, head[0], conv, table, ("mul", "quantize"), *head]
    assert found["grouped"] == [conv, conv, conv, table, *head]


def steps_of(fused: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[tuple[str, str]]:
    """Operators and their programs, for one sample, the quantizing of inputs aside."""
    called = launches(fused, tuple(x[:1] for x in inputs))
    return [(o.op.removeprefix("pqk::"), o.arguments["steps"]) for o in called if o.op != "pqk::quantize_static"]


class Branches(nn.Module):
    """A concatenation of a SiLU, of a layer that another reads too, and of a depthwise layer; ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.deep, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c = self.b(x).relu(), self.c(x)
        return self.last(torch.cat([F.silu(self.a(x)), b, self.deep(b + c)], 1).relu()).mean((2, 3))


def test_producers_write_into_one_buffer(tmp_path: Path) -> None:
    graph, x = small(Branches, target="cuda-sm80")
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert {layer: reason.rpartition(": ")[2] for layer, reason in declined} == {
        "b": "others read it too",
        "deep": "int8_depthwise_conv2d writes no slices",
    }
    found = steps_of(fused, (x,))
    assert [op for op, _ in found].count("int8_concat_into") == 2
    assert ("int8_conv2d_into", "table,requantize,quantize") in found
    emit_torch(fused, (x[:2],), tmp_path / "student.pt2")
    student = load_student(tmp_path / "student.pt2")
    with torch.inference_mode():
        for part in (x, x[:1]):
            assert torch.equal(student(part), fused(part))
    assert [c[:2] for c in launches(student, (x[:1],))] == [c[:2] for c in launches(fused, (x[:1],))]


def test_a_dense_block_copies_only_what_others_read() -> None:
    network = NETWORKS["dense"]
    (x,) = network.inputs(8)
    fused, declined = fuse(int8_graph(network.teacher(), x))
    assert declined == [("stem", "cat: what it joins is copied: others read it too")]
    assert [op for op, _ in steps_of(fused, (x,))][:3] == ["int8_conv2d", "int8_conv2d_into", "int8_concat_into"]
    both = NETWORKS["several"]
    fused, _ = fuse(int8_graph(both.teacher(), *both.inputs(8)))
    assert [op for op, _ in steps_of(fused, both.inputs(1))][:2] == ["int8_conv2d_into"] * 2, "nothing is copied"


class Rooted(nn.Module):
    """RMS norm before a linear layer, which others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Linear(12, 32), nn.RMSNorm(32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return x + self.up(x)


@pytest.mark.slow
def test_an_rms_norm_is_a_launch() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 12)
    graph = int8_graph(Rooted(), x, target="cuda-sm80")
    fused, declined = fuse(graph)
    rows = check_launches(graph, fused, (x,))
    assert declined == [] and all(r.passed for r in rows), [r for r in rows if not r.passed]
    assert operators(fused, (x,)) == ["quantize_static", "int8_linear", "rms_norm_quantize", "int8_linear"]


class Twins(nn.Module):
    """Both sides of the sum are convolutions, one of them 1x1; then ReLU6, depthwise, an average, a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x) + self.b(x))
        x = F.max_pool2d(F.avg_pool2d(self.deep(x), 2), 3, 2, 1)
        return self.head(x.flatten(1))


def small(net: Callable[[], nn.Module], size: int = 8, **options: Any) -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, size, size)
    return int8_graph(net(), x, **options), x


def test_one_of_two_convolutions_takes_in_their_sum() -> None:
    graph, x = small(Twins)
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert declined == []
    want = "quantize_static int8_conv2d int8_conv2d int8_depthwise_conv2d int8_pool int8_pool int8_linear"
    assert operators(fused, (x,)) == want.split()
    assert at(fused, "a").kwargs["residual"] is at(fused, "b")


def test_a_flattened_image_is_not_turned_back() -> None:
    """The weight of the linear layer is turned instead, once."""
    graph, _ = small(Twins)
    fused, _ = fuse(graph)
    moved = [n.target._opname for n in fused.graph.nodes if n.op == "call_function" and stands_for(n) is None]
    assert moved == ["permute", "flatten"]
    turned = value(fused, at(fused, "head"), "weight").unflatten(1, (2, 2, 8)).permute(0, 3, 1, 2)
    assert torch.equal(turned.flatten(1), graph.get_buffer("head.weight_int8"))


class Scaled(nn.Module):
    """A constant factor belongs to the quantizer before it, as another scale of the same integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c((self.b(x) * 0.25 + x).relu()).mean((2, 3))


def test_a_scaled_value_is_read_on_its_other_scale() -> None:
    graph, x = small(Scaled)
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert declined == [] and at(fused, "b").kwargs["steps"] == "requantize,add,quantize"
    row = value(fused, at(fused, "b"), "params")[0]
    torch.testing.assert_close(row[4], row[0] * 0.25)


class Shortened(nn.Module):
    """A shortcut whose channels were cut unevenly (a gather), or that has values below zero (`signed`)."""

    def __init__(self, source: list[int], signed: bool = False) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.two, self.signed = nn.Conv2d(8, len(source), 3, padding=1), signed
        self.shortcut = ChannelPadShortcut(8, source, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x if self.signed else x.relu()
        return (self.two(self.one(x).relu()) + self.shortcut(x)).relu().mean((2, 3))


@pytest.mark.parametrize("source", [[-1, 0, 3, 2, -1, 7], [2, 3, 4], [-1, *range(8), -1]])
def test_a_shortcut_may_move_its_channels_as_it_likes(source: list[int]) -> None:
    graph, x = small(lambda: Shortened(source))
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert declined == []
    assert value(fused, at(fused, "two"), "residual_channels").tolist() == source
    assert operators(fused, (x,)) == ["quantize_static", *["int8_conv2d"] * 3, "int8_pool"]


def test_a_shortcut_whose_zero_is_not_0_is_written() -> None:
    """The launch reads the integer 0 for channels that are not there, which is another value here."""
    graph, x = small(lambda: Shortened([-1, *range(8), -1], signed=True))
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert [layer for layer, _ in declined] == ["shortcut.pad"]
    assert "aten::pad" in operators(fused, (x,))
    no_channel_is_added, _ = small(lambda: Shortened([*range(1, 8)], signed=True))
    assert fuse(no_channel_is_added)[1] == []


# ---- what does not apply


def test_a_float_layer_is_named_with_its_reason() -> None:
    graph, x = small(Scaled, floats={"b": "by name"})
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert ("b", "conv2d: no rule makes it part of a launch; torch runs it") in declined


def test_a_match_that_is_refused_is_tried_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _rules_weighted.why_not_one_grid

    def unlike(match: Match) -> str | None:
        return "no sums today" if "add" in match.ending.steps else original(match)

    monkeypatch.setattr(_rules_weighted, "why_not_one_grid", unlike)
    graph, x = small(Scaled)
    fused, declined = fuse(graph)
    agree(graph, fused, x)
    assert declined == [("b", "no sums today")]
    assert at(fused, "b").kwargs["steps"] == "quantize"
    assert operators(fused, (x,)).count("int8_add") == 1


def test_a_bias_on_another_scale_is_no_accumulator() -> None:
    graph, _ = small(Scaled)
    graph.get_buffer("b.bias_scale").mul_(1.01)
    _, declined = fuse(graph)
    assert ("b", "its bias is not on the scale of its accumulator") in declined


# ---- counting, and the pass


def test_bytes_are_each_tensor_of_a_launch_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 20)
    fused, _ = fuse(int8_graph(nn.Linear(20, 5), x))
    quantized = 20 * 4 + 20
    multiplied = 20 + 5 * 20 + 5 * 4 + 5 * 4 + 5 * 4  # input, weight, bias, scale, output
    assert traffic(fused, (x[:1],)) == (2, quantized + multiplied)
    assert traffic(fused, (x,)).bytes == 8 * quantized + 8 * (20 + 20) + 5 * 20 + 5 * 4 + 5 * 4


@pytest.mark.slow
def test_a_resumed_run_fuses_again(tmp_path: Path) -> None:
    network = NETWORKS["residual"]
    teacher = network.teacher().requires_grad_(False)
    task, passes = network.task(teacher), (Capture(), Quantize(samples=16), Convert(), Fuse())

    def run() -> Program:
        student = copy.deepcopy(teacher).requires_grad_(True)
        program = Program(teacher, student, Stage.MODULE, Target.named("cuda-sm80"), RunContext(0, tmp_path))
        return run_passes(program, task, passes)

    first, again = run(), run()
    assert first.fused is not None and again.fused is not None
    assert first.stage == again.stage == Stage.INT8 and first.plan == again.plan
    x = network.inputs(5, seed=3)
    with torch.no_grad():
        for one, other in zip(tensors(first.fused(*x)), tensors(again.fused(*x)), strict=True):
            assert torch.equal(one, other)
    noted = again.records[-1].details
    assert set(noted) == {"launches_before", "launches_after", "bytes_before", "bytes_after"}
    assert noted["launches_after"] == 9 and noted["bytes_after"] < noted["bytes_before"]
    assert again.records[-1].metric == again.records[-2].metric


# ---- encoders


def encoder(target: str, masked: bool = False) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x: tuple[Tensor, ...] = (torch.randn(16, 7, 12),)
    if masked:
        x = (*x, (torch.arange(7) < torch.arange(16)[:, None] % 6 + 2).float())
    return int8_graph(Encoder(), *x, target=target), x


@pytest.mark.parametrize(("target", "together"), [("cuda-sm80", "quantize"), ("x86-avx2", "requantize,add,quantize")])
def test_an_encoder_layer_is_six_launches(target: str, together: str) -> None:
    """Also where queries, keys and values have zero points of their own."""
    graph, x = encoder(target)
    fused, declined = fuse(graph)
    rows = check_launches(graph, fused, x)
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
    layer = ["int8_linear", "int8_attention", "int8_linear", "layer_norm_quantize", "int8_linear", "int8_linear"]
    assert operators(fused, x) == ["quantize_static", "int8_linear", *layer, "layer_norm_quantize", "int8_linear"]
    assert declined == []
    steps = {n.meta["layer"]: n.kwargs["steps"] for n in fused.graph.nodes if "int8_linear" in str(n.target)}
    assert steps == {"embed": "quantize", "q": together, "o": "add", "up": "gelu,quantize", "down": "add", "out": ""}
    with torch.no_grad():
        want, got = graph(*x), fused(*x)
    assert float(want.std()) > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=0.03 * float(want.abs().max()))


def test_scores_may_be_masked() -> None:
    graph, x = encoder("cuda-sm80", masked=True)
    fused, _ = fuse(graph)
    assert "int8_attention" in operators(fused, x)
    rows = check_launches(graph, fused, x)
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
    with torch.no_grad():
        hidden = fused(*x)
        changed = fused(torch.where(x[1][..., None] > 0, x[0], 7.0), x[1])
    assert torch.equal(hidden, changed), "a hidden token was read"


def test_zero_points_of_queries_keys_and_values_are_added_behind_the_rounding() -> None:
    """Not before it, where a tie may go the other way: 0.5 rounds to 0, and 0.5 + 3 to 4."""
    graph, _ = encoder("x86-avx2")
    fused, _ = fuse(graph)
    (together,) = (n for n in fused.graph.nodes if n.meta.get("layer") == "q" and "steps" in n.kwargs)
    zero_points = value(fused, together, "residual")
    assert zero_points.dtype == torch.uint8 and len(zero_points.unique()) == 3
    params = value(fused, together, "params")
    for y, zero_point in ((0.5, 3), (-0.5, 3), (1.5, 4), (1e9, 0), (-1e9, 200), (300.0, 255), (-300.0, 255)):
        residual = torch.tensor([zero_point], dtype=torch.uint8)
        got = apply_steps(torch.tensor([y]), str(together.kwargs["steps"]), params, residual, torch.uint8)
        assert int(got) == min(max(round(y) + zero_point, 0), 255), (y, zero_point)


def test_an_attention_of_small_heads_is_left_to_torch() -> None:
    network = NETWORKS["attention"]
    _, declined = fuse(int8_graph(network.teacher(), *network.inputs(8)))
    assert any("heads of size 8" in reason for _, reason in declined)


@pytest.mark.slow
def test_an_encoder_survives_its_file(tmp_path: Path) -> None:
    graph, x = encoder("cuda-sm80")
    fused, _ = fuse(graph)
    emit_torch(fused, tuple(t[:2] for t in x), tmp_path / "student.pt2")
    student = load_student(tmp_path / "student.pt2")
    with torch.no_grad():
        assert torch.equal(student(x[0][:5]), fused(x[0][:5]))


# ---- embeddings


class Embedded(nn.Module):
    """What BERT begins with, and a residual layer: ids, types [B, T] -> [B, T, 5], and what `also` names in float.

    `order`: the tables in the order in which they are added; "0" is the first row of the types.
    """

    places: Tensor
    zero: Tensor

    def __init__(self, order: str = "wtp", also: str = "") -> None:
        super().__init__()
        self.w, self.t, self.p = nn.Embedding(40, 64), nn.Embedding(2, 64), nn.Embedding(50, 64)
        self.norm, self.up, self.out = nn.LayerNorm(64, eps=1e-12), nn.Linear(64, 64), nn.Linear(64, 5)
        self.register_buffer("places", torch.arange(1, 51)[None] - 1)
        self.register_buffer("zero", torch.zeros(1, 1, dtype=torch.int64))
        self.order, self.also = order, also

    def forward(self, ids: Tensor, types: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        length = ids.shape[1]
        read = {
            "w": (self.w, ids), "t": (self.t, types), "0": (self.t, self.zero),
            "p": (self.p, self.places[:, :length]), "2": (self.p, self.places[:, 2 : length + 2]),
        }  # fmt: skip
        rows = [table(at) for table, at in (read[name] for name in self.order)]
        total = sum(rows[1:], rows[0])
        normed = self.norm(total)
        out = self.out(F.relu(normed + self.up(normed)))
        return (out, {"norm": normed, "sum": total}[self.also]) if self.also else out


LENGTH = (("batch", "sequence"), ("batch", "sequence"))


def embedded(net: nn.Module, target: str = "x86-avx2", axes: Any = None) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn_like(p) * (0.2 if p.ndim == 2 else 0.5)
    inputs = torch.randint(0, 40, (16, 9)), torch.randint(0, 2, (16, 9))
    return int8_graph(net, *inputs, target=target, axes=axes), inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "target", "axes"),
    [
        ("wtp", "x86-avx2", None), ("wtp", "x86-avx2", LENGTH), ("wtp", "cuda-sm80", LENGTH),
        ("w0p", "x86-avx2", LENGTH), ("wp", "cuda-sm80", None), ("2wt", "x86-avx2", LENGTH),
    ],
)  # fmt: skip
def test_an_embedding_with_its_norm_is_one_launch(order: str, target: str, axes: Any) -> None:
    """Tables of BERT and of DistilBERT, a constant row, places from the third on; of one length or of any."""
    graph, x = embedded(Embedded(order), target, axes)
    fused, declined = fuse(graph)
    agree(graph, fused, *x)
    assert declined == []
    before, after = operators(graph, x), operators(fused, x)
    assert "aten::embedding" in before and "aten::layer_norm" in before
    assert after == ["int8_embedding", "int8_linear", "int8_linear"]
    one = tuple(t[:1] for t in x)
    assert 3 * traffic(fused, one).bytes < traffic(graph, one).bytes
    if axes:
        shorter = tuple(t[:3, :5] for t in x)
        with torch.no_grad():
            want, got = graph(*shorter), fused(*shorter)
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))


@pytest.mark.slow
def test_who_reads_the_norm_gets_floats_of_the_same_launch() -> None:
    graph, x = embedded(Embedded(also="norm"), axes=LENGTH)
    fused, declined = fuse(graph)
    agree(graph, fused, *x)
    with torch.no_grad():
        torch.testing.assert_close(fused(*x)[1], graph(*x)[1], rtol=0, atol=1e-5)
    assert declined == [] and operators(fused, x).count("int8_embedding") == 1
    assert not {"aten::layer_norm", "layer_norm_quantize", "aten::embedding"} & {*operators(fused, x)}


@pytest.mark.parametrize(
    ("order", "also", "reason"),
    [
        ("wwtp", "", "it adds more tables than words, types and positions"),
        ("wtp", "sum", "others read the sum of its rows"),
        ("p0", "", "no table is read at the ids of a sequence"),
    ],
)
def test_an_embedding_that_is_no_launch_says_why(order: str, also: str, reason: str) -> None:
    graph, x = embedded(Embedded(order, also), axes=LENGTH)
    fused, declined = fuse(graph)
    agree(graph, fused, *x)
    assert [layer for layer, why in declined if reason in why] == ["norm"], declined
    assert "int8_embedding" not in operators(fused, x) and "layer_norm_quantize" in operators(fused, x)


def test_an_embedding_survives_its_file(tmp_path: Path) -> None:
    graph, x = embedded(Embedded(), axes=LENGTH)
    fused, _ = fuse(graph)
    emit_torch(fused, tuple(t[:2] for t in x), tmp_path / "student.pt2", LENGTH)
    student = load_student(tmp_path / "student.pt2")
    with torch.no_grad():
        for part in (x, tuple(t[:3, :5] for t in x)):
            assert torch.equal(student(*part), fused(*part))
    assert launches(student, x)[0][:2] == ("norm", "pqk::int8_embedding")


@pytest.mark.slow
def test_a_bert_of_any_length(tmp_path: Path) -> None:
    """Of Hugging Face, its mask and all: the embedding is the first launch, the masked softmax stays in registers."""
    pytest.importorskip("transformers")
    folder = tiny.directory(tmp_path / "model", hidden_size=64, num_hidden_layers=1, intermediate_size=96)
    ids = torch.randint(5, len(tiny.WORDS), (16, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.arange(16)[:, None] % 6 + 4).long()
    graph = int8_graph(encoders.encoder(folder), ids * mask, mask, axes=LENGTH)
    fused, _ = fuse(graph)
    rows = check_launches(graph, fused, (ids * mask, mask))
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
    one = (ids[:1], mask[:1])
    assert (traffic(graph, one).launches, traffic(fused, one).launches) == (50, 15), "the README says so"
    found = operators(fused, one)
    assert found[0] == "int8_embedding" and {"int8_attention", "layer_norm_quantize"} < {*found}
    assert not {"aten::embedding", "aten::layer_norm", "aten::softmax"} & {*found}
    assert fused(ids[:3, :5], mask[:3, :5]).shape == (3, 3)
