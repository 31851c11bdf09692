"""Pruning, quantization and knowledge in one search."""

from __future__ import annotations

from pqk.passes.joint.joint_search import PQK

__all__ = ["PQK"]
