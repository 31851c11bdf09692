"""A knowledge term: one distillation loss with its weight, and where it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from pqk.data.structures import Inputs, map_tensors
from pqk.errors import InputError, Reason, nearest
from pqk.settings import settings
from pqk.task.task import Task


@dataclass(frozen=True)
class View:
    """What a term sees of one batch."""

    student: Any
    """the student's outputs: a tensor [B, …], or a tuple or dict of them"""
    teacher: Any
    """the teacher's outputs, detached, float32 at least; None where no term asks for them"""
    targets: Any
    """the labels: int64 [B, …] classes, or whatever the task's loss takes; None: the data has none"""
    student_features: Mapping[str, Tensor]
    """module path -> what the module gave: [B, C, H, W], [B, N, D] or [B, D]"""
    teacher_features: Mapping[str, Tensor]
    """the same of the teacher, detached"""
    task: Task
    """whose loss a supervised term uses"""
    inputs: Inputs = ()
    """the student's inputs, each [B, …]"""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """name -> which positions of a sample count: [B, positions…], 0 where they do not"""
    teacher_share: float | None = None
    """where the student wrote the answers that are the labels: of the probabilities that it drew with, the teacher's
    part; None: they are the data's, or others'"""
    scores: Tensor | None = None
    """where several answers to each prompt were ranked: what the critic says of each [B, N], the best first; all else
    then has a row for each, [B · N, …], prompt by prompt"""

    def best(self) -> View:
        """The view of the best answer to each prompt alone, where several were ranked."""
        if self.scores is None:
            return self
        count = self.scores.shape[1]
        shown = {
            f.name: map_tensors(lambda t: t[::count], getattr(self, f.name))
            for f in fields(self)
            if f.name not in ("task", "teacher_share", "scores")
        }
        return View(**shown, task=self.task, teacher_share=self.teacher_share)

    def mask(self, name: str) -> Tensor:
        """Looks up a mask of this training, or else the model input of that name.

        Args:
            name: of the mask, or of the input.

        Returns:
            [B, positions…], 0 where a feature does not count.

        Raises:
            InputError: there is neither; it names the nearest known one.
        """
        if name in self.masks:
            return self.masks[name]
        inputs = dict(zip(self.task.input_names, self.inputs, strict=False))
        if name not in inputs:
            raise InputError(f'distill: there is no mask "{name}"{nearest(name, {*self.masks, *inputs})}')
        return inputs[name]


@dataclass(frozen=True)
class Place:
    """Two points of comparison on the task's example, before training: what a projector is built from."""

    student: Tensor
    teacher: Tensor
    """the features [B, …]"""
    kept: Sequence[int] | None
    """the teacher's channels that survive in the student, where the compiler cut some"""
    student_model: nn.Module
    teacher_model: nn.Module | None
    """None: the teacher is a black box"""
    task: Task

    def __str__(self) -> str:
        return f"student {tuple(self.student.shape)}, teacher {tuple(self.teacher.shape)}"


@settings
class Term(ABC):
    """A distillation loss: a value for each sample [B], in float32 at least, whose mean, times `weight`, is minimised.

    A subclass is a frozen dataclass with a field `term`, its name in recipes, and is called with what one batch shows.
    """

    weight: float = Field(default=1.0, ge=0)
    """factor of this term's loss"""
    ramp_up: float = Field(default=0.0, ge=0, le=1)
    """share of the training over which the weight rises from 0, once the term has joined"""
    ramp_down: float = Field(default=0.0, ge=0, le=1)
    """share of the training, at its end, over which the weight falls to 0"""
    gate: str | None = Field(default=None, min_length=1)
    """what scales this loss sample by sample: "teacher_right", "teacher_confidence", "student_doubt",
    "teacher_agreement" (of an ensemble with uncertainty), or one given in Python"""

    needs_teacher: ClassVar[bool] = True
    other_classes: ClassVar[bool] = False
    """whether the teacher's classes may be others than the student's"""
    ranks: ClassVar[bool] = False
    """whether it looks at all answers that a critic ranked, and not at the best of each prompt alone"""
    blind: ClassVar[str] = ""
    """what this term cannot see, so that it must not train a student alone"""

    def points(self) -> tuple[str, str] | None:
        """(student, teacher) module paths whose outputs are compared; None: the models' outputs are."""
        return None

    def why_not_compared(self, task: Task, outputs: Any) -> Reason | None:
        """Tells, before anything is trained, whether the term can compare a model's outputs.

        Args:
            task: what the model is for.
            outputs: of the teacher, on the task's example.

        Returns:
            Why it cannot, else None.
        """
        return None

    def projector(self, place: Place) -> nn.Module | None:
        """Builds the module that maps the student's feature to the teacher's shape.

        It trains along, and is never exported.

        Args:
            place: both features on the task's example, and the models that they are of.

        Returns:
            The module; None where the features are compared as they are.

        Raises:
            InputError: this term cannot compare the two points.
        """
        return None

    @abstractmethod
    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        """Computes the loss of a batch.

        Args:
            view: what the batch shows.
            projector: what `projector` built, if anything.

        Returns:
            A loss for each sample [B], in float32, or in float64 where the outputs are.

        Raises:
            InputError: the outputs, features or labels are not such that the term can compare them.
        """
