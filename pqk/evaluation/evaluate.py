"""What the student is worth: parity, coverage, accuracy and latency of every step, beside the teacher.

Every network of the attribution table is emitted to ONNX, evaluated through ONNX Runtime on all evaluation samples,
and timed in turn with the teacher. What they answered is what the diagnostics are about.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from pqk.bench.contenders import (
    Contender,
    Skipped,
    compiled_contender,
    onnxruntime_contender,
    openvino_contender,
    torch_contender,
)
from pqk.bench.protocol import measure, protocol
from pqk.core.costs import count_macs, count_parameters
from pqk.core.pipeline import load
from pqk.core.program import Declined, Pass, Program, Stage
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.deploy.onnxruntime_session import OnnxModel
from pqk.deploy.torch_emitter import load_student
from pqk.evaluation.controls import CONTROLS
from pqk.evaluation.diagnostics import Judged, answers, diagnose
from pqk.evaluation.variants import NEURAL_COMPRESSOR, TRITON, Network, optimize_teacher, quantized_teachers
from pqk.passes import REWRITES, Distill, Fuse, Prune
from pqk.quant.fake_quant import quantizers
from pqk.report.diagnostics import ControlVariant
from pqk.report.schema import (
    AttributionRow,
    Conditions,
    DeclinedRow,
    Fusion,
    LatencyRow,
    MetricValues,
    Parity,
    PassRecord,
    Report,
    VariantName,
)
from pqk.target.machine import machine_fingerprint, peak_memory
from pqk.task.metrics import predict
from pqk.task.task import Task
from pqk.training.trainer import Training
from pqk.verify.contract import ModelFunction
from pqk.verify.coverage import integer_coverage
from pqk.verify.fused_parity import check_fused_parity
from pqk.verify.parity import check_parity

THREADS = 2
THROUGHPUT_BATCH = 32
DIAGNOSED = ("teacher_fp32", "student", *get_args(ControlVariant))
"""networks whose answers are kept"""


def evaluate(
    program: Program, task: Task, passes: Sequence[Pass], folder: Path, attribution: str, *, seed: int
) -> Report:
    """The report of a finished INT8 program; what it deploys is in `folder`, other files are written beside it."""
    here = program.target.why_not_measured()
    fake_quant = _saved(program, task, passes, Stage.FAKE_QUANT).student
    networks = _networks(program, fake_quant, task, passes, folder, attribution)
    fusion, parity = _contracts(program, fake_quant, task, folder, here)
    optimized = optimize_teacher(networks, task, here, THREADS)
    latency, notes = _latency(networks, program, task, here)
    judged = [_judge(n, program, task, latency, here) for n in networks]
    by_variant = {j.row.variant: j for j in judged if j.row.runtime != NEURAL_COMPRESSOR}
    student, teacher = by_variant["student"].row, by_variant["teacher_fp32"].row
    seconds = {f"{r.index:02d}-{r.pass_name}": r.seconds for r in program.records}
    return Report(
        metric=MetricValues(
            name=task.metric.name, unit=task.metric.unit, teacher=teacher.metric, student=student.metric
        ),
        latency=tuple(latency),
        latency_reason=here,
        integer_coverage=student.integer_coverage,
        integer_coverage_reason=here,
        parity=parity,
        fusion=fusion,
        size_bytes=student.size_bytes or 0,
        parameters=student.parameters or 0,
        macs=student.macs or 0,
        seconds=seconds,
        declined=_declined(program.declined),
        machine=machine_fingerprint(),
        target=program.target.name,
        seed=seed,
        attribution=tuple(j.row for j in judged),
        conditions=_conditions(program, task, passes),
        passes=tuple(PassRecord(**dataclasses.asdict(r)) for r in program.records),
        diagnostics=diagnose(task, by_variant, sum(seconds.values())),
        notes=(*task.notes, *optimized, *notes),
    )


def _conditions(program: Program, task: Task, passes: Sequence[Pass]) -> Conditions:
    training = {i: p for i, p in enumerate(passes) if isinstance(p, Training)}
    return Conditions(
        training_epochs=sum(p.epochs for p in training.values()),
        training_seconds=sum(r.seconds for r in program.records if r.index in training),
        train_samples=0 if task.train is None else task.train.samples,
        validation_samples=task.validation.samples,
        evaluation_samples=task.evaluation.samples,
        peak_memory_bytes=max(peak_memory(), *(r.peak_memory_bytes for r in program.records)),
        protocol=protocol(),
    )


def _declined(entries: Sequence[Declined]) -> tuple[DeclinedRow, ...]:
    return tuple(DeclinedRow(pass_name=d.pass_name, layer=d.layer, reason=d.reason) for d in entries)


def _contracts(
    program: Program, fake_quant: nn.Module, task: Task, folder: Path, here: str | None
) -> tuple[Fusion | None, Parity]:
    """The fused student's part of the report, if there is one, and the parity of what is deployed."""
    assert isinstance(program.student, torch.fx.GraphModule)
    fusion = _fusion(program, fake_quant, task, folder / "student.pt2")
    if program.target.runtime == TRITON:
        assert fusion is not None
        return fusion, fusion.parity
    return fusion, check_parity(fake_quant, program.student, folder / "model.onnx", task, optimized=here is None)


