"""The rows of the attribution table: networks that are run, timed and weighed, each in its own form.

OnnxFile        a file that ONNX Runtime executes: the teacher, its INT8 forms, the student and what led to it
TorchModule     a module that another tool made and torch.compile runs
FusedStudent    `student.pt2`, for a GPU
Missing         a row without numbers, and why
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pqk.bench.contenders import Contender, Feeds, Skipped, compiled_contender, onnxruntime_contender
from pqk.core.costs import count_macs, count_parameters
from pqk.core.onnxruntime_session import OnnxModel, size_of
from pqk.core.program import Pass, Program
from pqk.data.structures import Outputs
from pqk.errors import Reason
from pqk.evaluation.attempts import Failure, attempt
from pqk.evaluation.diagnostics import Judged, answers
from pqk.evaluation.settings import Evaluation
from pqk.report.diagnostics import ControlVariant
from pqk.report.schema import AttributionRow, LatencyRow, VariantName
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage
from pqk.verify.verdict import ModelFunction

DIAGNOSED = ("teacher_fp32", "student", *get_args(ControlVariant))
"""networks whose answers are kept"""
TIMES = ("latency_ms", "ratio")
WEIGHTS = ("size_bytes", "parameters", "macs", "integer_coverage")


@dataclass(frozen=True)
class Subject:
    """A finished program, and everything that its evaluation reads."""

    program: Program
    task: Task
    passes: Sequence[Pass]
    folder: Path
    """what is deployed is here, and other networks' files are written beside it"""
    settings: Evaluation
    fake_quant: nn.Module
    """the student as it was trained, before its conversion"""

    @property
    def why_not_measured(self) -> Reason | None:
        """Why this machine's numbers are not the target's."""
        return self.program.target.why_not_measured()

    @property
    def why_not_timed(self) -> Reason | None:
        """Why nothing is timed."""
        return self.why_not_measured or (
            None if self.settings.latency else "the evaluation was asked not to time anything"
        )


class Variant(ABC):
    """A network of the attribution table."""

    name: VariantName
    runtime: str = "onnxruntime"
    label: str | None = None
    """what to call the row, where that is not the usual title of its variant"""

    @abstractmethod
    def model(self, subject: Subject) -> ModelFunction:
        """What the row's network computes."""

    @abstractmethod
    def contender(self, inputs: tuple[Tensor, ...], feeds: Feeds, threads: int) -> Contender | Skipped | None:
        """What is timed; None where another row's time is its own."""

    def network(self, subject: Subject) -> ModelFunction | None:
        """What the row's contenders should answer; None where there are none."""
        return subject.program.teacher if self.name.startswith("teacher_") else None

    @abstractmethod
    def costs(self, subject: Subject) -> dict[str, Any]:
        """`size_bytes`, `parameters`, `macs` and `integer_coverage`, those that can be had, or a `Failure`."""

    @abstractmethod
    def reasons(self, subject: Subject) -> dict[str, Reason]:
        """Why numbers are missing, by field."""

    def judge(self, subject: Subject, latency: Sequence[LatencyRow]) -> Judged:
        """The row, and what there is behind it for a diagnosis."""
        found: dict[str, Any] = {**self._times(latency, subject.settings), **self.costs(subject)}
        run = attempt(lambda: self._run(subject))
        found["metric"] = run if isinstance(run, Failure) else attempt(lambda: subject.task.metric.function(*run[1:]))
        failures = {name: value.reason for name, value in found.items() if isinstance(value, Failure)}
        numbers = {name: None if name in failures else value for name, value in found.items()}
        row = self.row().model_copy(update={**numbers, "reasons": {**self.reasons(subject), **failures}})
        if isinstance(run, Failure):
            return Judged(row, None, f"it was not evaluated: {run.reason}")
        if self.name not in DIAGNOSED:
            return Judged(row, run[0])
        said = attempt(lambda: answers(subject.task, *run[1:]))
        return Judged(row, run[0], said.reason if isinstance(said, Failure) else said)

    def _run(self, subject: Subject) -> tuple[ModelFunction, Outputs, Any]:
        """What is deployed, its outputs on all evaluation data, and the targets."""
        task, model = subject.task, self.model(subject)
        teaches = self.name.startswith("teacher_")
        return model, *task.predict(model, task.teachers(task.evaluation) if teaches else task.evaluation)

    def row(self) -> AttributionRow:
        """The row without numbers."""
        return AttributionRow(variant=self.name, runtime=self.runtime, label=self.label)

    def _times(self, latency: Sequence[LatencyRow], settings: Evaluation) -> dict[str, Any]:
        """The latency in the row's own runtime, at the first batch size."""
        own = (self.name, self.runtime, settings.batches[0])
        rows = (r for r in latency if (r.variant, r.runtime, r.batch) == own and r.spinning and not r.inputs)
        row = next(rows, None)
        if row is None:
            return {}
        return {k: getattr(row, k) for k in ("ratio", "ratio_low", "ratio_high")} | {"latency_ms": row.median_ms}


