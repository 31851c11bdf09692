"""Distillation: train the student, whatever stage it is in, on what the teacher knows.

At MODULE this is the recovery after pruning; at FAKE_QUANT it is quantization-aware training with distillation. The
trainer and the terms are the same.

A captured network has its batch norm folded into the weights, so nothing keeps a too long step from growing on the way
through the layers: on the pruned ResNet-20 of the digits the gradient's norm reached 87 within 19 steps at a rate of
0.01, step sizes learned or not, and the student was lost. From `capture` on gradients are therefore clipped.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pqk.core.program import Pass, Program, Stage
from pqk.data.data import Data
from pqk.data.structures import first_tensor, tensors
from pqk.errors import InputError, Reason, nearest
from pqk.knowledge import AnyTerm, ByCritic, CrossEntropy, GroupPolicy, KLDivergence, LogitMSE, MiniLLM, Term
from pqk.knowledge.answers.authors import Desk
from pqk.knowledge.answers.catalogue import AnyAnswers
from pqk.knowledge.objective import why_not_learned
from pqk.knowledge.retention import Memory, Retention
from pqk.knowledge.sources import AnySource, FromModule, TeacherContext
from pqk.knowledge.teachers.base import LogitCache, Teacher, cache_for
from pqk.knowledge.terms.feature import channel_axis
from pqk.knowledge.terms.response import ResponseTerm
from pqk.models.decoder import decoder, decoder_config
from pqk.models.hub import find_directory, load_tokenizer
from pqk.passes.distill.assistant import earlier_student
from pqk.passes.distill.keep_best import UNTRAINED, CheckpointSelection, Criterion
from pqk.passes.prune.survivors import surviving_channels
from pqk.quant.fake_quant import quantizers
from pqk.settings import settings
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, TrainingLog, fit

CAPTURED_CLIP = 1.0
"""the gradient's norm after `capture`, where the recipe gives none"""


