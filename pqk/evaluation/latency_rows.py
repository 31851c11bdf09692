"""Times the networks of the table in turn with the teacher: in ONNX Runtime, elsewhere, and on other inputs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pqk.bench.contenders import (
    Contender,
    Feeds,
    Skipped,
    compiled_contender,
    onnxruntime_contender,
    openvino_contender,
    torch_contender,
)
from pqk.bench.measure import measure
from pqk.core.modes import fused_layers
from pqk.evaluation.rows import OnnxFile, Subject, Variant
from pqk.report.schema import LatencyRow, VariantName

ENDS: tuple[VariantName, ...] = ("teacher_fp32", "student")
"""whom a user decides between: these two are also timed without spinning threads and on other inputs"""


def time_variants(variants: Sequence[Variant], subject: Subject) -> tuple[list[LatencyRow], list[str]]:
    """Latency rows of all networks that can be timed here, and notes on what was left out.

    At every batch size ONNX Runtime's files are measured in turn; at the first one other runtimes as well.
    """
    if subject.why_not_timed is not None:
        return [], []
    with fused_layers(True):  # as torch runs for its users
        return _time_variants(variants, subject)


def _time_variants(variants: Sequence[Variant], subject: Subject) -> tuple[list[LatencyRow], list[str]]:
    settings, task = subject.settings, subject.task
    rows: list[LatencyRow] = []
    notes: list[str] = []
    if any(name is not None for axes in task.axes for name in axes[1:]):
        shapes = zip(task.input_names, task.sized(1), strict=True)
        notes.append(f"timed, unless said otherwise, on {', '.join(f'{n} {list(x.shape)}' for n, x in shapes)}")
    files = [v for v in variants if isinstance(v, OnnxFile)]
    for batch in settings.batches:
        inputs, feeds = task.sized(batch), task.feeds(batch)
        candidates: list[Contender | Skipped | None] = [v.contender(inputs, feeds, settings.threads) for v in files]
        if batch == settings.batches[0]:
            others = [v for v in variants if not isinstance(v, OnnxFile)]
            candidates += [v.contender(inputs, feeds, settings.threads) for v in others]
            candidates += elsewhere(subject, inputs, feeds)
        contenders = [c for c in candidates if isinstance(c, Contender)]
        skipped = [c for c in candidates if isinstance(c, Skipped)]
        notes += [f"{s.variant} in {s.runtime} was not measured: {s.reason}" for s in skipped]
        rows += measure(contenders, contenders[0], settings.timing)
    ends = {v.name: v.path for v in files if v.name in ENDS}
    return rows + _without_spinning(ends, subject) + _other_sizes(ends, subject), notes


def elsewhere(subject: Subject, inputs: tuple[Tensor, ...], feeds: Feeds) -> list[Contender | Skipped]:
    """Teacher and student in the other runtimes, each with a ratio of its own to the same baseline."""
    settings, teacher = subject.settings, subject.program.teacher
    contenders: list[Contender | Skipped] = []
    if "torch" in settings.runtimes:
        contenders.append(torch_contender("teacher_fp32", teacher, inputs, threads=settings.threads))
    if "torch.compile" in settings.runtimes:
        contenders.append(compiled_contender("teacher_fp32", teacher, inputs, threads=settings.threads))
    if "openvino" in settings.runtimes:
        # OpenVINO does not know what ONNX Runtime's tool fuses, so it gets the plain file.
        for name, stem in zip(ENDS, ("teacher", "model"), strict=True):
            path = subject.folder / f"{stem}.onnx"
            contenders.append(openvino_contender(name, path, feeds, threads=settings.threads))
    return contenders


def _without_spinning(ends: dict[VariantName, Path], subject: Subject) -> list[LatencyRow]:
    settings = subject.settings
    feeds = subject.task.feeds(settings.batches[0])
    contenders = [
        onnxruntime_contender(name, ends[name], feeds, threads=settings.threads, spinning=False) for name in ENDS
    ]
    return measure(contenders, contenders[0], settings.timing)


def _other_sizes(ends: dict[VariantName, Path], subject: Subject) -> list[LatencyRow]:
    """Teacher and student in ONNX Runtime on the task's other inputs."""
    rows: list[LatencyRow] = []
    settings, task = subject.settings, subject.task
    for name, batch in itertools.product(task.timed, settings.batches):
        feeds = task.feeds(batch, name)
        contenders = [
            onnxruntime_contender(v, path, feeds, threads=settings.threads, inputs=name) for v, path in ends.items()
        ]
        rows += measure(contenders, contenders[0], settings.timing)
    return rows
