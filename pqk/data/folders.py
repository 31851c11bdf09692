"""Where data lives: the folders that a file's name is looked up in."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PQK_DATA"
"""the environment variable that names the folder with the data"""
DEFAULT = "../shared/data"
"""the folder where neither an argument nor the variable names one"""


def data_folders(data: str | Path | None = None) -> list[Path]:
    """The folders with data, in the order in which they are looked at: `data`, that of `PQK_DATA`, the default one."""
    return [Path(folder) for folder in (data, os.environ.get(VARIABLE), DEFAULT) if folder]


def data_folder(data: str | Path | None = None) -> Path:
    """The first of `data_folders`: for data that is in one place."""
    return data_folders(data)[0]
