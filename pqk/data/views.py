"""Views of samples: what a student, a teacher or a second augmentation is shown of the same sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from pqk.data.data import Batch, Data, digest_of
from pqk.data.structures import Inputs
from pqk.errors import InputError

ViewFunction = Callable[[Inputs], Inputs]


@dataclass(frozen=True)
class Views:
    """What teacher and student see of one batch (`Task(views=…)`): functions of all that the data gives.

    The student is a rewritten copy of the teacher, so both views must have the same shapes and dtypes: a view may be
    cheaper (fewer bands or frames repeated in place, a lower resolution enlarged again, a sensor that is zero), not
    smaller.
    """

    teacher: ViewFunction
    student: ViewFunction


@dataclass(frozen=True)
class Take:
    """The view that is some of the inputs, by position: `Views(teacher=Take(0), student=Take(1))`."""

    first: int
    count: int = 1

    def __call__(self, inputs: Inputs) -> Inputs:
        if not 0 <= self.first <= self.first + self.count <= len(inputs):
            raise InputError(f"data: {self} of {len(inputs)} inputs; each view takes some of what the data gives")
        return inputs[self.first : self.first + self.count]


class _Shown(Data):
    """Another data's batches, each shown in another way."""

    def __init__(self, data: Data) -> None:
        self.data, self.samples, self.key_count = data, data.samples, data.key_count
        self.unkeyed_reason, self.resume_reason = data.unkeyed_reason, data.resume_reason
        self.views: int | None = getattr(data, "views", None)
        self.targets: Tensor | None = getattr(data, "targets", None)

    def __len__(self) -> int:
        return len(self.data)

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        return map(self.show, self.data.batches(seed, epoch, start, state))

    @abstractmethod
    def show(self, batch: Batch) -> Batch:
        """What becomes of one batch."""

    def fingerprint(self) -> str:
        """Of the data, and of what is shown of its first batch: functions do not say what they compute."""
        batch = next(self.batches())
        return digest_of(self.data.fingerprint(), (*batch.inputs, *(batch.teacher_inputs or ())))


class TwoViews(_Shown):
    """`data` as its `views` show it: batches have the student's inputs, and the teacher's as `teacher_inputs`."""

    def __init__(self, data: Data, views: Views) -> None:
        super().__init__(data)
        self.shown = views

    def show(self, batch: Batch) -> Batch:
        student, teacher = self.shown.student(batch.inputs), self.shown.teacher(batch.inputs)
        return Batch(student, batch.targets, batch.keys, teacher)


class TeachersView(_Shown):
    """`data` as the teacher sees it: for scoring and calibrating the teacher itself."""

    def show(self, batch: Batch) -> Batch:
        return batch.for_teacher()
