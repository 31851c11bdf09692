"""MODULE to GRAPH: the ATen graph that will be deployed, in one canonical form."""

from __future__ import annotations

from pqk.passes.capture.capture import Capture

__all__ = ["Capture"]
