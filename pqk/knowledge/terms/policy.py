"""Policy knowledge: terms about answers that the student itself writes, judged token by token or as a whole."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.data.structures import tensors, widened
from pqk.errors import InputError
from pqk.knowledge.terms.base import View
from pqk.knowledge.terms.response import ResponseTerm, kl_rows, over_tokens, pick
from pqk.settings import settings


@settings
class MiniLLM(ResponseTerm):
    """w_n (KL(p_s ‖ p_t) − R_n log p_s(y_n)), the mean over tokens n of an answer y that the student wrote.

    Gu et al., MiniLLM, ICLR 2024, arXiv:2306.08543, section 2.2: its gradient is that of the reverse divergence of
    whole answers. R_n is the mean of log p_t(y_i) / p_s(y_i) over the tokens i behind n, and w_n = p_s(y_n) over the
    probability with which y_n was drawn; neither has a gradient. Logits are [B, S, C], labels int64 [B, S] the answer.
    On the data's answers, and on those of others, the divergence alone counts. Names as in TRL's `MiniLLMConfig`.
    """

    term: Literal["minillm"] = "minillm"
    single_step_decomposition: bool = True
    """what a token does to its own step is computed as an expectation; else by the token that was drawn, as the rest"""
    length_normalization: bool = True
    """R is the mean over the later tokens, and not their sum, which prefers short answers"""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """each later token counts this much of the one before it"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        ((s, t),) = self._one(view)
        (labels,) = self.labels(view, [s])
        if labels.dim() != 2:
            raise InputError(f"distill: minillm takes sequences of tokens [B, S], and labels are {tuple(labels.shape)}")
        (counted,) = self.labelled(view, [labels])
        log_s, log_t = (F.log_softmax(z[counted], -1) for z in (s, t))
        reverse, drawn = kl_rows(log_s, log_t), labels[counted][:, None]
        if view.teacher_share is None:
            return over_tokens(reverse, counted)
        own_s, own_t = (log.gather(1, drawn)[:, 0] for log in (log_s, log_t))
        with torch.no_grad():
            gain = torch.zeros_like(s[..., 0]).masked_scatter(counted, own_t - own_s)
            returns = self.returns(gain, counted)[counted]
            weights = (own_s - _mixed(own_s, own_t, view.teacher_share)).exp()
        losses = -returns * own_s
        if self.single_step_decomposition:
            losses = losses + reverse
        return over_tokens(weights * losses, counted)

    def _one(self, view: View) -> list[tuple[Tensor, Tensor]]:
        pairs = self.pairs(view)
        if len(pairs) != 1:
            raise InputError(f"distill: minillm compares one output, and there are {len(pairs)}; name it with `output`")
        return pairs

    def returns(self, gain: Tensor, counted: Tensor) -> Tensor:
        """R [B, S] of log p_t(y) / p_s(y) [B, S] at the tokens that count, bool [B, S].

        Of those behind each token; without the decomposition, its own included.
        """
        total, weight = torch.zeros_like(gain[:, 0]), torch.zeros_like(gain[:, 0])
        columns = []
        for i in reversed(range(gain.shape[1])):
            here = counted[:, i]
            before = total, weight
            total = torch.where(here, gain[:, i] + self.gamma * total, total)
            weight = torch.where(here, 1 + self.gamma * weight, weight)
            value, share = before if self.single_step_decomposition else (total, weight)
            columns.append(value / share.clamp_min(1) if self.length_normalization else value)
        return torch.stack(columns[::-1], 1)


class AnswersTerm(ResponseTerm):
    """A term of several answers to each prompt, of which something was said; a batch without such has no loss."""

    needs_teacher: ClassVar[bool] = False
    ranks: ClassVar[bool] = True

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        (logits,) = (widened(z) for z in tensors(pick(view.student, self.output)))
        if view.scores is None:
            return logits.flatten(1)[:, 0] * 0.0
        (labels,) = self.labels(view, [logits])
        p = token_log_likelihood(logits, labels, view.task.ignored).view_as(view.scores)
        return self.of_answers(p, view.scores)

    @abstractmethod
    def of_answers(self, p: Tensor, scores: Tensor) -> Tensor:
        """The loss of each prompt [B], by its answers' log-likelihoods per token and what is said of them, [B, N]."""


@settings
class Ranking(AnswersTerm):
    """Σ_{r_i > r_j} max(0, p_j − p_i + m) of answers i, j to a prompt: r what a critic says, p log-likelihood a token.

    Yuan et al., RRHF, NeurIPS 2023, arXiv:2304.05302, section 3.1, with m = 0, which CycleAlign (arXiv:2310.16271)
    trains by. Logits are [B · N, S, C], labels int64 [B · N, S] the answers of `answers = { by = "critic" }`. A batch
    without such answers has no loss.
    """

    term: Literal["ranking"] = "ranking"
    blind: ClassVar[str] = "it sees which answer is more probable, and not how probable"
    margin: float = Field(default=0.0, ge=0)
    """m: by how many nats per token the better answer is to be ahead"""

    def of_answers(self, p: Tensor, scores: Tensor) -> Tensor:
        better = scores[:, :, None] > scores[:, None, :]
        behind = (p[:, None, :] - p[:, :, None] + self.margin).clamp_min(0)
        return (behind * better).sum((1, 2))


@settings
class GroupPolicy(AnswersTerm):
    """−mean_i A_i p_i of answers i: A = (r − mean r) / std r of what is said of them, p their log-likelihood a token.

    Shao et al., GRPO, arXiv:2402.03300, section 4.1, of answers that the student has just written, where its ratio of
    probabilities is 1, and without its divergence from a reference, which other terms are. GAD (arXiv:2511.10643)
    trains by it against `answers = { by = "adversary" }`. Logits are [B · N, S, C], of N answers to each of B prompts,
    and labels int64 [B · N, S] the answers. A batch without such answers has no loss.
    """

    term: Literal["group_policy"] = "group_policy"

    def of_answers(self, p: Tensor, scores: Tensor) -> Tensor:
        spread = scores.std(1, correction=0, keepdim=True)
        advantage = (scores - scores.mean(1, keepdim=True)) / (spread + 1e-6)
        return -(advantage * p).mean(1)


def token_log_likelihood(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """The mean log-probability of the tokens that have a label, [B], by scores [B, S, C] and labels int64 [B, S]."""
    counted = labels != ignored
    rows = logits[counted]
    return over_tokens(rows.gather(1, labels[counted][:, None])[:, 0] - rows.logsumexp(-1), counted)


def _mixed(log_s: Tensor, log_t: Tensor, share: float) -> Tensor:
    """log((1 − share) p_s + share p_t)."""
    if share == 0:
        return log_s
    return torch.logaddexp(log_s + math.log1p(-share), log_t + math.log(share))
