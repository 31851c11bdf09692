"""Feature knowledge: terms that compare what two modules inside the models give.

Features are images [B, C, H, W], tokens [B, N, D] or vectors [B, D]: one axis of channels, one of samples, the others
are positions. A mask says which positions count: padding of tokens, the foreground of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.data.structures import widened
from pqk.errors import InputError
from pqk.knowledge.terms.base import Place, Term, View
from pqk.knowledge.terms.response import kl_rows, labelled_tokens
from pqk.settings import settings


def channel_axis(feature: Tensor) -> int:
    """The channel axis: 1 of images [B, C, H, W], the last of tokens [B, N, D] and vectors [B, D]."""
    return 1 if feature.dim() == 4 else feature.dim() - 1


def unit(x: Tensor, axis: int = -1) -> Tensor:
    """`x` over its Euclidean norm along `axis`; 0, without a gradient, where that is next to nothing."""
    norm = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return x / torch.where(norm > 1e-6, norm, torch.full_like(norm, float("inf")))


def position_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean over positions [B, P…] -> [B], weighted where `weights` [B, P…] are given."""
    values = values.reshape(len(values), -1)
    if weights is None:
        return values.mean(1)
    weights = weights.reshape(len(weights), -1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1e-6)


class Slice(nn.Module):
    """The student's channels are some of the teacher's: nothing to learn. Selects them from the teacher's feature."""

    def __init__(self, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = list(kept)

    def forward(self, teacher: Tensor) -> Tensor:
        index = torch.tensor(self.kept, device=teacher.device)
        return teacher.index_select(channel_axis(teacher), index)


@settings
class FeatureTerm(Term):
    """A term that compares the outputs of two modules."""

    other_classes: ClassVar[bool] = True
    point: str = Field(min_length=1)
    """path of the module whose output is compared, such as "layer2" """
    teacher_point: str | None = None
    """its path in the teacher, where it has another name there"""
    mask: str | None = Field(default=None, min_length=1)
    """the model input that is 0 at positions that do not count (padding), or a mask given in Python (foreground); by
    default all count, and of sequences those with a label"""

    def points(self) -> tuple[str, str]:
        return self.point, self.teacher_point or self.point

    def features(self, view: View, projector: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """(student, teacher), in float32 at least; where `projector` selects channels, the teacher's surviving ones."""
        student, teacher = self.points()
        t = widened(view.teacher_features[teacher].detach())
        return widened(view.student_features[student]), projector(t) if isinstance(projector, Slice) else t

    def slice_at(self, place: Place) -> Slice | None:
        """Selects the teacher's channels that the student has.

        Args:
            place: both features on the task's example.

        Returns:
            The selection; None where the student has all channels.

        Raises:
            InputError: channels differ, and it is not known which survive.
        """
        axis = channel_axis(place.student)
        if place.kept is None and place.student.shape[axis] == place.teacher.shape[channel_axis(place.teacher)]:
            return None
        if place.kept is None or len(place.kept) != place.student.shape[axis]:
            raise InputError(
                f"{self.called}: it is not known which teacher channels the student has there ({place}); use a hint "
                "with conv1x1 or linear"
            )
        return Slice(place.kept)

    @property
    def called(self) -> str:
        """Which term of a recipe this is, for messages."""
        return f'{self.term} at "{self.point}"'  # type: ignore[attr-defined]

    def same_shape(self, s: Tensor, t: Tensor) -> None:
        """Checks that the difference of two features would not broadcast.

        Raises:
            InputError: their shapes differ; it names both.
        """
        if s.shape != t.shape:
            raise InputError(
                f"{self.called}: the features are {tuple(s.shape)} (student) and {tuple(t.shape)} (teacher); "
                "choose points of one shape"
            )

    def position_weights(self, view: View, feature: Tensor) -> Tensor | None:
        """The mask at this feature's resolution, [B, positions…]; None where every position counts.

        Without one, tokens [B, S, D] count that have a label, where labels are of tokens: no padding and no prompt.

        Raises:
            InputError: the mask is not of these positions.
        """
        if self.mask is None:
            return labelled_tokens(view, feature.shape[:-1]) if feature.dim() == 3 else None
        mask = widened(view.mask(self.mask))
        positions = feature.shape[:1] + feature.shape[2:] if feature.dim() == 4 else feature.shape[:-1]
        if feature.dim() == 4 and mask.dim() in (3, 4):  # of an image: its share of each cell of the feature
            height, width = feature.shape[2:]
            mask = F.adaptive_avg_pool2d(mask.reshape(len(mask), -1, *mask.shape[-2:]).mean(1), (height, width))
        if mask.shape != positions:
            raise InputError(
                f'{self.called}: mask "{self.mask}" is {tuple(mask.shape)} and the feature has positions '
                f"{tuple(positions)}"
            )
        return mask


@settings
class Hint(FeatureTerm):
    """mean_c (proj(f_s) − f_t)² of features [B, C, H, W], [B, N, D] or [B, D], then the mean over positions.

    Romero et al., FitNets, ICLR 2015, arXiv:1412.6550, section 2.2.
    """

    term: Literal["hint"] = "hint"
    projector_kind: Literal["identity", "slice", "linear", "conv1x1", "mlp"] = "slice"
    """slice: the teacher's surviving channels, which the compiler knows; the others are learned and never exported"""

    def projector(self, place: Place) -> nn.Module | None:
        cs, ct = (f.shape[channel_axis(f)] for f in (place.student, place.teacher))
        match self.projector_kind:
            case "identity" if place.student.shape != place.teacher.shape:
                raise InputError(f"{self.called}: shapes differ ({place}); use slice or a learned projector")
            case "identity":
                return None
            case "slice":
                return self.slice_at(place)
            case "conv1x1" if place.student.dim() != 4:
                raise InputError(f"{self.called}: conv1x1 maps images [B, C, H, W] ({place}); use linear")
            case "conv1x1":
                return nn.Conv2d(cs, ct, 1)
            case "linear":
                return nn.Linear(cs, ct)
            case _:
                return nn.Sequential(nn.Linear(cs, 2 * ct), nn.ReLU(), nn.Linear(2 * ct, ct))

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = self.features(view, projector)
        axis = channel_axis(s)
        if isinstance(projector, nn.Conv2d):
            s = projector(s)
        elif projector is not None and not isinstance(projector, Slice):
            s = projector(s.movedim(axis, -1)).movedim(-1, axis)
        self.same_shape(s, t)
        return position_mean((s - t).square().mean(axis), self.position_weights(view, s))


@settings
class AttentionTransfer(FeatureTerm):
    """mean (Q_s − Q_t)², Q = vec(mean_c f²) / ‖·‖₂, of features of one resolution and any channel counts.

    Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928, section 3.1. Features are [B, C, H, W], [B, N, D] or [B, D].
    """

    term: Literal["attention_transfer"] = "attention_transfer"
    weight: float = Field(default=1000.0, ge=0)
    """factor of this term's loss"""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        maps = []
        for f in self.features(view):
            energy, weights = f.square().mean(channel_axis(f)), self.position_weights(view, f)
            energy = energy if weights is None else energy * weights
            maps.append(F.normalize(energy.flatten(1), dim=1))
        s, t = maps
        if s.shape != t.shape:
            raise InputError(
                f"{self.called}: the student's feature has {s.shape[1]} places and the teacher's {t.shape[1]}; choose "
                "points of one resolution"
            )
        return (s - t).square().mean(1)


@settings
class HiddenCosine(FeatureTerm):
    """1 − cos(f_s, f_t) over channels, mean over real tokens, of features [B, N, D], [B, D] or [B, C, H, W].

    Sanh et al., DistilBERT 2019, arXiv:1910.01108, section 3. Its triple loss is 5 · kl (T = 2) + 2 · cross_entropy +
    1 · hidden_cosine. Name the padding mask with `mask`.
    """

    term: Literal["hidden_cosine"] = "hidden_cosine"

    def projector(self, place: Place) -> nn.Module | None:
        return self.slice_at(place)

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = self.features(view, projector)
        self.same_shape(s, t)
        axis = channel_axis(s)
        s, t = unit(s, axis), unit(t, axis)
        # 1 − cos of unit vectors, without its cancellation near 0.
        return position_mean((s - t).square().sum(axis) / 2, self.position_weights(view, s))


@settings
class AttentionMaps(FeatureTerm):
    """MSE or KL of attention maps [B, heads, N, N], head by head.

    MSE: Jiao et al., TinyBERT 2020, arXiv:1909.10351, equation 7. KL: Wang et al., MiniLM 2020, arXiv:2002.10957,
    equation 4. The points are modules with such an output, such as the softmax or the dropout behind it. Where heads
    were cut, those of the teacher that survive are compared; which these are is known to the compiler, or `heads`.
    Without a `mask`, the queries count that have a label, where labels are of tokens.
    """

    term: Literal["attention_maps"] = "attention_maps"
    distance: Literal["mse", "kl"] = "kl"
    """kl of distributions over the keys, or mean squared difference of whatever the points give"""
    scores: bool = False
    """the points give scores before the softmax"""
    heads: tuple[int, ...] | None = None
    """the teacher's head for each head of the student"""

    def projector(self, place: Place) -> nn.Module | None:
        if place.student.dim() != 4 or place.student.shape[2:] != place.teacher.shape[2:]:
            raise InputError(f"{self.called}: it compares attention [B, heads, N, N] ({place}); choose another point")
        heads = place.teacher.shape[1]
        if self.heads is None:
            return self.slice_at(place)
        if len(self.heads) != place.student.shape[1] or not all(0 <= h < heads for h in self.heads):
            raise InputError(f"{self.called}: heads = {list(self.heads)} do not fit ({place})")
        return Slice(self.heads)

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        s, t = self.features(view, projector)
        self.same_shape(s, t)
        real = None if self.mask is None else self._real(view, s)
        asked = real if real is not None else labelled_tokens(view, (len(s), s.shape[2]))
        if self.distance == "mse":
            error = (s - t).square().mean(1)  # [B, queries, keys]
            if real is None and asked is not None:
                return position_mean(error.mean(2), asked)
            return position_mean(error, None if real is None else real[:, :, None] * real[:, None])
        losses = kl_rows(*(self._log(p, real) for p in (t, s)))  # [B, heads, queries]
        return position_mean(losses.mean(1), asked)

    def _log(self, attention: Tensor, real: Tensor | None) -> Tensor:
        """Log-probabilities over the keys; those that are padding get next to none."""
        if not self.scores:
            attention = attention.clamp_min(1e-12).log()
        if real is not None:
            attention = attention.masked_fill(real[:, None, None] == 0, -1e4)
        return F.log_softmax(attention, -1)

    def _real(self, view: View, attention: Tensor) -> Tensor:
        """The mask of tokens [B, N]."""
        mask = widened(view.mask(self.mask or ""))
        if mask.shape != (len(attention), attention.shape[-1]) or attention.shape[-1] != attention.shape[-2]:
            raise InputError(
                f'{self.called}: mask "{self.mask}" is {tuple(mask.shape)} and the attention '
                f"{tuple(attention.shape)}; it must be [B, N] for [B, heads, N, N]"
            )
        return mask
