"""Train and eval mode of a model, given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
