"""Relation knowledge: how the teacher arranges the samples of a batch.

Features are flattened to [B, D]; the widths of teacher and student may differ, so every term survives pruning without a
projector. Each is zero where the two arrangements are equal. Row i of a matrix of relations is the loss of sample i.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pqk.knowledge.terms.base import View
from pqk.knowledge.terms.feature import FeatureTerm, unit
from pqk.knowledge.terms.response import kl_rows
from pqk.settings import settings

NEAR = 1e-6
"""squared distances below this share of the mean one count as 0: rounding has eaten them, and their roots' gradients"""


@settings
class RelationTerm(FeatureTerm):
    """A term that compares how two batches of vectors lie: features flattened to [B, D_s] and [B, D_t]."""

    def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
        flat = []
        for f in self.features(view):
            weights = self.position_weights(view, f)
            if weights is not None:
                f = f * (weights[:, None] if f.dim() == 4 else weights[..., None])
            flat.append(f.flatten(1))
        return self.compare(*flat)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the loss [B] of a student's batch [B, D_s] and a teacher's [B, D_t]."""


@settings
class RKDDistance(RelationTerm):
    """Smooth L1 of the distances [B, B] between samples, over their own mean.

    Park et al., CVPR 2019, arXiv:1904.05068, equations 7 to 9. Features are flattened to [B, D]; the loss is invariant
    to rotation, shift and scale of the student.
    """

    term: Literal["rkd_distance"] = "rkd_distance"
    weight: float = Field(default=25.0, ge=0)
    """factor of this term's loss"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.smooth_l1_loss(_distances(student), _distances(teacher), reduction="none").mean(1)


@settings
class RKDAngle(RelationTerm):
    """Smooth L1 of the cosines [B, B, B] at sample j between i and k.

    Park et al., CVPR 2019, arXiv:1904.05068, equations 10 to 12. Features are flattened to [B, D]; the loss is
    invariant to rotation, shift and scale of the student. B³ numbers: larger batches are taken in equal groups.
    """

    term: Literal["rkd_angle"] = "rkd_angle"
    weight: float = Field(default=50.0, ge=0)
    """factor of this term's loss"""
    most: int = Field(default=64, ge=3)
    """samples in a group at most"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        groups = -(-len(student) // self.most)
        parts = zip(student.tensor_split(groups), teacher.tensor_split(groups), strict=True)
        return torch.cat([F.smooth_l1_loss(_angles(s), _angles(t), reduction="none").mean((1, 2)) for s, t in parts])


@settings
class SimilarityPreserving(RelationTerm):
    """‖G_t − G_s‖²_F / B², G the row-normalised Gram matrix [B, B] of features flattened to [B, D].

    Tung & Mori, ICCV 2019, arXiv:1907.09682, equations 1 to 4.
    """

    term: Literal["similarity_preserving"] = "similarity_preserving"
    weight: float = Field(default=3000.0, ge=0)
    """factor of this term's loss"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (unit(x @ x.T) for x in (student, teacher))
        return (s - t).square().mean(1)


@settings
class CorrelationCongruence(RelationTerm):
    """Mean squared difference of Gaussian kernels [B, B] in Taylor form.

    Peng et al., ICCV 2019, arXiv:1904.01802, equations 5 and 11. Features [B, D] have unit norm: k(x, y) =
    Σ_p exp(−2γ) (2γ)^p / p! · (x·y)^p, p = 0 … P.
    """

    term: Literal["correlation_congruence"] = "correlation_congruence"
    weight: float = Field(default=100.0, ge=0)
    """factor of this term's loss"""
    gamma: float = Field(default=0.4, gt=0)
    """γ of the kernel"""
    order: int = Field(default=2, ge=1, le=16)
    """P: the last power of the series"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = (self._kernel(unit(x)) for x in (student, teacher))
        return (s - t).square().mean(1)

    def _kernel(self, x: Tensor) -> Tensor:
        gram, g = x @ x.T, 2 * self.gamma
        powers = [math.exp(-g) * g**p / math.factorial(p) * gram**p for p in range(1, self.order + 1)]
        return torch.stack(powers).sum(0)  # the power 0 is the same constant on both sides


@settings
class LocalGeometry(RelationTerm):
    """KL(s ‖ t) of softmax(−distance) over each sample's nearest neighbours, of features flattened to [B, D].

    Yang et al., CVPR 2020, arXiv:2003.10477, equations 2 to 4. Neighbours are the teacher's; distances are over
    their own mean, so that the student's scale and shift are free.
    """

    term: Literal["local_geometry"] = "local_geometry"
    neighbours: int = Field(default=8, ge=2)
    """how many samples of the batch are near"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        d_s, d_t = _distances(student), _distances(teacher)
        others = d_t + torch.diag_embed(torch.full_like(d_t[0], float("inf")))
        near = others.topk(min(self.neighbours, len(d_t) - 1), largest=False).indices
        return kl_rows(*(F.log_softmax(-d.gather(1, near), -1) for d in (d_s, d_t)))


@settings
class PKT(RelationTerm):
    """KL of cosine similarities as probabilities [B, B], mean over pairs, of features flattened to [B, D].

    Passalis & Tefas, ECCV 2018, arXiv:1803.10837; the arithmetic is RepDistiller's.
    """

    term: Literal["pkt"] = "pkt"
    weight: float = Field(default=30000.0, ge=0)
    """factor of this term's loss (RepDistiller's scripts)"""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        p_s, p_t = (self._probabilities(x) for x in (student, teacher))
        return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean(1)

    @staticmethod
    def _probabilities(x: Tensor) -> Tensor:
        x = unit(x)
        similar = ((x @ x.T + 1) / 2).clamp_min(0)
        return similar / similar.sum(1, keepdim=True)


def _squared(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Gram matrix of centred vectors, squared distances, which of them are not next to nothing), [B, B] each."""
    x = x - x.mean(0)  # distances do not change, and rounding takes less of them
    gram = x @ x.T
    norms = gram.diagonal()
    squared = norms[:, None] + norms[None] - 2 * gram
    apart = squared > NEAR * squared.detach().mean().clamp_min(torch.finfo(x.dtype).tiny)
    return gram, torch.where(apart, squared, torch.ones_like(squared)), apart


def _distances(x: Tensor) -> Tensor:
    """Euclidean distances [B, B] over the mean of the positive ones; 0 between equal samples, without a gradient."""
    _, squared, apart = _squared(x)
    distances = squared.sqrt() * apart
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / torch.where(mean > 0, mean, torch.ones_like(mean))


def _angles(x: Tensor) -> Tensor:
    """[B, B, B]: the cosine at j between i and k, 0 where two of them coincide. From inner products: no [B, B, D]."""
    gram, squared, apart = _squared(x)
    inner = gram[None] - gram[:, :, None] - gram[:, None] + gram.diagonal()[:, None, None]  # [j, i, k]
    inverse = apart / squared.sqrt()
    return inner * inverse[:, :, None] * inverse[:, None]
