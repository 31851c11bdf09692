"""The parity contract on a hand-made pair: a torch graph and a QDQ file of conv, sum, pool and linear."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from pqk.core.aten import QUANTIZE
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.deploy.qdq import QdqFile
from pqk.errors import InputError
from pqk.passes import Capture, Convert, Quantize
from pqk.report.schema import LayerParity
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.interpreters import Recorder, Ties
from pqk.verify.parity import check_layers, check_parity
from pqk.verify.verdict import compare_ends, divergence_of, why_not_at_the_ends

pytestmark = pytest.mark.slow

CHANNELS, CLASSES, SIZE = 16, 10, 8
NAMES = ("input", "conv", "add", "pool")


@dataclass(frozen=True)
class Numbers:
    """Scales and zero points of the four activations, and integer weights on the ±64 grid."""

    scales: tuple[float, ...] = (0.031, 0.047, 0.053, 0.0157)
    zero_points: tuple[int, ...] = (121, 0, 60, 0)
    weight_limit: int = 64
    seed: int = 0

    def tensors(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        t: dict[str, np.ndarray] = {}
        for name, scale, zero_point in zip(NAMES, self.scales, self.zero_points, strict=True):
            t[f"{name}.s"], t[f"{name}.z"] = np.float32(scale), np.uint8(zero_point)
        for name, shape, source in (("conv", (CHANNELS, CHANNELS, 3, 3), 0), ("fc", (CLASSES, CHANNELS), 3)):
            w = rng.integers(-self.weight_limit, self.weight_limit, shape, endpoint=True)
            t[f"{name}.w"] = w.astype(np.int8)
            t[f"{name}.ws"] = rng.uniform(0.001, 0.003, shape[0]).astype(np.float32)
            t[f"{name}.wz"] = np.zeros(shape[0], np.int8)
            t[f"{name}.bs"] = t[f"{name}.ws"] * np.float32(self.scales[source])
            t[f"{name}.b"] = rng.integers(-900, 900, shape[0]).astype(np.int32)
            t[f"{name}.bz"] = np.zeros(shape[0], np.int32)
        return t


def int8_module(numbers: Numbers) -> fx.GraphModule:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in numbers.tensors().items():
                self.register_buffer(name.replace(".", "_"), torch.from_numpy(np.array(value)))

        def forward(self, x: Tensor) -> Tensor:
            quantize, dequantize = QUANTIZE, torch.ops.pqk.dequantize.default
            q = quantize(x, self.input_s, self.input_z, 0, 255)
            x = dequantize(q, self.input_s, self.input_z)
            w = dequantize(self.conv_w, self.conv_ws, self.conv_wz, 0)
            y = torch.conv2d(x, w, dequantize(self.conv_b, self.conv_bs, self.conv_bz, 0), padding=1)
            y = dequantize(quantize(y, self.conv_s, self.conv_z, 0, 255), self.conv_s, self.conv_z)
            z = dequantize(quantize(x + y, self.add_s, self.add_z, 0, 255), self.add_s, self.add_z)
            z = torch.mean(z, (2, 3), keepdim=True)
            z = torch.flatten(dequantize(quantize(z, self.pool_s, self.pool_z, 0, 255), self.pool_s, self.pool_z), 1)
            w = dequantize(self.fc_w, self.fc_ws, self.fc_wz, 0)
            return torch.nn.functional.linear(z, w, dequantize(self.fc_b, self.fc_bs, self.fc_bz, 0))

    return fx.symbolic_trace(Student())


def save_onnx(path: Path, numbers: Numbers) -> Path:
    def dq(name: str, source: str | None = None) -> str:
        node = [source or f"{name}_q", f"{name}.s", f"{name}.z"]
        nodes.append(helper.make_node("DequantizeLinear", node, [f"{name}_d"]))
        return f"{name}_d"

    def constant(name: str) -> list[str]:
        for part in "wb":
            inputs = [f"{name}.{part}", f"{name}.{part}s", f"{name}.{part}z"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.{part}_d"], axis=0))
        return [f"{name}.w_d", f"{name}.b_d"]

    def q(name: str, value: str) -> None:
        nodes.append(helper.make_node("QuantizeLinear", [value, f"{name}.s", f"{name}.z"], [f"{name}_q"]))

    nodes: list[onnx.NodeProto] = []
    q("input", "input")
    nodes.append(helper.make_node("Conv", [dq("input"), *constant("conv")], ["y"], "conv", pads=[1] * 4))
    q("conv", "y")
    nodes.append(helper.make_node("Add", ["input_d", dq("conv")], ["z"], "add"))
    q("add", "z")
    nodes.append(helper.make_node("GlobalAveragePool", [dq("add")], ["p"], "pool"))
    q("pool", "p")
    nodes.append(helper.make_node("Flatten", [dq("pool")], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", *constant("fc")], ["logits"], "fc", transB=1))
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(np.array(v), k) for k, v in numbers.tensors().items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def layers_of(trained: Numbers, path: Path, *, optimized: bool = True) -> list[LayerParity]:
    graph = int8_module(trained)
    named = list(zip(NAMES, [n for n in graph.graph.nodes if n.target is QUANTIZE], strict=True))
    x = 2 * torch.randn(8, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return check_layers(graph, named, path, (x,), optimized=optimized)


@pytest.mark.parametrize("optimized", [True, False])
def test_the_contract_holds_and_says_what_each_layer_is(tmp_path: Path, optimized: bool) -> None:
    rows = layers_of(Numbers(), save_onnx(tmp_path / "m.onnx", Numbers()), optimized=optimized)
    told = [(r.name, r.op, r.accumulators) for r in rows]
    assert told == [
        ("input", "QuantizeLinear", None),
        ("conv", "Conv", True),
        ("add", "Add", None),
        ("pool", "GlobalAveragePool", None),
        ("logits", "Flatten Gemm", None),
    ]
    assert all(r.passed for r in rows), [divergence_of(r) for r in rows if not r.passed]
    assert rows[1].exact >= 0.999 and rows[-1].max_lsb is None


@pytest.mark.parametrize(("corrupted", "name"), [(1, "conv"), (2, "add"), (3, "pool")])
def test_a_corrupted_scale_is_found_and_its_layer_named_first(tmp_path: Path, corrupted: int, name: str) -> None:
    scales = list(Numbers().scales)
    scales[corrupted] *= 1.05
    rows = layers_of(Numbers(), save_onnx(tmp_path / "m.onnx", replace(Numbers(), scales=tuple(scales))))
    broken = next(r for r in rows if not r.passed)
    assert broken.name == name
    assert f"{name} (" in divergence_of(broken) and "LSB" in divergence_of(broken)


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    model = onnx.load(save_onnx(tmp_path / "m.onnx", Numbers()))
    weights = next(i for i in model.graph.initializer if i.name == "conv.w")
    values = numpy_helper.to_array(weights).copy()
    values[3] = np.roll(values[3], 1)
    weights.CopyFrom(numpy_helper.from_array(values, "conv.w"))
    onnx.save(model, tmp_path / "m.onnx")
    broken = [r.name for r in layers_of(Numbers(), tmp_path / "m.onnx") if not r.passed]
    assert broken == ["conv"]


def test_exact_halves_are_left_out_of_the_exact_share_of_a_sum(tmp_path: Path) -> None:
    """Inputs at half the output's step: every odd sum is a tie, which the runtime may round the other way."""
    numbers = Numbers(scales=(0.03125, 0.03125, 0.0625, 0.0157), zero_points=(121, 0, 60, 0))
    row = next(r for r in layers_of(numbers, save_onnx(tmp_path / "m.onnx", numbers)) if r.name == "add")
    assert row.passed and row.exact == 1.0


