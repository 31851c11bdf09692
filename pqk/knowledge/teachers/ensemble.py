"""Teachers made of others: ensembles, with or without their uncertainty, and the student's own moving average."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.data.data import Batch
from pqk.data.structures import Inputs, Outputs, first_tensor, map_tensors, tensors
from pqk.errors import InputError, Reason, nearest
from pqk.knowledge.teachers.base import ChangingTeacher, Teacher, TeacherAnswer
from pqk.knowledge.terms.base import View

LEAST_VARIANCE = 1e-8
"""what a log-variance is taken of at least"""

# ---- ensembles

Weighting = Callable[[Tensor, Batch], Tensor]
"""(members' first outputs [M, B, …, C], batch) -> how much each counts for each sample [M, B], ≥ 0

Of [M, B, …], for each position, the mean is taken.
"""
AxisOf = Callable[[Tensor], int]
"""an output -> the axis of it that classes are on"""


def last_axis(output: Tensor) -> int:
    """Where classes are in [B, …, C]."""
    return output.dim() - 1


def confidence(logits: Tensor, batch: Batch) -> Tensor:
    """A member counts as much as its top probability."""
    return logits.softmax(-1).amax(-1)


def surest(logits: Tensor, batch: Batch) -> Tensor:
    """For each sample the most confident member alone."""
    return F.one_hot(confidence(logits, batch).argmax(0), len(logits)).movedim(-1, 0).to(logits.dtype)


def label_confidence(logits: Tensor, batch: Batch) -> Tensor:
    """(1 − softmax over members of their cross-entropies) / (M − 1) (CA-MKD: Zhang et al. 2022, arXiv:2201.00007).

    Raises `InputError` where the batch has no class labels.
    """
    if len(logits) == 1:
        _losses(logits, batch, "label_confidence")
        return torch.ones_like(logits[..., 0])
    return (1 - _losses(logits, batch, "label_confidence").softmax(0)) / (len(logits) - 1)


def best_on_label(logits: Tensor, batch: Batch) -> Tensor:
    """For each sample the member alone with the least cross-entropy on its label.

    Raises `InputError` where the batch has no class labels.
    """
    best = _losses(logits, batch, "best_on_label").argmin(0)
    return F.one_hot(best, len(logits)).movedim(-1, 0).to(logits.dtype)


def _losses(logits: Tensor, batch: Batch, by: str) -> Tensor:
    """The members' cross-entropies [M, B]."""
    y = batch.targets
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != logits.shape[1:-1]:
        raise InputError(f'distill: members weighted by "{by}" need one class label for every sample')
    return -logits.log_softmax(-1).gather(-1, y.long().expand(len(logits), *y.shape)[..., None]).squeeze(-1)


WEIGHTINGS: tuple[Weighting, ...] = (confidence, surest, label_confidence, best_on_label)


class EnsembleTeacher(Teacher):
    """The weighted mean of several teachers, as logits.

    A mean of probabilities p̄ is given as log p̄ shifted by the mean log-normaliser of the members, so that an ensemble
    of one is that one.

    Args:
        members: teachers whose outputs have the same shapes, logits [B, …, C].
        weights: one for each member, at least 0 and not all 0; None: alike.
        of: "probabilities" or "logits", what the mean is taken of.
        by: what further weights the members sample by sample: a name in `WEIGHTINGS` ("confidence", "surest",
            "label_confidence", "best_on_label"), or a function of (first outputs [M, B, …, C], batch) to weights
            [M, B].
        class_axis: an output -> the axis of it that classes are on; the last by default.

    Raises:
        InputError: there are no members, or the weights do not fit them.
    """

    no_feature_reason = "an ensemble has no features of its own; compare outputs, or let one of its members teach alone"

    def __init__(
        self,
        members: Sequence[Teacher],
        weights: Sequence[float] | None = None,
        *,
        of: Literal["probabilities", "logits"] = "probabilities",
        by: str | Weighting | None = None,
        class_axis: AxisOf = last_axis,
    ) -> None:
        super().__init__()
        self.class_axis = class_axis
        weights = [1.0] * len(members) if weights is None else list(weights)
        if not members or len(weights) != len(members):
            raise InputError(f"distill: an ensemble of {len(members)} teachers has {len(weights)} weights")
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise InputError(f"distill: an ensemble's weights {weights} must be at least 0, and not all 0")
        self.members = nn.ModuleList(members)
        self.weights, self.of = weights, of
        self.by = weighting_named(by) if isinstance(by, str) else by

    def _each(self) -> Iterator[Teacher]:
        for member in self.members:
            assert isinstance(member, Teacher)
            yield member

    def why_not_cached(self) -> Reason | None:
        if self.by is not None and self.by not in WEIGHTINGS:
            return "the members' weights are a function, which does not say what it computes"
        return next((reason for m in self._each() if (reason := m.why_not_cached()) is not None), None)

    def identity(self) -> str:
        by = None if self.by is None else self.by.__name__
        return repr((type(self).__name__, self.of, self.weights, by, [m.identity() for m in self._each()]))

    def begin(self, progress: float) -> None:
        for member in self._each():
            member.begin(progress)

    def auxiliary_loss(self, view: View) -> Tensor | None:
        own = [loss for member in self._each() if (loss := member.auxiliary_loss(view)) is not None]
        return torch.stack(own).sum(0) if own else None

    def check(self, example: Inputs) -> None:
        for member in self._each():
            member.check(example)
        with torch.no_grad():
            self._member_outputs(Batch(example, None, None))

    def live(self, batch: Batch) -> TeacherAnswer:
        return self._mean(*self._member_outputs(batch), batch), {}

    def _member_outputs(self, batch: Batch) -> tuple[list[Tensor], Outputs]:
        """([M, …] for each output, the outputs of the first member). Raises `InputError` where shapes differ."""
        answers = [member(batch)[0] for member in self._each()]
        parts = [tensors(a) for a in answers]
        shapes = [[tuple(t.shape) for t in part] for part in parts]
        for i, other in enumerate(shapes):
            if other != shapes[0]:
                raise InputError(
                    f"distill: the ensemble disagrees in shape: member 0 answers {shapes[0]} and member {i} {other}"
                )
        return [torch.stack(ts) for ts in zip(*parts, strict=True)], answers[0]

    def _shares(self, answers: list[Tensor], batch: Batch) -> Tensor:
        """How much each member counts for each sample: [M, B], with a sum of 1 over members."""
        first = answers[0]
        w = first.new_tensor(self.weights)[:, None].expand(-1, first.shape[1])
        if self.by is not None:
            counts = self.by(self._classes_last(first), batch)
            w = w * (counts if counts.dim() == 2 else counts.flatten(2).mean(2))
        return w / w.sum(0, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)

    def _mean(self, answers: list[Tensor], like: Outputs, batch: Batch) -> Outputs:
        shares = self._shares(answers, batch)
        means = iter([self._mixed(z, shares) for z in answers])
        return map_tensors(lambda t: next(means), like)

    def _mixed(self, z: Tensor, shares: Tensor) -> Tensor:
        if len(z) == 1:
            return z[0]
        w = _spread(shares, z)
        if self.of == "logits":
            return (w * z).sum(0)
        axis = self.class_axis(z[0]) + 1  # behind that of the members
        scale = z.logsumexp(axis, keepdim=True)
        return (z - scale + w.log()).logsumexp(0) + (w * scale).sum(0)

    def _classes_last(self, z: Tensor) -> Tensor:
        """Members' outputs [M, B, …] as [M, B, …, C]."""
        return z.movedim(self.class_axis(z[0]) + 1, -1)


class UncertaintyTeacher(EnsembleTeacher):
    """An ensemble that also says how far its members disagree (DEGU: Zhou et al. 2026, npj Artificial Intelligence).

    Its disagreement [B] is from 0 to 1: for probabilities the mutual information of class and member over log M, for
    logits v / (1 + v) of their variance v.

    Args:
        members: as of an `EnsembleTeacher`.
        args: as of an `EnsembleTeacher`.
        target: answer (mean, log-variance over members), for a student with two outputs of that shape; else answers are
            those of the ensemble, and the gate "teacher_agreement" scales terms by 1 − disagreement.
        options: as of an `EnsembleTeacher`.
    """

    def __init__(self, members: Sequence[Teacher], *args: Any, target: bool = False, **options: Any) -> None:
        super().__init__(members, *args, **options)
        self.target = target

    def why_not_cached(self) -> Reason | None:
        return "how far the members disagree is not kept with their answers"

    def live(self, batch: Batch) -> TeacherAnswer:
        answers, like = self._member_outputs(batch)
        mean, shares = self._mean(answers, like, batch), self._shares(answers, batch)
        z = answers[0]
        if not self.target:
            return mean, {"disagreement": self._disagreement(z, shares)}
        if len(answers) != 1:
            raise InputError(f"distill: a log-variance is taken of one output, and the members have {len(answers)}")
        return (first_tensor(mean), _variance(z, _spread(shares, z)).clamp_min(LEAST_VARIANCE).log()), {}

    def _disagreement(self, z: Tensor, shares: Tensor) -> Tensor:
        """[B], from 0 to 1."""
        w = _spread(shares, z)
        if self.of == "logits":
            variance = _variance(z, w).reshape(z.shape[1], -1).mean(1)
            return variance / (1 + variance)
        p, w = self._classes_last(z).softmax(-1), w[..., 0]
        information = _entropy((w[..., None] * p).sum(0)) - (w * _entropy(p)).sum(0)
        return (information / math.log(max(2, len(z)))).clamp(0, 1).reshape(z.shape[1], -1).mean(1)


def weighting_named(name: str) -> Weighting:
    """One of `WEIGHTINGS`. Raises `InputError` naming the nearest known one."""
    known = {w.__name__: w for w in WEIGHTINGS}
    if name not in known:
        raise InputError(f'distill: unknown weighting of members "{name}"{nearest(name, known)}')
    return known[name]


def _spread(shares: Tensor, z: Tensor) -> Tensor:
    """[M, B] as wide as z [M, B, …]."""
    return shares.reshape(*shares.shape, *[1] * (z.dim() - 2))


def _variance(z: Tensor, w: Tensor) -> Tensor:
    return (w * (z - (w * z).sum(0)).square()).sum(0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


# ---- the student as its own teacher


class EMATeacher(ChangingTeacher):
    """The exponential moving average of the student that trains (mean teacher: Tarvainen & Valpola, NeurIPS 2017).

    Before each step every tensor moves by 1 − momentum towards the student's, batch-norm statistics among them. The
    average is saved with the training, so a resumed one goes on with the same teacher.

    Args:
        student: the module that trains; the average begins as a copy of it.
        points: module paths whose outputs it shows as features.
        momentum: share of the average that stays in a step, at least 0 and below 1.
        warmup: let the momentum be at most 1 − 1/(k + 1) in step k: at first the plain mean of all students so far.
        precision: "fp32", or "bf16" for bfloat16 autocast.

    Raises:
        InputError: the momentum is outside its range.
    """

    uncacheable: ClassVar[str] = "the teacher is the student's moving average, which is another one in every step"

    def __init__(
        self,
        student: nn.Module,
        points: Sequence[str] = (),
        *,
        momentum: float = 0.999,
        warmup: bool = True,
        precision: str = "fp32",
    ) -> None:
        super().__init__(points, precision)
        if not 0 <= momentum < 1:
            raise InputError(f"distill: the teacher's momentum={momentum} must be at least 0 and below 1")
        self.momentum, self.warmup = momentum, warmup
        self._student = [student]  # hidden: it is no part of the teacher
        self.average = copy_of(student, "student").eval().requires_grad_(False)
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.tap_module()

    @property
    def module(self) -> nn.Module | None:
        return self.average

    @torch.no_grad()
    def begin(self, progress: float) -> None:
        step = int(self.steps)
        momentum = min(self.momentum, 1 - 1 / (step + 1)) if self.warmup else self.momentum
        self.steps += 1
        own = self.average.state_dict()
        for key, value in self._student[0].state_dict().items():
            mean, new = own[key], value.detach().to(own[key].device)
            if momentum > 0 and mean.is_floating_point():
                mean.lerp_(new, 1 - momentum)
            else:
                mean.copy_(new)
