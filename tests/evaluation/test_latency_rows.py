"""Other runtimes beside ONNX Runtime: those that are asked for, each timed or with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk import Evaluation
from pqk.bench.contenders import Contender, Skipped
from pqk.bench.measure import QUICK, measure
from pqk.data.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx, emit_onnx_for
from pqk.errors import InputError
from pqk.evaluation.latency_rows import elsewhere, time_variants
from pqk.evaluation.rows import Missing, OnnxFile, Subject
from pqk.evaluation.table import NEURAL_COMPRESSOR
from pqk.report.schema import LatencyRow, VariantName
from pqk.report.text import latency_cells
from pqk.target.target import Target
from pqk.task.task import Task

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


def test_who_answers_otherwise_is_said_to(tmp_path: Path) -> None:
    """The student's file is of another network, which no time of its own shows."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval() for _ in range(2)]
    data = ArrayData(torch.randn(64, 3, 2, 2), torch.arange(64) % 4, 16)
    task = Task(None, data, validation=data)
    for name, net in (("teacher", nets[0]), ("model", nets[1])):
        emit_onnx_for(net, task, tmp_path / f"{name}.onnx")
    program: Any = SimpleNamespace(teacher=nets[0], target=Target.detect())
    settings = Evaluation(baselines=(), runtimes=("torch",), timing=QUICK, batches=(1, 8), threads=1)
    files = [
        OnnxFile("teacher_fp32", tmp_path / "teacher.onnx", nets[0]),
        OnnxFile("student", tmp_path / "model.onnx", nets[0]),
    ]
    rows, notes = time_variants(files, Subject(program, task, (), tmp_path, settings, nets[0]))
    timed = {(r.variant, r.runtime, r.batch) for r in rows}
    assert timed >= {("teacher_fp32", "torch", 1), ("student", "onnxruntime", 8)}
    for row in rows:
        assert row.agreement is not None and row.samples == 64 + row.batch
        assert row.decides_otherwise == (row.variant == "student") == (row.agreement < 0.9)
        assert row.agreement == 1 or row.variant == "student"
        assert ("other answers" in " ".join(latency_cells(row))) == row.decides_otherwise
    said = [note for note in notes if "its time is that of other answers" in note]
    assert len(said) == 3 and all("student" in note for note in said) and "of 65 samples" in said[0]


def test_who_cannot_answer_is_left_out_with_a_note(subject: Subject, tmp_path: Path) -> None:
    data = ArrayData(X.repeat(4, 1, 1, 1), torch.zeros(4, 16, 16, dtype=torch.int64), 4)
    program: Any = SimpleNamespace(teacher=NET, target=Target.detect())
    settings = Evaluation(baselines=(), runtimes=(), timing=QUICK, batches=(1,), threads=1)
    whole = replace(subject, program=program, task=Task(None, data, validation=data), settings=settings)
    stems: dict[VariantName, str] = {"teacher_fp32": "teacher", "pruned": "nothing", "student": "model"}
    rows, notes = time_variants([OnnxFile(name, tmp_path / f"{stem}.onnx", NET) for name, stem in stems.items()], whole)
    assert {row.variant for row in rows} == {"teacher_fp32", "student"}, notes
    assert all(row.agreement is None for row in rows), "of [B, 16, 16, 16] no one can tell what a decision is"
    assert [note for note in notes if note.startswith("pruned in onnxruntime was not measured")]


def test_a_report_of_an_earlier_version_has_no_agreement() -> None:
    row = measure([Contender("student", "onnxruntime", 1, 1, lambda: None)], timing=QUICK)[0]
    earlier = LatencyRow(**{k: v for k, v in row.model_dump().items() if k not in ("agreement", "samples")})
    assert earlier.agreement is None and not earlier.decides_otherwise and "–" in latency_cells(earlier)


class Broken(nn.Module):
    """A network of which nothing can be counted or asked."""

    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("nobody thought of this")


def test_a_number_that_cannot_be_had_is_null_with_its_reason(subject: Subject, tmp_path: Path) -> None:
    data = ArrayData(X.repeat(4, 1, 1, 1), torch.zeros(4, 16, 16, dtype=torch.int64), 4)
    program: Any = SimpleNamespace(teacher=Broken(), target=Target.detect())
    task = Task(None, data, validation=data)
    student = OnnxFile("student", tmp_path / "model.onnx", Broken())
    row = student.judge(replace(subject, program=program, task=task), []).row
    assert row.macs is None and row.metric is None and row.size_bytes and row.integer_coverage == 0
    for field in ("macs", "metric"):
        assert "nobody thought of this" in row.reasons[field]


def test_a_tool_that_is_not_installed_says_so() -> None:
    absent = Missing("teacher_ptq", "not installed", NEURAL_COMPRESSOR)
    assert absent.contender((X,), {}, 1) == Skipped("teacher_ptq", NEURAL_COMPRESSOR, "not installed")
    assert Missing("teacher_ptq", "it has none").contender((X,), {}, 1) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controls": ("student_no_kdd",)}, "controls.0: .*'student_no_kd'.*got 'student_no_kdd'"),
        ({"runtimes": ("tflite",)}, "runtimes.0: .*'openvino' .got 'tflite'"),
        ({"baselines": ("onnx",)}, "baselines.0: .*'onnxruntime'.*got 'onnx'"),
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
