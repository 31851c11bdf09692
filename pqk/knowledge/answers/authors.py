"""Who writes the answers of a training: `answers = { by = "student", fraction = 0.5 }`. Listed in `AUTHORS`.

What a student of texts sees in training are other people's answers, and what it meets in use are its own. A batch's
prompts can therefore be answered anew: by the teacher, which makes the data, or by the student as it is, which the
teacher then judges token by token.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pqk.core.distributed import rank
from pqk.data.answer_file import AnswerFile
from pqk.data.data import Batch
from pqk.data.sequences import answered, prompts_of
from pqk.errors import InputError, Reason
from pqk.knowledge.answers.generation import Correcting, Ends, Mixing, NextScores, TokenSampling, generate
from pqk.knowledge.teachers.base import ChangingTeacher, FrozenTeacher, Teacher
from pqk.knowledge.teachers.cache import cache_folder
from pqk.settings import settings
from pqk.task.task import Task


class Written(NamedTuple):
    """AnswerSettings to a batch's prompts."""

    batch: Batch
    """the prompts with these answers, which alone are learned"""
    instead: bool
    """whether they stand in the place of the data for all terms, and not for those alone that ask the teacher"""
    teacher_share: float | None = None
    """of the probabilities that they were drawn with, beside the student's own; None: they are not the student's"""
    scores: Tensor | None = None
    """where several answers to each prompt were ranked: what the critic says of each [B, N], the best first, which are
    the rows of the batch prompt by prompt; None: each prompt has one answer"""
    loss: Tensor | None = None
    """of what the author learns itself, for each prompt [B], which is added to the training's; None: nothing"""


@dataclass(frozen=True)
class Desk:
    """What answers are written with, when a training begins."""

    student: nn.Module
    """the one that trains"""
    teacher: Teacher
    task: Task
    seed: int
    """of everything that is drawn"""
    folder: Path | None = None
    """the run's, where a teacher's answers are kept; None: in memory"""
    configured: nn.Module | None = None
    """the model over the student's tokens whose configuration says what ends a text; None: the teacher's"""


class Author(nn.Module):
    """Writes answers, step by step: a function of the seed, the step and the student, all of which checkpoints hold."""

    step: Tensor
    """int64: how many batches it was asked about"""

    def __init__(self, desk: Desk, how: AnswerSettings) -> None:
        super().__init__()
        self.desk, self.how = desk, how
        # In a list: the student is no part of what answers, and no part of it is saved twice.
        self._student = [desk.student]
        self.ends = ends_of(desk, how)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Batch, progress: float) -> Written | None:
        """AnswerSettings a training batch's prompts; None: in this step the data's answers stay.

        Args:
            batch: of the data.
            progress: share of the training that is done, 0 to 1.

        Raises:
            InputError: it has no prompts.
        """
        step = int(self.step)
        self.step += 1
        chance = torch.rand((), generator=torch.Generator().manual_seed(number(self.desk.seed, "whether", step)))
        return self.write(batch, float(chance), step, progress)

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        """As `forward`, with a number drawn from 0 to 1 that is the same for all processes."""
        raise NotImplementedError

    def end_epoch(self, epoch: int) -> None:
        """Called after each epoch."""

    def own_answers(self, batch: Batch, step: int, together: Mixing | Correcting | None = None) -> Batch:
        """Prompts with the student's answers, alone or together with the teacher."""
        prompts = prompts_of(batch, self.how.prompt_tokens)
        seeds = [number(self.desk.seed, "answer", step, rank(), row) for row in range(len(prompts))]
        other = None if together is None else teachers_scores(self.desk.teacher, prompts[0].device)
        answers = generate(self._student[0], prompts, self.how, seeds, self.ends, other, together)
        return answered(prompts, answers)

    def proposals(self, prompts: Sequence[Tensor], samples: int, step: int, what: str) -> list[list[Tensor]]:
        """The student's answers to each prompt, int64 [N] each; `what` they are is part of their seeds."""
        asked = [(row, draw) for row in range(len(prompts)) for draw in range(samples)]
        seeds = [number(self.desk.seed, what, step, rank(), row, draw) for row, draw in asked]
        found = generate(self._student[0], [prompts[row] for row, _ in asked], self.how, seeds, self.ends)
        return [found[row * samples : (row + 1) * samples] for row in range(len(prompts))]


