"""Response knowledge: what the teacher says."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.knowledge.term import Term, View
from pqk.program import CONFIG
from pqk.task import tensors, widened


def logit_pairs(view: View) -> list[tuple[Tensor, Tensor]]:
    """(student, teacher) logits, each [B, …, C] in float32 at least, one pair for every output tensor.

    Raises `InputError`, naming both sides, where their number or shapes differ.
    """
    students, teachers = tensors(view.student), tensors(view.teacher)
    if len(students) != len(teachers):
        raise InputError(f"distill: the student has {len(students)} outputs and the teacher {len(teachers)}")
    pairs = list(zip(students, teachers, strict=True))
    for s, t in pairs:
        if s.shape != t.shape:
            raise InputError(
                f"distill: the student's output is {tuple(s.shape)} and the teacher's {tuple(t.shape)}; this term "
                "compares them class by class"
            )
    return [(widened(s), widened(t.detach())) for s, t in pairs]


def per_sample(losses: list[Tensor]) -> Tensor:
    """Mean over the outputs and over all axes but the first: [B, …] each -> [B]."""
    return torch.stack([loss.reshape(len(loss), -1).mean(1) for loss in losses]).mean(0)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CrossEntropy(Term):
    """The task's own loss against the labels; no teacher."""

    term: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher = False

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        if view.targets is None:
            raise InputError("distill: cross_entropy needs labels, and the training data has none; take the term out")
        loss = view.task.loss(view.student, view.targets)
        return loss if loss.dim() == 1 else per_sample([loss])


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class KLDivergence(Term):
    """T² · Σ_c p_t log(p_t / p_s), with p = softmax(z / T) (Hinton, Vinyals, Dean 2015, section 2)."""

    term: Literal["kl"] = "kl"
    temperature: float = Field(default=4.0, gt=0)
    """T: softens both distributions; 1 to 2 under quantization-aware training"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        t2 = self.temperature**2
        losses = []
        for s, t in logit_pairs(view):
            log_s = F.log_softmax(s / self.temperature, -1)
            log_t = F.log_softmax(t / self.temperature, -1)
            losses.append(t2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1))
        return per_sample(losses)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LogitMSE(Term):
    """mean_c (z_s − z_t)² (Kim et al., 2105.08919); centred: KD's limit for large T."""

    term: Literal["logit_mse"] = "logit_mse"
    centred: bool = False
    """subtract each sample's mean logit first"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        losses = []
        for s, t in logit_pairs(view):
            if self.centred:
                s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
            losses.append((s - t).square())
        return per_sample(losses)
