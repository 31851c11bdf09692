"""What is known about ATen operators: one row an operator, of which every tuple here is a selection.

A rule or emitter that names an operator finds it here, also where only the rule itself has something to say about it.
A new activation is one row, and a step of `pqk.kernels.common.epilogue` where a fused launch is to compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import pqk.quant.ops  # noqa: F401 (the operators that this file names)
from pqk.core.graph import arguments, is_float, operand

aten = torch.ops.aten
QUANTIZE = torch.ops.pqk.quantize.default
DYNAMIC = torch.ops.pqk.quantize_dynamic_linear.default
DEQUANTIZE = torch.ops.pqk.dequantize.default
MULTIPLY = torch.ops.pqk.matmul_integer_to_float.default
NBITS = torch.ops.pqk.matmul_nbits.default
GATHER_NBITS = torch.ops.pqk.gather_block_quantized.default

Limit = float | str | None
"""a bound of a clamp: a number, the name of the argument that holds it, or none"""


@dataclass(frozen=True)
class Operator:
    """One overload and its traits; a row without traits is of an operator that single rules deal with."""

    overload: Any
    """a `torch._ops.OpOverload`"""
    output_axis: int | None = None
    """the axis of its weight that holds output channels; batch norm folds into such an operator"""
    weighted: bool = False
    """its integer kernel multiplies a value by weights, and adds a bias"""
    product: bool = False
    """its integer kernel multiplies two values"""
    float_output: bool = False
    """its integer kernel can put out floats"""
    light: bool = False
    """it has an integer kernel that pays only beside other integer kernels"""
    follows_inputs: bool = False
    """a light operator that computes in integers wherever all its inputs are integers"""
    limits: tuple[Limit, Limit] | None = None
    """lower and upper bound of a clamp"""
    step: str = ""
    """the step of a launch's epilogue that it is, whatever its arguments (GELU by tanh has a name of its own)"""
    residual_step: str = ""
    """the step of a launch's epilogue that it is with another tensor"""
    pointwise: bool = False
    """it computes each element from the elements in its place"""
    by_row: bool = False
    """it needs no axis but the last where its other operands have none"""
    same_shape: bool = False
    """its output has the axes of an input, but for the last"""
    recurrent: bool = False
    """it runs over a sequence step by step"""
    norm: bool = False
    """a norm over the last axes, which one launch computes with the quantize behind it"""
    moves: bool = False
    """it only moves values or picks the largest, so that in most forms it acts on integers as it does on floats"""
    view: bool = False
    """its result is a view, which takes no launch (a reshape's nearly always is)"""
    reshapes: bool = False
    """it keeps all values in their order"""
    pads: bool = False
    shortcut: bool = False
    """a movement that the launch that adds a shortcut can do as it reads, and that has a form in NHWC"""
    no_op: bool = False
    """it does nothing in eval mode, memory aside"""
    guard: bool = False
    """it computes nothing and checks what was traced"""
    quantizes: bool = False
    """it makes integers of floats"""
    takes_scale: bool = False
    """its second and third argument are scale and zero point"""
    autograd: tuple[str, ...] = ()
    """where it keeps channels in their places: how autograd may call it, without endings"""