def test_ties_are_found_in_float64() -> None:
    halves = Numbers(scales=(0.03125, 0.03125, 0.0625, 0.0157), zero_points=(121, 0, 60, 0))
    for numbers, low, high in ((halves, 0.4, 0.6), (Numbers(), 0.0, 0.0)):
        graph = int8_module(numbers)
        x = torch.randn(4, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        recorder = Recorder(graph)
        recorder.run(x)
        ties = Ties(graph, recorder.integers)
        ties.run(x)
        add = [n for n in graph.graph.nodes if n.target is QUANTIZE][2]
        assert low <= ties.masks[add].double().mean() <= high


def test_a_file_of_another_graph_is_refused(tmp_path: Path) -> None:
    graph = int8_module(Numbers())
    named = [("only", next(n for n in graph.graph.nodes if n.target is QUANTIZE))]
    with pytest.raises(InputError, match="quantizes 4 tensors of 1 inputs, the INT8 graph 1"):
        check_layers(graph, named, save_onnx(tmp_path / "m.onnx", Numbers()), (torch.zeros(2, CHANNELS, SIZE, SIZE),))


def test_layers_reach_back_to_integers_only(tmp_path: Path) -> None:
    file = QdqFile(onnx.load(save_onnx(tmp_path / "m.onnx", Numbers())))
    assert [(la.output, la.inputs) for la in file.layers] == [
        ("input_q", ("input",)),
        ("conv_q", ("input_q",)),
        ("add_q", ("conv_q", "input_q")),
        ("pool_q", ("add_q",)),
        ("logits", ("pool_q",)),
    ]


def a_task(**changes: object) -> Task:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, CHANNELS, SIZE, SIZE, generator=generator)
    batches = [(x[i : i + 32], torch.randint(0, CLASSES, (32,), generator=generator)) for i in (0, 32)]
    return Task(None, batches, batches, **changes)  # type: ignore[arg-type]