@dataclass(frozen=True)
class OnnxFile(Variant):
    """A file that ONNX Runtime executes, and the module behind it."""

    name: VariantName
    path: Path
    module: nn.Module
    parameters: int | None = None
    """weights and biases, where the module has others besides"""
    same_network: Reason | None = None
    """why it is not timed, though it could be"""

    def model(self, subject: Subject) -> ModelFunction:
        with torch.inference_mode():
            like = subject.program.teacher(*subject.task.example)
        return OnnxModel(self.path, like, optimized=subject.why_not_measured is None)

    def network(self, subject: Subject) -> ModelFunction:
        return super().network(subject) or self.module

    def contender(self, inputs: tuple[Tensor, ...], feeds: Feeds, threads: int) -> Contender | None:
        return None if self.same_network else onnxruntime_contender(self.name, self.path, feeds, threads=threads)

    def costs(self, subject: Subject) -> dict[str, Any]:
        feeds = subject.task.feeds(len(subject.task.example[0]))
        return {
            "size_bytes": size_of(self.path),
            "parameters": self.parameters or count_parameters(self.module),
            "macs": attempt(lambda: count_macs(self.module, subject.task.example)),
            "integer_coverage": attempt(lambda: _coverage(self.path, feeds))
            if subject.why_not_measured is None
            else None,
        }

    def reasons(self, subject: Subject) -> dict[str, Reason]:
        reasons = dict.fromkeys(TIMES, self.same_network) if self.same_network else {}
        if subject.why_not_timed is not None:
            reasons |= dict.fromkeys(TIMES, subject.why_not_timed)
        return reasons | ({} if subject.why_not_measured is None else {"integer_coverage": subject.why_not_measured})


def _coverage(path: Path, feeds: Feeds) -> float | Failure:
    found = integer_coverage(path, feeds)
    return Failure(found.reason or "it was not counted") if found.share is None else found.share


@dataclass(frozen=True)
class TorchModule(Variant):
    """A module that another tool made of the teacher; it has no file of its own."""

    name: VariantName
    module: nn.Module
    runtime: str
    label: str | None = None

    def model(self, subject: Subject) -> ModelFunction:
        return self.module

    def contender(self, inputs: tuple[Tensor, ...], feeds: Feeds, threads: int) -> Contender | Skipped:
        return compiled_contender(self.name, self.module, inputs, threads=threads, runtime=self.runtime)

    def costs(self, subject: Subject) -> dict[str, Any]:
        return {}

    def reasons(self, subject: Subject) -> dict[str, Reason]:
        why = f"{self.runtime} makes a torch module, not a file that ONNX Runtime executes"
        return dict.fromkeys(WEIGHTS, why) | (
            {} if subject.why_not_timed is None else dict.fromkeys(TIMES, subject.why_not_timed)
        )


@dataclass(frozen=True)
class FusedStudent(Variant):
    """`student.pt2`: run here by the reference bodies of its operators, and timed on its GPU by `pqk benchmark`."""

    name: VariantName
    path: Path
    module: nn.Module
    """the INT8 graph that was fused"""
    loaded: ModelFunction
    parameters: int
    runtime: str

    def model(self, subject: Subject) -> ModelFunction:
        return self.loaded

    def contender(self, inputs: tuple[Tensor, ...], feeds: Feeds, threads: int) -> None:
        return None

    def costs(self, subject: Subject) -> dict[str, Any]:
        size, macs = self.path.stat().st_size, attempt(lambda: count_macs(self.module, subject.task.example))
        return {"size_bytes": size, "parameters": self.parameters, "macs": macs}

    def reasons(self, subject: Subject) -> dict[str, Reason]:
        why = subject.why_not_measured or "a fused student is timed on its GPU"
        return dict.fromkeys((*TIMES, "integer_coverage"), why)


@dataclass(frozen=True)
class Missing(Variant):
    """A row without numbers."""

    name: VariantName
    reason: Reason
    runtime: str = "onnxruntime"
    label: str | None = None

    def model(self, subject: Subject) -> ModelFunction:
        raise LookupError(self.reason)

    def contender(self, inputs: tuple[Tensor, ...], feeds: Feeds, threads: int) -> Skipped | None:
        return None if self.runtime == "onnxruntime" else Skipped(self.name, self.runtime, self.reason)

    def costs(self, subject: Subject) -> dict[str, Any]:
        return {}

    def reasons(self, subject: Subject) -> dict[str, Reason]:
        return dict.fromkeys(("metric", *TIMES, *WEIGHTS), self.reason)

    def judge(self, subject: Subject, latency: Sequence[LatencyRow]) -> Judged:
        return Judged(self.row().model_copy(update={"reasons": self.reasons(subject)}), None, self.reason)
