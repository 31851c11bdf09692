"""Fake-quantizers of the grid in blocks of 32 (see `blocks`): activations on own ranges, weights on learned steps.

What a linear layer computes between the two is what `MatMulNBits` computes, to the rounding of floats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pqk.quant.blocks import BLOCK, WeightBits, choose_scales, extremes, in_blocks, round_trip
from pqk.quant.fake_quant import DynamicFakeQuant, WeightFakeQuant
from pqk.quant.qparams import TINY, Grid, Method


class BlockStep(torch.autograd.Function):
    """Rounding in blocks, each on the range that it has: nothing is clipped, so the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return round_trip(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class LearnedBlockSteps(torch.autograd.Function):
    """`LearnedStepPerChannel` over the blocks of a weight [N, K], each turned to the side with the one integer more.

    Only the weight is kept for the way back, which rounds it again: a language model's weights are most of its memory,
    and the rounded copy is kept by the product that reads it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, sign: Tensor, low: int, high: int) -> Tensor:
        """`scale` and `sign` are [N * B]."""
        step = scale.detach().clamp(min=TINY).mul(sign).view(len(weight), -1, 1)
        ctx.save_for_backward(weight, step)
        ctx.low, ctx.high = low, high
        return _rounded(weight, step, low, high).flatten(1)[:, : weight.shape[1]]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, step = ctx.saved_tensors
        blocks, of_blocks = in_blocks(weight), in_blocks(g)
        position = blocks / step  # of a negative step's block, on the side that the grid has
        of_weight = torch.where((position > ctx.low) & (position < ctx.high), of_blocks, 0)
        of_scale = None
        if ctx.needs_input_grad[1]:
            k = 1 / math.sqrt(BLOCK * ctx.high)
            moved = position.round().clamp_(ctx.low, ctx.high).mul_(of_blocks).sub_(position.mul_(of_weight))
            of_scale = moved.sum(-1).flatten() * step.sign().flatten() * k
        return of_weight.flatten(1)[:, : weight.shape[1]], of_scale, None, None, None


def _rounded(weight: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """`weight` [N, K] on the grid of steps [N, B, 1], as blocks."""
    return torch.div(in_blocks(weight), step).round_().clamp_(low, high).mul_(step)


class BlockFakeQuant(DynamicFakeQuant):
    """Fake-quantizer of an activation [..., K], in 8 bits on the range that each block of each row has.

    A row's neighbours in a batch do not move its rounding, as they do with one range a tensor.
    """

    def forward(self, x: Tensor) -> Tensor:
        return BlockStep.apply(x) if self.mode == "on" else x


class BlockWeightFakeQuant(WeightFakeQuant):
    """Fake-quantizer of a weight [N, K]. `scale` is a float32 [N * B] parameter, one step for each of B blocks a row.

    Steps are positive while they are learned, and `sign` [N * B], which `calibrate` sets, says which side of zero has
    the one integer more; their product is what the runtime knows as a scale.
    """

    sign: Tensor

    def __init__(self, rows: int, columns: int, bits: WeightBits, learned: bool = True) -> None:
        low, high = extremes(bits)
        super().__init__(Grid("int8", low, high, symmetric=True), rows * -(-columns // BLOCK), learned)
        self.rows, self.columns, self.bits = rows, columns, bits
        self.register_buffer("sign", torch.ones(len(self.scale)))

    def forward(self, weight: Tensor) -> Tensor:
        if self.mode != "on":
            return weight
        rounded: Tensor = LearnedBlockSteps.apply(weight, self.scale, self.sign, self.grid.qmin, self.grid.qmax)
        return rounded

    def calibrate(self, weight: Tensor, method: Method, percentile: float) -> None:
        """Set the steps and their signs from the weight's values and turn the quantizer on."""
        scales = choose_scales(weight, self.bits, method, percentile).flatten()
        with torch.no_grad():
            self.scale.copy_(scales.abs())
            self.sign.copy_(torch.where(scales < 0, -1.0, 1.0))
        self.mode = "on"

    def block_scales(self) -> Tensor:
        """float32 [N, B]: the scales as the runtime reads them."""
        return (self.sign * self.scale.detach().clamp(min=TINY)).view(self.rows, -1)

    def extra_repr(self) -> str:
        return f"{self.bits} bits [{self.rows}, {self.columns}] in blocks of {BLOCK}, mode={self.mode}"
