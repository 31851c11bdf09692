"""Pruning, quantization and knowledge in one search."""

from __future__ import annotations

from pqk.passes.joint.joint_search import JointSearch

__all__ = ["JointSearch"]
