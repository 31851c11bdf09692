"""Checkpoint selection: the best student of a training, its start among them, on validation data.

Under quantization what is compared is what will be deployed, not what trains: converted to integers a student has no
learned step, no clamp in float and no unrounded bias left, so the best epoch is the best of that form. Before it, the
student is compared in float, in eval mode. What is best so far lies in buffers of the objective, which checkpoints
hold: a run that was killed keeps the same epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.modes import evaluating
from pqk.knowledge.objective import Distillation
from pqk.passes.convert.convert import convert
from pqk.quant.fake_quant import quantizers
from pqk.task.task import Task

Criterion = Literal["last", "metric", "teacher"]
Scorer = Callable[[nn.Module], list[float]]
"""a student -> its scores, higher is better, the most important score first"""
UNTRAINED = "the student as it was before the training, since no epoch made it better on validation data"
"""what is kept of a training whose best state is its start"""


def scorer(task: Task, teacher: nn.Module, criterion: Criterion) -> Scorer:
    """Scores students (unchanged) on validation data, FAKE_QUANT ones as integers: [metric or 0, negative divergence].

    The metric counts for "metric" where the data has labels; the divergence is that from `teacher`'s outputs.
    """
    answers, _ = task.predict(teacher, task.validation)

    def score(student: nn.Module) -> list[float]:
        deployed = convert(copy_of(student, "student"), task.example) if quantizers(student) else student
        with evaluating(deployed):
            outputs, targets = task.predict(deployed, task.validation)
        labelled = criterion == "metric" and targets is not None
        scores = [task.metric.function(outputs, targets) if labelled else 0.0, -task.distance(outputs, answers)]
        return [s if math.isfinite(s) else -math.inf for s in scores]  # nothing compares with NaN

    return score


class CheckpointSelection(Distillation):
    """Distillation that, from `select` on, remembers the best student of the start and of every epoch's end."""

    best_score: Tensor
    """float64 [3]: the two of `scorer`, and the number of epochs it was trained for"""
    score: Scorer | None = None

    def select(self, student: nn.Module, teacher: nn.Module, criterion: Criterion) -> None:
        """Starts the comparison with `student` as it is; with "last" nothing is compared."""
        if criterion == "last":
            return
        self.score = scorer(self.task, teacher, criterion)
        self.best = nn.Module()
        for i, value in enumerate(student.state_dict().values()):
            self.best.register_buffer(str(i), value.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("best_score", torch.tensor([*self.score(student), 0.0], dtype=torch.float64))

    def end_epoch(self, student: nn.Module, epoch: int) -> None:
        super().end_epoch(student, epoch)
        if self.score is None:
            return
        score = self.score(student)
        if score > self.best_score[:2].tolist():
            self.best_score.copy_(torch.tensor([*score, epoch + 1.0], dtype=torch.float64))
            for kept, value in zip(self.best.buffers(), student.state_dict().values(), strict=True):
                kept.copy_(value)

    def finish(self, student: nn.Module) -> int | None:
        """Loads the best student into `student`; returns how many epochs it had trained, None with "last"."""
        if self.score is None:
            return None
        state: dict[str, Any] = dict(zip(student.state_dict(), self.best.buffers(), strict=True))
        student.load_state_dict(state)
        return int(self.best_score[2])
