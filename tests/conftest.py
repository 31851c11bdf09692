"""What all tests share: one torch thread a test process, and the folder of public data, which may not be there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Tiny networks do not gain from a second thread, and timings of ONNX Runtime lose by torch's idle ones.
torch.set_num_threads(1)

# Read once, when Triton is imported: without a GPU, kernels run on CPU tensors in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary", type=Path, help="write how many tests of each file passed, as JSON")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The result of a sweep, to be committed beside what it proves."""
    if (path := config.getoption("--summary")) is None:
        return
    from pqk.files import write_json
    from pqk.target.machine import machine_fingerprint

    files: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, ()):
            files.setdefault(report.nodeid.partition("::")[0], Counter())[outcome] += 1
    command = ["pytest", *(str(a) for a in config.invocation_params.args)]
    document = {"command": " ".join(command), "machine": machine_fingerprint(), "tests": dict(sorted(files.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)


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