def test_ends_agree_and_a_corrupted_end_does_not(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "m.onnx", Numbers())
    deployed = OnnxModel(path, torch.zeros(()))
    same = compare_ends(int8_module(Numbers()), deployed, a_task(), samples=None)
    assert same["divergence"] is None and same["agreement"] == 1.0 and same["samples"] == 64
    other = compare_ends(int8_module(Numbers(seed=5)), deployed, a_task(), samples=32)
    assert "end to end" in other["divergence"] and other["samples"] == 32


def test_a_float_decision_is_refused(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "m.onnx", Numbers())
    with pytest.raises(InputError, match="decision"):
        compare_ends(
            int8_module(Numbers()), OnnxModel(path, torch.zeros(())), a_task(decision=lambda y: y), samples=None
        )


@pytest.mark.parametrize(
    ("agreement", "delta", "samples", "kept"),
    [
        (0.995, 0.001, 10_000, True),
        (0.9949, 0.0, 10_000, False),
        (1.0, 0.0011, 10_000, False),
        (1.0, -0.0011, 10_000, False),
        (0.98, -0.02, 50, True),  # one sample of fifty is always allowed
        (0.96, 0.0, 50, False),
        (1.0, 0.04, 50, False),
        (1.0, float("nan"), 50, False),
        (1.0, None, 50, True),
    ],
)
def test_tolerances_end_to_end(agreement: float, delta: float | None, samples: int, kept: bool) -> None:
    assert (why_not_at_the_ends(agreement, delta, 1.0, samples, samples) is None) is kept


@pytest.mark.parametrize(
    ("agreement", "own", "kept"),
    [(0.99, 0.995, True), (0.9899, 0.995, False), (0.995, 1.0, True), (0.5, 0.8, False)],
)
def test_others_may_disagree_with_a_runtime_twice_as_often_as_itself(agreement: float, own: float, kept: bool) -> None:
    """And as often as the contract allows in any case."""
    reason = why_not_at_the_ends(agreement, 0.0, 1.0, 10_000, 10_000, own)
    assert (reason is None) is kept
    assert kept or f"agrees with itself on {100 * own:.2f} %" in str(reason)


