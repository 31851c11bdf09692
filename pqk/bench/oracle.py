"""The latency oracle: how long the deployed INT8 form of a float student takes in the target's runtime, here.

A student is captured, quantized after training and converted as the recipe would, emitted, and timed in turn with the
teacher in FP32, so that whatever else the machine is doing cancels out. Its weights do not matter, and layers that a
measurement of the recipe's would leave in float are not looked for.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort
import torch
from torch import fx, nn

from pqk.bench.latency.executed import executed_nodes
from pqk.bench.latency.prediction import layer_times
from pqk.bench.latency.table import LatencyTable
from pqk.bench.measure import fastest, ratio_to
from pqk.copies import copy_of
from pqk.core.onnxruntime_session import session
from pqk.core.program import Pass, Program, Stage
from pqk.core.run_context import Channels, RunContext, TimesByWidth
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.passes import Capture, Convert, Quantize
from pqk.scratch import ScratchFolder
from pqk.target.target import Target
from pqk.task.task import Task

ROUNDS = 9
"""turns in which a candidate is timed"""


class Oracle:
    """Times students beside the teacher at batch 1, in turn over `rounds`.

    `threads` of the runtime are part of what is measured.
    """

    def __init__(
        self,
        teacher: nn.Module,
        task: Task,
        target: Target,
        passes: Sequence[Pass],
        run: RunContext,
        threads: int = 2,
        rounds: int = ROUNDS,
    ):
        self.teacher, self.task, self.target, self.run = teacher, task, target, run
        self.threads, self.rounds = threads, rounds
        # The recipe's own passes from a module to integers; the default ones where it has none.
        named = {p.name: p for p in (Capture(), Quantize(), Convert(), *passes)}
        self.passes = tuple(named[p.name] for p in (Capture, Quantize, Convert))
        self.folder = ScratchFolder("oracle")
        self._session: ort.InferenceSession | None = None
        self._table: LatencyTable | None = None
        self.seconds: list[float] = []
        """what timing each MODULE student took, beside making and writing its INT8 form"""
        self.emitted: tuple[fx.GraphModule, Path] | None = None
        """the INT8 form that was written last, and its file, which the next one overwrites"""
        self._last: tuple[nn.Module, tuple[str, ...], ort.InferenceSession] | None = None

    @property
    def teacher_path(self) -> Path:
        """Where the teacher's FP32 file is, once something was timed."""
        return Path(self.folder.name) / "teacher.onnx"

    def baseline(self, timed: str = "") -> float:
        """Milliseconds of the teacher in FP32, measured once in a run and journaled: all ratios are to it.

        On the example, or on the inputs that the task has under the name `timed`.
        """
        key = f"oracle/teacher_ms/{timed}" if timed else "oracle/teacher_ms"
        return float(self.run.journal.decide(key, lambda: self._fastest(self._teacher(), timed=timed)[0]))

    def latency(self, student: nn.Module, timed: str = "") -> float:
        """Milliseconds of the INT8 form of a MODULE student: the baseline over the ratio measured in turn."""
        candidate = session(self.emit(student), threads=self.threads)
        baseline, began = self._teacher(), time.perf_counter()
        teacher, student_ms = self._fastest(baseline, candidate, timed=timed)
        self.seconds.append(time.perf_counter() - began)
        return self.baseline(timed) * student_ms / teacher

    def float_gain(self, student: nn.Module, floats: tuple[str, ...], layer: str) -> tuple[float, float, float]:
        """How many times faster the INT8 form of a GRAPH student is with `layer` in float beside `floats`.

        In turn, with the ends of the 95 % interval.
        """
        if self._last is None or self._last[0] is not student or self._last[1] != floats:
            integer = session(self.emit(student, Stage.GRAPH, floats), threads=self.threads)
            self._last = student, floats, integer
        candidate = session(self.emit(student, Stage.GRAPH, (*floats, layer)), threads=self.threads)
        ratio, low, high = ratio_to(self._last[2], candidate, self.task.feeds(1))
        return ratio, low, high

    def layer_times(self, student: nn.Module, channels: Channels) -> TimesByWidth:
        """What the layers of the INT8 form of a MODULE student take with other channels, by this machine's table."""
        if self._table is None:
            self._table = LatencyTable(self.threads)
        nodes = executed_nodes(self.emit(student), self.task.feeds(1), threads=self.threads)
        return layer_times(self._table, nodes, channels)

    def emit(self, student: nn.Module, stage: Stage = Stage.MODULE, floats: tuple[str, ...] = ()) -> Path:
        """The ONNX file of the INT8 form of a student in `stage`, with `floats` left in float beside the recipe's."""
        program = Program(self.teacher, copy_of(student, "student").eval(), stage, self.target, RunContext())
        with torch.random.fork_rng(devices=[]):
            for p in self.passes:
                timed = p.timed_form(floats)
                if timed is not None and program.stage in timed.consumes:
                    after = timed.apply(program, self.task)
                    program = dataclasses.replace(after, stage=timed.result_stage(program.stage))
        path = Path(self.folder.name) / "candidate.onnx"
        assert isinstance(program.student, fx.GraphModule)
        self.emitted = None
        emit_onnx_for(program.student, self.task, path)
        self.emitted = program.student, path
        return path

    def _fastest(self, *sessions: ort.InferenceSession, timed: str) -> list[float]:
        return fastest(sessions, self.task.feeds(1, timed), rounds=self.rounds)

    def _teacher(self) -> ort.InferenceSession:
        if self._session is None:
            if not self.teacher_path.exists():
                emit_onnx_for(self.teacher, self.task, self.teacher_path)
            self._session = session(self.teacher_path, threads=self.threads)
        return self._session
