"""What a student is worth on validation data beside its teacher, with the uncertainty of few samples and noisy times.

The drop of the metric is that of the same samples: its interval is a paired bootstrap over them (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, sections 8.3 and 13.3). Where nothing differs, a bootstrap knows no uncertainty;
of n samples of which none went wrong, up to 3 / n may (Hanley and Lippman-Hand 1983, JAMA 249:1743).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pqk.bench.baselines import Tool, float_files, why_not_quantized
from pqk.bench.measure import Twins, fastest, twins_of, undisturbed_ratio
from pqk.bench.statistics import Ratio
from pqk.core.costs import count_macs
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Program
from pqk.data.data import Data
from pqk.data.structures import Outputs, first_tensor, map_tensors
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.target.target import Target
from pqk.task.task import Task

PERMUTATIONS = 20
"""of the samples' outputs, all of which a metric is better for where lower is better"""
RESAMPLES = 400
UNDEFINED = 0.05
"""share of resamples on which a metric may have no value, as where a class was not drawn"""
LEAST = 30
"""samples that decide at least about a metric that is no share, of which no rule says how many it takes"""
CERTAIN = 95.0
"""per cent, one-sided, of the drop"""
NONE_OF = 3.0
"""of n samples of which none is wrong, this over n may be"""


@dataclass(frozen=True)
class Worth:
    """What one network is worth on validation data: plain numbers, as the journal keeps them."""

    metric: float
    drop: float
    """of the metric below the teacher's, as a fraction for a share"""
    drop_high: float
    """the upper end of its one-sided 95 % interval"""
    ratio: float | None
    """times faster than the teacher in FP32; None where nothing can be timed here"""
    ratio_low: float | None
    ratio_high: float | None
    milliseconds_high: float | None
    """for one sample, by the lower end of the ratio"""
    size_bytes: int
    macs: int

    @property
    def milliseconds_low(self) -> float:
        """For one sample, by the upper end of the ratio; infinite where nothing is timed."""
        if self.milliseconds_high is None or self.ratio_low is None or self.ratio_high is None:
            return math.inf
        return self.milliseconds_high * self.ratio_low / self.ratio_high

    @property
    def speed(self) -> float:
        """What students are ordered by: the ratio, or where nothing is timed how small the file is."""
        return self.ratio if self.ratio is not None else 1e6 / self.size_bytes


