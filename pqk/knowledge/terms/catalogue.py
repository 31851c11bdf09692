"""All terms, and the table of a recipe that is one of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pqk.knowledge.terms.dual_space import DualSpace
from pqk.knowledge.terms.feature import AttentionMaps, AttentionTransfer, HiddenCosine, Hint
from pqk.knowledge.terms.neurons import TaskNeurons
from pqk.knowledge.terms.policy import GroupPolicy, MiniLLM, Ranking
from pqk.knowledge.terms.relation import (
    PKT,
    CorrelationCongruence,
    LocalGeometry,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from pqk.knowledge.terms.response import (
    DIST,
    JSD,
    CrossEntropy,
    DecoupledKD,
    KLDivergence,
    LabelSmoothing,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SortedULD,
    StandardizedKD,
)

TERMS = (
    CrossEntropy, KLDivergence, ReverseKL, JSD, SkewKL, SkewReverseKL, LogitMSE, DecoupledKD, StandardizedKD, DIST,
    LabelSmoothing, SortedULD, MiniLLM, Ranking, GroupPolicy,
    Hint, AttentionTransfer, AttentionMaps, HiddenCosine, TaskNeurons, DualSpace,
    RKDDistance, RKDAngle, SimilarityPreserving, CorrelationCongruence, LocalGeometry, PKT,
)  # fmt: skip
AnyTerm = Annotated[
    CrossEntropy | KLDivergence | ReverseKL | JSD | SkewKL | SkewReverseKL | LogitMSE | DecoupledKD | StandardizedKD
    | DIST | LabelSmoothing | SortedULD | MiniLLM | Ranking | GroupPolicy
    | Hint | AttentionTransfer | AttentionMaps | HiddenCosine | TaskNeurons | DualSpace
    | RKDDistance | RKDAngle | SimilarityPreserving | CorrelationCongruence | LocalGeometry | PKT,
    Field(discriminator="term"),
]  # fmt: skip
