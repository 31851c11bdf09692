"""pqk: compress a trained PyTorch model into an INT8 student that is measurably faster, with the proof beside it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqk.bench.artifact import benchmark as benchmark
    from pqk.bench.measure import TimingProtocol as TimingProtocol
    from pqk.comparison.config import Comparison as Comparison
    from pqk.comparison.runner import compare as compare
    from pqk.compiler import compress as compress
    from pqk.data.data import ArrayData as ArrayData
    from pqk.data.data import LoaderData as LoaderData
    from pqk.data.synthesis import pseudo_labels as pseudo_labels
    from pqk.data.synthesis import synthesize as synthesize
    from pqk.data.views import Views as Views
    from pqk.deploy.artifact import Artifact as Artifact
    from pqk.errors import ContractError as ContractError
    from pqk.errors import InputError as InputError
    from pqk.errors import ParityError as ParityError
    from pqk.errors import PqkError as PqkError
    from pqk.evaluation.settings import Evaluation as Evaluation
    from pqk.recipe.contract import Contract as Contract
    from pqk.recipe.recipe import Recipe as Recipe
    from pqk.target.target import Target as Target
    from pqk.task.metrics import Metric as Metric
    from pqk.task.task import Task as Task

_HOME = {
    "ArrayData": "pqk.data.data",
    "Artifact": "pqk.deploy.artifact",
    "Comparison": "pqk.comparison.config",
    "Contract": "pqk.recipe.contract",
    "ContractError": "pqk.errors",
    "Evaluation": "pqk.evaluation.settings",
    "InputError": "pqk.errors",
    "LoaderData": "pqk.data.data",
    "Metric": "pqk.task.metrics",
    "ParityError": "pqk.errors",
    "PqkError": "pqk.errors",
    "Recipe": "pqk.recipe.recipe",
    "Target": "pqk.target.target",
    "Task": "pqk.task.task",
    "TimingProtocol": "pqk.bench.measure",
    "Views": "pqk.data.views",
    "benchmark": "pqk.bench.artifact",
    "compare": "pqk.comparison.runner",
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
