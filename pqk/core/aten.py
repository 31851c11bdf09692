"""What is known about ATen operators: one row an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import pqk.quant.ops  # noqa: F401 (the operators that this file names)
from pqk.core.graph import arguments, is_float, operand

QUANTIZE = torch.ops.pqk.quantize.default


DYNAMIC = torch.ops.pqk.quantize_dynamic_linear.default


DEQUANTIZE = torch.ops.pqk.dequantize.default


aten = torch.ops.aten


OUTPUT_AXIS: dict[Any, int] = {
    aten.conv1d.default: 0, aten.conv2d.default: 0, aten.conv3d.default: 0, aten.linear.default: 0,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1, aten.conv_transpose3d.input: 1,
}  # fmt: skip
"""operators that batch norm folds into -> the axis of the weight that holds output channels"""


SAME_SHAPE = (
    aten.add.Tensor, aten.mul.Tensor, aten.layer_norm.default, aten.gelu.default, aten.relu.default, aten.tanh.default,
    aten.linear.default,
)  # fmt: skip
"""operators whose output has the axes of an input, but for the last"""


CLAMPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default)


CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


WEIGHTED = (*CONVOLUTIONS, aten.linear.default)


PRODUCTS = (aten.matmul.default, aten.bmm.default)


HEAVY = (*WEIGHTED, *PRODUCTS)


FLOAT_OUTPUT = (aten.linear.default, *PRODUCTS)
"""heavy operators whose integer kernel can put out floats"""


LIGHT = (
    aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.mean.dim, aten.avg_pool2d.default, aten.sigmoid.default,
    aten.leaky_relu.default,
)  # fmt: skip


MOVEMENT = (
    aten.slice.Tensor, aten.select.int, aten.pad.default, aten.constant_pad_nd.default, aten.reshape.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.expand.default,
    aten.max_pool2d.default, aten.index_select.default,
)  # fmt: skip


def bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The constant bounds of a ReLU or clamp whose range includes 0; None for anything else."""
    if node.op != "call_function" or node.target not in CLAMPS:
        return None
    a = arguments(node)
    if node.target in (aten.relu.default, aten.relu6.default):
        low, high = 0.0, 6.0 if node.target is aten.relu6.default else None
    elif node.target is aten.hardtanh.default:
        low, high = a["min_val"], a["max_val"]
    else:
        low, high = a["min"], a.get("max")
    fixed = all(b is None or isinstance(b, int | float) for b in (low, high))
    return (low, high) if fixed and (low is None or low <= 0) and (high is None or high > 0) else None


def gain(node: fx.Node) -> float | None:
    """The positive constant that `node` multiplies its input by; None for anything else."""
    if node.op != "call_function" or node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) < 2:
        return None
    factor = node.args[1]
    if not isinstance(factor, int | float) or factor <= 0:
        return None
    return float(factor) if node.target is aten.mul.Tensor else 1 / factor


def moves(node: fx.Node) -> bool:
    """Whether `node` only moves values (or picks the largest), so that it can act on integers as it does on floats."""
    if node.op != "call_function" or node.target not in MOVEMENT or not is_float(node):
        return False
    a = arguments(node)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return a.get("mode", "constant") == "constant" and not a["value"]
    return node.target is not aten.max_pool2d.default or not a["ceil_mode"]


def root(node: fx.Node) -> fx.Node:
    """The node whose quantizer `node`'s value has: itself, or where it was moved from."""
    while moves(node):
        node = operand(node)
    return node


VIEWS = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


POINTWISE = (
    *CLAMPS, QUANTIZE, DEQUANTIZE, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor,
    aten.sigmoid.default, aten.tanh.default, aten.leaky_relu.default, aten.gelu.default, aten.elu.default,
    aten.exp.default, aten.softplus.default, aten.mish.default, aten.neg.default, aten.abs.default,
)  # fmt: skip
"""operators that compute each element from the elements in its place"""


QUANTIZERS = (QUANTIZE, DEQUANTIZE)


BY_ROW = (
    *QUANTIZERS, *CLAMPS, aten.layer_norm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    aten.gelu.default, aten.tanh.default, aten.sigmoid.default, aten.leaky_relu.default, aten.elu.default,
)  # fmt: skip
"""operators that need no axis but the last where their other operands have none"""


MULTIPLY = torch.ops.pqk.matmul_integer_to_float.default


def quantized_tensors(int8_graph: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """`(layer, node)` of every activation that is quantized, in the order of the quantizing nodes in `model.onnx`."""
    kinds = (QUANTIZE, DYNAMIC)
    return [(n.meta["layer"], n) for n in int8_graph.graph.nodes if n.op == "call_function" and n.target in kinds]
