"""Which axes of the inputs are free: the batch, and lengths that have a name; which sizes they may have."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sizes:
    """The sizes that a free axis may have: from the least in steps to the most."""

    least: int = 1
    most: int | None = None
    """None: no limit is known"""
    step: int = 1

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= (size if self.most is None else self.most) and not (size - self.least) % self.step

    def __str__(self) -> str:
        if self.least == self.most:
            return str(self.least)
        if self.step > 1:
            some = ", ".join(str(self.least + i * self.step) for i in range(3))
            return f"{some} …" + ("" if self.most is None else f" up to {self.most}")
        return f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"


def sizes_of(example: Sequence[Tensor], axes: Axes) -> dict[str, int]:
    """The size of every free axis, by its name."""
    return {
        name: size
        for t, names in zip(example, axes, strict=True)
        for name, size in zip(names, t.shape, strict=True)
        if name
    }


def resized(example: Sequence[Tensor], axes: Axes, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Inputs like `example` whose axes have the named `sizes`.

    Along an axis of another size they hold values of the example that are drawn anew, and floats are scaled at random
    beside: a repeated input would hide from means and maxima what is left out of it. The draw is always the same and
    leaves torch's generator alone.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for t, names in zip(example, axes, strict=True):
        for axis, name in enumerate(names):
            size = sizes.get(name or "", t.shape[axis])
            if size != t.shape[axis]:
                index = torch.randint(max(t.shape[axis], 1), (size,), generator=generator)
                t = t.index_select(axis, index.to(t.device))
        if t.is_floating_point():
            noise = torch.rand(t.shape, generator=generator, dtype=t.dtype).to(t.device)
            t = t * (0.5 + noise) if bool(t.any()) else noise - 0.5
        inputs.append(t)
    return tuple(inputs)
