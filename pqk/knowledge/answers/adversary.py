"""An adversary: a discriminator of the data's answers from the student's, whose score the student then earns."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.modes import evaluating
from pqk.data.data import Batch
from pqk.data.sequences import UNLABELLED, answers_of, prompts_of
from pqk.errors import InputError
from pqk.knowledge.answers.authors import AnswerSettings, Author, Desk, Written
from pqk.knowledge.answers.critic import best_first, rows_of
from pqk.settings import settings


class Discriminator(nn.Module):
    """How much answers are like the data's: a linear score of what a copy of a model makes of an answer, on average.

    Bradley & Terry: the data's answer beats another with the probability sigmoid(its score − the other's).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        width = int(_output_layer(model).weight.shape[1])
        self.body = copy_of(model).requires_grad_(True)
        self.norm, self.score = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # it knows nothing yet, and so says the same of all

    def features(self, batch: Batch) -> Tensor:
        """The mean over an answer's tokens of the state in front of the output layer, float32 [B, D], normalised."""
        states = list[Tensor]()
        handle = _output_layer(self.body).register_forward_pre_hook(lambda _, given: states.append(given[0]))
        try:
            with evaluating(self.body):
                self.body(*batch.inputs)
        finally:
            handle.remove()
        answer = F.pad(batch.targets != UNLABELLED, (1, 0))[:, :-1]  # where a token of it stands, not where it is next
        total = (states[0].float() * answer[..., None]).sum(1)
        normalised: Tensor = self.norm(total / answer.sum(1, keepdim=True).clamp_min(1))
        return normalised

    def forward(self, batch: Batch) -> Tensor:
        """The score of each row's answer, [B], with gradients to all of the discriminator."""
        scores: Tensor = self.score(self.features(batch))[:, 0]
        return scores


def _output_layer(model: nn.Module) -> Any:
    """The layer that makes scores of tokens, or None where it is not known."""
    get = getattr(getattr(model, "model", None), "get_output_embeddings", None)
    return None if get is None else get()


class AdversaryAuthor(Author):
    """Answers of the student, and what the discriminator, which learns to tell them from the data's, says of them."""

    def __init__(self, desk: Desk, how: ByAdversary) -> None:
        super().__init__(desk, how)
        self.settings = how
        known = (desk.student, desk.configured, desk.teacher.module)
        model = next((m for m in known if m is not None and _output_layer(m) is not None), None)
        if model is None:
            raise InputError(
                'distill: answers = { by = "adversary" } copies the student, or the recipe\'s teacher, and reads its '
                f"states in front of the output layer, which is not known of a {type(desk.student).__name__}; take a "
                "causal model of Hugging Face (pqk.models.decoder)"
            )
        device = next(desk.student.parameters()).device
        with torch.random.fork_rng(devices=[]):
            self.discriminator = Discriminator(model).to(device)

    def write(self, batch: Batch, chance: float, step: int, progress: float) -> Written | None:
        how = self.settings
        if chance >= how.fraction:
            return None
        prompts = prompts_of(batch, how.prompt_tokens)
        own = list(zip(prompts, self.proposals(prompts, how.samples, step, "attempt"), strict=True))
        given = [(p, [a]) for p, a in zip(prompts, answers_of(batch, prompts), strict=True)]
        scores = self.discriminator(rows_of(own)).view(len(prompts), -1)
        loss = -F.logsigmoid(self.discriminator(rows_of(given))[:, None] - scores).mean(1)
        batch, scores = best_first(own, scores.detach())
        return Written(batch, instead=False, teacher_share=0.0, scores=scores, loss=loss)


@settings
class ByAdversary(AnswerSettings):
    """The student answers, and what a discriminator that tells it from the data says of that is its reward.

    Ye et al., "Black-Box On-Policy Distillation of Large Language Models" (GAD), arXiv:2511.10643: the data are the
    texts of a teacher of which nothing else is seen, the discriminator learns by −log σ(D(data) − D(student)), and the
    student by the term `group_policy`, beside `cross_entropy` on the data. The discriminator begins as a copy of the
    student (of a captured one, of the recipe's teacher) with a score, and trains whole, in the student's optimizer.
    Let the student's reward wait until it knows something: `ramp_up` of the term.

    Raises:
        InputError: the answers would all be alike.
    """

    by: Literal["adversary"] = "adversary"
    fraction: float = Field(default=1.0, gt=0, le=1)
    """share of the steps in which the student answers; in the others all terms see the data alone"""
    samples: int = Field(default=4, ge=2)
    """the student's answers to a prompt"""
    ranked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_draws(self.samples)

    def make(self, desk: Desk) -> Author:
        return AdversaryAuthor(desk, self)
