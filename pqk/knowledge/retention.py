"""What must not be forgotten: other data beside the training's, on which the student is held to an old model.

A student that learns new data moves away from what it knew, and no loss on the new data sees it. So every step has a
second batch, of the task's `retained` data, on which terms compare the student with the model from before. What was
forgotten is measured, with and without that, on samples that no step had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pqk.core.modes import evaluating
from pqk.data.data import Batch, Data
from pqk.data.structures import Outputs
from pqk.errors import InputError, Reason
from pqk.knowledge.answers.authors import number
from pqk.knowledge.objective import Distillation, why_not_learned
from pqk.knowledge.sources import FromArtifact, FromModule, FromSnapshot
from pqk.knowledge.teachers.base import Teacher
from pqk.knowledge.terms.base import Term
from pqk.knowledge.terms.catalogue import AnyTerm
from pqk.knowledge.terms.policy import MiniLLM
from pqk.knowledge.terms.response import KLDivergence
from pqk.settings import settings
from pqk.task.task import Task
from pqk.training.trainer import Objective, SmallBatches, local_part

OldModel = Annotated[FromModule | FromSnapshot | FromArtifact, Field(discriminator="source")]
"""sources whose answers stay as they were when the training began"""


@settings
class Retention:
    """Hold the student to an old model on what must not be forgotten: a batch of `Task(retained=…)` in every step.

    Li & Hoiem, Learning without Forgetting, ECCV 2016, arXiv:1606.09282, section 3 (KL at T = 2, weight 1, which asks
    the old model about the new data); on data of before, as in Buzzega et al., Dark Experience Replay, NeurIPS 2020,
    arXiv:2004.07725, whose term is `logit_mse`. The loss is added to that of the training, after its `balance`.

    Raises:
        InputError: no term has a weight, one cannot be compared there, or the student would begin again.
    """

    terms: tuple[AnyTerm, ...] = (KLDivergence(weight=1.0, temperature=2.0),)
    """what is compared there: terms of models' outputs; `cross_entropy` asks for labels instead"""
    old: OldModel = FromModule()
    """the model from before: a table with `source`, which is "module", the teacher of the recipe, "snapshot", the
    student as it is when this training begins, or "artifact", that of an earlier compile"""

    def __post_init__(self) -> None:
        counted = [t for t in self.terms if t.weight > 0]
        if not counted:
            raise InputError("retain: no term has a weight above 0; give it one, or take the table out")
        if isinstance(self.old, FromSnapshot) and self.old.restart:
            raise InputError("retain: a student that begins again has forgotten everything; take restart out")
        reasons = (_why_not_retained(t) for t in counted)
        if (reason := next((r for r in reasons if r is not None), why_not_learned(counted))) is not None:
            raise InputError(f"retain: {reason}")

    def why_not_applied(self, task: Task, outputs: Any) -> Reason | None:
        """Why a task has nothing that a student could be held to, else None; `outputs` are the teacher's."""
        if task.retained is None:
            return "retain: the task has no data that must not be forgotten; pass Task(retained=…)"
        if (reason := task.retained.resume_reason) is not None:
            return f"retain: the retained data cannot be gone on with after a kill: {reason}"
        if not task.retained.labelled and not all(t.needs_teacher for t in self.terms if t.weight > 0):
            return "retain: a term needs labels, and the retained data has none; take it out"
        reasons = (t.why_not_compared(task, outputs) for t in self.terms if t.weight > 0)
        return next((f"retain: {reason}" for reason in reasons if reason is not None), None)


def _why_not_retained(term: Term) -> Reason | None:
    name = type(term).__name__
    if term.points() is not None:
        return f"{name} compares features, and here outputs are compared; take kl, jsd or logit_mse"
    return f"{name} learns from answers that the student writes; take reverse_kl" if isinstance(term, MiniLLM) else None


