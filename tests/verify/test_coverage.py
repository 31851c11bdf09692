"""Integer coverage of files with no, some and only integer kernels."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import nn

from pqk.core.costs import count_macs
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.verify.coverage import integer_coverage

pytestmark = pytest.mark.slow

FEEDS = {"input": np.random.default_rng(0).normal(size=(3, 8, 10, 10)).astype(np.float32)}
MACS = {"a": 16 * 10 * 10 * 8 * 9, "b": 16 * 5 * 5 * 4 * 9, "fc": 16 * 10}


def network(path: Path) -> Path:
    """Two convolutions, the second strided and grouped, a pool and a linear layer."""
    rng = np.random.default_rng(0)
    shapes = {"a.w": (16, 8, 3, 3), "b.w": (16, 4, 3, 3), "fc.w": (16, 10)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "a.w"], ["a"], "a", pads=[1] * 4),
            helper.make_node("Conv", ["a", "b.w"], ["b"], "b", pads=[1] * 4, strides=[2, 2], group=4),
            helper.make_node("GlobalAveragePool", ["b"], ["p"], "p"),
            helper.make_node("Flatten", ["p"], ["f"], "f"),
            helper.make_node("MatMul", ["f", "fc.w"], ["y"], "fc"),
        ],
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [FEEDS]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def quantized(path: Path, exclude: list[str]) -> Path:
    out = path.with_name("q.onnx")
    quantize_static(
        network(path),
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=exclude,
        extra_options={"ForceQuantizeNoInputCheck": True},
    )
    return out


def test_a_float_model_has_none_and_says_why(tmp_path: Path) -> None:
    coverage = integer_coverage(network(tmp_path / "m.onnx"), FEEDS)
    assert coverage.share == 0 and coverage.integer_macs == 0
    assert coverage.total_macs == sum(MACS.values())
    assert [la.macs for la in coverage.layers] == list(MACS.values())
    assert all(la.reason and "float" in la.reason for la in coverage.layers)


def test_a_quantized_model_is_covered(tmp_path: Path) -> None:
    coverage = integer_coverage(quantized(tmp_path / "m.onnx", []), FEEDS)
    assert coverage.share == 1.0, coverage.layers
    assert coverage.total_macs == sum(MACS.values())
    assert [la.op for la in coverage.layers] == ["QLinearConv", "QLinearConv", "QLinearMatMul"]


def test_a_half_quantized_model_is_in_between(tmp_path: Path) -> None:
    coverage = integer_coverage(quantized(tmp_path / "m.onnx", ["b", "p", "f", "fc"]), FEEDS)
    assert coverage.share == pytest.approx(MACS["a"] / sum(MACS.values()))
    assert [(la.name, la.integer) for la in coverage.layers] == [("a", True), ("b", False), ("fc", False)]


def test_dynamic_quantization_counts(tmp_path: Path) -> None:
    quantize_dynamic(network(tmp_path / "m.onnx"), tmp_path / "q.onnx", op_types_to_quantize=["MatMul"])
    coverage = integer_coverage(tmp_path / "q.onnx", FEEDS)
    assert coverage.integer_macs == MACS["fc"]


def test_the_batch_is_divided_out(tmp_path: Path) -> None:
    path = network(tmp_path / "m.onnx")
    one = integer_coverage(path, {"input": FEEDS["input"][:1]})
    assert one.total_macs == integer_coverage(path, FEEDS).total_macs


def test_transposed_and_nchwc_convolutions_are_counted_as_torch_counts_them(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 16, 1), nn.ConvTranspose2d(16, 8, 3, 2))
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "0"], ["x"], "first"),
            helper.make_node("Conv", ["x", "1"], ["y"], "second"),
            helper.make_node("ConvTranspose", ["y", "2"], ["z"], "third", strides=[2, 2]),
        ],
        "network",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8, 10, 10])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 8, 17, 17])],
        [numpy_helper.from_array(layer.weight.detach().numpy(), str(i)) for i, layer in enumerate(net)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    coverage = integer_coverage(model.SerializeToString(), FEEDS)
    assert coverage.total_macs == count_macs(net, (torch.from_numpy(FEEDS["input"]),))


def test_a_model_without_products_is_covered() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["y"])],
        "relu",
        [value("input", TensorProto.FLOAT, ["batch", 4])],
        [value("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert integer_coverage(model.SerializeToString(), {"input": np.zeros((2, 4), np.float32)}).share == 1.0


def test_feeds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not fit"):
        integer_coverage(network(tmp_path / "m.onnx"), {"input": np.zeros((1, 3, 4, 4), np.float32)})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_counted_as_torch_counts_them(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = kind(8, 6, num_layers=2, bidirectional=kind is nn.LSTM, batch_first=True), torch.randn(3, 5, 8)
    emit_onnx(layer, (x,), tmp_path / "a.onnx", ["x"], ["y", *[f"state_{i}" for i in range(1 + (kind is nn.LSTM))]])
    coverage = integer_coverage(tmp_path / "a.onnx", {"x": x.numpy()})
    assert coverage.share == 0 and coverage.total_macs == count_macs(layer, (x,))


def test_what_cannot_be_counted_has_a_reason_and_no_share() -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Einsum", ["input", "input", "input"], ["y"], "three", equation="ab,ab,ab->ab"),
        helper.make_node("MatMul", ["y", "w"], ["z"], "known"),
    ]
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = helper.make_graph(
        nodes, "einsum", [value("input", TensorProto.FLOAT, [3, 4])], [value("z", TensorProto.FLOAT, [3, 2])], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    coverage = integer_coverage(model.SerializeToString(), {"input": np.zeros((3, 4), np.float32)})
    assert coverage.share is None and coverage.total_macs == 8
    assert coverage.reason is not None and "Einsum (three)" in coverage.reason
