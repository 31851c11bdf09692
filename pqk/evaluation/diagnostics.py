"""Whether distillation worked, for the report: `answer_statistics.py` on what teacher, student and controls say.

All of it is about classifications, logits [B, C], and next tokens: of another task every part is null with its reason,
except when the compile time has paid. The student is what is deployed; nothing here trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from pqk.data.data import Batch, Data
from pqk.data.structures import Inputs, Outputs, concatenate, map_tensors, tensors
from pqk.evaluation.answer_statistics import (
    accuracy_by_class,
    break_even,
    calibration,
    control_row,
    corruption_row,
    corruption_warning,
    fidelity,
    negative_transfer,
    teacher_health,
)
from pqk.evaluation.attempts import Failure, attempt
from pqk.evaluation.corruptions import CORRUPTIONS
from pqk.evaluation.token_statistics import SaidTokens, token_diagnostics, tokens_of
from pqk.report.diagnostics import (
    BreakEven,
    Calibration,
    CapacityGap,
    ControlRow,
    ControlVariant,
    Diagnostics,
    Interval,
    Robustness,
    TeacherHealth,
    TokenDiagnostics,
)
from pqk.report.schema import AttributionRow, VariantName
from pqk.task.calibration import best_temperature
from pqk.task.task import Task
from pqk.verify.verdict import ModelFunction

SAMPLES = 2000
"""most evaluation samples that are corrupted, and validation samples that a temperature is found on"""
LOGITS = 2**24
"""most logits of a network that are kept: all evaluation samples, but of thousands of classes not as many"""
T = TypeVar("T")
NO_LABELS = "the evaluation data has no labels"


@dataclass(frozen=True)
class Answers:
    """What a network says of evaluation samples, spread evenly: logits [N, C], labels int64 [N]."""

    logits: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class Judged:
    """A row of the attribution table, and what there is behind it for a diagnosis."""

    row: AttributionRow
    model: ModelFunction | None = None
    """what is deployed"""
    answers: Answers | SaidTokens | str = "it was not evaluated"
    """on the evaluation data, or why there are none"""


def answers(task: Task, outputs: Outputs, targets: Any) -> Answers | SaidTokens | str:
    """The logits among a network's outputs of all evaluation samples, or its tokens; or why it is about neither."""
    if (tokens := tokens_of(outputs, targets)) is not None:
        return tokens
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        shapes = ", ".join(str(["B", *t.shape[1:]]).replace("'", "") for t in tensors(outputs))
        return f"diagnostics are about logits [B, C] of classes; the model's outputs are {shapes}"
    if not task.decides_by_argmax and not task.learns_classes:
        return "the task is no classification: its decision is not argmax, and its loss not cross-entropy"
    if targets is not None:
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape[:1] or targets.is_floating_point():
            return "the targets are not one class label a sample"
        targets = targets.long()
        if not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]:
            return f"the labels run from {int(targets.min())} to {int(targets.max())}, of {outputs.shape[1]} classes"
    if not bool(outputs.isfinite().all()):
        return "some logits are NaN or infinite"
    chosen = spread(len(outputs), max(1, LOGITS // outputs.shape[1]))
    return Answers(outputs[chosen].float(), None if targets is None else targets[chosen])


def diagnose(task: Task, judged: Mapping[VariantName, Judged], seconds: float) -> Diagnostics:
    """The part `diagnostics` of a report; `seconds` is what the passes took."""
    teacher, student = judged["teacher_fp32"], judged["student"]
    paid = _paid(teacher.row, student.row, seconds)
    parts: dict[str, Any] = {"break_even": paid}
    for network in (student, teacher):
        if isinstance(network.answers, str):
            parts |= dict.fromkeys(DISTILLATION, network.answers)
    if isinstance(teacher.answers, SaidTokens) and isinstance(student.answers, SaidTokens):
        parts["tokens"] = _of_tokens(judged, teacher.answers, student.answers)
    if isinstance(teacher.answers, Answers) and isinstance(student.answers, Answers):
        parts |= _distilled(task, judged, teacher, student, teacher.answers, student.answers)
    reasons = {name: part for name, part in parts.items() if isinstance(part, str)}
    found = Diagnostics(**{name: part for name, part in parts.items() if not isinstance(part, str)}, reasons=reasons)
    return found.model_copy(update={"warnings": tuple(_warnings(found))})


DISTILLATION = (
    "teacher", "fidelity", "accuracy_by_class", "calibration", "negative_transfer", "robustness", "capacity_gap",
)  # fmt: skip


def _distilled(
    task: Task, judged: Mapping[VariantName, Judged], teacher: Judged, student: Judged, t: Answers, s: Answers
) -> dict[str, Any]:
    """Every part that looks at logits, or why it is not there."""
    assert teacher.model is not None and student.model is not None
    asked, answering = teacher.model, student.model
    parts: dict[str, Any] = {"samples": len(s.logits)}
    parts["fidelity"] = part(lambda: fidelity(s.logits, t.logits, s.labels))
    if (labels := s.labels) is None:
        reasons = dict.fromkeys(DISTILLATION, NO_LABELS)
        return reasons | parts | {"teacher": part(lambda: teacher_health(t.logits))}
    alone = judged["student_no_kd"].answers
    control = alone.logits if isinstance(alone, Answers) else None
    missing = alone if isinstance(alone, str) else None
    rows = part(lambda: tuple(_controls(judged, s.logits, labels)))
    gains = () if isinstance(rows, str) else rows
    gain = next((row.difference for row in gains if row.variant == "student_no_kd"), None)

    def health() -> TeacherHealth:
        shown = task.teachers(task.validation)
        return teacher_health(t.logits, _calibrated(task, asked, shown, t.logits, labels))

    return parts | {
        "teacher": part(health),
        "accuracy_by_class": part(lambda: accuracy_by_class(s.logits, t.logits, labels)),
        "calibration": part(lambda: _calibrated(task, answering, task.validation, s.logits, labels)),
        "negative_transfer": part(lambda: negative_transfer(s.logits, t.logits, labels, control, missing)),
        "robustness": part(lambda: robustness(task, asked, answering)),
        "controls": rows,
        "capacity_gap": missing if gain is None else _gap(gain, teacher.row, student.row),
    }


def _of_tokens(
    judged: Mapping[VariantName, Judged], teacher: SaidTokens, student: SaidTokens
) -> TokenDiagnostics | str:
    said = {name: judged[name].answers for name in get_args(ControlVariant) if name in judged}
    controls = {name: found for name, found in said.items() if isinstance(found, SaidTokens)}
    missing = found if isinstance(found := judged["student_no_kd"].answers, str) else None
    return part(lambda: token_diagnostics(teacher, student, controls, missing))


def part(what: Callable[[], T]) -> T | str:
    """A part of the diagnostics, or why it cannot be computed."""
    found = attempt(what)
    return found.reason if isinstance(found, Failure) else found


def _controls(judged: Mapping[VariantName, Judged], student: Tensor, labels: Tensor) -> Iterator[ControlRow]:
    for variant in get_args(ControlVariant):
        if variant in judged and isinstance(found := judged[variant].answers, Answers):
            yield control_row(student, found.logits, labels, variant)


def _gap(gain: Interval, teacher: AttributionRow, student: AttributionRow) -> CapacityGap | str:
    if teacher.parameters is None or student.parameters is None:
        return "the networks' parameters were not counted"
    return CapacityGap(gain=gain, teacher_parameters=teacher.parameters, student_parameters=student.parameters)


def _calibrated(task: Task, model: ModelFunction, validation: Data, logits: Tensor, labels: Tensor) -> Calibration:
    """Calibration on evaluation data, with the temperature that is best on validation data."""
    said, given = zip(*((model(*b.inputs), b.targets) for b in sampled(validation, SAMPLES)), strict=True)
    found = answers(task, concatenate(list(said)), concatenate(list(given)))
    if not isinstance(found, Answers) or found.labels is None:
        why = found if isinstance(found, str) else "it has no labels"
        return calibration(logits, labels, None, f"validation data: {why}")
    temperature = best_temperature(found.logits, found.labels)
    reason = f"all {len(found.labels)} validation samples are right: no temperature is best on them"
    return calibration(logits, labels, temperature, reason)


def robustness(task: Task, teacher: ModelFunction, student: ModelFunction) -> Robustness | str:
    """Both networks on corrupted evaluation samples, or why no corruption applies."""
    left_out = {c.name: reason for c in CORRUPTIONS if (reason := c.why_not_corrupted(task)) is not None}
    applied = [c for c in CORRUPTIONS if c.name not in left_out]
    if not applied:
        return "; ".join(sorted(set(left_out.values())))
    generator, clean = torch.Generator().manual_seed(0), "clean"
    right: dict[tuple[str, ModelFunction], list[Tensor]] = {}

    def spoiled(inputs: Inputs) -> dict[str, Inputs]:
        return {clean: inputs} | {c.name: c(task, inputs, generator) for c in applied}

    for batch in sampled(task.evaluation, SAMPLES):
        seen = spoiled(batch.inputs)
        taught = seen if batch.teacher_inputs is None else spoiled(batch.teacher_inputs)
        for model, views in ((teacher, taught), (student, seen)):
            for name, inputs in views.items():
                right.setdefault((name, model), []).append(model(*inputs).argmax(1) == batch.targets)
    flags = {key: torch.cat(found) for key, found in right.items()}
    accuracies = [float(flags[clean, m].double().mean()) for m in (teacher, student)]

    def pair(name: str, model: ModelFunction) -> tuple[Tensor, Tensor]:
        return flags[clean, model], flags[name, model]

    return Robustness(
        samples=len(flags[clean, teacher]),
        teacher=accuracies[0],
        student=accuracies[1],
        rows=tuple(corruption_row(c.name, c.what, pair(c.name, teacher), pair(c.name, student)) for c in applied),
        left_out=left_out,
    )


def _paid(teacher: AttributionRow, student: AttributionRow, seconds: float) -> BreakEven | str:
    """When the compile has paid, in queries of the measured latencies."""
    if teacher.latency_ms is None or student.latency_ms is None:
        return student.reasons.get("latency_ms", "latencies were not measured")
    if student.ratio_low is None or student.ratio_low <= 1:
        return "the student is not significantly faster, so the compile never pays"
    paid = break_even(seconds, teacher.latency_ms, student.latency_ms)
    return paid or "the student is not faster, so the compile never pays"


def _warnings(found: Diagnostics) -> Iterator[str]:
    said = [found.teacher and found.teacher.warning, found.negative_transfer and found.negative_transfer.warning]
    said += [row.warning for row in found.controls]
    if found.tokens is not None:
        said += [found.tokens.negative_transfer.warning, *(row.warning for row in found.tokens.controls)]
    said += [corruption_warning(row) for row in found.robustness.rows] if found.robustness else []
    return (text for text in said if text)


def spread(samples: int, most: int) -> Tensor:
    """Positions of at most `most` samples, spread evenly: stored data may be sorted by class. int64 [N]."""
    count = min(samples, most)
    return torch.arange(count) * samples // max(1, count)


@torch.inference_mode()
def sampled(data: Data, most: int) -> Iterator[Batch]:
    """At most `most` samples, spread evenly over all batches."""
    chosen, seen = torch.zeros(data.samples, dtype=torch.bool), 0
    chosen[spread(data.samples, most)] = True
    for batch in data.batches():
        index = chosen[seen : seen + len(batch.inputs[0])].nonzero()[:, 0]
        seen += len(batch.inputs[0])
        if len(index):
            yield map_tensors(itemgetter(index), batch)
