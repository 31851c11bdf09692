"""Checks of a task's data before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.structures import Inputs, Outputs
from pqk.errors import InputError


def check_labels(targets: Tensor, classes: int, what: str = "the") -> None:
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise InputError(
            f"{what} data: labels run from {int(targets.min())} to {int(targets.max())} and the model has {classes} "
            f"classes (0 to {classes - 1})"
        )


def check_views(what: str, batch: Batch) -> None:
    """Raises `InputError` where teacher and student see inputs of other shapes."""
    sides = [[(tuple(t.shape), t.dtype) for t in x] for x in (batch.for_teacher().inputs, batch.inputs)]
    if sides[0] != sides[1]:
        raise InputError(
            f"{what} data: the teacher's view is {sides[0]} and the student's {sides[1]}; the student is a rewritten "
            "copy of the teacher and takes inputs of its shapes: bring the cheaper view to them (repeat, enlarge, pad)"
        )


def try_forward(teacher: nn.Module, inputs: Inputs, what: str) -> Outputs:
    """The teacher's outputs. Raises `InputError` where it cannot take the inputs: whatever its own code raised."""
    try:
        with torch.inference_mode():
            return teacher(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in inputs)
        raise InputError(f"teacher: the {what} inputs ({shapes}) do not fit it: {error}") from error
