"""Dual-space distillation: both models' hidden states, each read by both models' heads."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError, nearest
from pqk.knowledge.terms.base import Place, View
from pqk.knowledge.terms.feature import FeatureTerm
from pqk.knowledge.terms.response import at, kl_rows, labelled_tokens, over_tokens, per_sample
from pqk.settings import settings

Head = tuple[Tensor, Tensor | None]
"""weight [C, D] and bias [C]"""


class DualProjector(nn.Module):
    """Maps between the two hidden spaces, which train along. The heads are looked at and belong to their models."""

    def __init__(self, student: Head, teacher: Head) -> None:
        super().__init__()
        self.heads = (student, teacher)
        self.to_student = nn.Linear(teacher[0].shape[1], student[0].shape[1])
        self.to_teacher = nn.Linear(student[0].shape[1], teacher[0].shape[1])

    def read(self, hidden: Tensor, model: int) -> Tensor:
        """Logits of a hidden state by the head of the student (0) or the teacher (1), which learns nothing by it."""
        weight, bias = self.heads[model]
        return F.linear(hidden, weight.detach().to(hidden), None if bias is None else bias.detach().to(hidden))


@settings
class DualSpace(FeatureTerm):
    """KL(W_s P f_t ‖ z_s) + CE(W_s P f_t, y) + KL(z_t ‖ W_t P' f_s): hidden states read by both models' heads.

    Zhang et al., EMNLP 2024, arXiv:2406.17328, section 3.2. The heads W are frozen and the maps P and P' learned. The
    points are the inputs f of the heads ([B, D], [B, N, D], or [B, C, H, W], which is averaged over its positions); z
    are the first outputs [B, …, C] of the two models, y labels int64 [B, …]. Class counts may differ.
    """

    term: Literal["dual_space"] = "dual_space"
    head: str = Field(min_length=1)
    """path of the linear layer that reads the student's feature at `point`"""
    teacher_head: str | None = None
    """its path in the teacher, where it has another name there"""
    temperature: float = Field(default=1.0, gt=0)
    """T: softens the distributions of both divergences"""

    def projector(self, place: Place) -> nn.Module:
        if place.teacher_model is None:
            raise InputError(f"{self.called}: the teacher is a black box, and its head cannot be looked at")
        heads = (
            self._head("student", place.student_model, self.head, place.student),
            self._head("teacher", place.teacher_model, self.teacher_head or self.head, place.teacher),
        )
        return DualProjector(*heads)

    def _head(self, whose: str, model: nn.Module, path: str, feature: Tensor) -> Head:
        stored = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weight = stored.get(f"{path}.weight")
        if weight is None or weight.dim() != 2:
            known = [n.removesuffix(".weight") for n, t in stored.items() if n.endswith("weight") and t.dim() == 2]
            raise InputError(f'{self.called}: the {whose} has no linear layer "{path}"{nearest(path, known)}')
        width = _hidden(feature).shape[-1]
        if weight.shape[1] != width:
            raise InputError(
                f'{self.called}: the {whose}\'s head "{path}" reads {weight.shape[1]} channels and the feature has '
                f"{width}; choose the point that it reads"
            )
        return weight, stored.get(f"{path}.bias")

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        assert isinstance(projector, DualProjector)
        hidden_s, hidden_t = (_hidden(f) for f in self.features(view))
        z_s, z_t = (view.task.classes_last(widened(first_tensor(o))) for o in (view.student, view.teacher))
        z_t = z_t.detach()
        read_s = projector.read(projector.to_student(hidden_t), 0)
        read_t = projector.read(projector.to_teacher(hidden_s), 1)
        if read_s.shape != z_s.shape or read_t.shape != z_t.shape:
            raise InputError(
                f"{self.called}: the heads give {tuple(read_s.shape)} and {tuple(read_t.shape)}, the models "
                f"{tuple(z_s.shape)} (student) and {tuple(z_t.shape)} (teacher); choose the points that they read"
            )
        if not isinstance(view.targets, Tensor) or view.targets.shape != z_s.shape[:-1]:
            raise InputError(f"{self.called}: it needs one class label for each of the student's rows of logits")
        counted, labels = labelled_tokens(view, z_s.shape[:-1]), view.targets
        read_s, z_s, z_t, read_t, labels = (at(x, counted) for x in (read_s, z_s, z_t, read_t, labels))
        log_p = [F.log_softmax(z / self.temperature, -1) for z in (read_s.detach(), z_s, z_t, read_t)]
        divergences = self.temperature**2 * (kl_rows(log_p[0], log_p[1]) + kl_rows(log_p[2], log_p[3]))
        labelled = F.cross_entropy(
            read_s.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=view.task.ignored
        )
        return per_sample([over_tokens(divergences + labelled.view_as(divergences), counted)])


def _hidden(feature: Tensor) -> Tensor:
    return feature.mean((2, 3)) if feature.dim() == 4 else feature
