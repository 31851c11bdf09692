"""Other runtimes beside ONNX Runtime: those that are asked for, each timed or with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pqk import Evaluation
from pqk.bench.contenders import Contender, Skipped
from pqk.bench.measure import QUICK, measure
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.evaluation.latency_rows import elsewhere
from pqk.evaluation.rows import Missing, Subject
from pqk.evaluation.table import NEURAL_COMPRESSOR

pytestmark = pytest.mark.slow

NET, X = nn.Conv2d(16, 16, 3, padding=1).eval(), torch.zeros(1, 16, 16, 16)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A teacher and a student that are one convolution."""
    for stem in ("teacher", "model"):
        emit_onnx(NET, (X.repeat(2, 1, 1, 1),), tmp_path / f"{stem}.onnx", ["input"])
    program: Any = SimpleNamespace(teacher=NET)
    task: Any = None
    return Subject(program, task, (), tmp_path, Evaluation(), NET)


def test_other_runtimes_stand_beside_the_same_baseline(subject: Subject) -> None:
    """torch as it is and compiled in earnest, OpenVINO where it is installed."""
    candidates = elsewhere(subject, (X,), {"input": X.numpy()})
    assert [c.runtime for c in candidates] == ["torch", "torch.compile", "openvino", "openvino"]
    rows = measure([c for c in candidates if isinstance(c, Contender)], timing=QUICK)
    assert {"torch", "torch.compile"} <= {row.runtime for row in rows}


def test_only_the_runtimes_that_are_asked_for_are_timed(subject: Subject) -> None:
    alone = replace(subject, settings=Evaluation(runtimes=("torch",)))
    assert [c.runtime for c in elsewhere(alone, (X,), {"input": X.numpy()})] == ["torch"]
    assert elsewhere(replace(subject, settings=Evaluation.quick()), (X,), {}) == []


def test_a_tool_that_is_not_installed_says_so() -> None:
    absent = Missing("teacher_ptq", "not installed", NEURAL_COMPRESSOR)
    assert absent.contender((X,), {}, 1) == Skipped("teacher_ptq", NEURAL_COMPRESSOR, "not installed")
    assert Missing("teacher_ptq", "it has none").contender((X,), {}, 1) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controls": ("student_no_kdd",)}, r'controls has "student_no_kdd" \(did you mean "student_no_kd"'),
        ({"runtimes": ("tflite",)}, 'runtimes has "tflite"'),
        ({"baselines": ("onnx",)}, 'baselines has "onnx"'),
        ({"batches": (0,)}, "must be 1 or more"),
        ({"threads": 0}, "must be 1 or more"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Evaluation(**settings)


def test_forms_by_name() -> None:
    assert Evaluation.named("standard") == Evaluation() and Evaluation.named("full") == Evaluation.full()
    with pytest.raises(InputError, match="quick"):
        Evaluation.named("quik")
