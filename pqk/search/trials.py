"""How students of a teacher learn: optimizers and rates, tried for a few steps each on what is cut out of it.

A rate that suits one kind of network ruins another, and no default is right for a stranger's: each option trains the
same cut student on the same batches, equally long, and the one that comes nearest to the teacher's answers on
validation data is taken (as a range test does; Smith 2017, arXiv:1506.01186, section 3.3).
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk.copies import copy_of
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.data.structures import concatenate
from pqk.errors import InputError, PqkError
from pqk.search.candidates import TrainingChoice, distillation
from pqk.task.task import Task

Option = tuple[Literal["sgd", "adamw"], float]
CONVOLUTIONAL: tuple[Option, ...] = (("sgd", 0.1), ("sgd", 0.02), ("sgd", 0.004), ("adamw", 1e-3))
"""for networks with batch norm; the gentlest for small ones, which the others would have to learn anew"""
OTHERS: tuple[Option, ...] = (("adamw", 1e-3), ("adamw", 2e-4), ("adamw", 5e-5))
TIMED_STEPS = 3
FEWEST, MOST = 6, 120
"""steps that each option is tried for"""
SAMPLES = 512
"""of validation data, on which the distance to the teacher is taken"""


def first_step(program: Program, task: Task, outputs: Any) -> float:
    """Seconds of a training step of a program's student, which stays as it is; the first of two warms up.

    Raises `InputError` where the task has no term to learn by.
    """
    option = OTHERS[-1]
    reason = distillation(TrainingChoice(*option, 1.0), 1.0).fitted(task, outputs).why_not_applied(task, outputs)
    if reason is not None:
        raise InputError(reason)
    steps = len(task.need_train("contract"))
    return [_trained(program, task, outputs, option, 1 / steps)[1] for _ in range(2)][-1]


def _trained(
    program: Program, task: Task, outputs: Any, option: Option, epochs: float
) -> tuple[nn.Module | None, float]:
    """A copy of the student after so many epochs, None where its loss stopped being finite; and their seconds."""
    config = distillation(TrainingChoice(*option, 1.0), epochs).fitted(task, outputs)
    alone = replace(program, student=copy_of(program.student, "student"), run=RunContext(program.run.seed), details={})
    torch.manual_seed(alone.run.seed_for("trial"))
    began, after = time.perf_counter(), None
    with contextlib.suppress(PqkError):
        after = config.apply(alone, task).student.eval()
    return after, time.perf_counter() - began


def choose_training(program: Program, task: Task, outputs: Any, seconds: float) -> TrainingChoice:
    """The option that brings a cut student nearest to its teacher, in about so many seconds.

    Args:
        program: with the cut student, a module, which stays as it is.
        task: training and validation data.
        outputs: the teacher's for the example.
        seconds: that all trials together may take.

    Raises:
        InputError: no option makes the student better than it was, or the task has no term to learn by.
    """
    options = CONVOLUTIONAL if any(isinstance(m, _BatchNorm) for m in program.student.modules()) else OTHERS
    reason = distillation(TrainingChoice(*options[0], 1.0), 1.0).fitted(task, outputs).why_not_applied(task, outputs)
    if reason is not None:
        raise InputError(reason)
    steps = len(task.need_train("contract"))
    inputs = concatenate(list(task.calibration(SAMPLES)))
    with torch.no_grad():
        answers = program.teacher(*inputs)
        before = task.distance(program.student.eval()(*inputs), answers)

    def trained(option: Option, count: int) -> tuple[float, float]:
        """The distance after `count` steps, and the seconds that they took."""
        after, took = _trained(program, task, outputs, option, count / steps)
        if after is None:
            return math.inf, took
        with torch.no_grad():
            found = task.distance(after(*inputs), answers)
        return (found if math.isfinite(found) else math.inf), took

    _, few = trained(options[-1], 1)
    _, few = trained(options[-1], 1)  # the first step of all is slow
    _, more = trained(options[-1], 1 + TIMED_STEPS)
    step = max((more - few) / TIMED_STEPS, 0.25 * more / (1 + TIMED_STEPS))
    count = int(min(max(FEWEST, seconds / (len(options) * step)), MOST))
    distances = {option: trained(option, count)[0] for option in options}
    best = min(distances, key=lambda option: distances[option])
    if distances[best] > before:
        raise InputError(
            f"training does not bring a cut student nearer to its teacher: its distance is {before:.3g}, and after "
            f"{count} steps {distances[best]:.3g} at best"
        )
    return TrainingChoice(*best, step * steps)
