"""Fake quantization with gradients: learned steps (LSQ), dynamic ranges, biases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pqk.quant.qparams import TINY, dynamic_qparams, fake_quantize, per_axis, quantize_bias


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


def _difference_of_dots(g: Tensor, y: Tensor, dx: Tensor, x: Tensor, gain: float) -> Tensor:
    """`Σ g*y - gain * Σ dx*x`, as two BLAS dots over memory where all four are laid out as `y`, which is dense."""
    if any(t.stride() != y.stride() for t in (g, dx, x)):
        return torch.sum(g * y) - gain * torch.sum(dx * x)
    flat = [torch.as_strided(t, (t.numel(),), (1,)) for t in (g, y, dx, x)]
    return torch.dot(flat[0], flat[1]) - gain * torch.dot(flat[2], flat[3])
