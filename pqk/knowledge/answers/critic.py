"""A critic: the student answers each prompt several times, and what is best of that is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pqk.data.data import Batch
from pqk.data.sequences import UNLABELLED, answered, answers_of, prompts_of
from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError, Reason, first_line
from pqk.knowledge.answers.authors import AnswerSettings, Author, Desk, Written, teachers_scores
from pqk.knowledge.terms.policy import token_log_likelihood
from pqk.settings import settings
from pqk.task.task import Task


class CriticAuthor(Author):
    """Several answers of the student to each prompt, and the data's, in the order of what a critic says of them."""

    def __init__(self, desk: Desk, how: ByCritic) -> None:
        super().__init__(desk, how)
        self.settings = how
        if how.critic == "teacher":
            teachers_scores(desk.teacher, torch.device("cpu"))  # refused before training, not in it
        elif (reason := how.why_not_applied(desk.task)) is not None:
            raise InputError(f"distill: {reason}")
        else:
            batch = next(desk.task.need_train("distill").batches())
            prompts = prompts_of(batch, how.prompt_tokens)
            self.scores([(p, [a]) for p, a in zip(prompts, answers_of(batch, prompts), strict=True)][:1])

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        if chance >= self.settings.fraction:
            return None
        prompts, how = prompts_of(batch, self.how.prompt_tokens), self.settings
        proposals = self.proposals(prompts, how.samples, step, "proposal")
        if how.data:
            proposals = [[a, *own] for a, own in zip(answers_of(batch, prompts), proposals, strict=True)]
        rivals = list(zip(prompts, proposals, strict=True))
        answers, scores = best_first(rivals, self.scores(rivals))
        return Written(answers, instead=True, scores=scores)

    def scores(self, rivals: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Tensor:
        """What the critic says of each prompt's answers, float32 [B, N]. Raises `InputError` for what are no scores."""
        if self.settings.critic == "teacher":
            batch, count = rows_of(rivals), len(rivals[0][1])
            parts = []
            for first in range(0, len(batch.targets), len(rivals)):  # no more at once than of the data
                part = [t[first : first + len(rivals)] for t in (*batch.inputs, batch.targets)]
                answer, _ = self.desk.teacher(Batch((part[0], part[1]), part[2], None))
                parts.append(token_log_likelihood(widened(first_tensor(answer)), part[2], UNLABELLED).float())
            return torch.cat(parts).view(-1, count)
        critic, rows = self.desk.task.critic, []
        assert critic is not None
        for prompt, answers in rivals:
            try:
                said = critic(prompt, answers)
            except Exception as error:  # whatever the user's code raises
                raise InputError(f"distill: the task's critic raised {first_line(error)}") from error
            rows.append(_numbers(said, len(answers)))
        return torch.tensor(rows, device=rivals[0][0].device)


def _numbers(said: Any, count: int) -> list[float]:
    """What a critic said of so many answers. Raises `InputError` where it is not a finite number of each."""
    try:
        row = [float(s) for s in said]
    except (TypeError, ValueError):
        row = []
    if len(row) != count or not all(map(math.isfinite, row)):
        raise InputError(
            f"distill: the task's critic gave {row or said!r:.80} for {count} answers; it gives one finite number for "
            "each, higher is better"
        )
    return row


def best_first(rivals: Sequence[tuple[Tensor, Sequence[Tensor]]], scores: Tensor) -> tuple[Batch, Tensor]:
    """A row for each answer, prompt by prompt, the best first, and what is said of them [B, N] in this order."""
    ordered, order = scores.sort(dim=1, descending=True, stable=True)
    return rows_of([(p, [own[i] for i in o.tolist()]) for (p, own), o in zip(rivals, order, strict=True)]), ordered


def rows_of(rivals: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> Batch:
    """A row for each answer, prompt by prompt."""
    return answered([p for p, own in rivals for _ in own], [a for _, own in rivals for a in own])


@settings
class ByCritic(AnswerSettings):
    """The student answers several times, a critic ranks that and the data's answer, and the best is what is learned.

    The step of CycleAlign (Hong et al., ACL Findings 2024, arXiv:2310.16271) in which a model's own answers, ranked by
    a stronger one, train it by the losses of RRHF (Yuan et al., NeurIPS 2023, arXiv:2304.05302): `cross_entropy` on the
    best and the term `ranking` on all. Here the critic is the teacher's log-likelihood per token, or a function; there
    are no demonstrations in a prompt that the two models' agreement would renew.

    Raises:
        InputError: the answers would all be alike.
    """

    by: Literal["critic"] = "critic"
    fraction: float = Field(default=1.0, gt=0, le=1)
    """share of the steps in which the student answers; in the others the data does"""
    samples: int = Field(default=4, ge=2)
    """the student's answers to a prompt"""
    data: bool = True
    """whether the data's answer is ranked among them"""
    critic: Literal["teacher", "task"] = "teacher"
    """who ranks: the teacher, by its log-likelihood per token, or the function of the task, `Task(critic=…)`"""
    why_unlike_said: ClassVar[Reason | None] = "the best of several answers is taken"
    for_all_terms: ClassVar[bool] = True
    ranked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_draws(self.samples)

    def why_not_applied(self, task: Task) -> Reason | None:
        if self.critic == "task" and task.critic is None:
            return (
                'critic = "task" ranks by a function of the task, and it has none; pass Task(critic=…), or let the '
                "teacher rank"
            )
        return super().why_not_applied(task)

    def make(self, desk: Desk) -> Author:
        return CriticAuthor(desk, self)
