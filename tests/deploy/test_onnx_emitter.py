"""The file that ships: every kind of network, in integers, in ONNX Runtime, with the numbers of the INT8 graph."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn
from zoo import IMAGE, NETWORKS, Residual

from pqk.core.aten import quantized_tensors
from pqk.core.onnxruntime_session import session
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.passes.capture.capture import capture
from pqk.passes.convert.convert import convert
from pqk.passes.quantize.placement import named_layers, placement
from pqk.passes.quantize.quantize import calibrate, insert_fake_quant
from pqk.target.target import Target

pytestmark = pytest.mark.slow

INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
MOVEMENT = {"Reshape", "Transpose", "Slice", "Pad", "Squeeze", "Unsqueeze", "Gather", "MaxPool", "NhwcMaxPool"}
FREE = {"QuantizeLinear", "DequantizeLinear", *MOVEMENT}
EXPECTED: dict[str, tuple[set[str], dict[str, int]]] = {
    "plain": (set(), {"QLinearConv": 2, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1}),
    "residual": (set(), {"QLinearConv": 4, "QLinearAdd": 2, "QGemm": 2}),
    "dense": (set(), {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 1}),
    "separable": (set(), {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1}),
    "gated": (set(), {"QLinearConv": 3, "QLinearMul": 2, "QLinearAdd": 2}),
    "silu": (set(), {"QLinearConv": 2, "QLinearSigmoid": 2, "QLinearMul": 2}),
    "grouped": (set(), {"QLinearConv": 4, "QLinearLeakyRelu": 1, "QGemm": 1}),
    "transposed": ({"ConvTranspose"}, {"QLinearConv": 2}),
    "several": (set(), {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 2}),
    "attention": ({"Mul", "Softmax", "Add", "LayerNormalization", "Gelu"}, {"QGemm": 8}),
    "linear": ({"Tanh"}, {"QGemm": 3}),
    "tokens": (set(), {"QGemm": 3}),
}
"""network -> operators that stay in float, integer kernels and how many of them"""


@dataclass(frozen=True)
class Emitted:
    module: nn.Module
    int8: fx.GraphModule
    path: Path
    inputs: tuple[Tensor, ...]
    declined: list[tuple[str, str]]
    optimized: collections.Counter[str]

    def feed(self, size: int | None = None) -> dict[str, np.ndarray]:
        return {i.name: x[:size].numpy() for i, x in zip(self.session().get_inputs(), self.inputs, strict=True)}

    def session(self, optimized: bool = True) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])


class Inputs:
    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(x[:limit] for x in self.inputs)


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(n.op_type for n in onnx.load(path).graph.node)


def emit(name: str, folder: Path, float_layers: tuple[str, ...] = ()) -> Emitted:
    torch.manual_seed(0)
    network = NETWORKS[name]
    module, inputs = network.build(), tuple(torch.randn(24, *s) for s in network.shapes)
    with torch.no_grad():
        for _ in range(3):
            module(*inputs)  # statistics of batch norm
    example, target = tuple(x[:2] for x in inputs), Target.named("x86-avx2")
    graph = capture(module.eval(), example)
    assert isinstance(graph, fx.GraphModule)
    points, declined = placement(graph, named_layers(graph, float_layers))
    grids = {"activation": asdict(target.activation), "weight": asdict(target.weight)}
    fake = insert_fake_quant(graph, example, points=[p.to_json() for p in points], learned=True, **grids)
    calibrate(fake, Inputs(inputs), "mse", 99.99, 24)  # type: ignore[arg-type]
    int8 = convert(fake, example)
    assert isinstance(int8, fx.GraphModule)
    path = folder / f"{name}.onnx"
    names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    emit_onnx(int8, example, path, names)
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(folder / f"{name}.optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = operators(folder / f"{name}.optimized.onnx")
    return Emitted(module, int8, path, inputs, declined, optimized)


@pytest.fixture(scope="module", params=NETWORKS)
def emitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Emitted]:
    return request.param, emit(request.param, tmp_path_factory.mktemp("emit"))


def flat(outputs: Any) -> list[np.ndarray]:
    if isinstance(outputs, Tensor):
        outputs = [outputs]
    return [t.detach().numpy() for t in (outputs.values() if isinstance(outputs, dict) else outputs)]


def sqnr(signal: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal).mean() / max(np.square(signal - other).mean(), 1e-20)))


def test_onnx_runtime_agrees_with_the_integer_graph_and_that_with_the_float_network(emitted: Any) -> None:
    name, e = emitted
    with torch.no_grad():
        expected, floats = flat(e.int8(*e.inputs)), flat(e.module(*e.inputs))
    for optimized in (True, False):
        for ours, theirs in zip(expected, e.session(optimized).run(None, e.feed()), strict=True):
            near = np.isclose(ours, theirs, rtol=1e-5, atol=1e-6)
            assert sqnr(ours, theirs) > 40, (name, optimized)
            assert near.mean() > 0.95, (name, optimized, "more than a few values fell on the other side of a tie")
    for ours, true in zip(expected, floats, strict=True):
        assert sqnr(true, ours) > 20, name
    for one in e.session().run(None, e.feed(1)):
        assert len(one) == 1, "the batch is dynamic"


def test_multiplications_run_in_integer_kernels(emitted: Any) -> None:
    name, e = emitted
    floats, needed = EXPECTED[name]
    found = e.optimized
    assert needed.items() <= dict(found).items(), (name, found)
    left = {op for op in found if not op.startswith("QLinear")} - INTEGER - FREE
    assert left == floats, (name, found)
    if not floats:
        ends = len(e.inputs)
        assert found["QuantizeLinear"] == ends and not found["DequantizeLinear"], (name, found)
        assert not e.declined
    assert all(reason for _, reason in e.declined)


def test_values_carry_the_names_of_layers(emitted: Any) -> None:
    name, e = emitted
    graph = onnx.load(e.path).graph
    produced = [n.output[0] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert produced == [f"{layer}_q" for layer, _ in quantized_tensors(e.int8)], name
    names = {"several": ["fine", "coarse"], "residual": ["output_0", "output_1"]}.get(name, ["logits"])
    assert [o.name for o in graph.output] == names
    assert all(v.type.tensor_type.shape.dim[0].dim_param == "batch" for v in (*graph.input, *graph.output))


def test_the_file_stands_alone_and_tells_nothing_of_this_machine(emitted: Any) -> None:
    name, e = emitted
    content = e.path.read_bytes()
    for leak in (b".py", b"torch", b"site-packages", b"forward", str(Path.home()).encode(), str(Path.cwd()).encode()):
        assert leak not in content, leak
    assert [p.name for p in e.path.parent.iterdir() if "optimized" not in p.name] == [e.path.name]
    model = onnx.load(e.path)
    assert not any(t.external_data for t in model.graph.initializer)
    assert {o.domain: o.version for o in model.opset_import}[""] == 21
    weights = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    large = [t.name for t in floats if np.prod(t.dims) > 256]
    assert weights and large == (["1.0.weight"] if name == "transposed" else [])


def test_a_float_module_is_emitted_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Residual().eval(), torch.randn(3, *IMAGE)
    emit_onnx(module, (x[:2],), tmp_path / "teacher.onnx", ["input"], ["logits", "small"])
    session = ort.InferenceSession(tmp_path / "teacher.onnx", providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["logits", "small"]
    for ours, theirs in zip(flat(module(x)), session.run(None, {"input": x.numpy()}), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_runtime_does_not_quantize_what_was_left_in_float(tmp_path: Path) -> None:
    e = emit("plain", tmp_path, float_layers=("2.0", "4.2"))
    assert e.optimized["Conv"] == e.optimized["Gemm"] == e.optimized["QLinearConv"] == 1
    (ours,), (theirs,) = flat(e.int8(*e.inputs)), e.session().run(None, e.feed())
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Loses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x)


def test_what_onnx_has_no_word_for_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"emit_onnx: Loses cannot be written as ONNX: .*i0e"):
        emit_onnx(Loses(), (torch.randn(2, 3),), tmp_path / "model.onnx", ["input"])
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", ""), "the library never prints"


class ByLength(nn.Module):
    """Its batch becomes a number of Python's, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(3, 2), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "len":
            return self.linear(x.reshape(len(x), -1))
        if self.how == "int":
            return self.linear(x) + torch.zeros(int(x.size(0)), 2)
        if self.how == "range":
            return self.linear(x) + torch.cat([torch.zeros(1, 2) for _ in range(x.shape[0])])
        return torch.stack([self.linear(row) for row in x])


