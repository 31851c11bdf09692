"""The Hugging Face directory whose tokenizer a task's texts are read with, and that which a student of it becomes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pqk.data.data import Data
from pqk.errors import Reason


@dataclass(frozen=True, eq=False)
class ModelDirectory:
    """Where a task's tokenizer is, and how the same texts are read with another one."""

    folder: Path
    remade: Callable[[Path], Any]
    """the same `Task` for the model in another folder"""
    spelled: Callable[[Data], tuple[int, int]]
    """data of the task -> how many tokens are learned, and how many characters those are"""


class GeneratingFiles(ABC):
    """Files of a directory that generates, made for a student: name -> contents; `Task(extra_files=…)`."""

    folder: Path
    """the teacher's directory"""

    @abstractmethod
    def __call__(self, student: nn.Module) -> Mapping[str, bytes]:
        """The files of a captured student, in float or in integers."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """How many tokens the directory's model scores."""

    @abstractmethod
    def why_not_everywhere(self, student: nn.Module) -> Reason | None:
        """Why not every tool that takes such a directory can run the student, else None."""
