"""pqk: compress a trained PyTorch model into an INT8 student that is measurably faster, with the proof beside it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.compiler import compress as compress
    from pqk.data.synthesis import pseudo_labels as pseudo_labels
    from pqk.data.synthesis import synthesize as synthesize
    from pqk.deploy.artifact import Artifact as Artifact
    from pqk.evaluation.settings import Evaluation as Evaluation
    from pqk.recipe.recipe import Recipe as Recipe
    from pqk.target.target import Target as Target
    from pqk.task.metrics import Metric as Metric
    from pqk.task.task import Task as Task

_HOME = {
    "Artifact": "pqk.deploy.artifact",
    "Evaluation": "pqk.evaluation.settings",
    "Metric": "pqk.task.task",
    "Recipe": "pqk.recipe.recipe",
    "Target": "pqk.target.target",
    "Task": "pqk.task.task",
    "compress": "pqk.compiler",
    "pseudo_labels": "pqk.data.synthesis",
    "synthesize": "pqk.data.synthesis",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pqk' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
