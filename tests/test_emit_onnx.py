"""The file that ships: every kind of network, in integers, in ONNX Runtime, with the numbers of the INT8 graph."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.emit_onnx import emit_onnx
from pqk.errors import InputError
from pqk.passes.capture import capture
from pqk.passes.convert import convert, quantized_tensors
from pqk.passes.quantize import calibrate, insert_fake_quant, placement
from pqk.target import Target


def block(i: int, o: int, act: type[nn.Module] = nn.ReLU, **conv: Any) -> nn.Sequential:
    conv = {"kernel_size": 3, "padding": 1, "bias": False} | conv
    return nn.Sequential(nn.Conv2d(i, o, **conv), nn.BatchNorm2d(o), act())


class Head(nn.Sequential):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def plain() -> nn.Module:
    return nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 16), nn.AvgPool2d(2), Head(16))


class Residual(nn.Module):
    """A block with a shortcut of slices and a pad; two outputs, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.linear, self.small = block(3, 16), nn.Conv2d(16, 32, 3, 2, 1), Head(32), Head(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        return self.linear(y), self.small(x)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.norm(torch.cat([x, self.conv(x)], 1))))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = block(3, 16, nn.ReLU6), block(16, 16, nn.ReLU6, groups=16)
        self.point, self.linear = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.linear(F.dropout(x + self.point(self.deep(x)), 0.2, self.training).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation as MobileNetV3 has it, with hard-swish and hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16, nn.Hardswish), Head(16)
        self.less, self.more = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(x, 1))))))


def silu() -> nn.Module:
    return nn.Sequential(block(3, 16, nn.SiLU), block(16, 16, nn.SiLU), Head(16))


def grouped() -> nn.Module:
    leaky = nn.Sequential(nn.Conv2d(32, 32, 3, padding="same"), nn.LeakyReLU(0.1))
    return nn.Sequential(block(3, 16), block(16, 32, groups=4), block(32, 32, dilation=2, padding=2), leaky, Head(32))


def transposed() -> nn.Module:
    up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(block(3, 16, stride=2), up, nn.Conv2d(8, 4, 3, padding=1))


class Several(nn.Module):
    """Two inputs; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fine, self.coarse = block(3, 8), block(1, 8), block(16, 16), Head(16), Head(16, 2)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        x = self.c(torch.cat([self.a(image), self.b(depth)], 1))
        return {"fine": self.fine(x), "coarse": self.coarse(x)}


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(12, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.one, self.two, self.out = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 5)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = self.one(x + self.o(mixed))
        return self.out(self.two(x + self.down(F.gelu(self.up(x))))[:, 0])


def linear() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


IMAGE = (3, 12, 12)
INTEGER = {"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}
MOVEMENT = {"Reshape", "Transpose", "Slice", "Pad", "Squeeze", "Unsqueeze", "Gather", "MaxPool", "NhwcMaxPool"}
FREE = {"QuantizeLinear", "DequantizeLinear", *MOVEMENT}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], set[str], dict[str, int]]] = {
    "plain": (plain, [IMAGE], set(), {"QLinearConv": 2, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 1}),
    "residual": (Residual, [IMAGE], set(), {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 2}),
    "dense": (Dense, [IMAGE], set(), {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 1}),
    "separable": (Separable, [IMAGE], set(), {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1}),
    "gated": (Gated, [IMAGE], set(), {"QLinearConv": 3, "QLinearMul": 2, "QLinearAdd": 2}),
    "silu": (silu, [IMAGE], set(), {"QLinearConv": 2, "QLinearSigmoid": 2, "QLinearMul": 2}),
    "grouped": (grouped, [IMAGE], set(), {"QLinearConv": 4, "QLinearLeakyRelu": 1, "QGemm": 1}),
    "transposed": (transposed, [IMAGE], {"ConvTranspose"}, {"QLinearConv": 2}),
    "several": (Several, [IMAGE, (1, 12, 12)], set(), {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 2}),
    "attention": (Attention, [(7, 12)], {"Mul", "Softmax", "SkipLayerNormalization", "Gelu"}, {"QGemm": 8}),
    "linear": (linear, [(20,)], {"Tanh"}, {"QGemm": 3}),
    "tokens": (tokens, [(6, 20)], set(), {"QGemm": 3}),
}


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
    build, shapes, _, _ = NETWORKS[name]
    module, inputs = build(), tuple(torch.randn(24, *s) for s in shapes)
    with torch.no_grad():
        for _ in range(3):
            module(*inputs)  # statistics of batch norm
    example, target = tuple(x[:2] for x in inputs), Target.named("x86-avx2")
    graph = capture(module.eval(), example)
    assert isinstance(graph, fx.GraphModule)
    points, declined = placement(graph, float_layers)
    grids = {"activation": asdict(target.activation), "weight": asdict(target.weight)}
    fake = insert_fake_quant(graph, example, points=points, learned=True, **grids)
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
    _, _, floats, needed = NETWORKS[name]
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
