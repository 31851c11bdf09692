"""The weighted sum of knowledge terms, as what a training run minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError, Reason
from pqk.knowledge.answers.authors import Author, Written
from pqk.knowledge.taps import tap
from pqk.knowledge.teachers.base import Teacher
from pqk.knowledge.terms.base import Place, Term, View
from pqk.knowledge.terms.response import Divergence, pick
from pqk.knowledge.weighting import Gate, balancer, gate_named, ramp, temperature_for
from pqk.task.task import Task
from pqk.training.trainer import Objective

SurvivingChannels = Callable[[str], Sequence[int] | None]
"""student's module path -> the teacher's output channels that survive there, where the compiler cut some"""

Numbered = Sequence[tuple[int, Term]]
"""terms by their numbers in the recipe"""

CALIBRATION = 512
"""validation samples on which a temperature is chosen"""


class Distillation(Objective):
    """Σ weight · term. Terms that need the teacher join after the first `start` share of the training.

    `author` writes answers to some batches' prompts; those of the student are judged by the terms that ask the teacher
    or rank answers, while the others go on seeing the data.

    `balance` is "static", "gradient_norm" or "learned" (`pqk.knowledge.weighting`). `masks` (batch -> [B, positions…])
    and `gates` (view -> [B]) are functions that terms name. Raises `InputError`, before training, for a point, a gate
    or a head that is missing, where all weights are zero, and where no term can see what the student is for.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        task: Task,
        student: nn.Module,
        teacher: Teacher,
        *,
        start: float = 0.0,
        kept: SurvivingChannels = lambda point: None,
        on_progress: Callable[[float], None] = lambda progress: None,
        balance: str = "static",
        masks: Mapping[str, Callable[[Batch], Tensor]] | None = None,
        gates: Mapping[str, Gate] | None = None,
        author: Author | None = None,
    ) -> None:
        super().__init__()
        terms = [t for t in terms if t.weight > 0]  # a term of weight zero must not even draw random numbers
        if not terms:
            raise InputError("distill: no term has a weight above 0; there is nothing to train on")
        if (reason := why_not_learned(terms)) is not None:
            raise InputError(f"distill: {reason}")
        if teacher.other_tokens and (same := [t for t in terms if t.needs_teacher and not t.other_classes]):
            raise InputError(
                f"distill: the teacher has another tokenizer, and {type(same[0]).__name__} compares the same classes "
                "of both; take sorted_uld or dual_space"
            )
        if any(t.needs_teacher or t.gate for t in terms):
            teacher.check(task.example)
        self.task, self.start, self.progress, self.on_progress = task, start, 0.0, on_progress
        self.teacher, self.masks = teacher, masks or {}
        self.gates = {i: gate_named(t.gate, gates or {}) for i, t in enumerate(terms) if t.gate}
        self.terms = [_tempered(t, teacher, task) for t in terms]
        self.student_points = sorted({*teacher.student_points, *(p[0] for t in self.terms if (p := t.points()))})
        self.projectors = nn.ModuleDict()
        self._build_projectors(student, kept)
        self.balance = balancer(balance, len(self.terms))
        self.author = author

    def _build_projectors(self, student: nn.Module, kept: SurvivingChannels) -> None:
        if not self.student_points:
            return
        batch = Batch(self.task.example, None, None)
        with torch.no_grad():
            _, features = self.wrap(student.eval())(*batch.inputs)
        _, teacher_features = self.teacher(batch)
        for i, term in enumerate(self.terms):
            points = term.points()
            if points is not None:
                if points[1] not in teacher_features:
                    raise InputError(
                        f'distill: {type(term).__name__} compares the teacher\'s features at "{points[1]}", but '
                        f"{self.teacher.no_feature_reason}"
                    )
                s, t = features[points[0]], teacher_features[points[1]]
                projector = term.projector(Place(s, t, kept(points[0]), student, self.teacher.module, self.task))
                if projector is not None:
                    self.projectors[str(i)] = projector

    def wrap(self, student: nn.Module) -> nn.Module:
        return tap(student, self.student_points)

    def begin(self, progress: float) -> None:
        self.progress = progress
        self.teacher.begin(progress)
        self.on_progress(progress)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        taught = self.progress >= self.start
        terms = [(i, t) for i, t in enumerate(self.terms) if taught or not t.needs_teacher]
        if not terms:  # a recipe without a supervised term has nothing else to begin with
            terms = list(enumerate(self.terms))
        losses, ramps, views, more = {}, {}, [], []
        for written, shown in self._shown(batch, terms):
            view = self._view(student, written, [t for _, t in shown])
            views.append(view)
            more += [] if written.loss is None else [written.loss]
            best = view.best()
            for i, term in shown:
                losses[i] = self._loss(i, term, view if term.ranks else best)
                ramps[i] = ramp(term, self.progress, self.start if term.needs_teacher else 0.0)
        total = self.balance(dict(sorted(losses.items())), ramps, student)
        for loss in more:
            total = total + loss
        own = self.teacher.auxiliary_loss(views[0]) if torch.is_grad_enabled() else None
        if own is None:
            return total
        return total + (own if own.shape == total.shape else own.mean())  # of all answers that were ranked

    def _shown(self, batch: Batch, terms: Numbered) -> list[tuple[Written, Numbered]]:
        """What the terms see of a training batch: the data, or answers that are written to its prompts."""
        asking = [(i, t) for i, t in terms if t.needs_teacher or t.ranks]
        written = None
        if self.author is not None and (asking or self.progress >= self.start):
            written = self.author(batch, self.progress)
        if written is None:
            return [(Written(batch, instead=True), terms)]
        if written.instead:
            return [(written, terms)]
        others = [(i, t) for i, t in terms if not (t.needs_teacher or t.ranks)]
        return [(written, asking), *([(Written(batch, instead=True), others)] if others else [])]

    def _view(self, student: nn.Module, written: Written, terms: Sequence[Term]) -> View:
        batch = written.batch
        outputs, features = student(*batch.inputs)
        answer: tuple[Any, dict[str, Tensor]] = (None, {})
        if any(t.needs_teacher or t.gate for t in terms):
            answer = self.teacher(batch)
        masks = {name: function(batch) for name, function in self.masks.items()}
        return View(
            outputs, answer[0], batch.targets, features, answer[1], self.task, batch.inputs, masks,
            written.teacher_share, written.scores,
        )  # fmt: skip

    def _loss(self, number: int, term: Term, view: View) -> Tensor:
        projector = self.projectors[str(number)] if str(number) in self.projectors else None  # noqa: SIM401 (a ModuleDict)
        loss = term.weight * term(view, projector)
        return loss * self.gates[number](view.best()).detach() if number in self.gates else loss

    def end_epoch(self, student: nn.Module, epoch: int) -> None:
        if self.author is not None:
            self.author.end_epoch(epoch)


def why_not_learned(terms: Sequence[Term]) -> Reason | None:
    """Why these terms alone cannot see what the student is for, else None."""
    if not terms or not all(t.blind for t in terms):
        return None
    return f"{type(terms[0]).__name__} must not be the only term: {terms[0].blind}; add another"


def _tempered(term: Term, teacher: Teacher, task: Task) -> Term:
    """The term, with the temperature at which the teacher is as confident as it wishes."""
    if not isinstance(term, Divergence) or term.teacher_top is None:
        return term
    answers = []
    for inputs in task.calibration(CALIBRATION, teacher=True):
        answer, _ = teacher(Batch(inputs, None, None))
        logits = task.classes_last(widened(first_tensor(pick(answer, term.output))))
        answers.append(logits.flatten(0, -2))  # sequences of several lengths are no less alike than their positions
    return replace(term, temperature=temperature_for(term.scaled(torch.cat(answers)), term.teacher_top))
