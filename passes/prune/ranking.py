"""The data that removals are ranked on: how far each takes the student's outputs away from the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.structures import Inputs, concatenate
from pqk.passes.prune.blocks import Edit, edit_costs
from pqk.task.task import Task

FEW = 8
"""samples that are enough to see which blocks may go"""


class RankingData:
    """Validation samples, and the teacher's answers for them.

    They are one batch, whose answers are computed once. Texts that are continued stay in the batches of the data, whose
    answers, a score for each token of a vocabulary at each place, are computed when they are compared; of them those
    places count that have a token to predict.
    """

    def __init__(self, task: Task, teacher: nn.Module, samples: int) -> None:
        self.task, self.teacher = task, teacher
        if task.generates:
            self.batches = _first(task, samples)
        else:
            self.batches = [Batch(concatenate(list(task.calibration(samples))), None, None)]
        with torch.no_grad():
            self.answers = None if task.generates else teacher(*self.batches[0].inputs)

    @property
    def few(self) -> Inputs:
        """The first samples."""
        return tuple(t[:FEW] for t in self.batches[0].inputs)

    @torch.no_grad()
    def measure(self, student: nn.Module, edits: Sequence[Edit], blocks: Sequence[str]) -> tuple[float, list[float]]:
        """How far the student's outputs are from the teacher's, and how far with each of `edits` alone."""
        now, costs = 0.0, [0.0] * len(edits)
        counts = [self._places(batch) for batch in self.batches]
        for batch, count in zip(self.batches, counts, strict=True):
            answers, share = self.teacher(*batch.inputs) if self.answers is None else self.answers, count / sum(counts)

            def distance(outputs: object, answers: object, targets: object = batch.targets) -> float:
                return self.task.distance(outputs, answers, targets)

            found = edit_costs(student, batch.inputs, answers, edits, blocks, distance)
            now += share * distance(student(*batch.inputs), answers)
            costs = [cost + share * more for cost, more in zip(costs, found, strict=True)]
        return now, costs

    def _places(self, batch: Batch) -> int:
        """How many places of a batch count, or its samples."""
        if isinstance(batch.targets, Tensor) and not batch.targets.is_floating_point():
            return int((batch.targets != self.task.ignored).sum())
        return len(batch.inputs[0])


def _first(task: Task, samples: int) -> list[Batch]:
    """Validation batches of `samples` texts in all, at most."""
    batches: list[Batch] = []
    for batch in task.validation.batches():
        if samples <= 0:
            break
        targets = None if batch.targets is None else batch.targets[:samples]
        batches.append(Batch(tuple(t[:samples] for t in batch.inputs), targets, None))
        samples -= len(batch.inputs[0])
    return batches
