"""What may be done to a student: the passes, a package each, listed in `PASSES`."""

from __future__ import annotations

from pqk.core.program import Pass, RewriteFunction
from pqk.passes.capture.capture import Capture
from pqk.passes.convert.convert import Convert
from pqk.passes.distill.distill import Distill
from pqk.passes.factorize.factorize import Factorize
from pqk.passes.fuse.fuse import Fuse
from pqk.passes.joint.joint_search import JointSearch
from pqk.passes.prune.prune import Prune
from pqk.passes.quantize.quantize import Quantize
from pqk.passes.vocabulary.vocabulary import Vocabulary

PASSES: tuple[type[Pass], ...] = (Vocabulary, Prune, Factorize, JointSearch, Distill, Capture, Quantize, Convert, Fuse)
PQK = JointSearch
"""the name of the joint search in scripts from before it had its own; recipes call it `pqk`"""
REWRITES: dict[str, RewriteFunction] = {f.__name__: f for p in PASSES for f in p.rewrites}

__all__ = ["PASSES", "PQK", "REWRITES", *(p.__name__ for p in PASSES)]
