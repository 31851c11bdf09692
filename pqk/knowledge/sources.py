"""Who teaches, as a recipe says it: `teacher = { source = "ema", momentum = 0.99 }`. Listed in `SOURCES`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import nn

from pqk.data import Inputs
from pqk.errors import InputError
from pqk.knowledge.black_box import OnnxTeacher
from pqk.knowledge.teacher import FrozenTeacher, Teacher
from pqk.knowledge.teachers import EMATeacher, EnsembleTeacher, UncertaintyTeacher
from pqk.program import CONFIG


@dataclass(frozen=True)
class Given:
    """What a teacher can be made of, when a training begins."""

    teacher: nn.Module
    """the recipe's"""
    student: nn.Module
    points: Sequence[str]
    """where features are wanted"""
    precision: str
    example: Inputs


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Source(ABC):
    """Where a training's teacher comes from."""

    like_student: ClassVar[bool] = False
    """whether its layers have the student's channels, whatever was cut"""

    def uncached(self) -> str | None:
        """Why its answers cannot be kept for the next epoch, whatever the data is, else None."""
        return None

    @abstractmethod
    def make(self, given: Given) -> Teacher:
        """The teacher. Raises `InputError` where there is none."""


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class FromModule(Source):
    """The teacher of the recipe, frozen."""

    source: Literal["module"] = "module"

    def make(self, given: Given) -> Teacher:
        return FrozenTeacher(given.teacher, given.points, given.precision)


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class FromEMA(Source):
    """The moving average of the student that trains."""

    source: Literal["ema"] = "ema"
    momentum: float = Field(default=0.999, ge=0, lt=1)
    """share of the average that stays in a step"""
    warmup: bool = True
    """let the momentum grow from 0, at most 1 - 1/(k + 1) in step k"""
    like_student: ClassVar[bool] = True

    def uncached(self) -> str | None:
        return EMATeacher.uncacheable

    def make(self, given: Given) -> Teacher:
        return EMATeacher(
            given.student, given.points, momentum=self.momentum, warmup=self.warmup, precision=given.precision
        )


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class FromSnapshot(Source):
    """The student as this training finds it, such as an earlier one left it, frozen."""

    source: Literal["snapshot"] = "snapshot"
    restart: bool = False
    """begin again from fresh weights: the next generation of a born-again network (Furlanello et al., ICML 2018)"""
    like_student: ClassVar[bool] = True

    def make(self, given: Given) -> Teacher:
        frozen = copy.deepcopy(given.student).requires_grad_(False)
        if self.restart:
            restart(given.student)
        return FrozenTeacher(frozen, given.points, given.precision)


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class FromOnnx(Source):
    """An ONNX file with the task's inputs: a black box, of which the outputs are seen."""

    source: Literal["onnx"] = "onnx"
    path: str = Field(min_length=1)
    """the file, from the folder in which pqk runs"""

    def make(self, given: Given) -> Teacher:
        return OnnxTeacher(self.path, given.example)


Member = Annotated[FromModule | FromEMA | FromSnapshot | FromOnnx, Field(discriminator="source")]


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class FromEnsemble(Source):
    """The weighted mean of several teachers."""

    source: Literal["ensemble"] = "ensemble"
    members: tuple[Member, ...] = Field(min_length=1)
    """the teachers: tables with `source`"""
    weights: tuple[float, ...] | None = None
    """one for each member; none: alike"""
    of: Literal["probabilities", "logits"] = "probabilities"
    """what the mean is taken of"""
    by: Literal["confidence", "surest", "label_confidence"] | None = None
    """what weights the members sample by sample; label_confidence: by their losses on the labels (CA-MKD)"""
    uncertainty: bool = False
    """also say how far the members disagree, which the gate "teacher_agreement" needs"""

    def __post_init__(self) -> None:
        weights = self.weights
        if weights is not None and (len(weights) != len(self.members) or min(weights) < 0 or sum(weights) <= 0):
            raise InputError(
                f"weights: {list(weights)} for {len(self.members)} members; give one each, at least 0 and not all 0"
            )

    def uncached(self) -> str | None:
        if self.uncertainty:
            return "how far the members disagree is not kept with their answers"
        return next((reason for m in self.members if (reason := m.uncached()) is not None), None)

    def make(self, given: Given) -> Teacher:
        kind = UncertaintyTeacher if self.uncertainty else EnsembleTeacher
        return kind([m.make(given) for m in self.members], self.weights, of=self.of, by=self.by)


SOURCES = (FromModule, FromEMA, FromSnapshot, FromOnnx, FromEnsemble)
AnySource = Annotated[
    FromModule | FromEMA | FromSnapshot | FromOnnx | FromEnsemble, Field(discriminator="source")
]  # fmt: skip


def restart(student: nn.Module) -> None:
    """Draw all weights anew, each layer as it does it itself. Raises `InputError` for layers that cannot."""
    for path, module in student.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not callable(getattr(module, "reset_parameters", None)):
            raise InputError(
                f'distill: the student cannot begin again: "{path}" ({type(module).__name__}) has tensors and no '
                "reset_parameters; restart a plain module, before it is captured"
            )
    for module in student.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
