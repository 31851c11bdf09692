"""The custom operators of the INT8 graph: quantize, dequantize, and their dynamic forms.

They are registered in a package that kernels may import, so that a saved `student.pt2` loads wherever the kernels do:
`pqk::quantize` and `pqk::dequantize`, for ranges that are found at run time `pqk::quantize_dynamic_linear` and
`pqk::matmul_integer_to_float`, and for integers in blocks `pqk::matmul_nbits` and `pqk::gather_block_quantized`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk.quant.blocks import BLOCK, round_activations, unpack
from pqk.quant.qparams import Grid, QParams, dynamic_qparams, per_axis, quantize


@torch.library.custom_op("pqk::quantize", mutates_args=())
def quantize_op(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Per-tensor quantization as one node of the INT8 graph; `zero_point`'s dtype (uint8 or int8) is the result's.

    The integers are contiguous, however `x` lies in memory: with channels last, torch (2.13) refuses to pool integers
    of planes with more values than their type has.
    """
    dtype: Any = "uint8" if zero_point.dtype == torch.uint8 else "int8"
    return quantize(x, QParams(scale, zero_point, Grid(dtype, qmin, qmax, symmetric=False))).contiguous()


@quantize_op.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("pqk::dequantize", mutates_args=())
def dequantize_op(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """float32 values of uint8, int8 or int32 `q`; `scale` and `zero_point` are [] or [C] along `axis`."""
    scale, zero_point = (per_axis(p, q, axis) for p in (scale, zero_point))
    return (q.to(torch.float32) - zero_point.to(torch.float32)) * scale


@dequantize_op.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("pqk::quantize_dynamic_linear", mutates_args=())
def quantize_dynamic_op(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers uint8, scale float32 [] and zero point uint8 [] of `x` on the range that it has."""
    qparams = dynamic_qparams(x)
    return quantize(x, qparams), qparams.scale, qparams.zero_point.to(torch.uint8)


@quantize_dynamic_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    integers = torch.empty_like(x, dtype=torch.uint8)
    return integers, x.new_empty((), dtype=torch.float32), x.new_empty((), dtype=torch.uint8)


@torch.library.custom_op("pqk::matmul_integer_to_float", mutates_args=())
def matmul_integer_to_float_op(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    """float32 [..., N] of uint8 `x` [..., K] and int8 `weight` [K, N]: the exact accumulator times both scales.

    `x_scale` and `x_zero_point` are [], `weight_scale` is [N].
    """
    accumulator = (x.double() - x_zero_point.double()) @ weight.double()
    return accumulator.float() * (x_scale * weight_scale)


@matmul_integer_to_float_op.register_fake
def _(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]), dtype=torch.float32)


@torch.library.custom_op("pqk::matmul_nbits", mutates_args=())
def matmul_nbits_op(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """float32 [..., N] of `x` [..., K], rounded in blocks (see `blocks`), and a packed weight [N, B, 4 * bits].

    `scale` is float32 [N, B], `bias` [N]. Every product is exact and the sums are of float64, rounded once.
    """
    q, steps = round_activations(x.float())
    rows = (q.double() * steps.double().unsqueeze(-1)).flatten(-2)
    columns = (unpack(weight).double() * scale.double().unsqueeze(-1)).flatten(1)
    result = rows @ columns.t()
    return (result if bias is None else result + bias.double()).float()


@matmul_nbits_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@torch.library.custom_op("pqk::gather_block_quantized", mutates_args=())
def gather_block_quantized_op(table: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    """float32 rows [..., 32 * B] that int64 `indices` name in a packed table [V, B, 4 * bits] of scales [V, B]."""
    return (unpack(table[indices]) * scale[indices].unsqueeze(-1)).flatten(-2)


@gather_block_quantized_op.register_fake
def _(table: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    return scale.new_empty((*indices.shape, scale.shape[1] * BLOCK))
