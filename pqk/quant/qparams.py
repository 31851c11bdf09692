"""Integer grids, scales and rounding: `x ≈ scale * (q - zero_point)`.

Rounding is half to even and clamping comes after the zero point is added, as ONNX QuantizeLinear defines both, so the
fake-quantized student, the INT8 graph and the runtime compute the same integers. `x / scale` is a true division
everywhere: a multiplication by the reciprocal lands on the other side of a tie now and then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["minmax", "percentile", "mse"]
"""how a range is chosen from values: see `choose`"""
TINY = 1e-9
"""no scale is smaller: a constant zero tensor still needs a positive one"""

BIAS_LEVELS = 1 << 30
"""a bias has at most this many steps, so that int32 holds it and the accumulator it is added to"""


@dataclass(frozen=True)
class Grid:
    """The integers a kernel accepts: `qmin ≤ q ≤ qmax` stored as `dtype`. Symmetric grids have zero point 0."""

    dtype: Literal["uint8", "int8"]
    qmin: int
    qmax: int
    symmetric: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.uint8 if self.dtype == "uint8" else torch.int8


@dataclass(frozen=True)
class QParams:
    """How one tensor is put on a grid. `scale` float32, `zero_point` int32: [] (per tensor) or [C] (per `axis`)."""

    scale: Tensor
    zero_point: Tensor
    grid: Grid
    axis: int | None = None


def per_axis(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """`parameter`, [] or [C], shaped to broadcast along `axis` of `x`."""
    if axis is None or parameter.ndim == 0:
        return parameter
    shape = [1] * x.ndim
    shape[axis] = -1
    return parameter.reshape(shape)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """The integers of float `x`, as the grid's dtype: `clamp(round_half_even(x / scale) + zero_point)`."""
    scale, zero_point = (per_axis(p, x, qparams.axis) for p in (qparams.scale, qparams.zero_point))
    q = torch.div(x, scale).round_().add_(zero_point).clamp_(qparams.grid.qmin, qparams.grid.qmax)
    return q.to(qparams.grid.torch_dtype)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """float32 `scale * (q - zero_point)`; `q` is any integer dtype."""
    scale, zero_point = (per_axis(p, q, qparams.axis) for p in (qparams.scale, qparams.zero_point))
    return (q.to(torch.float32) - zero_point) * scale


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """`dequantize(quantize(x))` without the integer dtype between: the same float32 values, bit for bit."""
    scale, zero_point = (per_axis(p, x, qparams.axis) for p in (qparams.scale, qparams.zero_point))
    low, high = qparams.grid.qmin - zero_point, qparams.grid.qmax - zero_point
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


def from_range(low: Tensor, high: Tensor, grid: Grid, axis: int | None = None) -> QParams:
    """The qparams that cover `[low, high]` ([] or [C]) on `grid`.

    The range always includes 0, which is then exactly representable, so that padding and ReLU add no error. On a
    symmetric grid it is widened to `[-m, m]`; one that never goes below zero (`qmin ≥ 0`) keeps `[0, m]`.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if grid.symmetric:
        reach = high if grid.qmin >= 0 else torch.maximum(-low, high)
        return QParams((reach / grid.qmax).clamp(min=TINY), torch.zeros_like(low, dtype=torch.int32), grid, axis)
    scale = ((high - low) / (grid.qmax - grid.qmin)).clamp(min=TINY)
    zero_point = (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)
    return QParams(scale, zero_point.to(torch.int32), grid, axis)


U8 = Grid("uint8", 0, 255, symmetric=False)
"""the grid of what is quantized dynamically, on every target: ONNX knows no other"""


def dynamic_qparams(x: Tensor) -> QParams:
    """The qparams [] that cover the values `x` at hand, as ONNX DynamicQuantizeLinear and ONNX Runtime define them.

    A tensor of zeros or of nothing gets scale 1.
    """
    values = x.detach() if x.numel() else x.new_zeros(1)
    low, high = (end.float() for end in torch.aminmax(values))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(high > low, (high - low) / (U8.qmax - U8.qmin), 1.0)
    # A range whose 255th part is less than a float can be has scale 0, and 0 / 0 the zero point of ONNX Runtime.
    zero_point = (U8.qmin - low / scale).nan_to_num(nan=U8.qmax).clamp(U8.qmin, U8.qmax).round()
    return QParams(scale, zero_point.to(torch.int32), U8)


def choose(x: Tensor, grid: Grid, method: Method, axis: int | None = None, percentile: float = 99.99) -> QParams:
    """qparams for the values `x`: a sample of an activation (`axis` None) or a weight (a scale per channel of `axis`).

    `minmax` covers everything; `percentile` drops `100 - percentile` per cent, half of it at each end; `mse` tries
    shrunken ranges and keeps the one with the least squared error, per channel (the search of Banner et al. 2019,
    "Post training 4-bit quantization", done numerically).
    """
    rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0).flatten(1)
    low, high = rows.amin(1), rows.amax(1)
    if method == "percentile":
        low, high = _percentiles(rows, percentile)
    elif method == "mse":
        low, high = _least_squares(rows, low, high, grid)
    if axis is None:
        low, high = low.reshape(()), high.reshape(())
    return from_range(low, high, grid, axis)


def _percentiles(rows: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    drop = math.floor((1 - percentile / 100) / 2 * rows.shape[1])
    ordered = rows.sort(dim=1).values
    return ordered[:, drop], ordered[:, rows.shape[1] - 1 - drop]


def _least_squares(rows: Tensor, low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The range among 40 shrinkings of `[low, high]`, from 100 to 22 per cent, with the least squared error per row."""
    best = torch.full_like(low, math.inf)
    best_low, best_high = low.clone(), high.clone()
    for step in range(40):
        share = 1 - 0.02 * step
        qparams = from_range(low * share, high * share, grid, axis=0)
        error = fake_quantize(rows, qparams).sub_(rows).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * share, best_low)
        best_high = torch.where(better, high * share, best_high)
    return best_low, best_high


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """The int32 [C] steps of `bias` on an accumulator of step `scale` [C]."""
    return torch.div(bias, scale).round_().clamp_(-BIAS_LEVELS, BIAS_LEVELS).to(torch.int32)
