"""Response knowledge: terms that compare the models' outputs.

Every term takes logits of each output, or of the one that `output` names: [B, …, C], where classes are on another axis
(`Task(class_axis=…)`) once that is moved to the end. It averages over the axes between; of sequences [B, S, C] over
the positions that have a label, so that padding and prompts say nothing. Probabilities are p = softmax(z / T)
throughout, always by way of `log_softmax`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.data.structures import leaves, members, tensors, widened
from pqk.errors import InputError, Reason, nearest
from pqk.knowledge.terms.base import Term, View
from pqk.settings import settings
from pqk.task.metrics import SAY_AXIS
from pqk.task.task import Task

ALIGNED = "aligned"
"""among a teacher's features: at which tokens it has an answer, bool [B, S]"""

Pairs = list[tuple[Tensor, Tensor]]
"""(student, teacher) logits, one for every output that is compared"""


def per_sample(losses: list[Tensor], labelled: list[Tensor] | None = None) -> Tensor:
    """Mean over the outputs and over all axes but the first: [B, …] each -> [B].

    `labelled`: for each output a mask of its positions that count. What stands elsewhere may be anything.
    """
    if labelled is None or all(bool(mask.all()) for mask in labelled):
        return torch.stack([loss.reshape(len(loss), -1).mean(1) for loss in losses]).mean(0)
    pairs = [(x.reshape(len(x), -1), m.reshape(len(m), -1)) for x, m in zip(losses, labelled, strict=True)]
    means = [x.where(m, torch.zeros_like(x)).sum(1) / m.sum(1).clamp_min(1) for x, m in pairs]
    return torch.stack(means).mean(0)


def labelled_tokens(view: View, shape: Sequence[int], output: int | str | None = None) -> Tensor | None:
    """Which tokens of sequences of this `shape` [B, S] have a label: bool; None: all, or labels are something else.

    And, of a teacher with another tokenizer, at which it has an answer. Two axes alone: a sample without a label, and a
    pixel without one, can still be learned from a teacher.
    """
    if len(shape) != 2:
        return None
    labels, counted = tensors(pick(view.targets, output)), view.teacher_features.get(ALIGNED)
    if counted is not None and counted.shape != tuple(shape):
        counted = None
    if len(labels) == 1 and not labels[0].is_floating_point() and labels[0].shape == tuple(shape):
        own = labels[0] != view.task.ignored
        counted = own if counted is None else own & counted
    return None if counted is None or bool(counted.all()) else counted


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last axis, of log-probabilities."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def pick(value: Any, output: int | str | None) -> Any:
    """One of a model's outputs (or targets) by number or name; all where that is None, or where there is only one."""
    if output is None or isinstance(value, Tensor) or value is None:
        return value
    if isinstance(output, str):
        by_name = dict(members(value) or ())
        if output not in by_name:
            raise InputError(f'distill: the model has no output "{output}"{nearest(output, map(str, by_name))}')
        return by_name[output]
    outputs = tensors(value)
    if not -len(outputs) <= output < len(outputs):
        raise InputError(f"distill: the model has {len(outputs)} outputs, and none of number {output}")
    return outputs[output]


def at(rows: Tensor, counted: Tensor | None) -> Tensor:
    """The rows [N, …] of [B, S, …] that count; all of them, as they are, where that is None."""
    return rows if counted is None else rows[counted]


def over_tokens(losses: Tensor, counted: Tensor | None) -> Tensor:
    """The mean over the tokens that count, of losses [N] at these: [B]. Without `counted`, the losses as they are."""
    if counted is None:
        return losses
    sums = losses.new_zeros(len(counted)).index_add(0, counted.nonzero()[:, 0], losses)
    return sums / counted.sum(1).clamp_min(1)


