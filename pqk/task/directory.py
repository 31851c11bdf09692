"""The Hugging Face directory whose tokenizer a task's texts are read with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.data.data import Data


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """Where a task's tokenizer is, and how the same texts are read with another one."""

    folder: Path
    remade: Callable[[Path], Any]
    """the same `Task` for the model in another folder"""
    spelled: Callable[[Data], tuple[int, int]]
    """data of the task -> how many tokens are learned, and how many characters those are"""
