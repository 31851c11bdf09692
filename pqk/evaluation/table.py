"""The networks that have a row in the attribution table: what pqk has to beat, what led to the student, the student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import nn

from pqk.bench.baselines import (
    CALIBRATION,
    FOR_TEXTS,
    Tool,
    float_baseline,
    is_transformer,
    neural_compressor_ptq,
    why_not_quantized,
)
from pqk.core.costs import count_parameters
from pqk.core.program import Pass, Stage
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.deploy.torch_emitter import load_like
from pqk.errors import Reason
from pqk.evaluation.attempts import Failure, attempt
from pqk.evaluation.controls import CONTROLS
from pqk.evaluation.rows import FusedStudent, Missing, OnnxFile, Subject, TorchModule, Variant
from pqk.quant.fake_quant import quantizers
from pqk.report.schema import VariantName

NEURAL_COMPRESSOR = "neural-compressor"
TRITON = "triton"
FloatStep = Literal["pruned", "factorized", "pruned_distilled"]
"""what passes call the rows that they make of a float student (`Pass.row`)"""
FLOAT_STEPS: tuple[FloatStep, ...] = get_args(FloatStep)


def variants_of(subject: Subject) -> list[Variant]:
    """All rows in the order of the table, their files written; first the teacher in FP32, last the student."""
    teacher = _emitted(subject, "teacher_fp32", subject.program.teacher, "teacher")
    rows: list[Variant] = [teacher, *_quantized_teachers(subject, teacher)]
    if subject.settings.steps_between:
        rows += _float_steps(subject)
    return [*rows, *_controls(subject), _student(subject)]


def count_weights(fake_quant: nn.Module) -> int:
    """Weights and biases, without the quantizers' own scales."""
    scales = sum(p.numel() for q in quantizers(fake_quant).values() for p in q.parameters())
    return count_parameters(fake_quant) - scales


def with_optimized_teacher(variants: list[Variant], subject: Subject) -> tuple[list[Variant], list[str]]:
    """The rows with the baseline optimized by ONNX Runtime's tool for transformers, where that is the better one.

    The INT8 forms of the teacher, and other runtimes, keep the plain file, whose operators they know. The second value
    says in words what was done.
    """
    teacher, *others = variants
    assert isinstance(teacher, OnnxFile)
    if subject.why_not_timed is not None or not is_transformer(teacher.path):
        return variants, []
    path, threads = teacher.path.with_name("teacher_optimized.onnx"), subject.settings.threads
    made = attempt(lambda: float_baseline(teacher.path, path, subject.task, threads))
    better, note = (False, f"teacher FP32 is as exported: {made.reason}") if isinstance(made, Failure) else made
    if better:
        return [replace(teacher, path=path), *others], [note]
    return variants, [note]


def _emitted(
    subject: Subject,
    name: VariantName,
    module: nn.Module,
    stem: str,
    parameters: int | None = None,
    same_network: Reason | None = None,
) -> OnnxFile:
    path = subject.folder / f"{stem}.onnx"
    emit_onnx_for(module, subject.task, path)
    return OnnxFile(name, path, module, parameters, same_network)


def _emitted_or_missing(
    subject: Subject,
    name: VariantName,
    module: nn.Module,
    parameters: int | None = None,
    same_network: Reason | None = None,
) -> Variant:
    """The row of a network that is deployed for this table only."""
    made = attempt(lambda: _emitted(subject, name, module, name, parameters, same_network))
    return Missing(name, made.reason) if isinstance(made, Failure) else made


def _float_steps(subject: Subject) -> Iterator[Variant]:
    """The float students that led to the deployed one; of a student of another shape first what was given."""
    given = subject.program.given
    if given is not None:
        yield _emitted_or_missing(subject, "given", given)
    made = {p.row for p in subject.passes}
    if given is not None and not made & {"pruned", "factorized"}:
        yield _float_step(subject, "pruned_distilled", "given_distilled")
    else:
        rows = [row for row in FLOAT_STEPS if row != "factorized" or row in made]
        yield from (_float_step(subject, row, row) for row in rows)


