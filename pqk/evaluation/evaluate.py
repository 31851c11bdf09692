"""What the student is worth: parity, coverage, accuracy and latency of every step, beside the teacher.

Every network of the attribution table is emitted to ONNX, evaluated through ONNX Runtime on all evaluation samples,
and timed in turn with the teacher. What they answered is what the diagnostics are about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pqk.bench.baselines import Tool
from pqk.core.costs import count_macs, count_parameters, why_not_counted
from pqk.core.program import Pass, Program, Stage
from pqk.core.run_folder import scope_of
from pqk.data.augmentation import why_not_augmented
from pqk.deploy.torch_emitter import load_like
from pqk.evaluation.diagnostics import Judged, diagnose
from pqk.evaluation.latency_rows import ENDS, time_variants
from pqk.evaluation.profile import profile
from pqk.evaluation.rows import OnnxFile, Subject, Variant
from pqk.evaluation.settings import Evaluation
from pqk.evaluation.table import NEURAL_COMPRESSOR, TRITON, variants_of, with_optimized_teacher
from pqk.evaluation.texts import continued_texts
from pqk.knowledge.retention import divergence
from pqk.passes import Quantize
from pqk.quant.fake_quant import DynamicFakeQuant
from pqk.report.schema import (
    LEAST_AGREEMENT,
    TITLES,
    Conditions,
    Fusion,
    MetricValues,
    Parity,
    Report,
    VariantName,
)
from pqk.report.text import metric_text, percent
from pqk.report.texts import ContinuedTexts
from pqk.target.machine import machine_fingerprint, peak_memory
from pqk.task.task import Task
from pqk.verify.fused_parity import check_fused_parity
from pqk.verify.parity import check_parity

NOTHING_TRAINED = Parity(
    passed=True, layers=(), agreement=None, metric_delta=None, first_divergence=None, samples=0, mode="optimized"
)
"""the contract of a file that no pass made: there is nothing that it could differ from"""


def evaluate(
    program: Program,
    task: Task,
    passes: Sequence[Pass],
    folder: Path,
    settings: Evaluation,
    *,
    seed: int,
    tool: Tool | None = None,
) -> Report:
    """Measures a finished program.

    Args:
        program: INT8, of a run whose passes are saved.
        task: data and metric; its evaluation data is looked at here and nowhere else.
        passes: the recipe's.
        folder: what is deployed is in it, and other networks' files are written beside it.
        settings: what is measured.
        seed: the run's, for the report.
        tool: that wrote what is deployed, of the teacher; None: the program was emitted.

    Returns:
        The report. A broken parity contract is a result in it, not an error.
    """
    fake_quant = program.last(Stage.FAKE_QUANT).student
    subject = Subject(program, task, passes, folder, settings, fake_quant)
    variants = variants_of(subject)
    fusion, parity = _contracts(subject) if tool is None else (None, NOTHING_TRAINED)
    variants, optimized = with_optimized_teacher(variants, subject)
    latency, notes = time_variants(variants, subject)
    judged = [_entitled(variant.judge(subject, latency), passes, tool) for variant in variants]
    by_variant = {j.row.variant: j for j in judged if j.row.runtime != NEURAL_COMPRESSOR}
    student, teacher = by_variant["student"].row, by_variant["teacher_fp32"].row
    texts = _texts(variants, subject)
    seconds = {scope_of(r.index, r.pass_name): r.seconds for r in program.records}
    return Report(
        metric=MetricValues(
            name=task.metric.name, unit=task.metric.unit, teacher=teacher.metric, student=student.metric
        ),
        latency=tuple(latency),
        latency_reason=subject.why_not_timed,
        integer_coverage=student.integer_coverage,
        integer_coverage_reason=subject.why_not_measured or student.reasons.get("integer_coverage"),
        parity=parity,
        fusion=fusion,
        size_bytes=student.size_bytes or 0,
        parameters=student.parameters or 0,
        macs=student.macs or 0,
        seconds=seconds,
        declined=program.declined,
        machine=machine_fingerprint(),
        target=program.target.name,
        seed=seed,
        attribution=tuple(j.row for j in judged),
        conditions=_conditions(subject),
        passes=program.records,
        diagnostics=diagnose(task, by_variant, sum(seconds.values())),
        layer_times=profile(variants, subject),
        texts=texts,
        notes=(*_notes(subject, by_variant, tool), *optimized, *notes, *_otherwise_at_once(texts, subject)),
    )


def _notes(subject: Subject, judged: Mapping[VariantName, Judged], tool: Tool | None) -> Iterator[str]:
    """What the report says of data, student and teacher before it speaks of how they were measured."""
    yield from subject.task.notes
    yield from _by_tool(tool)
    yield from _unaugmented(subject.task)
    yield from _given(subject)
    if (reason := subject.task.why_not_everywhere(subject.program.student)) is not None:
        yield reason
    yield from _uncounted(subject)
    yield from _forgotten(subject.task, judged["teacher_fp32"], judged["student"])


def _texts(variants: Sequence[Variant], subject: Subject) -> ContinuedTexts | None:
    """The report's part on texts that are continued; None where the student's runtime or its task does not."""
    task, settings = subject.task, subject.settings
    files = {v.name: v.path for v in variants if isinstance(v, OnnxFile)}
    if not task.generates or not settings.texts or not {*ENDS} <= files.keys():
        return None
    timed, optimized = subject.why_not_timed is None, subject.why_not_measured is None
    teacher, student = (files[name] for name in ENDS)
    return continued_texts(
        teacher, student, task, settings.texts, threads=settings.threads, timed=timed, optimized=optimized
    )


def _otherwise_at_once(texts: ContinuedTexts | None, subject: Subject) -> Iterator[str]:
    """What the report says of a student whose ranges, and so its tokens, depend on how many are read at once."""
    kinds = {type(m) for m in subject.fake_quant.modules()}
    if texts is not None and texts.as_whole < LEAST_AGREEMENT and DynamicFakeQuant in kinds:
        yield (
            f"of the tokens that the student chose one by one, it chooses {percent(texts.as_whole)} where their text "
            'is read at once: activations = "dynamic" takes one range for all that is read together; "static" and '
            '"blockwise" take none'
        )


def _unaugmented(task: Task) -> Iterator[str]:
    """What the report says of images to train on that are the same in every epoch."""
    if task.train is not None and (reason := why_not_augmented(task.train)) is not None:
        yield reason


def _given(subject: Subject) -> Iterator[str]:
    """What the report says of a student that is not cut out of its teacher."""
    program, example = subject.program, subject.task.example
    if program.given is None:
        return
    ours, theirs = (
        f"{count_parameters(model):,} parameters, {count_macs(model, example) / 1e6:.1f} million MACs"
        for model in (program.given, program.teacher)
    )
    yield (
        f"the student is of another shape than its teacher: the passes began with a {type(program.given).__name__} of "
        f"{ours}, which was given and not cut out of the teacher ({theirs})"
    )


def _entitled(judged: Judged, passes: Sequence[Pass], tool: Tool | None) -> Judged:
    """A student that nothing trained is not called by a training."""
    trains = [i for i, p in enumerate(passes) if p.training_epochs]
    quantizes = next((i for i, p in enumerate(passes) if p.name == Quantize.name), len(passes))
    if judged.row.variant != "student" or any(i > quantizes for i in trains):
        return judged
    if trains:
        label = "student: INT8, trained in float alone"
        return replace(judged, row=judged.row.model_copy(update={"label": label}))
    label = "student: INT8, not trained" if tool is None else f"student: {TITLES[tool].removeprefix('teacher, ')}"
    return replace(judged, row=judged.row.model_copy(update={"label": label}))


def _by_tool(tool: Tool | None) -> Iterator[str]:
    """What the report says of a file that is not pqk's."""
    if tool is not None:
        yield (
            f"model.onnx is {TITLES[tool]}, as that tool wrote it: nothing that was tried is better in metric and "
            "speed. No pass made it, so there is no trained form whose numbers it could have; recipe.toml and "
            "student.safetensors are the teacher in float"
        )


