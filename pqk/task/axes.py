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
    equals: str | None = None
    """the name of another axis that must have the same size"""

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= (size if self.most is None else self.most) and not (size - self.least) % self.step

    def some(self) -> list[int]:
        """Some of them, near the least and far from it, and the most; none of no samples."""
        first = self.least or self.step
        near_and_far = (first + i * self.step for i in (0, 1, 2, 3, 7, 20, 53, 148, 403, 1096))
        return sorted({n for n in (*near_and_far, self.most) if n is not None and n in self})

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


def resized(
    example: Sequence[Tensor], axes: Axes, sizes: Mapping[str, int], *, scaled: bool = True
) -> tuple[Tensor, ...]:
    """Inputs like `example` whose axes have the named `sizes`.

    Along an axis of another size they hold values of the example that are drawn anew, for all inputs the same ones, in
    their order and with both ends, so that masks and positions stay what they are. Floats are `scaled` at random
    beside, except masks: a repeated input would hide from means and maxima what is left out of it. The draws are always
    the same and leave torch's generator alone.
    """
    known = sizes_of(example, axes)
    generator = torch.Generator().manual_seed(0)
    draws = {name: _draw(known[name], n, generator) for name, n in sizes.items() if known.get(name, n) != n}
    inputs = []
    for t, names in zip(example, axes, strict=True):
        for axis, name in enumerate(names):
            if name in draws:
                t = t.index_select(axis, draws[name].to(t.device))
        if scaled and t.is_floating_point() and len(t.unique()) > 2:
            t = t * (0.5 + 0.5 * torch.rand(t.shape, generator=generator, dtype=t.dtype)).to(t.device)
        inputs.append(t)
    return tuple(inputs)


def _draw(known: int, size: int, generator: torch.Generator) -> Tensor:
    """Positions among the `known`, in order: of two or more the first and the last are the ends."""
    index = torch.randint(max(known, 1), (size,), generator=generator).sort().values
    if size > 1:
        index[0], index[-1] = 0, max(known, 1) - 1
    return index
