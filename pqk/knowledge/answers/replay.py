"""Answers of the student that are kept and shown again."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pqk.core.distributed import world_size
from pqk.core.modes import evaluating
from pqk.data.data import Batch
from pqk.data.sequences import UNLABELLED, answered
from pqk.errors import InputError, Reason
from pqk.knowledge.answers.authors import AnswerSettings, Author, Desk, Written, number
from pqk.settings import settings


class ReplayAuthor(Author):
    """The student's answers, kept and shown again, in a share of steps that grows with the loss on validation data."""

    threshold: Tensor
    """float64: share of the steps that have the student's answers"""
    reference: Tensor
    """float64: the loss on validation data that the next is compared with"""
    texts: Tensor
    """int32 [capacity, longest]: prompts with answers"""
    places: Tensor
    """int64 [capacity, 2]: of each the tokens of its prompt, and of both"""
    kept: Tensor
    """int64: how many were kept, the overwritten ones included"""

    def __init__(self, desk: Desk, how: ByReplay) -> None:
        super().__init__(desk, how)
        self.settings = how
        if self.ends.longest is None:
            raise InputError(
                "distill: answers that are kept need a length that none exceeds, and neither the teacher nor the task "
                "says one; give the task's preprocessing a max_length"
            )
        if world_size() > 1:
            raise InputError("distill: kept answers are those of one process; let it train in one, or take by student")
        self.register_buffer("threshold", torch.tensor(how.start, dtype=torch.float64))
        self.register_buffer("reference", torch.tensor(self.loss(), dtype=torch.float64))
        self.register_buffer("texts", torch.zeros(how.capacity, self.ends.longest, dtype=torch.int32))
        self.register_buffer("places", torch.zeros(how.capacity, 2, dtype=torch.int64))
        self.register_buffer("kept", torch.zeros((), dtype=torch.int64))

    def loss(self) -> float:
        """The student's mean loss on validation data."""
        student, losses = self._student[0], []
        device = next(student.parameters()).device
        with evaluating(student), torch.no_grad():
            for batch in self.desk.task.validation.batches():
                outputs = student(*(t.to(device) for t in batch.inputs))
                losses.append(self.desk.task.loss(outputs, batch.targets.to(device)).double())
        return float(torch.cat(losses).mean())

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        how, threshold = self.settings, float(self.threshold)
        if chance >= threshold:
            return None
        fresh = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[how.schedule]
        if chance < threshold * fresh or int(self.kept) < how.capacity:
            own = self.own_answers(batch, step)
            self._keep(own)
            return Written(own, instead=False, teacher_share=0.0)
        generator = torch.Generator().manual_seed(number(self.desk.seed, "replay", step))
        rows = torch.randint(how.capacity, (len(batch.inputs[0]),), generator=generator)
        return Written(self._shown(rows, batch.inputs[0].device), instead=False)

    def _keep(self, own: Batch) -> None:
        (ids, mask), learned = own.inputs, own.targets != UNLABELLED
        for row, length, first in zip(ids, mask.sum(1).tolist(), learned.int().argmax(1).tolist(), strict=True):
            place = int(self.kept) % len(self.texts)
            self.texts[place, :length] = row[:length]
            self.places[place] = torch.tensor([first + 1, length])
            self.kept += 1

    def _shown(self, rows: Tensor, device: torch.device) -> Batch:
        texts = [(self.texts[i].to(device).long(), *self.places[i].tolist()) for i in rows.tolist()]
        prompts, answers = [t[:start] for t, start, _ in texts], [t[start:length] for t, start, length in texts]
        return answered(prompts, answers)

    def end_epoch(self, epoch: int) -> None:
        loss = self.loss()
        if math.isfinite(loss) and loss >= float(self.reference) + self.settings.tolerance:
            self.threshold.copy_(torch.clamp(self.threshold + self.settings.increase, max=1.0))
            self.reference.fill_(loss)


@settings
class ByReplay(AnswerSettings):
    """The student answers where that pays, and its answers are kept and shown again.

    Ko et al., DistiLLM, ICML 2024, arXiv:2402.03898, section 3.2 and algorithm 1 with the defaults of its code: the
    share of such steps begins at 0 and grows by a tenth after each epoch that ends with a higher loss on validation
    data. Until the memory is full they are answered anew, then partly. Its losses are `skew_kl` and `skew_reverse_kl`.
    """

    by: Literal["replay"] = "replay"
    start: float = Field(default=0.0, ge=0, le=1)
    """share of the steps at the beginning"""
    increase: float = Field(default=0.1, ge=0, le=1)
    """what is added to it after an epoch that ends with a higher loss"""
    tolerance: float = Field(default=0.1, ge=0)
    """how much higher, in the task's loss, the loss must be"""
    capacity: int = Field(default=1000, ge=1)
    """answers that are kept; then the oldest is overwritten"""
    schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """once the memory is full, the part of these steps that is answered anew: 1 - progress, a half, or progress"""
    why_unlike_said: ClassVar[Reason | None] = "answers are shown again that an earlier student wrote"

    def make(self, desk: Desk) -> Author:
        return ReplayAuthor(desk, self)
