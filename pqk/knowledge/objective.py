"""The weighted sum of knowledge terms, as what a training run minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqk.data import Batch
from pqk.errors import InputError
from pqk.knowledge.taps import tap
from pqk.knowledge.teacher import FrozenTeacher
from pqk.knowledge.term import Term, View
from pqk.task import Task
from pqk.train import Objective

Kept = Callable[[str], Sequence[int] | None]
"""student's module path -> the teacher's output channels that survive there, where the compiler cut some"""


class Distillation(Objective):
    """Σ weight · term. Terms that need the teacher join after the first `start` share of the training.

    Raises `InputError`, before training, for a point that is missing in teacher or student, and where all weights are
    zero.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        task: Task,
        student: nn.Module,
        teacher: FrozenTeacher,
        *,
        start: float = 0.0,
        kept: Kept = lambda point: None,
        on_progress: Callable[[float], None] = lambda progress: None,
    ) -> None:
        super().__init__()
        self.terms = [t for t in terms if t.weight > 0]  # a term of weight zero must not even draw random numbers
        if not self.terms:
            raise InputError("distill: no term has a weight above 0; there is nothing to train on")
        self.task, self.start, self.progress, self.on_progress = task, start, 0.0, on_progress
        self.teacher = teacher
        self.student_points = sorted({p[0] for t in self.terms if (p := t.points())})
        self.projectors = nn.ModuleDict()
        self._build_projectors(student, kept)

    def _build_projectors(self, student: nn.Module, kept: Kept) -> None:
        if not self.student_points:
            return
        batch = Batch(self.task.example, None, None)
        with torch.no_grad():
            _, features = self.wrap(student.eval())(*batch.inputs)
        _, teacher_features = self.teacher(batch)
        for i, term in enumerate(self.terms):
            points = term.points()
            if points is not None:
                projector = term.projector(features[points[0]], teacher_features[points[1]], kept(points[0]))
                if projector is not None:
                    self.projectors[str(i)] = projector

    def wrap(self, student: nn.Module) -> nn.Module:
        return tap(student, self.student_points)

    def begin(self, progress: float) -> None:
        self.progress = progress
        self.on_progress(progress)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        outputs, features = student(*batch.inputs)
        taught = self.progress >= self.start
        terms = [(i, t) for i, t in enumerate(self.terms) if taught or not t.needs_teacher]
        if not terms:  # a recipe without a supervised term has nothing else to begin with
            terms = list(enumerate(self.terms))
        answer: tuple[Any, dict[str, Tensor]] = (None, {})
        if any(t.needs_teacher for _, t in terms):
            answer = self.teacher(batch)
        view = View(outputs, answer[0], batch.targets, features, answer[1], self.task)
        total: Tensor | None = None
        for i, term in terms:
            projector = self.projectors[str(i)] if str(i) in self.projectors else None  # noqa: SIM401 (a ModuleDict)
            loss = term.weight * term(view, projector)
            total = loss if total is None else total + loss
        assert total is not None
        return total