class Judge:
    """Judges INT8 students of one teacher on the data that decides. Files are written into `folder`."""

    def __init__(self, teacher: nn.Module, task: Task, data: Data, folder: Path, *, timed: bool, seed: int) -> None:
        self.teacher, self.task, self.data = teacher, task, data
        self.folder, self.timed, self.seed = folder, timed, seed
        self.labelled = data.labelled

    @property
    def unit(self) -> str:
        """The metric's; where data has no labels, decisions that are the teacher's are a share."""
        return self.task.metric.unit if self.labelled else "share"

    @property
    def name(self) -> str:
        return self.task.metric.name if self.labelled else "decisions that are the teacher's"

    @cached_property
    def answers(self) -> tuple[Outputs, Any]:
        """The teacher's outputs for all validation samples, and the targets: its own decisions where there are none."""
        outputs, targets = self.task.predict(self.teacher, self.task.teachers(self.data))
        return outputs, targets if self.labelled else self.task.decision(outputs)

    @cached_property
    def samples(self) -> int:
        return len(first_tensor(self.answers[0]))

    @cached_property
    def counted(self) -> int:
        """The samples that the metric counts: those with a label that is not ignored."""
        targets = self.answers[1]
        if not isinstance(targets, Tensor) or targets.is_floating_point() or not self.labelled:
            return self.samples
        return int((targets.reshape(len(targets), -1) != self.task.ignored).any(1).sum())

    @cached_property
    def teacher_value(self) -> float:
        """The teacher's metric on validation data.

        Raises `InputError` where it is not finite, differs from call to call, is better for other samples' outputs, or
        the same whatever the outputs are.
        """
        outputs, targets = self.answers
        value, again = self.value(outputs, targets), self.value(outputs, targets)
        if not math.isfinite(value):
            raise InputError(f'contract: the metric "{self.name}" of the teacher on validation data is {value}')
        self._refuse_changing(value, again)
        rng = np.random.default_rng(0)
        orders = [torch.from_numpy(rng.permutation(self.samples)) for _ in range(PERMUTATIONS)]
        mixed = min(self.value(rows_of(outputs, order), targets) for order in orders)
        if value < mixed and not self.task.counts_classes:  # a teacher may be worse than chance
            raise InputError(
                f'contract: the metric "{self.name}" of the teacher is {value:.6g}, and at least {mixed:.6g} where its '
                "outputs are those of other samples: higher must be better; return its negative"
            )
        self._refuse_changing(value, self.value(outputs, targets))  # a running mean has seen other outputs by now
        noise = torch.Generator().manual_seed(0)
        drawn = [map_tensors(lambda t: _noise_like(t, noise), outputs) for _ in range(3)]
        if value == mixed and all(self.value(other, targets) == value for other in drawn):
            raise InputError(
                f'contract: the metric "{self.name}" is {value:.6g} whatever the outputs are, and decides nothing'
            )
        return value

    def _refuse_changing(self, value: float, again: float) -> None:
        if value != again:
            raise InputError(
                f'contract: the metric "{self.name}" of the same outputs is {value:.6g} and then {again:.6g}; one that '
                "changes from call to call decides nothing: draw nothing in it, seed what it draws, reset what it sums"
            )

    def value(self, outputs: Outputs, targets: Any) -> float:
        """The task's metric; where data has no labels, the share of decisions that are the teacher's."""
        if self.labelled:
            return float(self.task.metric.function(outputs, targets))
        return float((self.task.decision(outputs) == targets).double().mean())

    def refuse_few(self, allowed: float) -> None:
        """Raises `InputError` where a drop of at most `allowed` could not be told on so few samples."""
        if self.unit != "share" and self.counted < LEAST and math.isfinite(allowed):
            raise InputError(
                f'contract: a drop of "{self.name}" cannot be told on {self.counted} validation samples; pass '
                f"{LEAST} or more"
            )
        if self.unit == "share" and allowed < NONE_OF / self.counted:
            needed = f"{math.ceil(NONE_OF / allowed)} samples are needed" if allowed else "None are enough for no drop"
            raise InputError(
                f"contract: a drop of at most {100 * allowed:g} points cannot be told on {self.counted} validation "
                f"samples: where none of them differs, {100 * NONE_OF / self.counted:.2g} points may still be lost "
                f"(95 %). {needed}: pass more validation data, or allow more"
            )

    def worth(self, program: Program, file: Path | None = None) -> Worth:
        """What an INT8 program's deployed form is worth, or `file` in its place."""
        with self.deployed(program, file) as (path, outputs):
            drop, high = self.drop(outputs)
            ratio = low = top = slowest = None
            if self.timed:
                ratio, low, top = self.speed_up(path)
                slowest = self.teacher_ms / low
            size = path.stat().st_size
        metric, macs = self.teacher_value - drop, count_macs(program.student, self.task.example)
        return Worth(metric, drop, high, ratio, low, top, slowest, size, macs)

    def speed_up(self, path: Path) -> Ratio:
        """How many times faster a file is than the teacher in FP32, for one sample."""
        return undisturbed_ratio(self.baselines, twins_of(path), self.task.feeds(1))

    def speed_up_of(self, program: Program) -> Ratio:
        """How many times faster an INT8 program's deployed form is, whatever it answers."""
        with self._emitted(program, None) as path:
            return self.speed_up(path)

    def faster(self, program: Program, file: Path | None, *, than: Path) -> Ratio:
        """How many times faster an INT8 program's deployed form, or `file` in its place, is `than` another file."""
        with self._emitted(program, file) as path:
            return undisturbed_ratio(twins_of(than), twins_of(path), self.task.feeds(1))

    @contextmanager
    def deployed(self, program: Program, file: Path | None = None) -> Iterator[tuple[Path, Outputs]]:
        """The file of an INT8 program, or `file` in its place, and its outputs for all samples.

        What is written is removed. Where nothing can be timed, as this machine is not the target, the outputs are those
        of the INT8 graph.
        """
        with self._emitted(program, file) as path:
            model: Callable[..., Outputs] = program.student
            if self.timed:
                with torch.no_grad():
                    model = OnnxModel(path, program.student(*self.task.example))
            yield path, self.task.predict(model, self.data)[0]

    @contextmanager
    def _emitted(self, program: Program, file: Path | None) -> Iterator[Path]:
        """The file of an INT8 program, which is removed afterwards, or `file`, which is there and stays."""
        path = file or self.folder / "candidate.onnx"
        try:
            if file is None:
                emit_onnx_for(program.student, self.task, path)
            yield path
        finally:
            if file is None:
                path.unlink(missing_ok=True)

    @cached_property
    def baselines(self) -> Twins:
        """Two sessions of the teacher in FP32, as the report's table has it."""
        return twins_of(self.teacher_files[-1])

    @cached_property
    def teacher_files(self) -> tuple[Path, Path]:
        """The teacher in FP32: as exported, and what students are held against."""
        return float_files(self.teacher, self.task, self.folder)

    def by_tool(self, tool: Tool, target: Target) -> Path:
        """The file that another tool makes of the teacher without training. Raises `InputError` where there is none."""
        path = self.folder / f"{tool}.onnx"
        if not path.exists() and (reason := why_not_quantized(tool, self.teacher_files[0], path, self.task, target)):
            raise InputError(reason)
        return path

    def prepare(self) -> None:
        """Makes what every candidate is held against: the teacher's answers and, where times are, its sessions."""
        _ = self._teacher_resampled
        if self.timed:
            _ = self.teacher_ms

    @cached_property
    def teacher_macs(self) -> int:
        return count_macs(self.teacher, self.task.example)

    @cached_property
    def teacher_ms(self) -> float:
        return float(fastest(self.baselines, self.task.feeds(1), rounds=7)[0])

    def _resampled(self, outputs: Outputs) -> NDArray[np.float64]:
        """The metric on every resample, `[RESAMPLES]`, the same samples for whatever outputs."""
        rng, targets = np.random.default_rng(self.seed), self.answers[1]
        values = np.empty(RESAMPLES)
        for i in range(RESAMPLES):
            rows = torch.from_numpy(rng.integers(0, self.samples, self.samples))
            values[i] = self.value(rows_of(outputs, rows), rows_of(targets, rows))
        return values

    @cached_property
    def _teacher_resampled(self) -> NDArray[np.float64]:
        return self._resampled(self.answers[0])

    def drop(self, outputs: Outputs) -> tuple[float, float]:
        """How much the metric of `outputs` is below the teacher's, and the upper end of its one-sided interval.

        Of a share the interval is never narrower than where no sample differs: few that do, and for the better, are no
        more certain. Resamples on which the metric has no value are left out. Raises `InputError` where the metric has
        none, or has none on more than a few of them.
        """
        point = self.teacher_value - self.value(outputs, self.answers[1])
        if not math.isfinite(point):
            raise InputError(f'contract: the metric "{self.name}" of the student is {self.teacher_value - point}')
        drops = self._teacher_resampled - self._resampled(outputs)
        defined = drops[np.isfinite(drops)]
        if len(defined) < (1 - UNDEFINED) * len(drops):
            raise InputError(
                f'contract: the metric "{self.name}" has no value on {len(drops) - len(defined)} of {len(drops)} draws '
                f"from {self.samples} validation samples, so that nothing is certain of it: pass more of every kind"
            )
        high = float(np.percentile(defined, CERTAIN))
        if self.unit == "share":
            high = max(high, point + NONE_OF / self.counted)
        return point, max(point, high)


def _noise_like(t: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else t


def rows_of(values: Any, rows: Tensor) -> Any:
    """Some samples of a structure of tensors."""
    return map_tensors(lambda t: t[rows], values)
