"""What the student is worth: parity, coverage, accuracy and latency of every step, beside the teacher.

Every network of the attribution table is emitted to ONNX, evaluated through ONNX Runtime on all evaluation samples,
and timed in turn with the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.baselines import CALIBRATION, neural_compressor_ptq, ptq
from pqk.benchmark import (
    Contender,
    Skipped,
    compiled_contender,
    measure,
    onnxruntime_contender,
    openvino_contender,
    protocol,
    torch_contender,
)
from pqk.coverage import integer_coverage
from pqk.emit_onnx import emit_onnx
from pqk.emit_torch import load_student
from pqk.knowledge import CrossEntropy
from pqk.machine import fingerprint, peak_memory
from pqk.measure import count_macs, count_parameters
from pqk.modules import quantizers
from pqk.parity import Model, OnnxModel, check_parity
from pqk.parity_fused import check_fused_parity
from pqk.passes import REWRITES, Distill, Fuse, Prune
from pqk.pipeline import load, run_passes
from pqk.program import Pass, Program, Stage
from pqk.report import (
    AttributionRow,
    Conditions,
    DeclinedRow,
    Fusion,
    LatencyRow,
    Metric,
    PassRecord,
    Report,
    Variant,
)
from pqk.task import Outputs, Task
from pqk.train import Training

THREADS = 2
NEURAL_COMPRESSOR = "neural-compressor"
TRITON = "triton"
THROUGHPUT_BATCH = 32


@dataclass
class Network:
    """One row of the attribution table in the making: its file, and the module behind it for counting."""

    variant: Variant
    path: Path | None
    module: nn.Module | None
    reason: str = ""
    """why there is nothing to measure"""
    parameters: int | None = None
    runtime: str = "onnxruntime"
    deployed: Callable[..., Outputs] | None = None
    """what is run for the metric, where it is not the file in ONNX Runtime"""


def prove(program: Program, task: Task, passes: Sequence[Pass], folder: Path, attribution: str, *, seed: int) -> Report:
    """The report of a finished INT8 program; what it deploys is in `folder`, other files are written beside it."""
    here = program.target.unmeasured()
    fake_quant = _saved(program, task, passes, Stage.FAKE_QUANT).student
    networks = _networks(program, fake_quant, task, passes, folder, attribution)
    feeds = task.feeds(len(task.example[0]))
    assert isinstance(program.student, torch.fx.GraphModule)
    fusion = _fusion(program, fake_quant, task, folder / "student.pt2")
    if program.target.runtime == TRITON:
        assert fusion is not None
        parity = fusion.parity
    else:
        parity = check_parity(fake_quant, program.student, folder / "model.onnx", task, optimized=here is None)
    latency, notes = _latency(networks, program, task, here)
    rows = [_row(n, program, task, latency, feeds, here) for n in networks]
    by_variant = {r.variant: r for r in rows if r.runtime != NEURAL_COMPRESSOR}
    student, teacher = by_variant["student"], by_variant["teacher_fp32"]
    training = [p for p in passes if isinstance(p, Training)]
    trained = {r.index: r.seconds for r in program.records if isinstance(passes[r.index], Training)}
    return Report(
        metric=Metric(name=task.metric.name, unit=task.metric.unit, teacher=teacher.metric, student=student.metric),
        latency=tuple(latency),
        latency_reason=here,
        integer_coverage=student.integer_coverage,
        integer_coverage_reason=here,
        parity=parity,
        fusion=fusion,
        size_bytes=student.size_bytes or 0,
        parameters=student.parameters or 0,
        macs=student.macs or 0,
        seconds={f"{r.index:02d}-{r.pass_name}": r.seconds for r in program.records},
        declined=tuple(DeclinedRow(pass_name=d.pass_name, layer=d.layer, reason=d.reason) for d in program.declined),
        machine=fingerprint(),
        target=program.target.name,
        seed=seed,
        attribution=tuple(rows),
        conditions=Conditions(
            training_epochs=sum(p.epochs for p in training),
            training_seconds=sum(trained.values()),
            train_samples=0 if task.train is None else task.train.samples,
            validation_samples=task.validation.samples,
            evaluation_samples=task.evaluation.samples,
            peak_memory_bytes=max(peak_memory(), *(r.peak_memory_bytes for r in program.records)),
            protocol=protocol(),
        ),
        passes=tuple(PassRecord(**dataclasses.asdict(r)) for r in program.records),
        notes=tuple(notes),
    )


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
        left_out=tuple(DeclinedRow(pass_name=d.pass_name, layer=d.layer, reason=d.reason) for d in left),
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
    def emit(variant: Variant, module: nn.Module, name: str) -> Network:
        path = folder / f"{name}.onnx"
        emit_onnx(module, task.example, path, task.input_names, task.output_names)
        return Network(variant, path, module)

    def stage(variant: Variant, kind: type[Pass]) -> Network:
        try:
            saved = _saved(program, task, passes, Stage.MODULE, kind)
        except LookupError:
            return Network(variant, None, None, f'the recipe has no "{kind.name}" in stage MODULE')
        return emit(variant, saved.student, variant)

    networks = [emit("teacher_fp32", program.teacher, "teacher"), *_quantized_teachers(program, task, folder)]
    networks += [stage("pruned", Prune), stage("pruned_distilled", Distill)]
    networks.append(_without_knowledge(program, task, passes, folder, attribution))
    student = Network("student", folder / "model.onnx", program.student, parameters=count_weights(fake_quant))
    if program.target.runtime == TRITON:
        file = folder / "student.pt2"
        student = dataclasses.replace(student, path=file, runtime=TRITON, deployed=load_student(file))
    return [*networks, student]


def _quantized_teachers(program: Program, task: Task, folder: Path) -> list[Network]:
    """The teacher after post-training quantization alone, by ONNX Runtime and by neural-compressor."""
    if program.target.runtime == TRITON:
        return [Network("teacher_ptq", None, None, "the tools that quantize after training write for CPUs")]
    quantized = folder / "teacher_ptq.onnx"
    reason = ptq(folder / "teacher.onnx", quantized, task, program.target)
    by_onnxruntime = Network("teacher_ptq", None if reason else quantized, program.teacher, reason or "")
    return [by_onnxruntime, _by_neural_compressor(program, task)]


def _by_neural_compressor(program: Program, task: Task) -> Network:
    """The teacher by neural-compressor's static INT8, which is a torch module and runs under torch.compile."""
    graph, reason = neural_compressor_ptq(program.teacher, task.example, task.calibration(CALIBRATION))
    return Network("teacher_ptq", None, graph, reason or "", runtime=NEURAL_COMPRESSOR)


