"""What is known about ONNX operators and ONNX Runtime's own: one row an operator; every set is a selection of rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operands:
    """Shapes of a node's inputs (`()` where absent) and first output, with its attributes."""

    inputs: tuple[Shape, ...]
    output: Shape
    attributes: Mapping[str, Any]


# MACs of a node over the whole batch. Each output of a convolution takes the MACs of one filter, whichever way
# (NCHW, NHWC, NCHWc) the runtime has laid the values out.


def convolution(weight: int) -> Callable[[Operands], int]:
    def macs(at: Operands) -> int:
        return math.prod(at.output) * math.prod(at.inputs[weight][1:])

    return macs


def transposed_convolution(at: Operands) -> int:
    return math.prod(at.inputs[0]) * math.prod(at.inputs[1][1:])


def product(at: Operands) -> int:
    """Gemm and MatMul: each output takes as many MACs as the contracted axis is long."""
    left = at.inputs[0]
    transposed = len(left) > 1 and at.attributes.get("transA", 0)
    return math.prod(at.output) * left[-2 if transposed else -1]


def attention(at: Operands) -> int:
    """com.microsoft Attention: the projection to queries, keys and values, then QK' and PV over all heads.

    ONNX's own operator of that name takes keys, which have more axes than a weight has.
    """
    if len(at.inputs[1]) > 2:
        return attention_of_keys(at)
    (batch, tokens, _), weight = at.inputs[0], at.inputs[1]
    return batch * tokens * math.prod(weight) + 2 * batch * tokens * tokens * at.output[-1]


def attention_of_keys(at: Operands) -> int:
    """ONNX's Attention: QK' and PV, of heads [B, H, T, D], or of [B, T, H * D] and keys kept before [B, G, P, D]."""
    query, key, kept = at.inputs[0], at.inputs[1], (*at.inputs, (), (), ())[4]
    total = key[-2] + (kept[2] if kept else 0)
    return math.prod(query[:-1]) * total * (query[-1] + at.output[-1])


def multi_head_attention(at: Operands) -> int:
    """com.microsoft MultiHeadAttention on separate queries and keys [B, T, D]."""
    query, key = at.inputs[0], at.inputs[1] or at.inputs[0]
    return query[0] * query[1] * key[-2] * (query[-1] + at.output[-1])


def grouped_query_attention(at: Operands) -> int | None:
    """com.microsoft GroupQueryAttention: QK' and PV of queries [B, T, H * D] and all keys, of which those before are
    [B, G, P, D]; None where queries, keys and values are one tensor."""
    query, key, kept = at.inputs[0], at.inputs[1], (*at.inputs, (), (), (), ())[3]
    if not key:
        return None
    return 2 * math.prod(query) * (key[1] + (kept[2] if kept else 0))


def recurrent(at: Operands) -> int:
    """LSTM, GRU and RNN: x [T, B, I] at each of its T steps, weights [directions, gates * H, I or H] of all gates."""
    return math.prod(at.inputs[0][:-1]) * (math.prod(at.inputs[1]) + math.prod(at.inputs[2]))


def few_bits(at: Operands) -> int:
    """com.microsoft MatMulNBits: x [..., K] by a packed weight of N columns."""
    return math.prod(at.inputs[0]) * int(at.attributes["N"])


def einsum(at: Operands) -> int | None:
    """One product for every choice of all letters; None for an ellipsis or more than two operands."""
    terms = bytes(at.attributes["equation"]).decode().replace(" ", "").partition("->")[0].split(",")
    if len(terms) > 2 or any("." in term for term in terms):
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, at.inputs, strict=True):
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values())


MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class OnnxOperator:
    """One operator and its traits; a row without traits is of an operator that the emitter alone writes."""

    name: str
    domain: str = ""
    """that which its name is of: ONNX's own, or ONNX Runtime's"""
    macs: Callable[[Operands], int | None] | None = None
    """how many MACs a node takes; None where shapes do not tell"""
    integer: bool = False
    """it multiplies integers"""
    integer_at: int | None = None
    """the `accuracy_level` at which it multiplies integers"""
    product: bool = False
    """a product of a QDQ file, as emitters write it: of dequantized values, or of bare integers"""
    moves: bool = False
    """it puts values elsewhere and changes none"""
    quantizes: bool = False
    """it makes integers of floats"""
    plumbing: bool = False
    """it computes nothing that a layer is named after"""