@settings
class ResponseTerm(Term):
    """A term that compares the models' outputs: logits [B, …, C], of one or of several outputs."""

    output: int | str | None = None
    """the output that is compared, by number or by name; none: all of them"""

    @property
    def compares_classes(self) -> bool:
        """Whether it matters which axis of the logits classes are on."""
        return True

    def why_not_compared(self, task: Task, outputs: Any) -> Reason | None:
        compared = [(path, t) for path, t in leaves(pick(outputs, self.output)) if isinstance(t, Tensor)]
        for path, output in compared:
            if len(output) != len(compared[0][1]):
                return (
                    f"{type(self).__name__} compares outputs sample by sample, and output {path} is "
                    f"{tuple(output.shape)} where output {compared[0][0]} is {tuple(compared[0][1].shape)}: not both "
                    "have the batch as their first axis; name the `output` that it compares"
                )
        for output in tensors(pick(outputs, self.output)) if self.compares_classes else ():
            if isinstance(axis := task.class_axis_or_reason(output), str):
                return (
                    f"{type(self).__name__} compares classes, and {axis}; {SAY_AXIS}, or name the `output` that has "
                    "classes, or take logit_mse, which needs none"
                )
        return None

    def pairs(self, view: View, same_classes: bool = True) -> Pairs:
        """Pairs (student, teacher) logits, each [B, …, C], float32 at least.

        Raises:
            InputError: their number or shapes differ, and it names both; or it cannot be told where the classes are.
        """
        students, teachers = (tensors(pick(o, self.output)) for o in (view.student, view.teacher))
        if len(students) != len(teachers):
            raise InputError(f"distill: the student has {len(students)} outputs and the teacher {len(teachers)}")
        pairs = list(zip(students, teachers, strict=True))
        if self.compares_classes:
            pairs = [(view.task.classes_last(s), view.task.classes_last(t)) for s, t in pairs]
        for s, t in pairs:
            if s.shape[:-1] != t.shape[:-1] or (same_classes and s.shape != t.shape):
                raise InputError(
                    f"distill: the student's output is {tuple(s.shape)} and the teacher's {tuple(t.shape)}; this term "
                    f"compares them {'class by class' if same_classes else 'row by row'}"
                )
        return [(widened(s), widened(t.detach())) for s, t in pairs]

    def counted(self, view: View, logits: Tensor) -> Tensor | None:
        """Which positions of logits [B, S, C] have a label, bool [B, S]; None: all count, or there are none to have."""
        return labelled_tokens(view, logits.shape[:-1], self.output)

    def labels(self, view: View, logits: list[Tensor]) -> list[Tensor]:
        """The labels int64 [B, …] of each output, some of which may be the task's label of what has none.

        Raises:
            InputError: there are none that fit.
        """
        labels = tensors(pick(view.targets, self.output))
        name = type(self).__name__
        if not labels:
            raise InputError(f"distill: {name} needs labels, and the training data has none; take the term out")
        if len(labels) != len(logits) or any(
            y.shape != z.shape[:-1] or y.is_floating_point() for y, z in zip(labels, logits, strict=True)
        ):
            raise InputError(
                f"distill: {name} needs one class label for every row of logits; labels are "
                f"{[tuple(y.shape) for y in labels]}, logits {[tuple(z.shape) for z in logits]}; name one with `output`"
            )
        for y, z in zip(labels, logits, strict=True):
            y = y[y != view.task.ignored]
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < z.shape[-1]:
                raise InputError(
                    f"distill: labels run from {int(y.min())} to {int(y.max())} and {name} has {z.shape[-1]} classes"
                )
            if z.shape[-1] < 2:
                raise InputError(f"distill: {name} tells one class from the others, and there is only one")
        return [y.long() for y in labels]

    def labelled(self, view: View, labels: list[Tensor]) -> list[Tensor]:
        """For each output a mask of its positions that have a label."""
        return [y != view.task.ignored for y in labels]


@settings
class CrossEntropy(Term):
    """The task's own loss [B] against the labels, the cross-entropy of logits [B, C] by default; no teacher."""

    term: Literal["cross_entropy"] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        if view.targets is None:
            raise InputError("distill: cross_entropy needs labels, and the training data has none; take the term out")
        loss = view.task.loss(view.student, view.targets)
        return loss if loss.dim() == 1 else per_sample([loss])


# ---- divergences


@settings
class Divergence(ResponseTerm):
    """T² times a divergence of the two distributions softmax(z / T)."""

    temperature: float = Field(default=1.0, gt=0)
    """T: softens both distributions; 1 to 2 under quantization-aware training"""
    teacher_top: float | None = Field(default=None, gt=0, lt=1)
    """if given, T is chosen so that the teacher's mean top probability on calibration data is this"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        losses = []
        for pair in self.pairs(view):
            counted = self.counted(view, pair[0])
            log_s, log_t = (F.log_softmax(self.scaled(at(z, counted)) / self.temperature, -1) for z in pair)
            losses.append(over_tokens(self.temperature**2 * self.divergence(log_s, log_t), counted))
        return per_sample(losses)

    def scaled(self, logits: Tensor) -> Tensor:
        """Logits as they are divided by the temperature.

        Raises:
            InputError: they cannot be scaled.
        """
        return logits

    @abstractmethod
    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """Computes the divergence [B, …] of log-probabilities [B, …, C]."""


@settings
class KLDivergence(Divergence):
    """T² · Σ_c p_t log(p_t / p_s), p = softmax(z / T) of logits z [B, …, C].

    Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2. The mean is over the axes between first and last.
    """

    term: Literal["kl"] = "kl"
    temperature: float = Field(default=4.0, gt=0)
    """T: softens both distributions; 1 to 2 under quantization-aware training"""

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return kl_rows(log_t, log_s)


@settings
class ReverseKL(Divergence):
    """T² · KL(p_s ‖ p_t) of logits [B, …, C], which seeks a mode instead of covering all.

    Gu et al., MiniLLM, ICLR 2024, arXiv:2306.08543, section 2.1.
    """

    term: Literal["reverse_kl"] = "reverse_kl"

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return kl_rows(log_s, log_t)


@settings
class JSD(Divergence):
    """T² · (β KL(p_t ‖ m) + (1−β) KL(p_s ‖ m)), m = β p_t + (1−β) p_s, of logits [B, …, C].

    Agarwal et al., GKD, ICLR 2024, arXiv:2306.13649, equation 1.
    """

    term: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1)
    """β: the teacher's share of the mixture; near 0 it is like KL(t ‖ s), near 1 like KL(s ‖ t)"""

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        log_m = _mixture(log_t, log_s, self.beta)
        return self.beta * kl_rows(log_t, log_m) + (1 - self.beta) * kl_rows(log_s, log_m)


