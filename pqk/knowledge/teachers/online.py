"""Teachers that learn beside the student: a peer, auxiliary exits, a shadow head.

They own parameters, which train and are saved with the student's, and live outside it: nothing of them is exported.
Both sides learn from each other's detached outputs: no loss of the student's reaches a teacher's parameters, and what a
teacher learns reaches the student's only where that is the point, at an auxiliary exit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pqk.data.data import Batch
from pqk.data.structures import Inputs, first_tensor, widened
from pqk.errors import InputError, Reason
from pqk.knowledge.teachers.base import ChangingTeacher, Teacher, TeacherAnswer
from pqk.knowledge.terms.base import View
from pqk.knowledge.terms.response import KLDivergence


def divergence(student: Any, teacher: Any, view: View, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) [B] of outputs; no gradient to the teacher's."""
    return KLDivergence(temperature=temperature)(View(student, teacher, view.targets, {}, {}, view.task), None)


def task_loss(outputs: Any, view: View) -> Tensor | float:
    """The task's loss [B]; 0 where there are no labels."""
    return 0.0 if view.targets is None else view.task.loss(outputs, view.targets)


class PeerTeacher(ChangingTeacher):
    """A second student that learns beside the first (deep mutual learning: Zhang et al., CVPR 2018, arXiv:1706.00384).

    It answers in eval mode, and learns T² KL(student ‖ peer) and the task's loss in a forward pass of its own.

    Args:
        peer: a module of the student's shape with other weights.
        points: module paths whose outputs it shows as features.
        kd_weight: weight of what it learns from the student, beside the task's loss.
        temperature: T of that.
        precision: "fp32", or "bf16" for bfloat16 autocast.
    """

    uncacheable: ClassVar[str] = "the teacher is a peer, which learns in every step"

    def __init__(
        self,
        peer: nn.Module,
        points: Sequence[str] = (),
        *,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        precision: str = "fp32",
    ) -> None:
        super().__init__(points, precision)
        self.peer, self.kd_weight, self.temperature = peer.eval(), kd_weight, temperature
        self.tap_module()

    @property
    def module(self) -> nn.Module | None:
        return self.peer

    def auxiliary_loss(self, view: View) -> Tensor | None:
        self.peer.train()
        outputs = self.peer(*view.inputs)
        self.peer.eval()
        return task_loss(outputs, view) + self.kd_weight * divergence(outputs, view.student, view, self.temperature)


class Exit(nn.Module):
    """A small classifier of a feature [B, C, H, W] or [B, …, C] -> logits [B, classes]: mean, layer norm, linear.

    float32 at least. The normalisation, over channels, makes all features alike in size.
    """

    def __init__(self, channels: int, classes: int, image: bool) -> None:
        super().__init__()
        self.image = image
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.classify = nn.Linear(channels, classes)

    def forward(self, feature: Tensor) -> Tensor:
        feature = widened(feature)
        if feature.dim() > 2:
            feature = feature.flatten(2).mean(2) if self.image else feature.flatten(1, -2).mean(1)
        return self.classify(self.norm(feature))


def exit_for(feature: Tensor, outputs: Any, where: str) -> Exit:
    """An untrained exit at `feature` for the classes of `outputs`. Raises `InputError` where they are not [B, C]."""
    logits = first_tensor(outputs)
    if logits.dim() != 2:
        raise InputError(
            f"distill: {where} classifies whole samples, and the model's first output is {tuple(logits.shape)}; it "
            "must be [B, classes]"
        )
    image = feature.dim() == 4
    return Exit(feature.shape[1 if image else -1], logits.shape[1], image)


class OnlineTeacher(Teacher):
    """A teacher that answers as an inner one does, with parts of its own that learn."""

    def __init__(self, inner: Teacher) -> None:
        super().__init__()
        self.inner = inner

    @property
    def module(self) -> nn.Module | None:
        return self.inner.module

    @property
    def no_feature_reason(self) -> str:  # type: ignore[override]
        return self.inner.no_feature_reason

    def check(self, example: Inputs) -> None:
        self.inner.check(example)

    def begin(self, progress: float) -> None:
        self.inner.begin(progress)

    def live(self, batch: Batch) -> TeacherAnswer:
        return self.inner(batch)


class ExitsTeacher(OnlineTeacher):
    """The student's deepest output teaches exits at its own shallower points (be your own teacher: Zhang et al., ICCV
    2019, arXiv:1905.08094), beside another teacher, whose answers and cache are kept.

    Each exit learns ce_weight · task loss + kd_weight · T² KL(student's output ‖ exit). Their gradient goes into the
    student below the point, and none to its output. The exits are left behind with the training.

    Args:
        inner: the teacher whose answers the terms get.
        exits: module path of the student -> the classifier of its output (`exit_for`).
        ce_weight: weight of the task's loss at each exit.
        kd_weight: weight of what the student's output teaches each exit.
        temperature: T of that.
    """

    def __init__(
        self,
        inner: Teacher,
        exits: dict[str, Exit],
        *,
        ce_weight: float = 0.3,
        kd_weight: float = 0.7,
        temperature: float = 3.0,
    ) -> None:
        super().__init__(inner)
        self.student_points = tuple(exits)
        self.exits = nn.ModuleList(exits.values())
        self.ce_weight, self.kd_weight, self.temperature = ce_weight, kd_weight, temperature

    def identity(self) -> str:
        return self.inner.identity()

    def why_not_cached(self) -> Reason | None:
        return self.inner.why_not_cached()

    def auxiliary_loss(self, view: View) -> Tensor | None:
        total = self.inner.auxiliary_loss(view)
        for point, head in zip(self.student_points, self.exits, strict=True):
            logits = head(view.student_features[point])
            loss = self.kd_weight * divergence(logits, first_tensor(view.student), view, self.temperature)
            loss = loss + self.ce_weight * task_loss(logits, view)
            total = loss if total is None else total + loss
        return total


class ShadowTeacher(OnlineTeacher):
    """A second head on the frozen teacher's features, which teaches in its place (SHAKE: Li & Jin, NeurIPS 2022).

    The head learns T² KL(teacher ‖ shadow) and student_weight · T² KL(student ‖ shadow). The teacher's backbone stays
    as it is.

    Args:
        inner: the frozen teacher; it must show the feature at `point`.
        point: module path of the teacher whose output the head reads.
        head: the head (`exit_for`).
        student_weight: weight of what the student teaches the head, beside what the teacher does.
        temperature: T of both.
    """

    uncacheable: ClassVar[str] = "the teacher's shadow head learns in every step"

    def __init__(
        self, inner: Teacher, point: str, head: Exit, *, student_weight: float = 1.0, temperature: float = 4.0
    ) -> None:
        super().__init__(inner)
        self.point, self.head = point, head
        self.student_weight, self.temperature = student_weight, temperature
        self._last: tuple[Tensor, Tensor] | None = None
        """the inner teacher's (feature, logits) of the batch that was answered last, until they are learned from"""

    def why_not_cached(self) -> Reason | None:
        return self.uncacheable

    def live(self, batch: Batch) -> TeacherAnswer:
        outputs, features = self.inner(batch)
        self._last = features[self.point], first_tensor(outputs)
        return self.head(features[self.point]), features

    def auxiliary_loss(self, view: View) -> Tensor | None:
        if self._last is None:  # no term has asked the teacher yet
            return None
        (feature, logits), self._last = self._last, None
        own = self.head(feature)
        mimicry = divergence(own, logits, view, self.temperature)
        return mimicry + self.student_weight * divergence(own, first_tensor(view.student), view, self.temperature)
