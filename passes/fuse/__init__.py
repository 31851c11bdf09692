"""The INT8 student as a program of fused operators."""

from __future__ import annotations

from pqk.passes.fuse.fuse import Fuse

__all__ = ["Fuse"]
