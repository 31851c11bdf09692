"""Where quantizers go, what they do to the numbers, and that the whole of it trains, copies and replays."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.core.program import Program, Stage, replay
from pqk.core.run_context import RunContext
from pqk.errors import InputError
from pqk.passes.capture.capture import capture
from pqk.passes.quantize.placement import named_layers
from pqk.passes.quantize.points import (
    ActivationPoint,
    BlockPoint,
    BlockTablePoint,
    TablePoint,
    WeightPoint,
    parse_point,
)
from pqk.passes.quantize.quantize import Quantize, insert_fake_quant
from pqk.quant.fake_quant import (
    ActivationFakeQuant,
    BiasFakeQuant,
    WeightFakeQuant,
    bounded_steps,
    freeze_scales,
    quantizers,
    set_mode,
)
from pqk.quant.qparams import Grid
from pqk.target.target import Target

aten = torch.ops.aten


class Inputs:
    """As much of a task as quantize reads."""

    generates = False

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs, self.example = inputs, tuple(x[:2] for x in inputs)

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, limit, 8):
            yield tuple(x[start : start + 8] for x in self.inputs)


class Net(nn.Module):
    """A residual block, ReLU6, gating, a shortcut of slices and a pad, and a layer norm that has no integer kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, 2, padding=1)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x) * 6)
        x = F.relu(x + self.deep(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(self.norm(x.mean((2, 3))))


def quantized(
    module: nn.Module, *inputs: Tensor, target: str = "x86-avx2", run: RunContext | None = None, **fields: Any
) -> Program:
    task = Inputs(*inputs)
    graph = capture(module.eval(), task.example)
    program = Program(nn.Module(), graph, Stage.GRAPH, Target.named(target), run or RunContext())
    return Quantize(samples=16, **fields).apply(program, task)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Program, Tensor]:
    torch.manual_seed(0)
    module, x = Net(), torch.randn(16, 3, 8, 8)
    return module.eval(), quantized(copy.deepcopy(module), x), x


def sqnr(signal: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(signal.square().mean() / (signal - other).square().mean()).detach())


def test_every_multiplication_has_integer_inputs_and_the_rest_says_why(net: Any) -> None:
    _, program, _ = net
    points, _ = program.plan[0].arguments["points"], json.dumps(program.plan[0].arguments)
    assert sum(p["kind"] == "weight" for p in points) == 5
    student = program.student
    for node in student.graph.nodes:
        if node.target in (aten.conv2d.default, aten.linear.default):
            assert str(node.args[1].target).startswith("quantizers.") and str(node.args[2].target).endswith("_bias")
    assert not [n for n in student.graph.nodes if n.target in (aten.relu.default, aten.relu6.default)], "taken over"
    reasons = {d.layer: d.reason for d in program.declined}
    assert list(reasons) == ["norm"] and "layer_norm: the runtime has no integer kernel" in reasons["norm"]
    counts = program.details
    assert counts["weights"] == 5 and counts["activations"] == sum(p["kind"] == "activation" for p in points)


def test_movement_has_no_quantizer_of_its_own(net: Any) -> None:
    student = net[1].student
    for node in student.graph.nodes:
        if node.target in (aten.slice.Tensor, aten.pad.default):
            assert not any(u.op == "call_module" for u in node.users)


def test_off_is_the_float_network_and_on_is_near_it(net: Any) -> None:
    module, program, x = net
    student = program.student.eval()
    with torch.no_grad():
        expected, on = module(x), student(x)
        set_mode(student, "off")
        off = student(x)
        set_mode(student, "on")
    torch.testing.assert_close(off, expected, atol=1e-5, rtol=1e-5)
    assert 20 < sqnr(expected, on) < 80


@pytest.mark.parametrize("target", ["x86-avx2", "x86-vnni", "arm-dotprod", "cuda-sm80"])
def test_values_are_on_the_grid_of_the_target(target: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    program = quantized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()), x, target=target
    )
    student, goal = program.student, Target.named(target)
    for name, quantizer in quantizers(student).items():
        grid = goal.activation if isinstance(quantizer, ActivationFakeQuant) else goal.weight
        assert (
            quantizer.grid.dtype == grid.dtype and grid.qmin <= quantizer.grid.qmin <= quantizer.grid.qmax <= grid.qmax
        )
        seen: list[Tensor] = []
        handle = quantizer.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.detach()))
        student(x)
        handle.remove()
        q = seen[0].movedim(0, -1) / quantizer.qparams().scale
        zero = int(quantizer.qparams().zero_point.flatten()[0])
        torch.testing.assert_close(q, q.round(), atol=1e-3, rtol=0, msg=name)
        assert quantizer.grid.qmin <= int(q.min().round()) + zero and int(q.max().round()) + zero <= quantizer.grid.qmax
    relu = student.get_submodule("quantizers.0")
    assert relu.grid.qmin == 0 or int(relu.zero_point) == relu.grid.qmin, "no level is spent below zero"


