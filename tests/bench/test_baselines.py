"""Post-training quantization of the teacher by other tools."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, load, numpy_helper, save
from torch import nn

from pqk.bench import baselines
from pqk.bench.baselines import (
    is_transformer,
    neural_compressor_ptq,
    onnxruntime_dynamic,
    onnxruntime_ptq,
    optimized_transformer,
    optimum_ptq,
)
from pqk.bench.statistics import Ratio
from pqk.core.onnxruntime_session import session
from pqk.errors import InputError
from pqk.target.machine import installed
from pqk.target.target import Target
from pqk.verify.coverage import integer_coverage

pytestmark = pytest.mark.slow


def network(path: Path) -> Path:
    weight = np.random.default_rng(0).normal(size=(16, 8, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w"], ["c"], "conv"), helper.make_node("Relu", ["c"], ["y"], "relu")],
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16, 7, 7])],
        [numpy_helper.from_array(weight, "w")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_onnxruntime_quantizes_the_teacher(tmp_path: Path) -> None:
    teacher, out = network(tmp_path / "t.onnx"), tmp_path / "q.onnx"
    x = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    onnxruntime_ptq(teacher, out, [(x,)], Target.named("x86-avx2"))
    feeds = {"input": x.numpy()}
    assert integer_coverage(out, feeds).share == 1.0
    truth, got = (session(p).run(None, feeds)[0] for p in (teacher, out))
    noise = np.square(got - truth).mean() / np.square(truth).mean()
    assert 10 * np.log10(1 / noise) > 20


def test_no_calibration_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no calibration samples"):
        onnxruntime_ptq(network(tmp_path / "t.onnx"), tmp_path / "q.onnx", [], Target.named("x86-avx2"))


def test_neural_compressor_quantizes_or_says_why_not() -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph, reason = neural_compressor_ptq(teacher, (x,), [(x,)])
    assert (graph is None) == (reason is not None)
    if graph is None:
        assert reason and "neural-compressor" in reason
        return
    assert installed("neural-compressor")
    with torch.no_grad():
        assert (graph(x[:3]) - teacher(x[:3])).abs().max() < 0.05 * teacher(x).abs().max()


def attention(path: Path) -> Path:
    """y = layer_norm(x + softmax(x) W + b), x [batch, sequence, 16]."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(16, 16)), "b": rng.normal(size=16), "g": np.ones(16), "o": np.zeros(16)}
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["r"]),
        helper.make_node("LayerNormalization", ["r", "g", "o"], ["y"], axis=-1),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", "sequence", 16]) for n in ("x", "y")]
    stored = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "attention", value[:1], value[1:], stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_a_transformer_is_quantized_dynamically(tmp_path: Path) -> None:
    teacher, out = attention(tmp_path / "t.onnx"), tmp_path / "q.onnx"
    assert is_transformer(teacher) and not is_transformer(network(tmp_path / "c.onnx"))
    assert onnxruntime_dynamic(teacher, out, Target.named("x86-avx2")) is None
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)}
    assert integer_coverage(out, feeds).share == 1.0
    truth, got = (session(p).run(None, feeds)[0] for p in (teacher, out))
    np.testing.assert_allclose(got, truth, atol=0.05)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert "cannot quantize" in (onnxruntime_dynamic(tmp_path / "broken.onnx", out, Target.named("x86-avx2")) or "")


@pytest.mark.parametrize("static", [True, False])
def test_optimum_quantizes_a_transformer(tmp_path: Path, static: bool) -> None:
    teacher, out, target = attention(tmp_path / "t.onnx"), tmp_path / "q.onnx", Target.named("x86-avx2")
    x = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))
    reason = optimum_ptq(teacher, out, [(x,)] if static else None, target)
    if installed("optimum-onnx") is None:
        assert reason is not None and "pqk[encoders]" in reason
        return
    assert reason is None
    kinds = {n.op_type for n in load(out).graph.node}
    assert ("DynamicQuantizeLinear" in kinds) != static and ("QuantizeLinear" in kinds) == static
    truth, got = (session(p).run(None, {"x": x.numpy()})[0] for p in (teacher, out))
    np.testing.assert_allclose(got, truth, atol=0.1)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert "optimum" in (optimum_ptq(tmp_path / "broken.onnx", out, None, target) or "")


def test_the_baseline_takes_the_optimizer_where_it_is_no_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, out = attention(tmp_path / "t.onnx"), tmp_path / "o.onnx"
    feeds = {"x": np.random.default_rng(1).normal(size=(1, 5, 16)).astype(np.float32)}
    for ratio, better, word in (
        (Ratio(0.9, 0.8, 1.1), True, "is optimized by"),
        (Ratio(0.5, 0.4, 0.6), False, "slower"),
    ):
        monkeypatch.setattr(baselines, "ratio_to", lambda *a, ratio=ratio: ratio)
        taken, said = optimized_transformer(teacher, out, feeds, feeds, 1)
        assert taken == better and word in said and "SkipLayerNormalization" in said
    truth, got = (session(p).run(None, feeds)[0] for p in (teacher, out))
    np.testing.assert_allclose(got, truth, rtol=1e-4, atol=1e-5)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    assert optimized_transformer(tmp_path / "broken.onnx", out, feeds, feeds, 1)[0] is False
