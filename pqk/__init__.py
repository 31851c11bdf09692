"""pqk: compress a trained PyTorch model into an INT8 student that is measurably faster, with the proof beside it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.artifact import Artifact as Artifact
    from pqk.compiler import compress as compress
    from pqk.recipe import Recipe as Recipe
    from pqk.synthesis import pseudo_labels as pseudo_labels
    from pqk.synthesis import synthesize as synthesize
    from pqk.target import Target as Target
    from pqk.task import Metric as Metric
    from pqk.task import Task as Task

_HOME = {
    "Artifact": "pqk.artifact",
    "Metric": "pqk.task",
    "Recipe": "pqk.recipe",
    "Target": "pqk.target",
    "Task": "pqk.task",
    "compress": "pqk.compiler",
    "pseudo_labels": "pqk.synthesis",
    "synthesize": "pqk.synthesis",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pqk' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
