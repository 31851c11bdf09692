"""Where the student will run, and where this process runs now."""

from __future__ import annotations

from pqk.target.target import TARGETS, Target

__all__ = ["TARGETS", "Target"]
