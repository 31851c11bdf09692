"""Feature knowledge: what the teacher computes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.knowledge.term import Term, View
from pqk.program import CONFIG
from pqk.task import widened


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FeatureTerm(Term):
    """A term that compares the outputs of two modules."""

    point: str = Field(min_length=1)
    """path of the module whose output is compared, such as "layer2" """
    teacher_point: str | None = None
    """its path in the teacher, where it has another name there"""

    def points(self) -> tuple[str, str]:
        return self.point, self.teacher_point or self.point

    def features(self, view: View) -> tuple[Tensor, Tensor]:
        student, teacher = self.points()
        return widened(view.student_features[student]), widened(view.teacher_features[teacher].detach())


class Slice(nn.Module):
    """The student's channels are the teacher's surviving ones: nothing to learn. Selects them from the teacher."""

    def __init__(self, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = list(kept)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Hint(FeatureTerm):
    """mean (proj(f_s) − f_t)² (Romero et al., FitNets 2015, section 2.2)."""

    term: Literal["hint"] = "hint"
    projector_kind: Literal["identity", "slice", "linear", "conv1x1", "mlp"] = "slice"
    """slice: the teacher's surviving channels, which the compiler knows; the others are learned and never exported"""

    def projector(self, student: Tensor, teacher: Tensor, kept: Sequence[int] | None) -> nn.Module | None:
        cs, ct = student.shape[_axis(student)], teacher.shape[_axis(teacher)]
        shapes = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        match self.projector_kind:
            case "identity" if student.shape != teacher.shape:
                raise InputError(f'hint at "{self.point}": shapes differ ({shapes}); use slice or a learned projector')
            case "identity":
                return None
            case "slice" if cs == ct and kept is None:
                return None
            case "slice" if kept is None or len(kept) != cs:
                raise InputError(
                    f'hint at "{self.point}": it is not known which teacher channels survive there ({shapes}); '
                    "use conv1x1 or linear"
                )
            case "slice":
                return Slice(kept or ())
            case "conv1x1" if student.dim() != 4:
                raise InputError(f'hint at "{self.point}": conv1x1 maps images [B, C, H, W] ({shapes}); use linear')
            case "conv1x1":
                return nn.Conv2d(cs, ct, 1)
            case "linear":
                return nn.Linear(cs, ct)
            case _:
                return nn.Sequential(nn.Linear(cs, 2 * ct), nn.ReLU(), nn.Linear(2 * ct, ct))

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = self.features(view)
        if isinstance(projector, Slice):
            t = t.index_select(_axis(t), t.new_tensor(projector.kept).long())
        elif isinstance(projector, nn.Conv2d) or projector is None:
            s = s if projector is None else projector(s)
        else:
            s = projector(s.movedim(_axis(s), -1)).movedim(-1, _axis(s))
        if s.shape != t.shape:  # the difference would broadcast
            raise InputError(
                f'hint at "{self.point}": the features are {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher); '
                "choose points of one shape"
            )
        return (s - t).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class AttentionTransfer(FeatureTerm):
    """mean (Q_s − Q_t)², Q = vec(mean_c f²) / ‖·‖₂ (Zagoruyko & Komodakis 2017, section 3.1). Any channel counts."""

    term: Literal["attention_transfer"] = "attention_transfer"

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = (F.normalize(f.square().mean(_axis(f)).flatten(1), dim=1) for f in self.features(view))
        if s.shape != t.shape:
            raise InputError(
                f'attention_transfer at "{self.point}": the student\'s feature has {s.shape[1]} places and the '
                f"teacher's {t.shape[1]}; choose points of one resolution"
            )
        return (s - t).square().mean(1)


def _axis(feature: Tensor) -> int:
    """The channel axis: 1 of images [B, C, H, W], the last of tokens [B, N, D] and vectors [B, D]."""
    return 1 if feature.dim() == 4 else feature.dim() - 1