OPERATORS: tuple[Operator, ...] = (
    # layers with weights
    Operator(aten.conv1d.default, output_axis=0, weighted=True),
    Operator(aten.conv2d.default, output_axis=0, weighted=True),
    Operator(aten.conv3d.default, output_axis=0, weighted=True),
    Operator(aten.linear.default, output_axis=0, weighted=True, float_output=True, same_shape=True),
    Operator(aten.conv_transpose1d.default, output_axis=1),
    Operator(aten.conv_transpose2d.input, output_axis=1),
    Operator(aten.conv_transpose3d.input, output_axis=1),
    Operator(aten.embedding.default),
    # products and attention
    Operator(aten.matmul.default, product=True, float_output=True),
    Operator(aten.bmm.default, product=True, float_output=True),
    Operator(MULTIPLY),
    Operator(NBITS),
    Operator(GATHER_NBITS),
    Operator(aten.softmax.int),
    # norms
    Operator(aten.layer_norm.default, norm=True, by_row=True, same_shape=True),
    Operator(aten.rms_norm.default, norm=True, by_row=True, same_shape=True),
    # arithmetic
    Operator(
        aten.add.Tensor, light=True, follows_inputs=True, residual_step="add",
        pointwise=True, by_row=True, same_shape=True, autograd=("Add",),
    ),
    Operator(
        aten.mul.Tensor, light=True, residual_step="mul",
        pointwise=True, by_row=True, same_shape=True, autograd=("Mul",),
    ),
    Operator(aten.sub.Tensor, pointwise=True, by_row=True),
    Operator(aten.div.Tensor, pointwise=True, by_row=True),
    Operator(aten.exp.default, pointwise=True),
    Operator(aten.neg.default, pointwise=True),
    Operator(aten.abs.default, pointwise=True),
    # clamps
    Operator(
        aten.relu.default, limits=(0.0, None), pointwise=True, by_row=True, same_shape=True, autograd=("Relu",)
    ),
    Operator(aten.relu6.default, limits=(0.0, 6.0), pointwise=True, by_row=True),
    Operator(
        aten.hardtanh.default, limits=("min_val", "max_val"), pointwise=True, by_row=True, autograd=("Hardtanh",)
    ),
    Operator(aten.clamp.default, limits=("min", "max"), pointwise=True, by_row=True, autograd=("Clamp",)),
    Operator(aten.clamp_min.default, limits=("min", None), pointwise=True, by_row=True),
    # other activations
    Operator(
        aten.sigmoid.default, light=True, step="sigmoid", pointwise=True, by_row=True, autograd=("Sigmoid",)
    ),
    Operator(aten.leaky_relu.default, light=True, pointwise=True, by_row=True, autograd=("LeakyRelu",)),
    Operator(
        aten.gelu.default, step="gelu", pointwise=True, by_row=True, same_shape=True, autograd=("Gelu",)
    ),
    Operator(aten.tanh.default, pointwise=True, by_row=True, same_shape=True),
    Operator(aten.elu.default, pointwise=True, by_row=True, autograd=("Elu",)),
    Operator(aten.mish.default, pointwise=True, autograd=("Mish",)),
    Operator(aten.softplus.default, pointwise=True),
    Operator(aten.log_sigmoid.default),
    Operator(aten.threshold.default, autograd=("Threshold",)),
    # pools, and what joins values
    Operator(aten.mean.dim, light=True, follows_inputs=True),
    Operator(aten.avg_pool2d.default, light=True, follows_inputs=True, autograd=("AvgPool",)),
    Operator(aten.max_pool2d.default, moves=True, autograd=("MaxPool",)),
    Operator(aten.avg_pool1d.default),
    Operator(aten.avg_pool3d.default),
    Operator(aten.max_pool1d.default),
    Operator(aten.max_pool3d.default),
    Operator(aten.cat.default, light=True),
    # movement
    Operator(aten.reshape.default, moves=True, view=True, reshapes=True),
    Operator(aten.flatten.using_ints, moves=True, view=True, reshapes=True),
    Operator(aten.unflatten.int, moves=True, view=True, reshapes=True),
    Operator(aten.permute.default, moves=True, view=True),
    Operator(aten.transpose.int, moves=True, view=True),
    Operator(aten.t.default, moves=True, view=True),
    Operator(aten.slice.Tensor, moves=True, view=True, shortcut=True),
    Operator(aten.select.int, moves=True, view=True),
    Operator(aten.squeeze.default, moves=True, view=True),
    Operator(aten.squeeze.dim, moves=True, view=True),
    Operator(aten.squeeze.dims, moves=True, view=True),
    Operator(aten.unsqueeze.default, moves=True, view=True),
    Operator(aten.expand.default, moves=True, view=True),
    Operator(aten.pad.default, moves=True, pads=True, shortcut=True),
    Operator(aten.constant_pad_nd.default, moves=True, pads=True, shortcut=True),
    Operator(aten.index_select.default, moves=True, shortcut=True),
    # between floats and integers
    Operator(QUANTIZE, quantizes=True, takes_scale=True, pointwise=True, by_row=True),
    Operator(DEQUANTIZE, takes_scale=True, pointwise=True, by_row=True),
    Operator(DYNAMIC, quantizes=True),
    # what `capture` writes in another way
    Operator(aten.conv1d.padding),
    Operator(aten.conv2d.padding),
    Operator(aten.conv3d.padding),
    Operator(aten.mm.default),
    Operator(aten.addmm.default),
    Operator(aten.scaled_dot_product_attention.default),
    Operator(aten.batch_norm.default),
    Operator(aten._native_batch_norm_legit_no_training.default),
    Operator(aten.silu.default, autograd=("Silu",)),
    Operator(aten.hardswish.default, autograd=("Hardswish",)),
    Operator(aten.hardsigmoid.default, autograd=("Hardsigmoid",)),
    Operator(aten.adaptive_avg_pool2d.default, autograd=("AdaptiveAvgPool", "MkldnnAdaptiveAvgPool")),
    Operator(aten.chunk.default),
    Operator(aten.split.Tensor),
    Operator(aten.split_with_sizes.default),
    Operator(aten.unbind.int),
    Operator(aten.view.default),
    Operator(aten._unsafe_view.default),
    Operator(aten.to.dtype),
    Operator(aten.copy_.default),
    Operator(aten.to.dtype_layout),
    Operator(aten.copy.default),
    Operator(aten.slice_scatter.default),
    Operator(aten.select_scatter.default),
    Operator(aten.index_put.default),
    Operator(aten.where.self),
    Operator(aten.clamp.Tensor),
    Operator(aten.any.dim),
    Operator(aten._to_copy.default, autograd=("ToCopy",)),
    # what `capture` takes out
    Operator(aten.dropout.default, no_op=True, autograd=("Dropout", "NativeDropout")),
    Operator(aten.feature_dropout.default, no_op=True, autograd=("FeatureDropout",)),
    Operator(aten.alpha_dropout.default, no_op=True),
    Operator(aten.feature_alpha_dropout.default, no_op=True),
    Operator(aten.rrelu.default),
    Operator(aten.rrelu_with_noise_functional.default),
    Operator(aten.detach.default, no_op=True),
    Operator(aten.alias.default, no_op=True),
    Operator(aten.lift_fresh_copy.default, no_op=True),
    Operator(aten.contiguous.default, no_op=True),
    Operator(aten.clone.default, no_op=True, autograd=("Clone",)),
    Operator(aten._assert_tensor_metadata.default, guard=True),
    Operator(aten._assert_scalar.default, guard=True),
    Operator(aten.sym_constrain_range_for_size.default, guard=True),
    # sizes
    Operator(aten.sym_size.int),
    # what a token sees
    Operator(aten.arange.default),
    Operator(aten.arange.start),
    Operator(aten.le.Tensor),
    Operator(aten.lt.Scalar),
    Operator(aten.gt.Scalar),
    Operator(aten.bitwise_and.Tensor),
    Operator(aten.where.Scalar),
    Operator(aten.cos.default),
    Operator(aten.sin.default),
    Operator(aten.rsqrt.default),
    Operator(aten.pow.Tensor_Scalar),
    # recurrence
    Operator(aten.gru.input, recurrent=True),
    Operator(aten.lstm.input, recurrent=True),
    Operator(aten.rnn_tanh.input, recurrent=True),
    Operator(aten.rnn_relu.input, recurrent=True),
)  # fmt: skip