@settings
class Distill(Training, Pass):
    """Train the student against the teacher and the labels.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; under quantization Mishra and
    Marr 2018, "Apprentice", arXiv:1711.05852. Each term names its own source.
    """

    name: ClassVar[str] = "distill"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE, Stage.GRAPH, Stage.FAKE_QUANT})
    row: ClassVar[str | None] = "pruned_distilled"

    terms: tuple[AnyTerm, ...] = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
    """the knowledge terms: tables with `term`, `weight` and the term's own fields"""
    teacher: AnySource = FromModule()
    """who teaches: a table with `source`, such as { source = "ema" }, and the source's own fields"""
    balance: Literal["static", "gradient_norm", "learned"] = "static"
    """what moves the weights during the training: nothing, equal gradients, or learned uncertainties"""
    teach_from: float = Field(default=0.0, ge=0, lt=1)
    """share of the training before the teacher joins (a tenth is usual under quantization)"""
    frozen: tuple[str, ...] = ()
    """paths of modules or parameters that do not train, such as a table of embeddings: what the texts do not contain
    then stays as near to the rest as the teacher has it, and the optimizer need not pass over it"""
    freeze_from: float = Field(default=0.5, ge=0, le=1)
    """share of a quantization-aware training after which all step sizes, and with them the activation ranges, stand
    still while the weights settle on them"""
    keep: Criterion = "last"
    """which student a training ends in. "last": that of the last step, as a fixed schedule means it; "metric" and
    "teacher": the best of the start and the end of every epoch (under quantization: once converted to integers), on
    validation data: by the task's metric (ties by the next), or by the least divergence from the teacher's outputs,
    which also tells students apart where the teacher has seen the validation data. Not the default, because a small
    validation set picks by chance what a cosine schedule does not have to"""
    teacher_precision: str = Field(default="fp32", pattern="^(fp32|bf16)$")
    """bf16 runs the frozen teacher in bfloat16 autocast"""
    answers: AnyAnswers | None = None
    """who answers the prompts, of models that continue texts: a table with `by`, such as { by = "student", fraction =
    0.5 }, and the author's own fields; none: the data does"""
    retain: Retention | None = None
    """what holds the student to an old model on what must not be forgotten, the task's `retained` data: a table such as
    { terms = [{ term = "kl", weight = 1.0, temperature = 2.0 }], old = { source = "snapshot" } }; none: nothing does"""

    def __post_init__(self) -> None:
        if not any(t.weight > 0 for t in self.terms):
            raise InputError("no term has a weight above 0; there is nothing to train on")
        if (reason := why_not_learned(self._counted())) is not None:
            raise InputError(reason)
        if (reason := self._why_not_answered()) is not None:
            raise InputError(reason)
        if self.keep != "last" and self.average:
            raise InputError(
                f'keep = "{self.keep}" picks the weights of one epoch and average = {self.average:g} blends those of '
                'many; set average = 0 or keep = "last"'
            )

    def _counted(self) -> Sequence[Term]:
        """The terms with a weight."""
        return [t for t in self.terms if t.weight > 0]

    def _why_not_answered(self) -> Reason | None:
        """Why the terms cannot learn from these answers, else None."""
        terms, how = self._counted(), self.answers
        if any(isinstance(t, MiniLLM) for t in terms):
            if how is None:
                return 'minillm learns from answers that the student writes; set answers = { by = "mixture" }'
            reason = how.why_unlike_said
            if reason is None and not how.draws_as_said:
                reason = "it draws at another temperature, or among some of the tokens only"
            if reason is not None:
                return f'minillm is an expectation over the student\'s own answers, and with by = "{how.by}" {reason}'
        for t in terms:
            if t.ranks and (how is None or not how.ranked):
                name = getattr(t, "term", type(t).__name__)
                return f'{name} compares several answers to a prompt; set answers = {{ by = "critic" }}, or "adversary"'
            if isinstance(t, GroupPolicy) and (reason := self._why_not_own(how)) is not None:
                return f"group_policy is an expectation over the student's own answers, and {reason}"
        if how is not None and how.ranked and not how.for_all_terms and not any(t.ranks for t in terms):
            return f'answers by = "{how.by}" are scored, and no term looks at that; add group_policy'
        if how is not None and not (how.for_all_terms or how.ranked) and not any(t.needs_teacher for t in terms):
            return f'answers by = "{how.by}" are judged by the teacher, and no term asks it; add one, such as jsd'
        return None

    @staticmethod
    def _why_not_own(how: AnyAnswers | None) -> Reason | None:
        """Why what is ranked is not what the student alone says, else None."""
        if isinstance(how, ByCritic) and how.data:
            return "the data's answer is among them; set data = false"
        if how is not None and not how.draws_as_said:
            return "they are drawn at another temperature, or among some of the tokens only"
        return None

    def cached_output(self) -> str | None:
        """The one of the teacher's outputs that is kept, where all terms that ask for it name the same."""
        taught = [t for t in self._counted() if t.needs_teacher or t.gate]
        names = {getattr(t, "output", None) if t.gate is None else None for t in taught}
        name = names.pop() if len(names) == 1 else None
        return name if isinstance(name, str) else None

    def why_not_cached(self) -> Reason | None:
        """Why the teacher's answers are not kept, whatever the data is, else None."""
        if any(t.points() for t in self._counted()):
            return "the terms compare features"
        if not any(t.needs_teacher or t.gate for t in self._counted()):
            return "the terms need no teacher"
        if self.answers is not None:
            return "what it judges is written during the training"
        return self.teacher.why_not_cached()

    def fitted(self, task: Task, outputs: Any) -> Pass:
        """With the terms of the default recipe that this task can have.

        No labels where there are none; and half the squared distance to the teacher's first output instead of a
        divergence, where that is a single score, or an answer without labels that is no class, such as an embedding.
        Of several outputs, some of which have no classes, the first one.
        """
        if task.train is None:
            return self
        labelled, terms, output = task.train.labelled, self.terms, first_tensor(outputs)
        axis = task.class_axis_or_reason(output)
        first = next(iter(outputs)) if isinstance(outputs, Mapping) else None if isinstance(outputs, Tensor) else 0
        width = output.shape[axis] if isinstance(axis, int) else output.shape[channel_axis(output)]
        if isinstance(axis, str) or (not task.decides_by_argmax and (width == 1 or not labelled)):
            terms = (*terms[:1], LogitMSE(output=first, weight=width / 2))
        elif any(isinstance(task.class_axis_or_reason(t), str) for t in tensors(outputs)):
            terms = tuple(dataclasses.replace(t, output=first) if isinstance(t, ResponseTerm) else t for t in terms)
        return dataclasses.replace(self, terms=tuple(t for t in terms if labelled or t.needs_teacher))

    def why_not_applied(self, task: Task, outputs: Any) -> Reason | None:
        reasons = [term.why_not_compared(task, outputs) for term in self._counted()]
        if self.answers is not None:
            reasons.append(self.answers.why_not_applied(task))
        if self.retain is not None:
            reasons.append(self.retain.why_not_applied(task, outputs))
        return next((f"distill: {reason}" for reason in reasons if reason is not None), None)

    def apply(self, program: Program, task: Task) -> Program:
        """Trains the student in place, in whatever stage it is.

        Args:
            program: the student to train, beside the teacher of the recipe.
            task: training data, and validation data where checkpoints are compared (`keep`).

        Returns:
            The program with losses, steps and how the teacher answered in its details.

        Raises:
            InputError: there is no training data, a setting does not suit the stage, or a term, the teacher or a frozen
                path names what the networks do not have.
            PqkError: the loss is still not finite after three retries at a lower rate.
        """
        data = task.need_train("distill")
        self._check_stage(program.stage)
        teacher, live = self._teacher_for(program, task, data)
        memory = self._memory(program, task)
        before = {} if memory is None else memory.figures(program.student)
        with frozen_parameters(program.student, self.frozen):
            log, kept_epoch = self._train(program, task, data, teacher, memory)
        notes: dict[str, Any] = log.notes if kept_epoch is None else {"kept_epoch": kept_epoch, **log.notes}
        if memory is not None:
            notes["retained"] = memory.forgotten(before, memory.figures(program.student))
        if kept_epoch == 0:
            notes["kept"] = UNTRAINED
        if program.run.rough and teacher.live_seconds:
            notes["teacher_seconds"] = statistics.median(teacher.live_seconds)
        answers = "cached" if live is None else f"live: {live}"
        return program.note(losses=log.losses, steps=log.steps, retries=log.retries, teacher=answers, **notes)

    def _check_stage(self, stage: Stage) -> None:
        if stage == Stage.FAKE_QUANT and self.precision == "bf16":
            raise InputError("distill: quantization-aware training needs fp32: bfloat16 is coarser than the INT8 grid")

    def _teacher_for(self, program: Program, task: Task, data: Data) -> tuple[Teacher, Reason | None]:
        """The teacher, and why it answers every batch live; None where its answers are cached."""
        points = sorted({p[1] for t in self._counted() if (p := t.points())})
        teacher = self.teacher.make(self._context(program, task, points))
        cache: LogitCache | Reason | None = self.why_not_cached()
        if cache is None:
            cache = self._cache(program, task, data, teacher, self.cached_output())
        teacher.cache = cache if isinstance(cache, LogitCache) else None
        return teacher, None if isinstance(cache, LogitCache) else cache

    def _context(self, program: Program, task: Task, points: Sequence[str]) -> TeacherContext:
        return TeacherContext(
            program.teacher,
            program.student,
            points=points,
            precision=self.teacher_precision,
            example=task.example,
            earlier=lambda number: earlier_student(program, number),
            class_axis=task.class_axis_of,
            language_model=language_model,
        )

    def _cache(
        self, program: Program, task: Task, data: Data, teacher: Teacher, output: str | None
    ) -> LogitCache | Reason:
        """Where a teacher's answers to this data are kept, or why they are not."""
        free = any(name is not None for axes in task.axes for name in axes[1:])
        return cache_for(program.run.folder, teacher, data, self.teacher_precision, output, free)

    def _memory(self, program: Program, task: Task) -> Memory | None:
        """The old model, and the data that must not be forgotten; None: the task has none."""
        if task.retained_evaluation is None:
            return None
        source = FromModule() if self.retain is None else self.retain.old
        memory = Memory(task, source.make(self._context(program, task, ())), source.like_student)
        if self.retain is not None and task.retained is not None:
            cache = self._cache(program, task, task.retained, memory.old, None)
            memory.old.cache = cache if isinstance(cache, LogitCache) else None
        return memory

    def _train(
        self, program: Program, task: Task, data: Data, teacher: Teacher, memory: Memory | None
    ) -> tuple[TrainingLog, int | None]:
        """Fit the student and leave it as the one to keep: the log, and its epoch where students were compared."""
        student = program.student
        step_sizes = [q.scale for q in quantizers(student).values() if q.scale.requires_grad]

        def freeze(progress: float) -> None:
            for scale in step_sizes:
                scale.requires_grad_(progress < self.freeze_from)

        author = None
        if self.answers is not None:
            seed = program.run.seed_for("answers")
            author = self.answers.make(Desk(student, teacher, task, seed, program.run.folder, program.teacher))
        objective = CheckpointSelection(
            self.terms,
            task,
            student,
            teacher,
            start=self.teach_from,
            kept=lambda p: None if self.teacher.like_student else surviving_channels(program, task.example, p),
            on_progress=freeze,
            balance=self.balance,
            author=author,
        )
        objective.select(student, program.teacher, self.keep)
        whole: Objective = objective
        if memory is not None and self.retain is not None:
            whole = memory.retaining(objective, self.retain.terms, student, program.run.seed_for("retained"))
        log = fit(program.run, student, data, whole, self._clipped(program.stage))
        kept_epoch = objective.finish(student)
        for scale in step_sizes:  # that they were frozen is a state of this training: a later one learns them again
            scale.requires_grad_(True)
        return log, kept_epoch

    def _clipped(self, stage: Stage) -> Training:
        return self if stage == Stage.MODULE or self.clip is not None else replace(self, clip=CAPTURED_CLIP)


def language_model(directory: str) -> tuple[nn.Module, Any]:
    """The causal model in a Hugging Face directory, and its tokenizer. Raises `InputError` where there is none."""
    folder = find_directory(directory, None, "distill")
    tokenizer = load_tokenizer(folder, decoder_config(folder), "distill", least=0.9, needs_padding=False)
    return decoder(folder), tokenizer


@contextmanager
def frozen_parameters(student: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Within it the parameters at these paths get no gradients. Raises `InputError` for a path that has none."""
    parameters = dict(student.named_parameters())
    frozen = []
    for path in paths:
        matches = [p for name, p in parameters.items() if name == path or name.startswith(f"{path}.")]
        if not matches:
            known = {name.rpartition(".")[0] for name in parameters}
            raise InputError(f'distill: frozen = "{path}": the student has no parameters there{nearest(path, known)}')
        frozen += [p for p in matches if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