@settings
class AnswerSettings(TokenSampling, ABC):
    """Who answers the prompts of a training, and how."""

    why_unlike_said: ClassVar[Reason | None] = None
    """why an objective that is an expectation over the student's own answers cannot use these, else None"""
    for_all_terms: ClassVar[bool] = False
    """whether these answers are the data of all terms, and not of those alone that ask the teacher"""
    ranked: ClassVar[bool] = False
    """whether several answers to each prompt are ranked"""
    prompt_tokens: int = Field(default=1, ge=1)
    """tokens of a text that are given at least, where the data says no longer prompt"""
    stop: tuple[int, ...] | None = None
    """tokens that end an answer; by default those of the teacher's configuration"""

    def check_draws(self, samples: int) -> None:
        """Raises `InputError` where several answers to a prompt would all be alike."""
        if samples > 1 and self.temperature == 0:
            raise InputError(f"samples = {samples} of the most probable tokens are all alike; set a temperature")

    def why_not_applied(self, task: Task) -> Reason | None:
        """Why nothing can be answered in this way for a task, else None."""
        if task.seq2seq or not task.generates:
            return "answers are written by causal models (Task(generates=True)), and this is none"
        return None

    @abstractmethod
    def make(self, desk: Desk) -> Author:
        """Makes the author.

        Raises:
            InputError: it cannot write here.
        """


