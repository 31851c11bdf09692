"""Structured pruning: whole channels, heads, units and blocks, found by a budget."""

from __future__ import annotations

from pqk.passes.prune.prune import Prune

__all__ = ["Prune"]
