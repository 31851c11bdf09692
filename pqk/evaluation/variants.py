"""The networks of the attribution table, and what other tools make of the teacher: what pqk has to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pqk.core.program import Program
from pqk.data.structures import Outputs
from pqk.evaluation.baselines import (
    CALIBRATION,
    is_transformer,
    neural_compressor_ptq,
    onnxruntime_dynamic,
    optimized_transformer,
    optimum_ptq,
    ptq,
)
from pqk.report.schema import VariantName
from pqk.task.task import Task

NEURAL_COMPRESSOR = "neural-compressor"
TRITON = "triton"
PADDED = 32
"""samples of a batch in which some are padded"""


@dataclass
class Network:
    """One row of the attribution table in the making: its file, and the module behind it for counting."""

    variant: VariantName
    path: Path | None
    module: nn.Module | None
    reason: str = ""
    """why there is nothing to measure"""
    untimed: str = ""
    """why it is not timed, though there is something to measure"""
    parameters: int | None = None
    runtime: str = "onnxruntime"
    deployed: Callable[..., Outputs] | None = None
    """what is run for the metric, where it is not the file in ONNX Runtime"""


def quantized_teachers(program: Program, task: Task, folder: Path) -> list[Network]:
    """The teacher after post-training quantization alone: by ONNX Runtime, a transformer also dynamically and by
    optimum, and by neural-compressor."""
    if program.target.runtime == TRITON:
        return [Network("teacher_ptq", None, None, "the tools that quantize after training write for CPUs")]
    quantized = folder / "teacher_ptq.onnx"
    reason = ptq(folder / "teacher.onnx", quantized, task, program.target)
    by_onnxruntime = Network("teacher_ptq", None if reason else quantized, program.teacher, reason or "")
    found = [by_onnxruntime]
    if is_transformer(folder / "teacher.onnx"):
        dynamic = folder / "teacher_dynamic.onnx"
        reason = onnxruntime_dynamic(folder / "teacher.onnx", dynamic, program.target)
        found.append(Network("teacher_dynamic", None if reason else dynamic, program.teacher, reason or ""))
        found += _by_optimum(program, task, folder)
    return [*found, _by_neural_compressor(program, task)]


def _by_optimum(program: Program, task: Task, folder: Path) -> list[Network]:
    found = []
    static: VariantName = "teacher_optimum_static"
    for variant in (static, "teacher_optimum_dynamic"):
        path = folder / f"{variant}.onnx"
        samples = task.calibration(CALIBRATION, teacher=True) if variant == static else None
        reason = optimum_ptq(folder / "teacher.onnx", path, samples, program.target)
        found.append(Network(variant, None if reason else path, program.teacher, reason or ""))
    return found


def optimize_teacher(networks: list[Network], task: Task, mismatch: str | None, threads: int) -> list[str]:
    """Let the baseline run the file with ONNX Runtime's optimizations for transformers, where that is the better one.

    The INT8 forms of the teacher, and other runtimes, keep the plain file, whose operators they know.
    """
    plain = networks[0].path
    if mismatch is not None or plain is None or not is_transformer(plain):
        return []
    out = plain.with_name("teacher_optimized.onnx")
    batch = next(task.calibration(PADDED, teacher=True))
    padded = {name: t.numpy() for name, t in zip(task.input_names, batch, strict=True)}
    better, said = optimized_transformer(plain, out, padded, task.feeds(1), threads)
    if better:
        networks[0] = dataclasses.replace(networks[0], path=out)
    else:
        out.unlink(missing_ok=True)  # where it stands, `pqk benchmark` takes it for the baseline, too
    return [said]


def _by_neural_compressor(program: Program, task: Task) -> Network:
    """The teacher by neural-compressor's static INT8, which is a torch module and runs under torch.compile."""
    calibration = task.calibration(CALIBRATION, teacher=True)
    graph, reason = neural_compressor_ptq(program.teacher, task.example, calibration, task.axes)
    return Network("teacher_ptq", None, graph, reason or "", runtime=NEURAL_COMPRESSOR)