def _fusion(program: Program, fake_quant: nn.Module, task: Task, path: Path) -> Fusion | None:
    """What `fuse` noted, and the parity of its file; None where the recipe does not fuse."""
    if program.fused is None:
        return None
    assert isinstance(program.student, torch.fx.GraphModule)
    noted = next(r.details for r in reversed(program.records) if r.pass_name == Fuse.name)
    left = [d for d in program.declined if d.pass_name == Fuse.name]
    return Fusion(
        **noted,
        size_bytes=path.stat().st_size,
        left_out=_declined(left),
        parity=check_fused_parity(fake_quant, program.student, program.fused, load_student(path), task),
    )


def _saved(
    program: Program, task: Task, passes: Sequence[Pass], stage: Stage, kind: type[Pass] | None = None
) -> Program:
    """The last saved program in `stage`, after a pass of `kind` where one is given."""
    assert program.run.folder is not None
    for record in reversed(program.records):
        if record.stage == str(stage) and (kind is None or isinstance(passes[record.index], kind)):
            return load(program, task, program.run.folder / f"{record.index:02d}-{record.pass_name}", REWRITES)
    raise LookupError(f"no saved pass in stage {stage}")


def _networks(
    program: Program, fake_quant: nn.Module, task: Task, passes: Sequence[Pass], folder: Path, attribution: str
) -> list[Network]:
    def emit(variant: VariantName, module: nn.Module, name: str) -> Network:
        path = folder / f"{name}.onnx"
        emit_onnx(module, task.example, path, task.input_names, task.output_names, task.axes)
        return Network(variant, path, module)

    def stage(variant: VariantName, kind: type[Pass]) -> Network:
        for before_quantization in (Stage.GRAPH, Stage.MODULE):
            try:
                saved = _saved(program, task, passes, before_quantization, kind)
            except LookupError:
                continue
            return emit(variant, saved.student, variant)
        return Network(variant, None, None, f'the recipe has no "{kind.name}" before it quantizes')

    networks = [emit("teacher_fp32", program.teacher, "teacher"), *quantized_teachers(program, task, folder)]
    networks += [stage("pruned", Prune), stage("pruned_distilled", Distill)]
    weights = count_weights(fake_quant)
    networks += _controls(program, task, passes, folder, attribution, weights)
    student = Network("student", folder / "model.onnx", program.student, parameters=weights)
    if program.target.runtime == TRITON:
        file = folder / "student.pt2"
        student = dataclasses.replace(student, path=file, runtime=TRITON, deployed=load_student(file))
    return [*networks, student]


def count_weights(fake_quant: nn.Module) -> int:
    """Weights and biases, without the quantizers' own scales."""
    scales = sum(p.numel() for q in quantizers(fake_quant).values() for p in q.parameters())
    return count_parameters(fake_quant) - scales


def _controls(
    program: Program, task: Task, passes: Sequence[Pass], folder: Path, attribution: str, parameters: int
) -> list[Network]:
    """The student trained without what the teacher knows; all but the first are asked for or not there."""
    if attribution != "full":
        return [Network("student_no_kd", None, None, "it needs a training of its own: --attribution full")]
    networks = []
    for control in CONTROLS:
        done = control.run(program, task, passes)
        if isinstance(done, str):
            networks.append(Network(control.variant, None, None, done))
            continue
        path = folder / f"{control.variant}.onnx"
        emit_onnx(done.student, task.example, path, task.input_names, task.output_names, task.axes)
        untimed = "" if control is CONTROLS[0] else "it is the student's network with other weights"
        networks.append(Network(control.variant, path, done.student, untimed=untimed, parameters=parameters))
    return networks


def _latency(
    networks: Sequence[Network], program: Program, task: Task, mismatch: str | None
) -> tuple[list[LatencyRow], list[str]]:
    """Every network in ONNX Runtime at batch 1 and a throughput batch, and teacher and student elsewhere."""
    if mismatch is not None:
        return [], []
    rows: list[LatencyRow] = []
    notes: list[str] = []
    if any(name is not None for axes in task.axes for name in axes[1:]):
        shapes = zip(task.input_names, task.sized(1), strict=True)
        notes.append(f"timed, unless said otherwise, on {', '.join(f'{n} {list(x.shape)}' for n, x in shapes)}")
    for batch in (1, THROUGHPUT_BATCH):
        inputs, feeds = task.sized(batch), task.feeds(batch)
        files = {n.variant: n.path for n in networks if n.path is not None and not n.untimed}
        found: list[Contender | Skipped] = [
            onnxruntime_contender(v, p, feeds, threads=THREADS) for v, p in files.items()
        ]
        if batch == 1:
            found += _elsewhere(program, networks, files, inputs, feeds)
        contenders = [c for c in found if isinstance(c, Contender)]
        notes += [f"{s.variant} in {s.runtime} was not measured: {s.reason}" for s in found if isinstance(s, Skipped)]
        rows += measure(contenders, contenders[0])
    feeds = task.feeds(1)
    still = [
        onnxruntime_contender(v, files[v], feeds, threads=THREADS, spinning=False) for v in ("teacher_fp32", "student")
    ]
    rows += measure(still, still[0])
    return rows + _other_sizes(files, task), notes


