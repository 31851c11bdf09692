"""Where the time goes: operators are given to layers by what they read, and their times are a profile's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pqk.bench.layer_times import layer_times, layers_of
from pqk.errors import InputError


def a_graph() -> onnx.ModelProto:
    """Scale, a linear layer whose weight has lost its name, a residual sum, a linear layer with its own, a norm."""

    def node(op: str, inputs: list[str], output: str) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], name=output)

    nodes = [
        node("Mul", ["x", "two"], "scaled"),
        node("MatMul", ["scaled", "val_7"], "product"),
        node("Add", ["product", "first.bias"], "first"),
        node("Relu", ["first"], "relu"),
        node("Gemm", ["relu", "block.second.weight", "block.second.bias"], "second"),
        node("Add", ["relu", "second"], "sum"),
        node("MatMul", ["sum", "val_9"], "third"),
        node("LayerNormalization", ["third", "norm.weight", "norm.bias"], "y"),
    ]
    square = np.eye(64, dtype=np.float32)
    row = np.ones(64, dtype=np.float32)
    values = {"two": np.float32(2), "val_7": square, "first.bias": row, "block.second.weight": square,
              "block.second.bias": row, "val_9": square, "norm.weight": row, "norm.bias": row}  # fmt: skip
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64])] for name in "xy"]
    weights = [numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()]
    graph = helper.make_graph(nodes, "a", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_operators_are_of_the_layer_whose_weights_they_read() -> None:
    """A product without a name is of the bias behind it, but not of a norm's; without weights it is what came last."""
    assert layers_of(a_graph().graph) == [
        "inputs", "first", "first", "first", "block.second", "block.second", "block.second", "norm",
    ]  # fmt: skip


def test_a_shared_scale_says_nothing_about_the_layer() -> None:
    nodes = [
        helper.make_node("Gather", ["a.weight_int8", "ids"], ["rows"]),
        helper.make_node("DequantizeLinear", ["rows", "a.weight_scale", "b.weight_zero_point"], ["values"]),
        helper.make_node("Gather", ["b.weight_int8", "ids"], ["others"]),
        helper.make_node("DequantizeLinear", ["others", "a.weight_scale", "b.weight_zero_point"], ["y"]),
    ]
    assert layers_of(helper.make_graph(nodes, "a", [], [])) == ["a", "a", "b", "b"]


def test_weights_that_the_runtime_lays_out_anew_keep_their_layer() -> None:
    """Blocked convolutions of few channels lose the names of weight and bias; the node keeps its own."""
    names = ["product", "second_nchwc", "ReorderOutput", "third_token_4"]
    executed = [
        helper.make_node("Conv", ["x", "reorder", "reorder_token_0"], [f"made {i}"], name=name)
        for i, name in enumerate(names)
    ]
    executed[2].input[0] = "made 0"
    found = layers_of(helper.make_graph(executed, "a", [], []), a_graph().graph)
    assert found == ["first", "block.second", "first", "block.second"]


def test_times_are_of_the_executed_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(a_graph(), path)
    found = layer_times(path, {"x": np.ones((4, 64), np.float32)}, "teacher_fp32", threads=1)
    assert found.variant == "teacher_fp32"
    layers = {la.layer: la for la in found.layers}
    assert {"first", "block.second"} <= layers.keys()
    assert layers["first"].integer is False and layers["block.second"].integer is False
    assert found.total_ms > 0 and all(la.milliseconds >= 0 for la in found.layers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]  # the profile is gone


def test_a_file_that_is_refused_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"none")
    with pytest.raises(InputError, match="refuses"):
        layer_times(tmp_path / "model.onnx", {}, "student")