class RetainedBatches(nn.Module):
    """Batches of data, one after another and epoch after epoch, as a function of the seed and of what was given so far.

    A loader draws from a state of torch's generator that is its own, so what else is drawn is as without it.
    """

    step: Tensor
    """int64: how many batches were given, or left out"""
    draws: Tensor
    """uint8: the state of torch's generator with which the next batch is read"""

    def __init__(self, data: Data, student: nn.Module, seed: int) -> None:
        super().__init__()
        self.data, self.seed = data, seed
        self.small = SmallBatches(student)
        self.small.check(data, next(data.batches()), "distill: retained data")
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("draws", torch.Generator().manual_seed(seed & 0xFFFFFFFF).get_state())
        self._batches: Iterator[Batch] = iter(())
        self._next = -1
        """the number of the batch that the iterator gives next"""

    def forward(self) -> Batch:
        """The next batch on which the student can train."""
        batch = self._read()
        while batch in self.small:
            batch = self._read()
        return batch

    def _read(self) -> Batch:
        step = int(self.step)
        epoch, start = divmod(step, len(self.data))
        with self._own_draws():
            if start == 0 or step != self._next:  # else a checkpoint was gone back to
                state = self.draws.cpu() if start else None
                self._batches = self.data.batches(number(self.seed, epoch) & 0xFFFFFFFF, epoch, start, state)
            batch = next(self._batches)
        self.step += 1
        self._next = step + 1
        return batch

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        others = torch.get_rng_state()
        torch.set_rng_state(self.draws.cpu())
        try:
            yield
        finally:
            self.draws.copy_(torch.get_rng_state())
            torch.set_rng_state(others)


class RetainingObjective(Objective):
    """Another objective, and the mean loss of a student against an old model on a batch that must not be forgotten."""

    def __init__(self, own: Objective, old: Distillation, batches: RetainedBatches) -> None:
        super().__init__()
        self.own, self.old, self.batches = own, old, batches

    def wrap(self, student: nn.Module) -> nn.Module:
        return self.own.wrap(student)

    def begin(self, progress: float) -> None:
        self.own.begin(progress)
        self.old.begin(progress)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        losses: Tensor = self.own(student, batch)
        other: Tensor = self.old(student, local_part(self.batches(), batch.inputs[0].device))
        return losses + other.mean()

    def end_epoch(self, student: nn.Module, epoch: int) -> None:
        self.own.end_epoch(student, epoch)


@torch.no_grad()
def divergence(
    task: Task, student: Callable[..., Outputs], data: Data, old: Callable[..., Outputs], shown: Data
) -> float:
    """How far a student is from an old model (`Task.distance`), the mean over samples; `shown` is what that sees."""
    total = 0.0
    for batch, others in zip(data.batches(), shown.batches(), strict=True):
        outputs, answers = student(*batch.inputs), old(*others.inputs)
        total += task.distance(outputs, answers, batch.targets) * len(batch.inputs[0])
    return total / data.samples


@dataclass(frozen=True)
class Memory:
    """What a student must not forget in a training: data, and an old model that knows it."""

    task: Task
    old: Teacher
    students_view: bool = False
    """where teacher and student see different views, the old model sees the student's"""

    def retaining(self, own: Objective, terms: Sequence[Term], student: nn.Module, seed: int) -> RetainingObjective:
        """An objective with these terms on the task's retained data beside it. Raises `InputError` as both do."""
        assert self.task.retained is not None
        old = Distillation(terms, self.task, student, self.old)
        return RetainingObjective(own, old, RetainedBatches(self.task.retained, student, seed))

    def figures(self, student: nn.Module) -> dict[str, float]:
        """What a student and the old model make of the data that forgetting is measured on.

        Returns:
            "student" and "old": the task's metric, where the data has labels; "divergence": how far the student is from
            the old model (`Task.distance`), the mean over samples.
        """
        task, data, old = self.task, self.task.retained_evaluation, self.old
        assert data is not None
        shown = data if self.students_view else task.teachers(data)
        figures, total = {}, 0.0
        with evaluating(student), torch.no_grad():
            if data.labelled:
                figures["student"] = task.score(student, data)
                figures["old"] = task.score(lambda *inputs: old(Batch(inputs, None, None))[0], shown)
            for batch, others in zip(data.batches(), shown.batches(), strict=True):
                answer, _ = old(Batch(others.inputs, None, None))
                total += task.distance(student(*batch.inputs), answer, batch.targets) * len(batch.inputs[0])
        return {**figures, "divergence": total / data.samples}

    def forgotten(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Figures of before and after a training as one table of a record (JSON)."""
        assert self.task.retained_evaluation is not None
        said: dict[str, float] = {"samples": self.task.retained_evaluation.samples}
        if "old" in after:
            said |= {"old": after["old"], "before": before["student"], "after": after["student"]}
        return {**said, "divergence_before": before["divergence"], "divergence_after": after["divergence"]}