ONNX_OPERATORS: tuple[OnnxOperator, ...] = (
    # products of floats
    OnnxOperator("Conv", macs=convolution(1), product=True),
    OnnxOperator("ConvTranspose", macs=transposed_convolution, product=True),
    OnnxOperator("Gemm", macs=product, product=True),
    OnnxOperator("MatMul", macs=product, product=True),
    OnnxOperator("FusedConv", MICROSOFT, macs=convolution(1)),
    OnnxOperator("NhwcFusedConv", MICROSOFT, macs=convolution(1)),
    OnnxOperator("FusedGemm", MICROSOFT, macs=product),
    OnnxOperator("FusedMatMul", MICROSOFT, macs=product),
    OnnxOperator("FusedMatMulActivation", MICROSOFT, macs=product),
    OnnxOperator("TransposeMatMul", MICROSOFT, macs=product),
    OnnxOperator("Attention", MICROSOFT, macs=attention),
    OnnxOperator("MultiHeadAttention", MICROSOFT, macs=multi_head_attention),
    # products of integers
    OnnxOperator("QLinearConv", macs=convolution(3), integer=True),
    OnnxOperator("ConvInteger", macs=convolution(1), integer=True),
    OnnxOperator("QLinearMatMul", macs=product, integer=True),
    OnnxOperator("MatMulInteger", macs=product, integer=True, product=True),
    OnnxOperator("QGemm", MICROSOFT, macs=product, integer=True),
    OnnxOperator("MatMulIntegerToFloat", MICROSOFT, macs=product, integer=True),
    OnnxOperator("DynamicQuantizeMatMul", MICROSOFT, macs=product, integer=True),
    OnnxOperator("QAttention", MICROSOFT, macs=attention, integer=True),
    # other products
    OnnxOperator("Einsum", macs=einsum),
    OnnxOperator("LSTM", macs=recurrent),
    OnnxOperator("GRU", macs=recurrent),
    OnnxOperator("RNN", macs=recurrent),
    OnnxOperator("DynamicQuantizeLSTM", MICROSOFT, macs=recurrent, integer=True),
    OnnxOperator("MatMulNBits", MICROSOFT, macs=few_bits, integer_at=4),
    OnnxOperator("GroupQueryAttention", MICROSOFT, macs=grouped_query_attention),
    # between floats and integers
    OnnxOperator("QuantizeLinear", quantizes=True, plumbing=True),
    OnnxOperator("DynamicQuantizeLinear", quantizes=True, plumbing=True),
    OnnxOperator("DequantizeLinear", plumbing=True),
    OnnxOperator("Cast", plumbing=True),
    # movement
    OnnxOperator("Reshape", moves=True),
    OnnxOperator("Transpose", moves=True),
    OnnxOperator("Squeeze", moves=True),
    OnnxOperator("Unsqueeze", moves=True, plumbing=True),
    OnnxOperator("Flatten", moves=True),
    OnnxOperator("Slice", moves=True),
    OnnxOperator("Gather", moves=True),
    OnnxOperator("Pad", moves=True),
    OnnxOperator("Expand", moves=True),
    OnnxOperator("Identity", moves=True),
    # numbers
    OnnxOperator("Constant", plumbing=True),
    OnnxOperator("Shape", plumbing=True),
    OnnxOperator("Mul"),
    OnnxOperator("Add"),
    OnnxOperator("Sub"),
    OnnxOperator("Min"),
    OnnxOperator("Abs"),
    OnnxOperator("Neg"),
    OnnxOperator("Exp"),
    OnnxOperator("Log"),
    OnnxOperator("GlobalAveragePool"),
    OnnxOperator("ReduceMean"),
)


def select(trait: Callable[[OnnxOperator], object]) -> frozenset[str]:
    """The names of the operators that have a trait."""
    return frozenset(operator.name for operator in ONNX_OPERATORS if trait(operator))


MACS: dict[str, Callable[[Operands], int | None]] = {o.name: o.macs for o in ONNX_OPERATORS if o.macs is not None}
INTEGER = select(lambda o: o.integer)
INSIDE = select(lambda o: o.integer_at is not None)
"""operators that round what they read inside of themselves"""
LEVELS = {o.name: o.integer_at for o in ONNX_OPERATORS if o.integer_at is not None}
PRODUCTS = select(lambda o: o.product)
MOVERS = select(lambda o: o.moves)
QUANTIZERS = select(lambda o: o.quantizes)
PLUMBING = select(lambda o: o.plumbing)


def in_integers(operator: str, attributes: Mapping[str, Any]) -> bool:
    """Whether an operator with these attributes multiplies integers."""
    return operator in INTEGER or (operator in LEVELS and attributes.get("accuracy_level", 0) == LEVELS[operator])


def plain_name(name: str) -> str:
    """The name of a node or value without what ONNX Runtime's optimizations append to it."""
    return re.sub(r"(_token_\d+|_nchwc|_quant|_nhwc)+$", "", name)
