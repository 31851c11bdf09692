"""What a student can learn from its teacher: one distillation term a class, listed in `TERMS`."""

from __future__ import annotations

from pqk.knowledge.answers.adversary import ByAdversary
from pqk.knowledge.answers.authors import ByCorrection, ByMixture, ByStudent, ByTeacher
from pqk.knowledge.answers.catalogue import AUTHORS, AnyAnswers
from pqk.knowledge.answers.critic import ByCritic
from pqk.knowledge.answers.generation import Ends, TokenSampling, generate
from pqk.knowledge.answers.replay import ByReplay
from pqk.knowledge.pairs import Pair, suggest_pairs
from pqk.knowledge.retention import Retention
from pqk.knowledge.sources import (
    FromArtifact,
    FromAssistant,
    FromContext,
    FromEMA,
    FromEnsemble,
    FromExits,
    FromModule,
    FromOnnx,
    FromOtherTokenizer,
    FromPeer,
    FromRandom,
    FromShadow,
    FromSnapshot,
)
from pqk.knowledge.teachers.base import FrozenTeacher, Teacher
from pqk.knowledge.teachers.black_box import CallableTeacher, OnnxTeacher, logits_of_labels, logits_of_top_k
from pqk.knowledge.teachers.ensemble import EMATeacher, EnsembleTeacher, UncertaintyTeacher
from pqk.knowledge.teachers.online import ExitsTeacher, PeerTeacher, ShadowTeacher
from pqk.knowledge.terms.base import Term, View
from pqk.knowledge.terms.catalogue import TERMS, AnyTerm
from pqk.knowledge.terms.dual_space import DualSpace
from pqk.knowledge.terms.feature import AttentionMaps, AttentionTransfer, HiddenCosine, Hint
from pqk.knowledge.terms.neurons import TaskNeurons, neuron_scores
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

__all__ = [
    "AUTHORS",
    "DIST",
    "JSD",
    "PKT",
    "TERMS",
    "AnyAnswers",
    "AnyTerm",
    "AttentionMaps",
    "AttentionTransfer",
    "ByAdversary",
    "ByCorrection",
    "ByCritic",
    "ByMixture",
    "ByReplay",
    "ByStudent",
    "ByTeacher",
    "CallableTeacher",
    "CorrelationCongruence",
    "CrossEntropy",
    "DecoupledKD",
    "DualSpace",
    "EMATeacher",
    "Ends",
    "EnsembleTeacher",
    "ExitsTeacher",
    "FromArtifact",
    "FromAssistant",
    "FromContext",
    "FromEMA",
    "FromEnsemble",
    "FromExits",
    "FromModule",
    "FromOnnx",
    "FromOtherTokenizer",
    "FromPeer",
    "FromRandom",
    "FromShadow",
    "FromSnapshot",
    "FrozenTeacher",
    "GroupPolicy",
    "HiddenCosine",
    "Hint",
    "KLDivergence",
    "LabelSmoothing",
    "LocalGeometry",
    "LogitMSE",
    "MiniLLM",
    "OnnxTeacher",
    "Pair",
    "PeerTeacher",
    "RKDAngle",
    "RKDDistance",
    "Ranking",
    "Retention",
    "ReverseKL",
    "ShadowTeacher",
    "SimilarityPreserving",
    "SkewKL",
    "SkewReverseKL",
    "SortedULD",
    "StandardizedKD",
    "TaskNeurons",
    "Teacher",
    "Term",
    "TokenSampling",
    "UncertaintyTeacher",
    "View",
    "generate",
    "logits_of_labels",
    "logits_of_top_k",
    "neuron_scores",
    "suggest_pairs",
]