def _float_step(subject: Subject, row: FloatStep, name: VariantName) -> Variant:
    """The float student after the last pass that says it makes this row, which is called `name` in the table."""

    def makes_it(p: Pass) -> bool:
        return p.row == row

    for before_quantization in (Stage.GRAPH, Stage.MODULE):
        try:
            program = subject.program.last(before_quantization, makes_it)
        except LookupError:
            continue
        return _emitted_or_missing(subject, name, program.student)
    verb = {"pruned": "prune", "factorized": "factorize", "pruned_distilled": "distill"}[row]
    return Missing(name, f'the recipe has no "{verb}" before it quantizes')


def _quantized_teachers(subject: Subject, teacher: OnnxFile) -> list[Variant]:
    """The teacher after post-training quantization alone, by every tool that is asked for."""
    tools, target = subject.settings.baselines, subject.program.target
    if not tools:
        return []
    if target.runtime == TRITON:
        return [Missing("teacher_ptq", "the tools that quantize after training write for CPUs")]
    names: list[Tool] = ["teacher_ptq"] if "onnxruntime" in tools else []
    if subject.task.generates:  # static ranges are found by feeds of texts, which such a file does not take alone
        names = [*FOR_TEXTS] if "onnxruntime" in tools else []
    elif is_transformer(teacher.path):
        names += ["teacher_dynamic"] if "onnxruntime" in tools else []
        names += ["teacher_optimum_static", "teacher_optimum_dynamic"] if "optimum" in tools else []
    rows = [_by_tool(subject, teacher, name) for name in names]
    return rows + ([_by_neural_compressor(subject)] if NEURAL_COMPRESSOR in tools else [])


def _by_tool(subject: Subject, teacher: OnnxFile, name: Tool) -> Variant:
    """The row of a file that a tool writes, or of why it did not."""
    path, target = subject.folder / f"{name}.onnx", subject.program.target
    made = attempt(lambda: why_not_quantized(name, teacher.path, path, subject.task, target))
    reason = made.reason if isinstance(made, Failure) else made
    return Missing(name, reason) if reason else replace(teacher, name=name, path=path)


def _by_neural_compressor(subject: Subject) -> Variant:
    """The teacher by neural-compressor's static INT8, which is a torch module and runs under torch.compile."""
    task, label = subject.task, f"teacher, INT8 by {NEURAL_COMPRESSOR}"
    calibration = task.calibration(CALIBRATION, teacher=True)
    teacher = subject.program.teacher
    made = attempt(lambda: neural_compressor_ptq(teacher, task.example, calibration, task.axes))
    graph, reason = (None, made.reason) if isinstance(made, Failure) else made
    if graph is None:
        return Missing("teacher_ptq", reason or "", NEURAL_COMPRESSOR, label)
    return TorchModule("teacher_ptq", graph, NEURAL_COMPRESSOR, label)


def _controls(subject: Subject) -> list[Variant]:
    """The student trained without what the teacher knows. The first control always has a row."""
    rows: list[Variant] = []
    parameters, first = count_weights(subject.fake_quant), CONTROLS[0]
    for control in CONTROLS:
        if control.variant not in subject.settings.controls:
            if control is first:
                rows.append(Missing(control.variant, "it needs a training of its own: --evaluation full"))
            continue
        trained = attempt(lambda c=control: c.run(subject.program, subject.task, subject.passes))  # type: ignore[misc]
        if isinstance(trained, str | Failure):
            rows.append(Missing(control.variant, trained if isinstance(trained, str) else trained.reason))
            continue
        same = None if control is first else "it is the student's network with other weights"
        rows.append(_emitted_or_missing(subject, control.variant, trained.student, parameters, same))
    return rows


def _student(subject: Subject) -> Variant:
    program, weights = subject.program, count_weights(subject.fake_quant)
    if program.target.runtime == TRITON:
        path = subject.folder / "student.pt2"
        with torch.no_grad():
            deployed = load_like(path, program.student(*subject.task.example))
        return FusedStudent("student", path, program.student, deployed, weights, TRITON)
    return OnnxFile("student", subject.folder / "model.onnx", program.student, weights)