def select(trait: Callable[[Operator], object]) -> tuple[Any, ...]:
    """The overloads of the operators that have a trait."""
    return tuple(operator.overload for operator in OPERATORS if trait(operator))


OUTPUT_AXIS: dict[Any, int] = {o.overload: o.output_axis for o in OPERATORS if o.output_axis is not None}
"""operators that batch norm folds into -> the axis of the weight that holds output channels"""
WEIGHTED = select(lambda o: o.weighted)
PRODUCTS = select(lambda o: o.product)
HEAVY = (*WEIGHTED, *PRODUCTS)
"""operators that are integer wherever they can be"""
FLOAT_OUTPUT = select(lambda o: o.float_output)
LIGHT = select(lambda o: o.light)
FOLLOWS_INPUTS = select(lambda o: o.follows_inputs)
LIMITS: dict[Any, tuple[Limit, Limit]] = {o.overload: o.limits for o in OPERATORS if o.limits is not None}
CLAMPS = tuple(LIMITS)
STEPS: dict[Any, str] = {o.overload: o.step for o in OPERATORS if o.step}
RESIDUAL_STEPS: dict[Any, str] = {o.overload: o.residual_step for o in OPERATORS if o.residual_step}
POINTWISE = select(lambda o: o.pointwise)
BY_ROW = select(lambda o: o.by_row)
SAME_SHAPE = select(lambda o: o.same_shape)
NORMS = select(lambda o: o.norm)
MOVEMENT = select(lambda o: o.moves)
VIEWS = select(lambda o: o.view)
RESHAPES = select(lambda o: o.reshapes)
PADS = select(lambda o: o.pads)
SHORTCUTS = select(lambda o: o.shortcut)
NO_OPS = select(lambda o: o.no_op)
GUARDS = select(lambda o: o.guard)
RECURRENT = select(lambda o: o.recurrent)
QUANTIZERS = select(lambda o: o.quantizes)
TAKES_SCALE = select(lambda o: o.takes_scale)
SAME_CHANNELS = frozenset(name for operator in OPERATORS for name in operator.autograd)
"""autograd's names, without their endings, of operators that keep channels where they are"""


def bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The constant bounds of a ReLU or clamp whose range includes 0; None for anything else."""
    if node.op != "call_function" or node.target not in LIMITS:
        return None
    a = arguments(node)
    low, high = (a[limit] if isinstance(limit, str) else limit for limit in LIMITS[node.target])
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
    if node.target in PADS:
        return a.get("mode", "constant") == "constant" and (not a["value"] or pads_below(node))
    return node.target is not aten.max_pool2d.default or not a["ceil_mode"]


def pads_below(node: fx.Node) -> bool:
    """Whether `node` pads with what is below every value, for pools of the largest: any lower integer will do."""
    value, users = arguments(node)["value"], list(node.users)
    pools = all(u.target is aten.max_pool2d.default and moves(u) for u in users)
    return isinstance(value, int | float) and value <= torch.finfo(torch.float32).min and pools and bool(users)


def root(node: fx.Node) -> fx.Node:
    """The node whose quantizer `node`'s value has: itself, or where it was moved from."""
    while moves(node):
        node = operand(node)
    return node


def quantized_tensors(int8_graph: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """`(layer, node)` of every activation that is quantized, in the order of the quantizing nodes in `model.onnx`."""
    nodes = int8_graph.graph.nodes
    return [(n.meta["layer"], n) for n in nodes if n.op == "call_function" and n.target in QUANTIZERS]


def rounded_inside(int8_graph: fx.GraphModule) -> list[fx.Node]:
    """What operators read that round it themselves, in blocks, in the order of the `MatMulNBits` in `model.onnx`."""
    return [operand(node) for node in int8_graph.graph.nodes if node.target is NBITS]