def test_the_bias_is_on_the_grid_of_its_accumulator_and_the_scaled_input_counts() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    student = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3)), x).student
    module = student.get_submodule("quantizers.2_bias")
    assert isinstance(module, BiasFakeQuant)
    activation, weight = student.get_submodule("quantizers.1"), student.get_submodule("quantizers.2_weight")
    assert activation.gain == 1, "the sixth is the gate's"
    step = activation.output_scale() * weight.qparams().scale
    steps = module(student.get_parameter("2.bias")).detach() / step
    torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=0)
    gate = [q for q in quantizers(student).values() if getattr(q, "gain", 1) != 1]
    assert len(gate) == 1 and gate[0].high == 6.0 and gate[0].gain == pytest.approx(1 / 6)


def test_training_moves_weights_and_scales_until_they_are_frozen(net: Any) -> None:
    _, program, x = net
    student = copy.deepcopy(program.student).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)

    def steps(count: int) -> dict[str, Tensor]:
        for _ in range(count):
            optimizer.zero_grad()
            student(x).square().mean().backward()
            optimizer.step()
        return {k: v.detach().clone() for k, v in student.state_dict().items()}

    before, after = {k: v.clone() for k, v in student.state_dict().items()}, steps(2)
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"stem.weight", "head.bias"} <= moved and any(k.endswith("scale") for k in moved)
    freeze_scales(student)
    last = steps(1)
    assert {k for k in last if not torch.equal(last[k], after[k])} == {k for k in moved if not k.endswith("scale")}
    assert torch.equal(before["quantizers.stem.zero_point"], last["quantizers.stem.zero_point"])


def test_a_copy_borrows_from_itself(net: Any) -> None:
    student = copy.deepcopy(net[1].student)
    activation, weight = student.get_submodule("quantizers.gate_bias")._borrowed
    ours = set(map(id, student.modules()))
    assert id(activation) in ours and id(weight) in ours


@pytest.mark.slow
def test_the_plan_and_the_tensors_give_the_student_back(net: Any) -> None:
    module, program, x = net
    plan = [type(step)(step.function, json.loads(json.dumps(step.arguments))) for step in program.plan]
    graph = capture(copy.deepcopy(module), (x[:2],))
    again = replay(graph, (x[:2],), plan, {"insert_fake_quant": insert_fake_quant})
    again.load_state_dict(program.student.state_dict(), strict=True)
    assert torch.equal(again.eval()(x), program.student.eval()(x))


STORED = [
    {"kind": "activation", "node": "x", "readers": ["conv2d", "add"]},
    {"kind": "dynamic", "node": "gelu", "readers": []},
    {"kind": "weight", "node": "linear"},
    {"kind": "table", "node": "embedding"},
    {"kind": "blockwise", "node": "linear_1", "bits": 4},
    {"kind": "blockwise_table", "node": "embedding_1"},
]
"""as artifacts have them"""


def test_points_read_and_write_what_artifacts_store() -> None:
    points = [parse_point(entry) for entry in STORED]
    assert points == [
        ActivationPoint("x", ("conv2d", "add")),
        ActivationPoint("gelu", (), dynamic=True),
        WeightPoint("linear"),
        TablePoint("embedding"),
        BlockPoint("linear_1", 4),
        BlockTablePoint("embedding_1"),
    ]
    assert json.dumps([point.to_json() for point in points]) == json.dumps(STORED)


def test_a_point_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r'of the kind "rotation" at linear; this version of pqk knows activation'):
        parse_point({"kind": "rotation", "node": "linear"})


def test_module_outputs_are_the_quantized_values(net: Any) -> None:
    student = net[1].student
    assert student.meta["points"]["deep"] == "quantizers_deep"
    assert set(student.meta["points"].values()) <= {n.name for n in student.graph.nodes}


def test_layers_are_left_in_float_by_name(net: Any) -> None:
    module, _, x = net
    program = quantized(copy.deepcopy(module), x, float_layers=("ga*", "head"))
    reasons = {d.layer: d.reason for d in program.declined}
    assert reasons["gate"] == reasons["head"] == "left in float by name (float_layers)"
    assert "quantizers.gate_weight" not in dict(program.student.named_modules())
    assert sqnr(module(x), program.student.eval()(x)) > 20