def count_weights(fake_quant: nn.Module) -> int:
    """Weights and biases, without the quantizers' own scales."""
    scales = sum(p.numel() for q in quantizers(fake_quant).values() for p in q.parameters())
    return count_parameters(fake_quant) - scales


def _without_knowledge(program: Program, task: Task, passes: Sequence[Pass], folder: Path, attribution: str) -> Network:
    """The student whose quantization-aware training had labels only: the same passes from the first of those on."""
    if attribution != "full":
        return Network("student_no_kd", None, None, "it needs a training of its own: --attribution full")
    index = next(
        (r.index for r in program.records if isinstance(passes[r.index], Distill) and r.stage == "FAKE_QUANT"), None
    )
    if index is None:
        return Network("student_no_kd", None, None, "the recipe trains nothing under quantization")
    assert program.run.folder is not None
    before = f"{index - 1:02d}-{passes[index - 1].name}"
    start = load(program, task, program.run.folder / before, REWRITES)
    run = dataclasses.replace(program.run, folder=program.run.folder / "without-knowledge")
    assert run.folder is not None
    run.folder.mkdir(exist_ok=True)
    rest = [
        dataclasses.replace(p, terms=(CrossEntropy(),), teach_from=0.0) if isinstance(p, Distill) else p
        for p in passes[index:]
    ]
    done = run_passes(dataclasses.replace(start, run=run), task, rest, start=index)
    path = folder / "student_no_kd.onnx"
    emit_onnx(done.student, task.example, path, task.input_names, task.output_names)
    parameters = count_weights(_saved(done, task, passes, Stage.FAKE_QUANT).student)
    return Network("student_no_kd", path, done.student, parameters=parameters)


