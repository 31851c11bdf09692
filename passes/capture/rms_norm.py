"""RMS norms that a model spells out, as the one operator that kernels and runtimes know.

`x * rsqrt(mean(x ** 2) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467) is five operators in the code of
most language models, and one in torch, in ONNX and among the kernels here.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from pqk.core.aten import aten
from pqk.core.graph import arguments, call, operand, replace, shape


def join_rms_norm(graph_module: fx.GraphModule, rsqrt: fx.Node) -> None:
    """One `aten.rms_norm` in the place of the norm around `rsqrt`, if it is one over the last axis."""
    found = _square_mean(rsqrt)
    if found is None or len(rsqrt.users) != 1:
        return
    x, eps = found
    scaled = next(iter(rsqrt.users))
    if scaled.target is not aten.mul.Tensor or set(scaled.args) != {x, rsqrt}:
        return
    size, weight, last = shape(x)[-1], None, scaled
    if len(scaled.users) == 1:
        product = next(iter(scaled.users))
        other = _other(product, scaled)
        if other is not None and shape(other) == (size,):
            weight, last = other, product
    with graph_module.graph.inserting_before(last):
        norm = call(graph_module.graph, aten.rms_norm.default, (x, [size], weight, eps), last)
    replace(graph_module, last, norm)


def _square_mean(rsqrt: fx.Node) -> tuple[fx.Node, float] | None:
    """x and eps of `rsqrt(mean(x ** 2) + eps)`, a mean over the last axis that stays; else None."""
    total = operand(rsqrt)
    if total.target is not aten.add.Tensor or len(total.args) > 2 or not isinstance(total.args[1], float):
        return None
    mean = operand(total)
    if mean.target is not aten.mean.dim:
        return None
    a, square, rank = arguments(mean), operand(mean), len(shape(mean))
    over_last = [d % rank for d in a["dim"] or ()] == [rank - 1] and a["keepdim"] and a["dtype"] is None
    if not over_last or shape(square)[-1] is None:
        return None
    x = operand(square)
    is_power = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    is_product = square.target is aten.mul.Tensor and square.args[1] is x
    return (x, total.args[1]) if is_power or is_product else None


def _other(product: fx.Node, one: fx.Node) -> Any:
    """What `product` multiplies `one` with, where that is a node; else None."""
    if product.target is not aten.mul.Tensor or len(product.args) != 2:
        return None
    others = [a for a in product.args if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
