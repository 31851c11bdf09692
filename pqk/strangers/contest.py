"""Files beside the teacher's: accuracy on evaluation data, and speed in turn with the teacher in FP32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from pqk.bench.baselines import TOOLS, float_files, why_not_quantized
from pqk.bench.measure import twins_of, undisturbed_ratio
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Pass
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import PqkError, Reason
from pqk.recipe.contract import Contract
from pqk.search.candidates import FLOAT, forms, mixed
from pqk.search.deciding import deciding
from pqk.search.runs import Runs
from pqk.target.target import Target
from pqk.task.task import Task


@dataclass(frozen=True)
class Standing:
    """What one file is worth on evaluation data."""

    name: str
    metric: float | None = None
    """the task's; None where there is no such file, as `reason` says"""
    ratio: float | None = None
    """times faster than the teacher in FP32, both in ONNX Runtime at batch 1, in turn"""
    low: float | None = None
    """lower end of the ratio's 95 % interval"""
    high: float | None = None
    reason: Reason | None = None

    def beats(self, other: Standing) -> bool:
        """Whether it is no worse in the metric, and faster beyond both intervals."""
        if None in (self.metric, self.low, other.metric, other.high):
            return False
        return self.metric >= other.metric and self.low > other.high  # type: ignore[operator]


class Contest:
    """Judges files that do what one teacher does, on evaluation data that decided nothing.

    The teacher's own FP32 file is written into `folder`; a transformer's is as ONNX Runtime's tool has it, if faster.
    """

    def __init__(self, teacher: nn.Module, task: Task, contract: Contract, folder: Path, *, rounds: int) -> None:
        self.teacher, self.folder, self.rounds = teacher, folder, rounds
        self.task = deciding(task, contract).task
        self.exported, self.file = float_files(teacher, self.task, folder)
        self.baselines = twins_of(self.file)
        with torch.no_grad():
            self.like = teacher(*self.task.example)

    @cached_property
    def teacher_metric(self) -> float:
        """The teacher's, through ONNX Runtime."""
        return self.task.score(OnnxModel(self.file, self.like), self.task.evaluation)

    def standing(self, name: str, path: Path) -> Standing:
        """What the ONNX file at `path` is worth."""
        metric = self.task.score(OnnxModel(path, self.like), self.task.evaluation)
        ratio = undisturbed_ratio(self.baselines, twins_of(path), self.task.feeds(1), rounds=self.rounds)
        return Standing(name, metric, ratio.ratio, ratio.low, ratio.high)

    def made(self, name: str, make: Callable[[Path], Reason | None]) -> Standing:
        """What the file is worth that `make` writes; what it returns or raises is why there is none."""
        path = self.folder / "contestant.onnx"
        try:
            reason = make(path)
            return self.standing(name, path) if reason is None else Standing(name, reason=reason)
        except PqkError as error:
            return Standing(name, reason=str(error).replace(str(path), path.name))  # no result names a folder
        finally:
            path.unlink(missing_ok=True)

    def post_training(self, target: Target, *, timing_layers: bool) -> list[Standing]:
        """The teacher quantized without training: by ONNX Runtime, fixed ranges and those of each run, and by pqk.

        `timing_layers`: also pqk's form in which each layer is as it is faster, which takes a while.
        """
        tools = {"ONNX Runtime, static": TOOLS[0], "ONNX Runtime, dynamic": TOOLS[1]}
        found = [
            self.made(name, partial(why_not_quantized, tool, self.exported, task=self.task, target=target))
            for name, tool in tools.items()
        ]
        for form in [*forms(self.teacher), *([mixed()] if timing_layers else [])]:
            if form.name != FLOAT:
                found.append(self.made(f"pqk, {form.name}", partial(self._write, form.passes, target)))
        return found

    def _write(self, passes: Sequence[Pass], target: Target, path: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            runs = Runs(self.teacher, self.task, target, RunContext(0), Path(place), {})
            emit_onnx_for(runs.program(passes).student, self.task, path)
