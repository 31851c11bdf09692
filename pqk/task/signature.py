"""The inputs and outputs of a model: examples, names, and which axes are free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from pqk.data.data import ONE_NUMBER
from pqk.data.structures import Inputs, Outputs, named_tensors, tensors, why_not_outputs
from pqk.errors import InputError, nearest
from pqk.task.axes import BATCH, batch_axes


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives."""

    example: Inputs
    """one batch of at least 2 samples, each [B, …]"""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] | None
    """None: those of the model's own structure"""
    axes: tuple[tuple[str | None, ...], ...]
    """for each input the names of its axes; None: of a fixed size"""
    timed: Mapping[str, Inputs] = field(default_factory=dict)
    """name -> inputs of other sizes than the example's"""

    @staticmethod
    def of(
        example: Inputs,
        input_names: Sequence[str] | None = None,
        output_names: tuple[str, ...] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        timed: Mapping[str, Inputs] | None = None,
    ) -> Signature:
        """The signature of a task's arguments. Raises `InputError` for examples, names and axes that do not fit."""
        default = ("input",) if len(example) == 1 else tuple(f"input_{i}" for i in range(len(example)))
        names = tuple(input_names or default)
        for name, t in zip(names, example, strict=False):
            if not t.ndim:
                raise InputError(f"task: the example of {name} is {ONE_NUMBER}")
        if any(len(t) < 2 for t in example):
            raise InputError(
                f"task: example inputs need a batch of at least 2, to show which axis is the batch; got shapes "
                f"{[tuple(t.shape) for t in example]}"
            )
        if len(names) != len(example) or len(set(names)) != len(example):
            raise InputError(f"task: input_names {names} must be {len(example)} names, all different")
        return Signature(
            example, names, output_names, named_axes(example, names, dynamic_axes or {}), dict(timed or {})
        )

    def sized(self, batch: int, name: str = "") -> Inputs:
        """The example inputs, or those timed under `name`, repeated or cut to `batch` samples."""
        inputs = self.timed[name] if name else self.example
        return tuple(torch.cat([t] * -(-batch // len(t)))[:batch] for t in inputs)

    def feeds(self, batch: int, name: str = "") -> dict[str, NDArray[Any]]:
        """`sized(batch, name)` as arrays by input name, as ONNX runtimes take them."""
        return {key: t.numpy() for key, t in zip(self.input_names, self.sized(batch, name), strict=True)}

    def names_of(self, outputs: Outputs) -> list[str]:
        """The outputs' names: `output_names`, or those of their own structure."""
        return list(self.output_names or named_tensors(outputs, self.input_names))

    def check_inputs(self, where: str, inputs: Inputs) -> None:
        """Raises `InputError`, beginning with `where`, where inputs differ from the example beyond free axes."""
        if len(inputs) != len(self.example):
            raise InputError(f"{where}: it gives {len(inputs)} inputs and the example has {len(self.example)}")
        for name, axes, t, e in zip(self.input_names, self.axes, inputs, self.example, strict=True):
            fits = t.dim() == e.dim() and all(a or n == m for a, n, m in zip(axes, t.shape, e.shape, strict=True))
            if t.dtype != e.dtype or not fits:
                raise InputError(
                    f"{where}: input {name} is {tuple(t.shape)} {t.dtype}, the example {tuple(e.shape)} {e.dtype}"
                )

    def check_outputs(self, outputs: Outputs) -> None:
        """Raises `InputError` where outputs cannot be put into a file, or the names are not one for each of them."""
        if (reason := why_not_outputs(outputs)) is not None:
            raise InputError(f"teacher: {reason}")
        names, count = self.output_names, len(tensors(outputs))
        if names is not None and (
            len(names) != count or len({*names, *self.input_names}) != count + len(self.input_names)
        ):
            raise InputError(
                f"task: output_names {names} must be {count} names, all different, and none of the "
                f"inputs' ({', '.join(self.input_names)})"
            )


def named_axes(
    example: Inputs, names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[tuple[str | None, ...], ...]:
    """For each input the names of its axes, None for one of a fixed size.

    Raises `InputError` where `dynamic` names an input or an axis that is not there, or another batch than axis 0.
    """
    axes = {name: list(a) for name, a in zip(names, batch_axes(example), strict=True)}
    shapes = {name: t.shape for name, t in zip(names, example, strict=True)}
    for name, free in dynamic.items():
        if name not in axes:
            raise InputError(f'task: dynamic_axes names an input "{name}"{nearest(name, axes)}')
        for axis, label in free.items():
            if not 0 <= axis < len(axes[name]) or (axis == 0) != (label == BATCH):
                raise InputError(
                    f'task: dynamic_axes calls axis {axis} of {name} "{label}"; axis 0 is the "{BATCH}", and {name} '
                    f"has {len(axes[name])} axes"
                )
            size = shapes[name][axis]
            if axis and size < 2:
                raise InputError(
                    f'task: dynamic_axes calls axis {axis} of {name} "{label}", and the example has size {size} there, '
                    "which a tracer takes for one that never changes; give an example of 2 or more"
                )
            axes[name][axis] = label
    return tuple(tuple(a) for a in axes.values())
