"""A knowledge term: one distillation loss with its weight, and where it looks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from pqk.program import CONFIG
from pqk.task import Task


@dataclass(frozen=True)
class View:
    """What a term sees of one batch. Teacher tensors are detached. Features by point name."""

    student: Any
    teacher: Any
    targets: Any
    student_features: dict[str, Tensor]
    teacher_features: dict[str, Tensor]
    task: Task


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Term(ABC):
    """Returns a per-sample loss [B] in float32 at least, whose mean, times `weight`, is minimised."""

    weight: float = Field(default=1.0, ge=0)
    """factor of this term's loss"""

    needs_teacher = True

    def points(self) -> tuple[str, str] | None:
        """(student, teacher) module paths whose outputs are compared; None: the models' outputs are."""
        return None

    def projector(self, student: Tensor, teacher: Tensor, kept: Sequence[int] | None) -> nn.Module | None:
        """The module that maps the student's feature to the teacher's shape; `kept` are the surviving channels."""
        return None

    @abstractmethod
    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        """Per-sample losses [B], in float32, or in float64 where the outputs are."""
