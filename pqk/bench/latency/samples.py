"""Small ONNX files whose time is that of a layer, or of an operator without weights, times how often it is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pqk.bench.latency.executed import LayerShape, LightKind

OPSET, MICROSOFT = 17, "com.microsoft"
ROW = 64
"""values of a row of what operators that are no layers work on"""
SCALE, WEIGHT_SCALE = 0.02, 0.01


@dataclass
class _Graph:
    """Nodes and constants of a graph that is being written."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def activation(self, operator: str, value: str, zero: int = 128) -> str:
        """`value` to or from integers, with the range of all activations here."""
        scale = self.constant("scale", np.array(SCALE, np.float32))
        return self.add(operator, [value, scale, self.constant(f"zero{zero}", np.array(zero, np.uint8))])

    def weight(self, shape: Sequence[int], integer: bool, axis: int) -> str:
        """Random weights of their own, as `axis` has a scale for each channel."""
        name = f"w{len(self.constants)}"
        if not integer:
            return self.constant(name, self.draw.normal(0, 0.05, shape).astype(np.float32))
        self.constant(name, self.draw.integers(-64, 65, shape).astype(np.int8))
        scale = self.constant(f"{name}_scale", np.full(shape[axis], WEIGHT_SCALE, np.float32))
        zero = self.constant(f"{name}_zero", np.zeros(shape[axis], np.int8))
        return self.add("DequantizeLinear", [name, scale, zero], axis=axis)

    def bias(self, count: int, integer: bool) -> str:
        name = f"b{len(self.constants)}"
        if not integer:
            return self.constant(name, self.draw.normal(0, 0.05, count).astype(np.float32))
        self.constant(name, self.draw.integers(-64, 65, count).astype(np.int32))
        scale = self.constant(f"{name}_scale", np.full(count, SCALE * WEIGHT_SCALE, np.float32))
        zero = self.constant(f"{name}_zero", np.zeros(count, np.int32))
        return self.add("DequantizeLinear", [name, scale, zero], axis=0)

    def finished(self, dtype: int, shape: Sequence[int], ends: Sequence[str]) -> bytes:
        """The file, whose input is `x` and whose outputs are `ends`."""
        outputs = [onnx.ValueInfoProto(name=name) for name in ends]
        for output in outputs:
            output.type.tensor_type.elem_type = dtype
        given = helper.make_tensor_value_info("x", dtype, shape)
        graph = helper.make_graph(self.nodes, "sample", [given], outputs, [*self.constants.values()])
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return bytes(model.SerializeToString())


def layer_sample(shape: LayerShape, channels: tuple[int, int], copies: int) -> bytes:
    """A file with `copies` of a layer side by side, each with weights of its own, which read the same input.

    Of each only one value is read on, or, of a convolution in float, the mean: that leaves what is made in the layout
    in which it is made. Input `x` is uint8 or float32 [1, in, …] or [rows, in].
    """
    graph, integer = _Graph(), shape.integer
    source = graph.activation("DequantizeLinear", "x") if integer else "x"
    ends = []
    for _ in range(copies):
        value = _layer(graph, shape, channels, source)
        value = graph.activation("QuantizeLinear", value) if integer else graph.add("Relu", [value])
        if shape.kernel and not integer:
            ends.append(graph.add("GlobalAveragePool", [value]))
            continue
        axes = list(range(1, 2 + len(shape.kernel))) if shape.kernel else [0, 1]
        zeros, ones = (graph.constant(f"all{n}", np.full(len(axes), n, np.int64)) for n in (0, 1))
        ends.append(graph.add("Slice", [value, zeros, ones, graph.constant("axes", np.array(axes, np.int64))]))
    end = graph.add("Concat", ends, axis=1)
    return graph.finished(_dtype(integer), input_shape(shape, channels[0]), [end])


def input_shape(shape: LayerShape, channels: int) -> tuple[int, ...]:
    """What a sample of a layer reads."""
    return (1, channels, *shape.sizes) if shape.kernel else (*shape.sizes, channels)


def _dtype(integer: bool) -> int:
    return int(TensorProto.UINT8 if integer else TensorProto.FLOAT)


def _layer(graph: _Graph, shape: LayerShape, channels: tuple[int, int], source: str) -> str:
    read, made = channels
    if not shape.kernel:
        weight = graph.weight((read, made), shape.integer, 1)
        return graph.add("Gemm", [source, weight, graph.bias(made, shape.integer)])
    groups = shape.groups or made
    weight = graph.weight((made, read // groups, *shape.kernel), shape.integer, 0)
    spread = [d * (k - 1) for k, d in zip(shape.kernel, shape.dilations, strict=True)]
    pads = [s // 2 for s in spread] + [s - s // 2 for s in spread]
    return graph.add(
        "Conv", [source, weight, graph.bias(made, shape.integer)], kernel_shape=shape.kernel, strides=shape.strides,
        dilations=shape.dilations, group=groups, pads=pads,
    )  # fmt: skip


def light_sample(kind: LightKind, elements: int, copies: int) -> bytes:
    """A chain of `copies` steps on rows of 64 values, each with one operator of a kind (movement: two).

    A step that rounds is a QuantizeLinear, a DequantizeLinear and a function, which keeps the two apart.
    """
    graph = _Graph()
    value, integer = "x", kind in ("integer", "movement")
    for _ in range(copies):
        value = _STEPS[kind](graph, value)
    return graph.finished(_dtype(integer), light_shape(elements), [value])


def light_shape(elements: int) -> tuple[int, ...]:
    """What a chain of operators that are no layers reads."""
    return (1, elements // ROW, ROW)


def _sum_of_integers(graph: _Graph, value: str) -> str:
    sides = [graph.activation("DequantizeLinear", each) for each in (value, "x")]
    return graph.activation("QuantizeLinear", graph.add("Add", sides))


def _movement(graph: _Graph, value: str) -> str:
    longer = graph.add("Pad", [value, graph.constant("pads", np.array([0, 0, 0, 0, 0, 8], np.int64))])
    limits = [graph.constant(f"at{n}", np.array([n], np.int64)) for n in (8, ROW + 8, 2)]
    return graph.add("Slice", [longer, *limits])


def _rounding(graph: _Graph, value: str) -> str:
    integers = graph.activation("QuantizeLinear", value)
    return _function(graph, graph.activation("DequantizeLinear", integers))


def _function(graph: _Graph, value: str) -> str:
    return graph.add("Gelu", [value], domain=MICROSOFT)


def _norm(graph: _Graph, value: str) -> str:
    return graph.add("LayerNormalization", [value, *_gain(graph)], axis=-1)


def _norm_of_a_sum(graph: _Graph, value: str) -> str:
    return graph.add("SkipLayerNormalization", [value, "x", *_gain(graph)], domain=MICROSOFT, epsilon=1e-5)


def _gain(graph: _Graph) -> list[str]:
    return [graph.constant(f"{name} of a norm", np.ones(ROW, np.float32)) for name in ("gain", "bias")]


_STEPS: dict[LightKind, Callable[[_Graph, str], str]] = {
    "integer": _sum_of_integers,
    "movement": _movement,
    "rounding": _rounding,
    "float": lambda graph, value: graph.add("Add", [value, "x"]),
    "function": _function,
    "softmax": lambda graph, value: graph.add("Softmax", [value], axis=-1),
    "norm": _norm,
    "sum and norm": _norm_of_a_sum,
}
