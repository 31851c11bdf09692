"""The passes, one public pass a file; a new one is a file and a name in `PASSES`."""

from __future__ import annotations

from pqk.passes.capture import Capture
from pqk.passes.convert import Convert
from pqk.passes.distill import Distill
from pqk.passes.fuse import Fuse
from pqk.passes.pqk import PQK
from pqk.passes.prune import Prune
from pqk.passes.quantize import Quantize
from pqk.program import Pass, RewriteFunction

PASSES: tuple[type[Pass], ...] = (Prune, PQK, Distill, Capture, Quantize, Convert, Fuse)
REWRITES: dict[str, RewriteFunction] = {f.__name__: f for p in PASSES for f in p.rewrites}

__all__ = ["PASSES", "REWRITES", *(p.__name__ for p in PASSES)]