def test_decisions_without_a_label_are_not_counted() -> None:
    """Padding, of which networks always decide alike, does not hide what differs."""
    x = torch.arange(12.0).reshape(2, 6, 1)
    targets = torch.tensor([[0, 1, -100, -100, -100, -100], [1, 0, 1, -100, -100, -100]])
    task = Task(None, [(x, targets)], [(x, targets)], decision=lambda y: y.argmax(-1), class_axis=2)
    wrong = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])

    def says(flipped: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda x: torch.stack([1.0 - flipped, flipped.float()], -1)

    found = compare_ends(says(torch.zeros(2, 6)), says(wrong), task, samples=None, itself=lambda: 0.9)
    assert found["agreement"] == 0.8  # of five with a label
    assert found["own_agreement"] == 0.9 and found["divergence"] is None
    assert "own_agreement" not in compare_ends(says(wrong), says(wrong), task, samples=None, itself=lambda: 0.9)


def test_an_onnx_model_answers_in_the_structure_of_its_module(tmp_path: Path) -> None:
    path = save_onnx(tmp_path / "m.onnx", Numbers())
    x = torch.zeros(3, CHANNELS, SIZE, SIZE)
    answer = OnnxModel(path, {"logits": (torch.zeros(1),)})(x)
    assert list(answer) == ["logits"] and answer["logits"][0].shape == (3, CLASSES)


class Mixed(nn.Module):
    """A residual convolution, then attention over the pixels: products of weights and of activations, moved around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.conv(x))
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        x = torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Stage, nn.Module], Path, Task]:
    """The stages of a student compiled without training, its file and its task."""
    torch.manual_seed(0)
    teacher, task = Mixed().eval(), a_task()
    program = Program(teacher, deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    stages: dict[Stage, nn.Module] = {}
    for step in (Capture(), Quantize(), Convert()):
        program = replace(step.apply(program, task), stage=step.result_stage(program.stage))
        stages[program.stage] = deepcopy(program.student)
    path = tmp_path_factory.mktemp("compiled") / "model.onnx"
    emit_onnx(program.student, task.example, path, task.input_names)
    return stages, path, task


@pytest.mark.parametrize("optimized", [True, False])
def test_a_compiled_student_keeps_the_contract(
    compiled: tuple[dict[Stage, nn.Module], Path, Task], optimized: bool
) -> None:
    stages, path, task = compiled
    parity = check_parity(stages[Stage.FAKE_QUANT], stages[Stage.INT8], path, task, optimized=optimized)  # type: ignore[arg-type]
    assert parity.passed, parity.first_divergence
    assert parity.first_divergence is None and parity.samples == 64 and parity.agreement is not None
    assert parity.mode == ("optimized" if optimized else "unoptimized")
    products = [la for la in parity.layers if "Conv" in la.op or "MatMul" in la.op]
    assert len(products) >= 3 and all(la.accumulators for la in products if la.max_lsb is not None)


def test_a_compiled_student_with_a_corrupted_scale_fails_with_its_layers_name(
    compiled: tuple[dict[Stage, nn.Module], Path, Task], tmp_path: Path
) -> None:
    stages, path, task = compiled
    model = onnx.load(path)
    conv = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.output[0] == "conv_q")
    scale = next(i for i in model.graph.initializer if i.name == conv.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.array(numpy_helper.to_array(scale) * np.float32(1.1)), scale.name))
    onnx.save(model, tmp_path / "m.onnx")
    parity = check_parity(stages[Stage.FAKE_QUANT], stages[Stage.INT8], tmp_path / "m.onnx", task)  # type: ignore[arg-type]
    assert not parity.passed
    assert parity.first_divergence is not None and parity.first_divergence.startswith("conv (Conv): differs by up to")