@pytest.mark.parametrize(
    ("how", "line"), [("len", "len(x)"), ("int", "int(x.size(0))"), ("range", "range(x.shape[0])"), ("rows", "in x])")]
)
def test_a_file_of_a_fixed_batch_is_refused_with_the_line_that_fixes_it(how: str, line: str, tmp_path: Path) -> None:
    """The exporter writes one without a word, which fails where the first batch of another size is asked of it."""
    with pytest.raises(InputError, match=r"the batch size is fixed to 2 .*, at test_onnx_emitter.py:\d+: '") as caught:
        emit_onnx(ByLength(how), (torch.randn(2, 3),), tmp_path / "model.onnx", ["input"])
    assert line in str(caught.value) and "x.shape[0]" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_model_runs_where_there_is_no_torch(tmp_path: Path) -> None:
    e = emit("tokens", tmp_path)
    np.save(tmp_path / "x.npy", e.inputs[0].numpy())
    code = (
        "import sys; sys.modules['torch'] = sys.modules['pqk'] = None\n"
        "import numpy as np, onnxruntime as ort\n"
        f"s = ort.InferenceSession({str(e.path)!r}, providers=['CPUExecutionProvider'])\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, s.run(None, {{'input': np.load({str(tmp_path / 'x.npy')!r})}})[0])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), e.session().run(None, e.feed())[0])


def test_a_log_sigmoid_is_finite_where_the_sigmoid_is_not_there(tmp_path: Path) -> None:
    x = torch.tensor([[-200.0, -90.0, -1.0], [0.0, 1.0, 90.0]])
    emit_onnx(nn.LogSigmoid(), (x,), tmp_path / "a.onnx", ["x"])
    (y,) = session(tmp_path / "a.onnx", optimized=False).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), nn.functional.logsigmoid(x))


class Windows(nn.Module):
    """Attention within windows, an axis more than the exporter knows attention of."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_what_the_exporter_does_not_know_is_written_as_it_is_captured(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 5, 8)
    emit_onnx(Windows().eval(), (x,), tmp_path / "m.onnx", ("x",))
    (got,) = session(tmp_path / "m.onnx").run(None, {"x": x[:1].numpy()})
    torch.testing.assert_close(torch.from_numpy(got), Windows()(x[:1]), atol=1e-6, rtol=1e-5)
