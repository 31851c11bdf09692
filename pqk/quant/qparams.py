"""Integer grids, scales and rounding: `x ≈ scale * (q - zero_point)`.

Rounding is half to even and clamping comes after the zero point is added, as ONNX QuantizeLinear defines both, so the
fake-quantized student, the INT8 graph and the runtime compute the same integers. `x / scale` is a true division
everywhere: a multiplication by the reciprocal lands on the other side of a tie now and then.

The custom ops of the INT8 graph are registered here, on the floor that kernels may import, so that a saved
`student.pt2` loads wherever the kernels do: `pqk::quantize` and `pqk::dequantize`, and for ranges that are found at run
time `pqk::quantize_dynamic_linear` and `pqk::matmul_integer_to_float`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

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


@torch.library.custom_op("pqk::quantize", mutates_args=())
def quantize_op(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Per-tensor quantization as one node of the INT8 graph; `zero_point`'s dtype (uint8 or int8) is the result's."""
    dtype: Any = "uint8" if zero_point.dtype == torch.uint8 else "int8"
    return quantize(x, QParams(scale, zero_point, Grid(dtype, qmin, qmax, symmetric=False)))


@quantize_op.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("pqk::dequantize", mutates_args=())
def dequantize_op(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """float32 values of uint8, int8 or int32 `q`; `scale` and `zero_point` are [] or [C] along `axis`."""
    scale, zero_point = (per_axis(p, q, axis) for p in (scale, zero_point))
    return (q.to(torch.float32) - zero_point.to(torch.float32)) * scale


@dequantize_op.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


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

    Zeros alone have scale 1.
    """
    low, high = (end.float() for end in torch.aminmax(x.detach()))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.where(high > low, (high - low) / (U8.qmax - U8.qmin), 1.0)
    # A range whose 255th part is less than a float can be has scale 0, and 0 / 0 the zero point of ONNX Runtime.
    zero_point = (U8.qmin - low / scale).nan_to_num(nan=U8.qmax).clamp(U8.qmin, U8.qmax).round()
    return QParams(scale, zero_point.to(torch.int32), U8)


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


class LearnedStep(torch.autograd.Function):
    """Fake quantization whose step is learned (LSQ: Esser et al. 2020, "Learned Step Size Quantization", section 2).

        forward   y = s * clamp(round(x / s), lo, hi)            lo = qmin - zero_point, hi = qmax - zero_point
        backward  dx = g where lo*s < x < hi*s, else 0
                  ds = k * Σ g * (clamp(round(x/s), lo, hi) - [inside] x/s) = k * (Σ g*y - Σ dx*x) / s

    with k = 1 / sqrt(elements per step * hi). The right-hand form needs only `x` and `y`, which are kept anyway, and
    costs one masked copy and two dot products; a mask, a residual and a reduction cost four passes over memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, limit: float, gain: float) -> Tensor:
        """Per tensor. `scale` [] is used within [TINY, limit], and its gradient flows even where it is clamped.

        The result is scaled by the constant `gain`, which costs nothing here: it is a scaling of the step.
        """
        step = scale.detach().clamp(TINY, limit)
        y = torch.div(x, step).round_().clamp_(low, high).mul_(step * gain)
        ctx.save_for_backward(x, y, step)
        ctx.low, ctx.high, ctx.gain = low, high, gain
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, step = ctx.saved_tensors
        s = step.item()
        if g.stride() != y.stride():  # an expanded gradient, of a mean say: lay it out as the values, for all before it
            g = torch.empty_like(y).copy_(g)
        dx = torch.ops.aten.hardtanh_backward(g, x, ctx.low * s, ctx.high * s)
        ds = None
        if ctx.needs_input_grad[1]:
            k = 1 / math.sqrt(x.numel() * max(ctx.high, -ctx.low))
            ds = _difference_of_dots(g, y, dx, x, ctx.gain) * (k / s)
        return dx if ctx.gain == 1 else dx.mul_(ctx.gain), ds, None, None, None, None


class LearnedStepPerChannel(torch.autograd.Function):
    """`LearnedStep` with one step per channel of axis 0, for weights; a few thousand numbers, so written plainly."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        step = per_axis(scale.detach().clamp(min=TINY), w, 0)
        y = torch.div(w, step).round_().clamp_(low, high).mul_(step)
        ctx.save_for_backward(w, y, step)
        ctx.low, ctx.high = low, high
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, y, step = ctx.saved_tensors
        dw = torch.where((w > ctx.low * step) & (w < ctx.high * step), g, 0)
        ds = None
        if ctx.needs_input_grad[1]:
            k = 1 / math.sqrt(w[0].numel() * ctx.high)
            ds = (g * y - dw * w).flatten(1).sum(1) / step.flatten() * k
        return dw, ds, None, None


class DynamicStep(torch.autograd.Function):
    """Fake quantization on the range of `x`: nothing is clipped, so the gradient passes as if nothing was rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return fake_quantize(x, dynamic_qparams(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class StraightThroughBias(torch.autograd.Function):
    """`bias` [C] on the int32 grid of step `scale` [C]; the gradient passes as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, scale: Tensor) -> Tensor:
        return torch.mul(quantize_bias(bias, scale), scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """The int32 [C] steps of `bias` on an accumulator of step `scale` [C]."""
    return torch.div(bias, scale).round_().clamp_(-BIAS_LEVELS, BIAS_LEVELS).to(torch.int32)


def _difference_of_dots(g: Tensor, y: Tensor, dx: Tensor, x: Tensor, gain: float) -> Tensor:
    """`Σ g*y - gain * Σ dx*x`, as two BLAS dots over memory where all four are laid out as `y`, which is dense."""
    if any(t.stride() != y.stride() for t in (g, dx, x)):
        return torch.sum(g * y) - gain * torch.sum(dx * x)
    flat = [torch.as_strided(t, (t.numel(),), (1,)) for t in (g, y, dx, x)]
    return torch.dot(flat[0], flat[1]) - gain * torch.dot(flat[2], flat[3])
