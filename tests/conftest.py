"""What all tests share: one torch thread a test process, and the folder of public data, which may not be there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Tiny networks do not gain from a second thread, and timings of ONNX Runtime lose by torch's idle ones.
torch.set_num_threads(1)

# Read once, when Triton is imported: without a GPU, kernels run on CPU tensors in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where public data sets and checkpoints are: `PQK_DATA`, else `../shared/data`. It may not exist."""
    return Path(os.environ.get("PQK_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def data_file(data_folder: Path) -> Callable[[str], Path]:
    """`data_file("cifar10_test.npz")`: its path; the test is skipped, naming the file, where it is missing."""

    def find(name: str) -> Path:
        path = data_folder / name
        if not path.is_file():
            pytest.skip(f"needs {name}, which is not in {data_folder}; PQK_DATA names the folder that has it")
        return path

    return find