def _latency(
    networks: Sequence[Network], program: Program, task: Task, mismatch: str | None
) -> tuple[list[LatencyRow], list[str]]:
    """Every network in ONNX Runtime at batch 1 and a throughput batch, and teacher and student elsewhere."""
    if mismatch is not None:
        return [], []
    rows: list[LatencyRow] = []
    notes: list[str] = []
    for batch in (1, THROUGHPUT_BATCH):
        inputs, feeds = task.sized(batch), task.feeds(batch)
        files = {n.variant: n.path for n in networks if n.path is not None}
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
    return rows + measure(still, still[0]), notes


def _elsewhere(
    program: Program,
    networks: Sequence[Network],
    files: dict[Variant, Path],
    inputs: tuple[torch.Tensor, ...],
    feeds: dict[str, Any],
) -> list[Contender | Skipped]:
    """Other runtimes, each with a ratio of its own to the same baseline."""
    modules = [n for n in networks if n.runtime == NEURAL_COMPRESSOR]
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
        openvino_contender("teacher_fp32", files["teacher_fp32"], feeds, threads=THREADS),
        openvino_contender("student", files["student"], feeds, threads=THREADS),
    ]


def _row(
    network: Network,
    program: Program,
    task: Task,
    latency: Sequence[LatencyRow],
    feeds: dict[str, Any],
    here: str | None,
) -> AttributionRow:
    """What a network is worth. One without a file (a torch module) has no size and no coverage of its own."""
    label = f"teacher, INT8 by {network.runtime}" if network.runtime == NEURAL_COMPRESSOR else None
    base = AttributionRow(variant=network.variant, runtime=network.runtime, label=label)
    if network.module is None or (network.path is None and network.runtime == "onnxruntime"):
        missing = ("metric", "latency_ms", "ratio", "size_bytes", "parameters", "macs", "integer_coverage")
        return base.model_copy(update={"reasons": dict.fromkeys(missing, network.reason)})
    reasons = {} if here is None else dict.fromkeys(("latency_ms", "ratio", "integer_coverage"), here)
    model, path = network.module, network.path
    if path is None:
        why = f"{network.runtime} makes a torch module, not a file that ONNX Runtime executes"
        reasons |= dict.fromkeys(("size_bytes", "parameters", "macs", "integer_coverage"), why)
    timed = next(
        (r for r in latency if (r.variant, r.runtime, r.batch) == (network.variant, network.runtime, 1) and r.spinning),
        None,
    )
    worth = {
        "metric": task.score(network.deployed or _deployed(path, program, task, here, model), task.evaluation),
        "reasons": reasons,
    }
    if timed is not None:
        worth |= {k: getattr(timed, k) for k in ("ratio", "ratio_low", "ratio_high")} | {"latency_ms": timed.median_ms}
    if path is not None:
        worth |= {
            "size_bytes": path.stat().st_size,
            "parameters": network.parameters or count_parameters(model),
            "macs": count_macs(model, task.example),
            "integer_coverage": integer_coverage(path, feeds).share if here is None else None,
        }
    return base.model_copy(update=worth)


def _deployed(path: Path | None, program: Program, task: Task, here: str | None, model: nn.Module) -> Model:
    """What a row's file computes; its module where it has none."""
    if path is None:
        return model
    with torch.inference_mode():
        like = program.teacher(*task.example)
    return OnnxModel(path, like, optimized=here is None)
