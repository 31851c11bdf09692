"""Times the networks of the table in turn with the teacher: in ONNX Runtime, elsewhere, and on other inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
from pqk.data.structures import Inputs
from pqk.evaluation.agreement import Agreement, agreement, batches_like
from pqk.evaluation.attempts import Failure, attempt
from pqk.evaluation.rows import OnnxFile, Subject, Variant
from pqk.report.schema import LEAST_AGREEMENT, TITLES, LatencyRow, VariantName
from pqk.report.text import percent
from pqk.task.task import Task
from pqk.verify.verdict import ModelFunction

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
        notes.append(f"timed, unless said otherwise, on {_timed_on(task)}")
    networks = {v.name: network for v in variants if (network := v.network(subject)) is not None}
    files = [v for v in variants if isinstance(v, OnnxFile)]
    for batch in settings.batches:
        inputs, feeds = task.sized(batch), task.feeds(batch)
        candidates = [_contender(v, inputs, feeds, settings.threads) for v in files]
        if batch == settings.batches[0]:
            others = [v for v in variants if not isinstance(v, OnnxFile)]
            candidates += [_contender(v, inputs, feeds, settings.threads) for v in others]
            candidates += elsewhere(subject, inputs, feeds)
        notes += [
            f"{c.variant} in {c.runtime} was not measured: {c.reason}" for c in candidates if isinstance(c, Skipped)
        ]
        rows += _timed([c for c in candidates if isinstance(c, Contender)], networks, subject, inputs, notes)
    ends = {v.name: v.path for v in files if v.name in ENDS}
    rows += _without_spinning(ends, networks, subject, notes) + _other_sizes(ends, networks, subject, notes)
    return rows, notes + [_warning(row) for row in rows if row.decides_otherwise]


def _timed_on(task: Task) -> str:
    if task.generates:
        return f"one token after {task.example[0].shape[1] - 1} that are kept"
    return ", ".join(f"{name} {list(x.shape)}" for name, x in zip(task.input_names, task.sized(1), strict=True))


def _timed(
    contenders: Sequence[Contender],
    networks: Mapping[VariantName, ModelFunction],
    subject: Subject,
    inputs: Inputs,
    notes: list[str],
) -> list[LatencyRow]:
    """Rows of contenders that were asked before they are timed; who cannot answer is left out, with a note."""
    task, asked = subject.task, list[tuple[Contender, Agreement | None]]()
    for contender in contenders:
        data = task.teachers(task.evaluation) if contender.variant.startswith("teacher_") else task.evaluation
        network = networks[contender.variant]
        found = attempt(lambda c=contender, n=network, d=data: agreement(c, n, task, batches_like(inputs, d)))  # type: ignore[misc]
        if isinstance(found, Failure):
            notes.append(f"{contender.variant} in {contender.runtime} was not measured: {found.reason}")
        else:
            asked.append((contender, found))
    if not asked or asked[0][0] is not contenders[0]:
        return []  # without the baseline no time says anything
    rows = measure([contender for contender, _ in asked], asked[0][0], subject.settings.timing)
    return [
        row if found is None else row.model_copy(update={"agreement": found[0], "samples": found[1]})
        for row, (_, found) in zip(rows, asked, strict=True)
    ]


def _warning(row: LatencyRow) -> str:
    return (
        f"{TITLES[row.variant]} in {row.runtime}, batch {row.batch}: {percent(row.agreement)} of {row.samples} samples "
        f"are decided as by the network itself, and the contract asks for {percent(LEAST_AGREEMENT)}: its time is that "
        "of other answers"
    )


def _contender(variant: Variant, inputs: Inputs, feeds: Feeds, threads: int) -> Contender | Skipped | None:
    """Who is timed for a row, or why nobody is."""
    made = attempt(lambda: variant.contender(inputs, feeds, threads))
    return Skipped(variant.name, variant.runtime, made.reason) if isinstance(made, Failure) else made


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


def _without_spinning(
    ends: dict[VariantName, Path], networks: Mapping[VariantName, ModelFunction], subject: Subject, notes: list[str]
) -> list[LatencyRow]:
    settings, task = subject.settings, subject.task
    feeds = task.feeds(settings.batches[0])
    contenders = [
        onnxruntime_contender(name, ends[name], feeds, threads=settings.threads, spinning=False) for name in ENDS
    ]
    return _timed(contenders, networks, subject, task.sized(settings.batches[0]), notes)


def _other_sizes(
    ends: dict[VariantName, Path], networks: Mapping[VariantName, ModelFunction], subject: Subject, notes: list[str]
) -> list[LatencyRow]:
    """Teacher and student in ONNX Runtime on the task's other inputs."""
    rows: list[LatencyRow] = []
    settings, task = subject.settings, subject.task
    for name, batch in itertools.product(task.timed, settings.batches):
        feeds = task.feeds(batch, name)
        contenders = [
            onnxruntime_contender(v, path, feeds, threads=settings.threads, inputs=name) for v, path in ends.items()
        ]
        rows += _timed(contenders, networks, subject, task.sized(batch, name), notes)
    return rows
