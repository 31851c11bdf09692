"""A model's mode, what of it is trained, and torch's fused attention: set for a while, given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """`model` in eval mode for a while; then every module of it has the mode that it had.

    Module by module, since a part can be in eval mode inside a model that trains, such as a frozen batch norm; and by
    the flag alone, since modules may do more in `train()`, and captured graphs may refuse it.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """`model` with no parameter that asks for a gradient for a while: torch's counters stumble over views of one."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def fused_layers(enabled: bool) -> Iterator[None]:
    """Whether attention and encoder layers of torch may run as one operator in eval mode, for a while.

    That "fast path" of `nn.MultiheadAttention` and `nn.TransformerEncoder` neither counts as products nor has an
    integer form, and it sets padded positions to zero: what is counted, traced and captured, and what that is compared
    with, goes without. Times of torch are taken with it.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