@settings
class SkewKL(Divergence):
    """T² · KL(p_t ‖ λ p_t + (1−λ) p_s) of logits [B, …, C]: KL without its exploding gradients.

    Ko et al., DistiLLM, ICML 2024, arXiv:2402.03898, section 3.1.
    """

    term: Literal["skew_kl"] = "skew_kl"
    skew: float = Field(default=0.1, gt=0, lt=1)
    """λ: the first distribution's share of the mixture"""

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return kl_rows(log_t, _mixture(log_t, log_s, self.skew))


@settings
class SkewReverseKL(Divergence):
    """T² · KL(p_s ‖ λ p_s + (1−λ) p_t) of logits [B, …, C] (Ko et al., DistiLLM, ICML 2024, section 3.1)."""

    term: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    skew: float = Field(default=0.1, gt=0, lt=1)
    """λ: the first distribution's share of the mixture"""

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return kl_rows(log_s, _mixture(log_s, log_t, self.skew))


def _mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share · p + (1 − share) · q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


@settings
class StandardizedKD(Divergence):
    """T² · KL(p_t ‖ p_s) of logits [B, …, C] that are z-scored row by row before the temperature.

    Sun et al., CVPR 2024, arXiv:2403.01427, algorithm 1. It keeps which classes are alike and drops the confidence.
    """

    term: Literal["standardized_kd"] = "standardized_kd"
    weight: float = Field(default=9.0, ge=0)
    """factor of this term's loss"""
    temperature: float = Field(default=2.0, gt=0)
    """T, after the z-score"""

    def scaled(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] < 2:
            raise InputError("distill: standardized_kd divides by the deviation over classes, and there is only one")
        centred = logits - logits.mean(-1, keepdim=True)
        # Not `std`, whose gradient is NaN where all logits of a row are equal.
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
        return centred / (deviation + 1e-7)

    def divergence(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        return kl_rows(log_t, log_s)


# ---- others


@settings
class LogitMSE(ResponseTerm):
    """mean_c (z_s − z_t)² of logits z [B, …, C]; centred, it is the limit of `kl` for large T.

    Kim et al., IJCAI 2021, arXiv:2105.08919; the limit: Hinton, Vinyals & Dean 2015, section 2.1.
    """

    term: Literal["logit_mse"] = "logit_mse"
    centred: bool = False
    """subtract each sample's mean logit first"""

    @property
    def compares_classes(self) -> bool:
        return self.centred

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        losses = []
        for s, t in self.pairs(view):
            counted = self.counted(view, s) if view.task.class_axis_or_reason(s) == 2 else None
            s, t = at(s, counted), at(t, counted)
            if self.centred:
                s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
            error = (s - t).square()
            losses.append(error if counted is None else over_tokens(error.mean(-1), counted))
        return per_sample(losses)


@settings
class DecoupledKD(ResponseTerm):
    """T² (a · TCKD + b · NCKD): target against the rest, and among the rest, of logits [B, …, C].

    Zhao et al., CVPR 2022, arXiv:2203.08679, equation 7. Labels are int64 [B, …]; the target is sliced out of the
    logits. The authors ramp the term up over the first 20 epochs: see `ramp_up`.
    """

    term: Literal["decoupled_kd"] = "decoupled_kd"
    temperature: float = Field(default=4.0, gt=0)
    """T: softens both distributions"""
    target: float = Field(default=1.0, ge=0)
    """a: factor of what the teacher says of the labelled class"""
    others: float = Field(default=8.0, ge=0)
    """b: factor of how it ranks the other classes"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        pairs, losses = self.pairs(view), []
        labels = self.labels(view, [s for s, _ in pairs])
        labelled = self.labelled(view, labels)
        for (s, t), y, mask in zip(pairs, labels, labelled, strict=True):
            y = y * mask  # any class will do where the loss does not count
            (two_s, rest_s), (two_t, rest_t) = (_decoupled(z / self.temperature, y) for z in (s, t))
            both = self.target * kl_rows(two_t, two_s) + self.others * kl_rows(rest_t, rest_s)
            losses.append(self.temperature**2 * both)
        return per_sample(losses, labelled)


def _decoupled(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of target and not target [B, …, 2], those among the other classes [B, …, C − 1])."""
    own = labels.unsqueeze(-1)
    index = torch.arange(z.shape[-1] - 1, device=z.device).expand(*labels.shape, -1)
    rest = z.gather(-1, index + (index >= own).long())
    two = torch.cat([z.gather(-1, own), rest.logsumexp(-1, keepdim=True)], -1)
    return F.log_softmax(two, -1), F.log_softmax(rest, -1)


@settings
class DIST(ResponseTerm):
    """T² · (b (1 − ρ of rows) + g (1 − ρ of columns)) of p = softmax(z / T), logits z [B, …, C].

    Huang et al., NeurIPS 2022, arXiv:2205.10536, equations 8 to 10. ρ is Pearson's correlation; columns are what the
    batch says of one class, so batches should have at least 32 samples. A row or column in which the teacher says
    nothing (it is constant) teaches nothing.
    """

    term: Literal["dist"] = "dist"
    temperature: float = Field(default=1.0, gt=0)
    """T: softens both distributions"""
    rows: float = Field(default=1.0, ge=0)
    """b: factor of the correlation within samples"""
    columns: float = Field(default=1.0, ge=0)
    """g: factor of the correlation within classes, over the batch"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        losses = []
        for s, t in self.pairs(view):
            counted = self.counted(view, s)
            p_s, p_t = ((at(z, counted) / self.temperature).softmax(-1) for z in (s, t))
            across = _uncorrelated(p_s.flatten(0, -2).T, p_t.flatten(0, -2).T).mean()  # the same for every sample
            rows = self.temperature**2 * (self.rows * _uncorrelated(p_s, p_t) + self.columns * across)
            losses.append(over_tokens(rows, counted))
        return per_sample(losses)


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − Pearson's correlation over the last axis; 0 where the teacher is constant."""
    s, t = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    norm_s, norm_t = (torch.linalg.vector_norm(x, dim=-1) for x in (s, t))
    loss = 1 - (s * t).sum(-1) / (norm_s * norm_t + 1e-8)
    return torch.where(norm_t > 1e-3, loss, torch.zeros_like(loss))


@settings
class LabelSmoothing(ResponseTerm):
    """KL(q ‖ softmax(z)) of logits z [B, …, C], q a teacher that knows the label int64 [B, …] and nothing else.

    A control (Yuan et al., CVPR 2020, arXiv:1909.11723, equation 9): it tells "the teacher helps" from "smoothing
    helps". Let `smoothing` be 1 − the teacher's mean top probability.
    """

    term: Literal["label_smoothing"] = "label_smoothing"
    needs_teacher: ClassVar[bool] = False
    smoothing: float = Field(default=0.1, gt=0, lt=1)
    """the probability that all classes but the labelled one share equally"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        logits = [view.task.classes_last(widened(z)) for z in tensors(pick(view.student, self.output))]
        labels, losses = self.labels(view, logits), []
        labelled = self.labelled(view, labels)
        for z, y, mask in zip(logits, labels, labelled, strict=True):
            y = y * mask
            log_q = torch.full_like(z, math.log(self.smoothing / (z.shape[-1] - 1)))
            log_q.scatter_(-1, y.unsqueeze(-1), math.log1p(-self.smoothing))
            losses.append(kl_rows(log_q, F.log_softmax(z, -1)))
        return per_sample(losses, labelled)


@settings
class SortedULD(ResponseTerm):
    """Σ_c |sorted p_s − sorted p_t|, p = softmax(z / T) of logits [B, …, C_s] and [B, …, C_t], padded with zeros.

    For a teacher with other classes or another vocabulary (Boizard et al., arXiv:2402.12030, equation 7). It is blind
    to *which* class: never use it alone.
    """

    term: Literal["sorted_uld"] = "sorted_uld"
    blind: ClassVar[str] = "it does not see which class is meant"
    other_classes: ClassVar[bool] = True
    weight: float = Field(default=1.5, ge=0)
    """factor of this term's loss"""
    temperature: float = Field(default=1.0, gt=0)
    """T: softens both distributions"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        losses = []
        for pair in self.pairs(view, same_classes=False):
            counted = self.counted(view, pair[0])
            s, t = ((at(z, counted) / self.temperature).softmax(-1).sort(-1, descending=True).values for z in pair)
            width = max(s.shape[-1], t.shape[-1])
            s, t = (F.pad(p, (0, width - p.shape[-1])) for p in (s, t))
            losses.append(over_tokens((s - t).abs().sum(-1), counted))
        return per_sample(losses)
