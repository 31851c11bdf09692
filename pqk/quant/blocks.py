"""The grid of ONNX Runtime's `MatMulNBits` (com.microsoft): integers in blocks of 32 along the input of a linear layer.

With `accuracy_level` 4 its kernels for x86 compute, of a row x and a column of weights w, block by block (the last one
filled up with zeros),

    s = max |x| / 127,  q = round_half_even(x * (127 / max |x|)),  y = bias + Σ s * scale * Σ q * (w - 2^(bits - 1))

the same for one row and for many, in 8 and in 4 bits, on AVX2 as on VNNI: no product saturates. The reciprocal is
multiplied with, where every other quantizer here divides; a half falls accordingly. Only the outer sum, which is one of
floats, has the kernel's own order, and its own way of taking off what the zero point adds. Scales of weights may be
negative.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.quant.qparams import TINY, Method

BLOCK = 32
"""values that share a scale"""
LEVELS = 127
"""the largest integer of an activation"""
SHRUNKEN = 40
"""scales that the search for the least squared error tries, from the one that covers the block downwards"""

WeightBits = Literal[8, 4]
"""bits of a weight"""


def in_blocks(x: Tensor) -> Tensor:
    """`x` [..., K] as [..., ceil(K / 32), 32], filled up with zeros."""
    short = -x.shape[-1] % BLOCK
    return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, BLOCK))


def round_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [..., B, 32] (as float32, within ±127) of `x` [..., K] and their scales [..., B]."""
    blocks = in_blocks(x)
    largest = blocks.abs().amax(-1)
    inverse = torch.div(torch.full_like(largest, LEVELS), largest)  # a number over a tensor is rounded twice by torch
    inverse = inverse.masked_fill(inverse.isinf(), 0.0)  # of zeros, and of what is too small to have a reciprocal
    return (blocks * inverse.unsqueeze(-1)).round_(), largest / LEVELS


def round_trip(x: Tensor) -> Tensor:
    """What the kernel takes `x` [..., K] for: its integers times their scales."""
    q, scale = round_activations(x)
    return q.mul_(scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]


def extremes(bits: WeightBits) -> tuple[int, int]:
    """The least and the largest integer of a weight, around zero: -8 and 7, or -128 and 127."""
    half = 1 << (bits - 1)
    return -half, half - 1


def choose_scales(weight: Tensor, bits: WeightBits, method: Method, percentile: float) -> Tensor:
    """The scales [N, B] of a weight [N, K], negative where a block's largest magnitude is positive.

    So that magnitude has the one integer more that is below zero (as in ggml's Q4_0): steps are an eighth, not a
    seventh, of it. `method` is that of `qparams.choose`, in each block.
    """
    blocks = in_blocks(weight.detach().float())
    low, high = extremes(bits)
    sign = torch.where(blocks.amax(-1) > -blocks.amin(-1), -1.0, 1.0)
    turned = blocks * sign.unsqueeze(-1)
    ends = turned
    if method == "percentile":
        drop = int((1 - percentile / 100) / 2 * BLOCK)
        ends = turned.sort(-1).values[..., drop : BLOCK - drop]
    scale = torch.maximum(ends.amin(-1) / low, ends.amax(-1) / high).clamp(min=TINY)
    return sign * (_least_squares(turned, scale, low, high) if method == "mse" else scale)


def _least_squares(blocks: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The scale among shrunken ones, down to 22 per cent, with the least squared error in each block."""
    best, error = scale, torch.full_like(scale, torch.inf)
    for i in range(SHRUNKEN):
        tried = (scale * (1 - 0.02 * i)).unsqueeze(-1)
        found = torch.div(blocks, tried).round_().clamp_(low, high).mul_(tried).sub_(blocks).square_().sum(-1)
        best, error = torch.where(found < error, tried.squeeze(-1), best), torch.minimum(found, error)
    return best


def round_weights(weight: Tensor, scale: Tensor, bits: WeightBits) -> Tensor:
    """The integers of a weight [N, K] on scales [N, B], moved up to begin at 0: uint8 [N, B, 32]."""
    low, high = extremes(bits)
    return torch.div(in_blocks(weight), scale.unsqueeze(-1)).round_().clamp_(low, high).sub_(low).to(torch.uint8)


def pack(integers: Tensor, bits: WeightBits) -> Tensor:
    """uint8 [N, B, 32] as the operator stores it: uint8 [N, B, 4 * bits], of two 4-bit neighbours the first lower."""
    return integers if bits == 8 else integers[..., 0::2] | (integers[..., 1::2] << 4)


def bits_of(packed: Tensor) -> WeightBits:
    """How many bits a packed weight [N, B, 4 * bits] has."""
    return 8 if packed.shape[-1] == BLOCK else 4


def unpack(packed: Tensor) -> Tensor:
    """Integers around zero, as float32 [N, B, 32], of a packed weight."""
    bits = bits_of(packed)
    integers = packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return integers.to(torch.float32) + extremes(bits)[0]