def _uncounted(subject: Subject) -> Iterator[str]:
    """Notes on networks whose MACs cannot be counted."""
    for name, module in (("teacher", subject.program.teacher), ("student", subject.program.student)):
        if (reason := why_not_counted(module, subject.task.example)) is not None:
            yield f"{name}: {reason}"


def _forgotten(task: Task, teacher: Judged, student: Judged) -> Iterator[str]:
    """What the report says of data that must not be forgotten: both as deployed, on samples that nothing trained on."""
    data, old, new = task.retained_evaluation, teacher.model, student.model
    if data is None or old is None or new is None:
        return
    shown = task.teachers(data)
    said = f"how far the student is from its teacher: {divergence(task, new, data, old, shown):.4g}"
    if data.labelled:
        names = {"name": task.metric.name, "unit": task.metric.unit}
        values = MetricValues(**names, teacher=task.score(old, shown), student=task.score(new, data))
        teachers, students = (metric_text(values, value) for value in (values.teacher, values.student))
        said = f"{task.metric.name} {teachers} of the teacher, {students} of the student; {said}"
    yield f"what must not be forgotten, {data.samples} samples: {said}"


def _conditions(subject: Subject) -> Conditions:
    program, task = subject.program, subject.task
    training = {i for i, p in enumerate(subject.passes) if p.training_epochs}
    return Conditions(
        training_epochs=sum(p.training_epochs for p in subject.passes),
        training_seconds=sum(r.seconds for r in program.records if r.index in training),
        train_samples=0 if task.train is None else task.train.samples,
        validation_samples=task.validation.samples,
        evaluation_samples=task.evaluation.samples,
        peak_memory_bytes=max(peak_memory(), *(r.peak_memory_bytes for r in program.records)),
        protocol=str(subject.settings.timing),
    )


def _contracts(subject: Subject) -> tuple[Fusion | None, Parity]:
    """The fused student's part of the report, if there is one, and the parity of what is deployed."""
    program, optimized = subject.program, subject.why_not_measured is None
    assert isinstance(program.student, torch.fx.GraphModule)
    fusion = _fusion(subject)
    if program.target.runtime == TRITON:
        assert fusion is not None
        return fusion, fusion.parity
    file = subject.folder / "model.onnx"
    return fusion, check_parity(subject.fake_quant, program.student, file, subject.task, optimized=optimized)


def _fusion(subject: Subject) -> Fusion | None:
    """What `fuse` noted, and the parity of its file; None where the recipe does not fuse."""
    program, path = subject.program, subject.folder / "student.pt2"
    if program.fused is None:
        return None
    assert isinstance(program.student, torch.fx.GraphModule)
    with torch.no_grad():
        deployed = load_like(path, program.student(*subject.task.example))
    record = program.records[-1]  # `fuse` comes last: no pass takes what it leaves
    return Fusion(
        **record.details,
        size_bytes=path.stat().st_size,
        left_out=tuple(d for d in program.declined if d.pass_name == record.pass_name),
        parity=check_fused_parity(subject.fake_quant, program.student, program.fused, deployed, subject.task),
    )
