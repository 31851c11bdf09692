"""Quantization noise."""

from __future__ import annotations

import torch
from torch import Tensor


def sqnr(reference: Tensor, found: Tensor) -> float:
    """Signal over quantization noise of `found`, in decibels: 10 log10(Σ reference² / Σ (reference - found)²).

    Infinite where both are equal, zeros included.
    """
    reference, found = reference.double(), found.double()
    signal, noise = reference.square().sum(), (reference - found).square().sum()
    return float(-10 * torch.log10(noise / signal.clamp_min(1e-300)))