class Turned(nn.Module):
    """A value turned by angles, the places of tokens times frequencies, as rotary embeddings compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 3)
        self.frequencies = nn.Buffer(torch.tensor([1.0, 0.1, 0.01, 0.001]), persistent=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        angles = (self.frequencies[None, :, None].expand(x.shape[0], -1, 1) @ places[:, None, :]).transpose(1, 2)
        angles = torch.cat([angles, angles], -1)
        x = self.up(x)
        return self.down(x * angles.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * angles.sin())


def test_angles_stay_in_float() -> None:
    """In 8 bits, places 0 to 299 would be steps of more than two turns."""
    torch.manual_seed(0)
    module, x, places = Turned().eval(), torch.randn(16, 300, 8), torch.arange(300.0).expand(16, 300)
    program = quantized(copy.deepcopy(module), x, places)
    assert ("matmul", "matmul: cosine and sine read it, an angle that 8 bits do not hold") in {
        (d.layer, d.reason) for d in program.declined
    }
    assert sqnr(module(x, places), program.student.eval()(x, places)) > 25


def test_a_pattern_that_names_nothing_is_refused(net: Any) -> None:
    graph = capture(copy.deepcopy(net[0]), (net[2][:2],))
    assert isinstance(graph, fx.GraphModule)
    with pytest.raises(InputError, match=r'float_layers "stam" matches no layer \(did you mean "stem"'):
        named_layers(graph, ("stam",))


def outlier() -> tuple[nn.Module, Tensor]:
    """Layer 2 reads one channel that is 10,000 times the others, and gives it a ten thousandth of the weight."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        module[0].weight[0] *= 1e4
        module[2].weight[:, 0] /= 1e4
    return module.eval(), torch.randn(16, 8)


def test_a_layer_that_is_too_sensitive_stays_in_float_with_its_number() -> None:
    module, x = outlier()
    whole = quantized(copy.deepcopy(module), x, calibration="minmax")
    program = quantized(copy.deepcopy(module), x, calibration="minmax", least_sqnr=20.0)
    reasons = {d.layer: d.reason for d in program.declined}
    assert set(reasons) == {"1", "2"} and reasons["1"] == "relu: no neighbour needs its result in integers"
    match = re.fullmatch(
        r"too sensitive: quantized alone it leaves (\S+) dB of signal over noise \(least_sqnr = 20\)", reasons["2"]
    )
    assert match is not None and float(match[1]) < 20
    assert not whole.declined and sqnr(module(x), whole.student(x)) < 20 < 30 < sqnr(module(x), program.student(x))


def test_the_sensitivity_of_the_only_layer_is_that_of_the_network() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(16, 3, 6, 6)
    program = quantized(copy.deepcopy(module), x, least_sqnr=1e-3)
    (found,) = program.run.journal.decisions.values()
    assert not program.declined and list(found) == ["0"]
    assert found["0"] == pytest.approx(sqnr(module(x), program.student.eval()(x)), abs=1e-3)


def test_what_is_sensitive_is_journaled_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = outlier()
    run = RunContext().enter("03-quantize")
    first = quantized(copy.deepcopy(module), x, least_sqnr=20.0, run=run)
    monkeypatch.setattr("pqk.passes.quantize.quantize.sensitivity", lambda *a: pytest.fail("measured again"))
    again = quantized(copy.deepcopy(module), x, least_sqnr=20.0, run=run)
    assert again.plan == first.plan and again.declined == first.declined
    assert list(run.journal.decisions) == ["03-quantize/sensitivity"]


@pytest.mark.slow
def test_a_layer_that_is_faster_in_float_stays_there_and_the_decision_is_replayed(net: Any) -> None:
    module, _, x = net
    asked = []

    def gain(student: nn.Module, floats: tuple[str, ...], layer: str) -> tuple[float, float, float]:
        asked.append((floats, layer))
        return {"deep": (1.2, 1.1, 1.3), "gate": (1.1, 0.98, 1.2)}.get(layer, (0.9, 0.85, 0.95))

    run = RunContext(oracle=SimpleNamespace(float_gain=gain)).enter("03-quantize")
    program = quantized(copy.deepcopy(module), x, faster_float=True, float_layers=("head",), run=run)
    reasons = {d.layer: d.reason for d in program.declined}
    assert reasons["deep"] == "faster in float: the student runs 1.20x as fast (1.10 to 1.30)"
    assert "gate" not in reasons, "1.1x is not more than the noise"
    assert asked == [(("head",), n) for n in ("stem", "deep")] + [(("head", "deep"), n) for n in ("gate", "down")]
    assert "quantizers.deep_weight" not in dict(program.student.named_modules())
    blind = replace(run, oracle=None)  # the journal has all that is asked
    again = quantized(copy.deepcopy(module), x, faster_float=True, float_layers=("head",), run=blind)
    assert again.plan == program.plan and again.declined == program.declined


