"""Fewer tokens: a causal model with the tokens that its texts use, and its task in them."""

from __future__ import annotations

from pqk.passes.vocabulary.vocabulary import Vocabulary

__all__ = ["Vocabulary"]
