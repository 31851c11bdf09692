"""What a student can learn from its teacher: one distillation term a class, listed in `TERMS`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pqk.knowledge.feature import AttentionTransfer, Hint
from pqk.knowledge.response import CrossEntropy, KLDivergence, LogitMSE
from pqk.knowledge.term import Term, View

TERMS = (CrossEntropy, KLDivergence, LogitMSE, Hint, AttentionTransfer)
AnyTerm = Annotated[CrossEntropy | KLDivergence | LogitMSE | Hint | AttentionTransfer, Field(discriminator="term")]

__all__ = ["TERMS", "AnyTerm", "Term", "View", *(t.__name__ for t in TERMS)]