def test_speed_is_not_guessed_where_it_cannot_be_measured(net: Any) -> None:
    with pytest.raises(InputError, match=r"^quantize.faster_float: how fast .* this machine is not the target; set it"):
        quantized(copy.deepcopy(net[0]), net[2], faster_float=True)


class Mixed(nn.Module):
    """An encoder's shape: linear layers between float operators, the residual additions next to a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.b(F.gelu(self.a(x))))
        return self.out(x[:, 0])


def test_float_operators_read_floats_and_additions_between_them_stay_float() -> None:
    torch.manual_seed(0)
    program = quantized(Mixed(), torch.randn(16, 5, 8))
    names = [n for n, q in quantizers(program.student).items() if isinstance(q, ActivationFakeQuant)]
    assert names == ["quantizers.x", "quantizers.gelu", "quantizers.norm"]
    add = next(n for n in program.student.graph.nodes if n.target is aten.add.Tensor)
    assert add.args[0].op == "placeholder", "the residual reads what was not rounded"
    assert {d.layer for d in program.declined} == {"gelu", "add", "norm"}


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_observing_keeps_a_bounded_sample_and_the_exact_extent(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pqk.quant.fake_quant.SAMPLE", 1000)
    quantizer = ActivationFakeQuant(Grid("uint8", 0, 255, symmetric=False))
    quantizer.mode = "observe"
    for seed in range(20):
        quantizer(torch.randn(400, generator=torch.Generator().manual_seed(seed)))
    quantizer(torch.tensor([-9.0, 12.0]))
    assert sum(map(len, quantizer.samples)) <= 1000
    quantizer.calibrate(method, 99.0)  # type: ignore[arg-type]
    width = float(quantizer.scale.detach()) * 255
    assert {"minmax": 20.9, "percentile": 3, "mse": 3}[method] < width < {"percentile": 12}.get(method, 21.1)
    assert quantizer.mode == "on" and not quantizer.samples


def test_calibrating_without_data_is_an_error() -> None:
    with pytest.raises(InputError, match="before any batch was seen"):
        ActivationFakeQuant(Grid("uint8", 0, 255, symmetric=False)).calibrate("mse", 99.0)


def test_a_quiet_channel_keeps_its_bias_within_int32() -> None:
    conv = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        conv.weight[0] = 1e-12
        conv.bias.copy_(torch.tensor([5.0, 0.1]))
    x = torch.randn(16, 1, 4, 4)
    student = quantized(nn.Sequential(conv), x).student
    torch.testing.assert_close(student.eval()(x), conv(x), atol=0.05, rtol=0.05)


def test_grids_are_json_in_the_plan(net: Any) -> None:
    arguments = net[1].plan[0].arguments
    assert Grid(**arguments["weight"]) == Target.named("x86-avx2").weight == Grid(**asdict(Grid(**arguments["weight"])))


def test_no_step_size_moves_by_more_than_its_share_and_none_leaves_the_positive() -> None:
    """Whatever the optimizer does: up, down below zero, within the bound (which it leaves alone), and frozen."""
    grid = Grid("int8", -64, 64, symmetric=True)
    student = nn.ModuleList([WeightFakeQuant(grid, 4), WeightFakeQuant(grid, 4), ActivationFakeQuant(grid)])
    scales = [q.scale for q in quantizers(student).values()]
    frozen = scales[1].requires_grad_(False)
    start = torch.tensor([1e-4, 1e-4, 1e-2, 1e-2])
    with torch.no_grad():
        scales[0].copy_(start)
    with bounded_steps(student, 0.25), torch.no_grad():
        scales[0].add_(torch.tensor([1.0, -1.0, 1e-3, -1e-3]))
        frozen.mul_(3)
        scales[2].zero_()
    assert torch.allclose(scales[0] / start, torch.tensor([1.25, 0.8, 1.1, 0.9]))
    assert frozen.tolist() == [3.0] * 4 and float(scales[2].detach()) == pytest.approx(0.8)


class HandMadeGelu(nn.Module):
    """GELU by its formula, which reads the layer before it three times, once in integers behind a scaling."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))))


def test_a_product_that_floats_read_is_not_quantized_for_one_reader() -> None:
    """A runtime has integer kernels that put out integers or floats: with a mixture the product is left in float."""
    torch.manual_seed(0)
    program = quantized(HandMadeGelu(), torch.randn(16, 8))
    graph = program.student.graph
    assert isinstance(graph, fx.Graph)
    up = next(n for n in graph.nodes if n.target is aten.linear.default)
    assert len(up.users) == 3 and all(user.op == "call_function" for user in up.users)
    half = next(n for n in up.users if n.args[1:] == (0.5,))
    assert [user.op for user in half.users] == ["call_module"]
