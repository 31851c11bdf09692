"""Distillation: train the student, whatever stage it is in, on what the teacher knows.

At MODULE this is the recovery after pruning; at FAKE_QUANT it is quantization-aware training with distillation. The
trainer and the terms are the same.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from pqk.errors import InputError
from pqk.knowledge import AnyTerm, CrossEntropy, KLDivergence
from pqk.knowledge.objective import Distillation
from pqk.knowledge.teacher import FrozenTeacher, LogitCache, cache_for
from pqk.modules import quantizers
from pqk.passes._survivors import surviving_channels
from pqk.program import CONFIG, Pass, Program, Stage
from pqk.task import Task
from pqk.train import Training, fit


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Distill(Training, Pass):
    """Train the student against the teacher and the labels."""

    name: ClassVar[str] = "distill"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE, Stage.GRAPH, Stage.FAKE_QUANT})

    terms: tuple[AnyTerm, ...] = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
    """the knowledge terms: tables with `term`, `weight` and the term's own fields"""
    teach_from: float = Field(default=0.0, ge=0, lt=1)
    """share of the training before the teacher joins (a tenth is usual under quantization)"""
    freeze_from: float = Field(default=0.5, ge=0, le=1)
    """share of a quantization-aware training after which the activation ranges stand still"""
    teacher_precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """bf16 runs the frozen teacher in bfloat16 autocast"""

    def __post_init__(self) -> None:
        if not any(t.weight > 0 for t in self.terms):
            raise InputError("no term has a weight above 0; there is nothing to train on")

    def apply(self, program: Program, task: Task) -> Program:
        data = task.need_train("distill")
        if program.stage == Stage.FAKE_QUANT and self.precision == "bf16":
            raise InputError("distill: quantization-aware training needs fp32: bfloat16 is coarser than the INT8 grid")
        terms = [t for t in self.terms if t.weight > 0]
        points = sorted({p[1] for t in terms if (p := t.points())})
        cache: LogitCache | str = "the terms compare features" if points else "the terms need no teacher"
        if not points and any(t.needs_teacher for t in terms):
            cache = cache_for(program.run.folder, program.teacher, data, self.teacher_precision, task.example)
        teacher = FrozenTeacher(
            program.teacher, points, self.teacher_precision, cache if isinstance(cache, LogitCache) else None
        )
        student = program.student
        steps = [q.scale for q in quantizers(student).values() if q.scale.requires_grad]

        def on_progress(progress: float) -> None:
            for scale in steps:
                scale.requires_grad_(progress < self.freeze_from)

        objective = Distillation(
            self.terms,
            task,
            student,
            teacher,
            start=self.teach_from,
            kept=lambda point: surviving_channels(program, task.example, point),
            on_progress=on_progress,
        )
        log = fit(program.run, student, data, objective, self)
        for scale in steps:  # that they were frozen is a state of this training: a later one learns them again
            scale.requires_grad_(True)
        cached = "cached" if isinstance(cache, LogitCache) else f"live: {cache}"
        return program.note(losses=log.losses, steps=log.steps, retries=log.retries, teacher=cached)
