"""Norms of a model's own make: modules that bring channels to one size and give each a scale, as RMS norms do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pqk.copies import copy_of

SAME = 1e-2
"""largest relative difference of what a norm makes of a tensor and of four times that: what its epsilon makes"""


def is_own_norm(module: nn.Module) -> bool:
    """Whether a module has a value for each channel, no other parameters, and takes [..., C] of any size to one size.

    Layers of torch that know of their channels are none.
    """
    widths = {p.shape for p in module.parameters(recurse=False)}
    if len(widths) != 1 or len(next(iter(widths))) != 1 or any(True for _ in module.children()):
        return False
    if isinstance(module, nn.LayerNorm) or type(module).forward is nn.Module.forward:
        return False
    weight = next(module.parameters())
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            one, other = (copy_of(module, "student").eval()(each) for each in (x, 4 * x))
    except Exception:  # what takes no such tensor is no norm
        return False
    same = isinstance(one, Tensor) and one.shape == x.shape and bool(one.any())
    return same and bool((one - other).abs().max() <= SAME * one.abs().max())


@contextmanager
def over_kept(layer: nn.Module, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Runs such a norm, within the context, over the kept channels alone; the others come out as zero.

    Args:
        layer: the norm.
        kept: for each of its parameters the channels that it keeps, the same ones.
    """
    layer.forward = _run(layer, layer.forward, kept)
    try:
        yield
    finally:
        del layer.forward


def _run(layer: nn.Module, forward: Callable[..., Any], kept: Mapping[str, Sequence[int]]) -> Callable[..., Any]:
    channels = [*next(iter(kept.values()))]

    def run(x: Tensor) -> Tensor:
        whole = {name: layer.get_parameter(name).data for name in kept}
        width = len(next(iter(whole.values())))
        try:
            for name, values in whole.items():
                layer.get_parameter(name).data = values[channels]
            resize(layer, width, len(channels))
            found = forward(x[..., channels])
        finally:
            for name, values in whole.items():
                layer.get_parameter(name).data = values
            resize(layer, len(channels), width)
        output = x.new_zeros(*found.shape[:-1], width)
        output[..., channels] = found
        return output

    return run


def resize(layer: Any, before: int, now: int) -> None:
    """Sets the shape that a norm of torch's keeps of its channels."""
    if getattr(layer, "normalized_shape", None) == (before,):
        layer.normalized_shape = (now,)
