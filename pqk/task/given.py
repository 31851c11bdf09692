"""A student of another shape: a network that is given, not cut out of its teacher, and whether it fits the task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.structures import Outputs, leaves, map_tensors, members, named_tensors
from pqk.errors import InputError, Reason
from pqk.task.checks import try_forward
from pqk.task.state import frozen_copy

if TYPE_CHECKING:
    from pqk.task.task import Task

FEW = 2
"""samples of each data's first batch that teacher and student both answer"""


def frozen_student(student: nn.Module, teacher: nn.Module, task: Task) -> nn.Module:
    """A copy of a student that was given, in eval mode, without gradients, that answers as the teacher does.

    Args:
        student: any float32 module that takes the task's inputs; its weights may be random.
        teacher: frozen, in eval mode; it fits the task.
        task: its example, its inputs of other sizes and the first samples of all its data are tried.

    Returns:
        The copy.

    Raises:
        InputError: it cannot be copied, run or rewritten, or its outputs have not the structure, shapes and dtypes of
            the teacher's; the message names the output and both shapes.
    """
    twin = frozen_copy(student, task.example, "student")
    tried = [("example", task.example, task.example)]
    tried += [(name, inputs, inputs) for name, inputs in task.timed.items()]
    for what, data in (("train", task.train), ("validation", task.validation), ("evaluation", task.evaluation)):
        if data is not None:
            batch = next(data.batches())
            few: Batch = map_tensors(lambda t: t[:FEW], Batch(batch.inputs, None, None, batch.teacher_inputs))
            tried.append((what, few.inputs, few.for_teacher().inputs))
    for what, inputs, teachers in tried:
        got = try_forward(twin, inputs, what, "student")
        want = try_forward(teacher, teachers, what)
        if (reason := why_not_alike(got, want)) is not None:
            raise InputError(
                f"student: {reason}, on the {what} inputs: a student of another shape answers as its teacher does, "
                "output by output; give it a last layer, or a wrapper, that does"
            )
        for name, t in named_tensors(got, task.input_names).items():
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise InputError(f"student: its output {name} on the {what} inputs is NaN or infinite")
    return twin


def why_not_alike(student: Outputs, teacher: Outputs) -> Reason | None:
    """Why outputs have not the structure, shapes and dtypes of the teacher's, else None."""
    ours, theirs = dict(leaves(student)), dict(leaves(teacher))
    if ours.keys() != theirs.keys() or _containers(student) != _containers(teacher):
        return f"its outputs are {_described(student)} and the teacher's {_described(teacher)}"
    for path, want in theirs.items():
        if (said := _leaf(ours[path])) != _leaf(want):
            return f"its output {_named(path)} is {said} and the teacher's {_leaf(want)}"
    return None


def _containers(outputs: Outputs) -> list[type]:
    inner = members(outputs)
    return [] if inner is None else [type(outputs), *(kind for _, part in inner for kind in _containers(part))]


def _described(outputs: Outputs) -> str:
    """`dict of logits [2, 10] float32, states [2, 8] float32`."""
    parts = [f"{_named(path)} {_leaf(value)}" for path, value in leaves(outputs)]
    return ", ".join(parts) if members(outputs) is None else f"{type(outputs).__name__} of {', '.join(parts)}"


def _named(path: str) -> str:
    """An output's name in a file, as `named_tensors` gives it."""
    return f"output_{path}" if path[:1].isdigit() else path or "logits"


def _leaf(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} {value.dtype}".replace("torch.", "")