def number(*key: object) -> int:
    """A seed of 63 bits for a key, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def ends_of(desk: Desk, how: AnswerSettings) -> Ends:
    """What ends an answer: the teacher's end tokens, and the longest text that it and the task know.

    Raises `InputError` for a token to stop at that the model has not.
    """
    model = getattr(desk.teacher.module if desk.configured is None else desk.configured, "model", None)
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    stop: Any = getattr(generation, "eos_token_id", None)
    stop = getattr(config, "eos_token_id", None) if stop is None else stop
    words = getattr(config, "vocab_size", None)
    for token in how.stop or ():
        if token < 0 or (isinstance(words, int) and token >= words):
            most = f"{words} tokens" if isinstance(words, int) else "tokens"
            raise InputError(f"distill: stop = {token}, and the model has {most}, from 0: no answer would end with it")
    known = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    limits = (getattr(config, "max_position_embeddings", None), desk.task.preprocessing.get("max_length"))
    return Ends(known if how.stop is None else how.stop, min((n for n in limits if isinstance(n, int)), default=None))


def teachers_scores(teacher: Teacher, device: torch.device) -> nn.Module | NextScores:
    """The teacher's model where it reads on and is on this device, else whatever answers.

    Raises `InputError` for a teacher over other tokens, which cannot write the student's.
    """
    if teacher.other_tokens:
        raise InputError(
            "distill: the teacher has another tokenizer and cannot write answers in the student's tokens; let the "
            'student write them, answers = { by = "student" }, or take the teacher\'s texts as data'
        )
    # Others answer by more than their model: with a context before the text, a head of their own, several members.
    module = teacher.module if isinstance(teacher, FrozenTeacher | ChangingTeacher) else None
    reads_on = module is not None and callable(getattr(module, "extend", None))
    if module is not None and reads_on and all(p.device == device for p in module.parameters()):
        return module
    return lambda ids, mask: teacher(Batch((ids, mask), None, None))[0]


# ---- the teacher


class TeacherAuthor(Author):
    """The teacher answers each prompt once a draw; its answers are kept."""

    epoch: Tensor
    """int64: epochs that are done"""

    def __init__(self, desk: Desk, how: ByTeacher) -> None:
        super().__init__(desk, how)
        teachers_scores(desk.teacher, torch.device("cpu"))  # refused before training, not in it
        self.samples, self.fraction = how.samples, how.fraction
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.kept = AnswerFile(None, "")
        folder = cache_folder(desk.folder)
        if folder is not None and desk.teacher.why_not_cached() is None:
            identity = f"{desk.teacher.identity()} {how} {self.ends} {desk.seed}"
            digest = hashlib.sha256(identity.encode()).hexdigest()
            self.kept = AnswerFile(folder / f"answers-{digest[:32]}.jsonl", digest)

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        if chance >= self.fraction:
            return None
        prompts, draw = prompts_of(batch, self.how.prompt_tokens), int(self.epoch) % self.samples
        questions = [" ".join(map(str, p.tolist())) for p in prompts]
        missing = {q: p for q, p in zip(questions, prompts, strict=True) if self.kept.get(q, draw) is None}
        if missing:
            seeds = [number(self.desk.seed, "teacher", q, draw) for q in missing]
            model = teachers_scores(self.desk.teacher, prompts[0].device)
            found = generate(model, list(missing.values()), self.how, seeds, self.ends)
            self.kept.add((q, draw, a.tolist()) for q, a in zip(missing, found, strict=True))
        answers = [torch.tensor(self.kept.get(q, draw), device=prompts[0].device) for q in questions]
        return Written(answered(prompts, answers), instead=True)

    def end_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch + 1)


@settings
class ByTeacher(AnswerSettings):
    """The teacher answers, and its answers are the data: sequence-level distillation.

    Kim & Rush, EMNLP 2016, arXiv:1606.07947, section 3.2, which takes the teacher's mode, by a beam; here it is the
    greedy answer (`temperature = 0`), or `samples` draws, one an epoch. Each answer is written once and kept. All terms
    learn from these answers, `cross_entropy` among them.

    Raises:
        InputError: several samples of the most probable tokens are asked for.
    """

    by: Literal["teacher"] = "teacher"
    temperature: float = Field(default=0.0, ge=0)
    """the scores are divided by it before the softmax; 0: always the most probable token"""
    fraction: float = Field(default=1.0, gt=0, le=1)
    """share of the steps in which the teacher's answers take the place of the data's"""
    samples: int = Field(default=1, ge=1)
    """different answers to a prompt; epoch e shows answer e mod samples"""
    why_unlike_said: ClassVar[Reason | None] = "the teacher writes the answers"
    for_all_terms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_draws(self.samples)

    def make(self, desk: Desk) -> Author:
        return TeacherAuthor(desk, self)


# ---- the student


class StudentAuthor(Author):
    """The student answers as it is, alone or together with the teacher token by token."""

    def __init__(
        self, desk: Desk, how: ByStudent | ByMixture | ByCorrection, together: Mixing | Correcting | None = None
    ) -> None:
        super().__init__(desk, how)
        if together is not None:
            teachers_scores(desk.teacher, torch.device("cpu"))  # refused before training, not in it
        self.fraction, self.together = how.fraction, together

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        if chance >= self.fraction:
            return None
        own = self.own_answers(batch, step, self.together)
        if isinstance(self.together, Correcting):
            return Written(own, instead=False)
        return Written(own, instead=False, teacher_share=0.0 if self.together is None else self.together.share)


@settings
class ByStudent(AnswerSettings):
    """The student answers as it is by then, in a share of the steps, and the teacher judges token by token.

    Agarwal et al., GKD, ICLR 2024, arXiv:2306.13649, algorithm 1; the share is their lambda (TRL's `lmbda`), and their
    loss the term `jsd` (at the ends of its beta `kl` with T = 1, and `reverse_kl`). Terms without a teacher, such as
    `cross_entropy`, go on seeing the data.
    """

    by: Literal["student"] = "student"
    fraction: float = Field(default=0.5, gt=0, le=1)
    """share of the steps in which the student answers; in the others the data does"""

    def make(self, desk: Desk) -> Author:
        return StudentAuthor(desk, self)


@settings
class ByMixture(AnswerSettings):
    """Student and teacher answer together: each next token is drawn from the mean of their probabilities.

    Gu et al., MiniLLM, ICLR 2024, arXiv:2306.08543, section 2.2, "teacher-mixed sampling", against answers that please
    by repeating themselves. The term `minillm` weighs by what the student alone would have drawn.
    """

    by: Literal["mixture"] = "mixture"
    fraction: float = Field(default=1.0, gt=0, le=1)
    """share of the steps in which they answer; in the others the data does"""
    teacher_share: float = Field(default=0.2, gt=0, lt=1)
    """the teacher's part of the mean (their alpha)"""

    def make(self, desk: Desk) -> Author:
        return StudentAuthor(desk, self, Mixing(self.teacher_share))


@settings
class ByCorrection(AnswerSettings):
    """The student answers, and the teacher corrects it token by token: what it finds unlikely it draws itself.

    Xu et al., Speculative Knowledge Distillation, ICLR 2025, arXiv:2410.11325, algorithm 1: a token of the student
    stays where it is one of the teacher's `among` most probable, so that answers begin near the teacher's and become
    the student's as it learns. Their losses are `kl` and `jsd`. Terms without a teacher go on seeing the data.
    """

    by: Literal["correction"] = "correction"
    fraction: float = Field(default=1.0, gt=0, le=1)
    """share of the steps in which they answer; in the others the data does"""
    among: int = Field(default=25, ge=1)
    """how many of the teacher's most probable tokens are right enough (their K)"""
    why_unlike_said: ClassVar[Reason | None] = "the teacher replaces tokens of the answers"

    def make(self, desk: Desk) -> Author:
        return StudentAuthor(desk, self, Correcting(self.among))
