"""Training with the teacher's knowledge, in any stage that trains."""

from __future__ import annotations

from pqk.passes.distill.distill import Distill

__all__ = ["Distill"]
