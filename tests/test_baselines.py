"""Post-training quantization of the teacher by other tools."""

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import nn

from pqk.baselines import neural_compressor_ptq, onnxruntime_ptq
from pqk.coverage import integer_coverage
from pqk.errors import InputError
from pqk.machine import installed
from pqk.runtime import session
from pqk.target import Target


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
