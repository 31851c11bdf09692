"""Views of samples: what the teacher and the student see of the same sample."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

from pydantic.dataclasses import dataclass
from torch import Tensor

from pqk.data.data import Batch, Data, digest_of
from pqk.data.structures import Inputs
from pqk.errors import InputError
from pqk.settings import CONFIG, in_words

ViewFunction = Callable[[Inputs], Inputs]
"""all inputs that the data gives, each [B, …] -> those that one of the two sees"""


@in_words
@dataclass(frozen=True, config=CONFIG)
class Views:
    """What teacher and student see of one batch (`Task(views=…)`).

    Both are compared and timed on inputs of the same shapes and dtypes, so the views must have them: a view may be
    cheaper (fewer bands or frames repeated in place, a lower resolution enlarged again, a sensor that is zero), not
    smaller.
    """

    teacher: ViewFunction
    """all inputs that the data gives, each [B, …] -> those of the teacher"""
    student: ViewFunction
    """all inputs that the data gives -> those of the student"""


@in_words
@dataclass(frozen=True, config=CONFIG)
class Take:
    """The view that is some of the inputs, by position: `Views(teacher=Take(0), student=Take(1))`."""

    first: int
    """the position of the first one, from 0"""
    count: int = 1
    """how many"""

    def __call__(self, inputs: Inputs) -> Inputs:
        """Selects the inputs.

        Raises:
            InputError: there are not so many.
        """
        if not 0 <= self.first <= self.first + self.count <= len(inputs):
            raise InputError(f"data: {self} of {len(inputs)} inputs; each view takes some of what the data gives")
        return inputs[self.first : self.first + self.count]


class _ViewedData(Data):
    """Another data's batches, each with other inputs."""

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
        """The batch with other inputs."""

    def fingerprint(self) -> str:
        """Identifies the data by its own fingerprint and a hash of what is shown of its first batch.

        The views are functions, which do not say what they compute.
        """
        batch = next(self.batches())
        return digest_of(self.data.fingerprint(), (*batch.inputs, *(batch.teacher_inputs or ())))


class TwoViews(_ViewedData):
    """`data` as its `views` show it: batches have the student's inputs, and the teacher's as `teacher_inputs`."""

    def __init__(self, data: Data, views: Views) -> None:
        super().__init__(data)
        self.sides = views

    def show(self, batch: Batch) -> Batch:
        student, teacher = self.sides.student(batch.inputs), self.sides.teacher(batch.inputs)
        return Batch(student, batch.targets, batch.keys, teacher)


class TeachersView(_ViewedData):
    """`data` as the teacher sees it: for scoring and calibrating the teacher itself."""

    def show(self, batch: Batch) -> Batch:
        return batch.for_teacher()