def _other_sizes(files: Mapping[VariantName, Path], task: Task) -> list[LatencyRow]:
    """Teacher and student in ONNX Runtime on the task's other inputs."""
    rows: list[LatencyRow] = []
    for name, batch in itertools.product(task.timed, (1, THROUGHPUT_BATCH)):
        feeds = task.feeds(batch, name)
        both = [
            onnxruntime_contender(v, files[v], feeds, threads=THREADS, inputs=name)
            for v in files
            if v in ("teacher_fp32", "student")
        ]
        rows += measure(both, both[0])
    return rows


def _elsewhere(
    program: Program,
    networks: Sequence[Network],
    files: dict[VariantName, Path],
    inputs: tuple[torch.Tensor, ...],
    feeds: dict[str, Any],
) -> list[Contender | Skipped]:
    """Other runtimes, each with a ratio of its own to the same baseline."""
    modules = [n for n in networks if n.runtime == NEURAL_COMPRESSOR]
    plain = files["teacher_fp32"].with_name("teacher.onnx")  # OpenVINO does not know what ONNX Runtime fuses
    by_module: list[Contender | Skipped] = [
        Skipped(n.variant, n.runtime, n.reason)
        if n.module is None
        else compiled_contender(n.variant, n.module, inputs, threads=THREADS, runtime=n.runtime)
        for n in modules
    ]
    return [
        *by_module,
        torch_contender("teacher_fp32", program.teacher, inputs, threads=THREADS),
        compiled_contender("teacher_fp32", program.teacher, inputs, threads=THREADS),
        openvino_contender("teacher_fp32", plain, feeds, threads=THREADS),
        openvino_contender("student", files["student"], feeds, threads=THREADS),
    ]


def _judge(network: Network, program: Program, task: Task, latency: Sequence[LatencyRow], here: str | None) -> Judged:
    """What a network is worth. One without a file (a torch module) has no size and no coverage of its own."""
    label = f"teacher, INT8 by {network.runtime}" if network.runtime == NEURAL_COMPRESSOR else None
    base = AttributionRow(variant=network.variant, runtime=network.runtime, label=label)
    if network.module is None or (network.path is None and network.runtime == "onnxruntime"):
        missing = ("metric", "latency_ms", "ratio", "size_bytes", "parameters", "macs", "integer_coverage")
        return Judged(base.model_copy(update={"reasons": dict.fromkeys(missing, network.reason)}), None, network.reason)
    model = network.deployed or _deployed(network.path, program, task, here, network.module)
    teaches = network.variant.startswith("teacher_")
    outputs, targets = predict(model, task.teachers(task.evaluation) if teaches else task.evaluation)
    worth = {"metric": task.metric.function(outputs, targets)}
    worth |= _time(network, latency) | _weight(network, network.module, task, here)
    row = base.model_copy(update={**worth, "reasons": _reasons(network, here)})
    if network.variant not in DIAGNOSED:
        return Judged(row, model)
    return Judged(row, model, answers(task, outputs, targets))


def _reasons(network: Network, here: str | None) -> dict[str, str]:
    """Why a network that can be evaluated lacks numbers."""
    reasons = dict.fromkeys(("latency_ms", "ratio"), network.untimed) if network.untimed else {}
    if here is not None:
        reasons |= dict.fromkeys(("latency_ms", "ratio", "integer_coverage"), here)
    if network.path is None:
        why = f"{network.runtime} makes a torch module, not a file that ONNX Runtime executes"
        reasons |= dict.fromkeys(("size_bytes", "parameters", "macs", "integer_coverage"), why)
    return reasons


def _time(network: Network, latency: Sequence[LatencyRow]) -> dict[str, Any]:
    """The latency of a row: batch 1, in its own runtime."""
    wanted = (network.variant, network.runtime, 1)
    found = (r for r in latency if (r.variant, r.runtime, r.batch) == wanted and r.spinning and not r.inputs)
    timed = next(found, None)
    if timed is None:
        return {}
    return {k: getattr(timed, k) for k in ("ratio", "ratio_low", "ratio_high")} | {"latency_ms": timed.median_ms}


def _weight(network: Network, module: nn.Module, task: Task, here: str | None) -> dict[str, Any]:
    """What a row's file is made of."""
    if network.path is None:
        return {}
    feeds = task.feeds(len(task.example[0]))
    return {
        "size_bytes": network.path.stat().st_size,
        "parameters": network.parameters or count_parameters(module),
        "macs": count_macs(module, task.example),
        "integer_coverage": integer_coverage(network.path, feeds).share if here is None else None,
    }


def _deployed(path: Path | None, program: Program, task: Task, here: str | None, model: nn.Module) -> ModelFunction:
    """What a row's file computes; its module where it has none."""
    if path is None:
        return model
    with torch.inference_mode():
        like = program.teacher(*task.example)
    return OnnxModel(path, like, optimized=here is None)
