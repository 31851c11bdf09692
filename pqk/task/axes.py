"""Which axes of the inputs are free: the batch, and lengths that have a name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = "batch"


Axes = Sequence[Sequence[str | None]]
"""for each input the names of its axes; None: of a fixed size"""


def batch_axes(example: Sequence[Tensor]) -> tuple[tuple[str | None, ...], ...]:
    """The axes of inputs that are free in their first one only."""
    return tuple((BATCH, *[None] * (t.ndim - 1)) if t.ndim else () for t in example)


def free_axes(module: nn.Module, example: Sequence[Tensor], axes: Axes | None = None) -> tuple[Any, ...]:
    """`axes` (by default the batch alone) as the `dynamic_shapes` of `torch.export` of `module`.

    The batch is one `Dim` for all inputs. Other axes are free within the limits that the model itself sets, such as a
    table of positions, which the exporter finds. What `forward` takes as `*inputs` is one tuple to the exporter.
    """
    batch = torch.export.Dim(BATCH)
    names = [list(enumerate(a)) for a in (axes or batch_axes(example))]
    free = tuple({i: torch.export.Dim.DYNAMIC if i else batch for i, name in a if name} for a in names)
    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return free
    single = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:single], free[single:])
