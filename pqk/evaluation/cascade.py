"""A cascade on evaluation data: its metric as a whole, who answers how much, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pqk.bench.contenders import timed
from pqk.bench.measure import THREADS, WARM
from pqk.core.onnxruntime_session import OnnxModel, session
from pqk.data.structures import tensors
from pqk.deploy.cascade import CASCADE_TEACHER, Cascade, Routing
from pqk.report.cascade import CascadeResult
from pqk.task.task import Task

TIMED = 400
"""evaluation samples that are timed, one by one, at most"""


def measure_cascade(
    folder: Path,
    model: str,
    task: Task,
    routing: Routing,
    routed_validation: float,
    *,
    timed: bool,
    optimized: bool = True,
) -> CascadeResult:
    """Judges the cascade of the file `model` in `folder` and of the teacher's beside it, on evaluation data.

    Args:
        folder: holds both files.
        model: the student's file.
        task: its evaluation data, and metric where that is labelled.
        routing: who answers what.
        routed_validation: for the report.
        timed: whether its times are taken, which only the target tells.
        optimized: whether this machine is the target; else both files are run by the ONNX operators' own arithmetic,
            without ONNX Runtime's optimizations, as the table's rows are.

    Returns:
        The part of the report; a sample's time is that of its own way through the cascade.
    """
    files = [folder / model, folder / CASCADE_TEACHER]
    student, teacher = (_logits(path, task, optimized) for path in files)
    sure = torch.from_numpy(routing.sure(student[0].numpy()))
    targets = student[1]

    def metric(outputs: Tensor) -> float | None:
        return float(task.metric.function(outputs, targets)) if task.evaluation.labelled else None

    return CascadeResult(
        temperature=routing.temperature,
        threshold=routing.threshold,
        routed_validation=routed_validation,
        routed=float((~sure).double().mean()),
        metric=metric(torch.where(sure[:, None], student[0], teacher[0])),
        student_metric=metric(student[0]),
        teacher_metric=metric(teacher[0]),
        size_bytes=sum(path.stat().st_size for path in files),
        **(_times(files, task, routing, float((~sure).double().mean())) if timed else {}),
    )


def _logits(path: Path, task: Task, optimized: bool) -> tuple[Tensor, object]:
    outputs, targets = task.predict(OnnxModel(path, task.example[0], optimized=optimized), task.evaluation)
    return tensors(outputs)[0], targets


def _times(files: list[Path], task: Task, routing: Routing, routed: float) -> dict[str, Any]:
    """Milliseconds of student, teacher and cascade, each sample by all three in turn."""
    runs = [session(path, threads=THREADS) for path in files]
    student, teacher = (lambda feeds, run=run: run.run(None, feeds) for run in runs)
    contenders: list[Callable[..., object]] = [student, teacher, Cascade(student, teacher, routing)]
    samples = list(_samples(task))
    for feeds in samples[:WARM]:
        for contender in contenders:
            contender(feeds)
    times = np.array([[timed(partial(contender, feeds)) for contender in contenders] for feeds in samples])
    student_ms, teacher_ms = (float(np.median(times[:, i])) for i in (0, 1))
    mean = student_ms + routed * teacher_ms
    p95, p99 = (float(p) for p in np.percentile(times[:, 2], [95, 99]))
    return {
        "mean_ms": mean, "p95_ms": p95, "p99_ms": p99, "student_ms": student_ms, "teacher_ms": teacher_ms,
        "ratio": teacher_ms / mean, "timed_samples": len(samples),
    }  # fmt: skip


def _samples(task: Task) -> Iterator[dict[str, np.ndarray]]:
    """The first evaluation samples, each by itself."""
    left = TIMED
    for batch in task.evaluation.batches():
        for i in range(min(left, len(batch.inputs[0]))):
            rows = (t[i : i + 1].contiguous().numpy() for t in batch.inputs)
            yield dict(zip(task.input_names, rows, strict=True))
        left -= len(batch.inputs[0])
        if left <= 0:
            return
