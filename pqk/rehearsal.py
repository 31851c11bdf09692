"""The cheap part of a rehearsal: what would refuse a student at the end of a compile refuses it before training.

The untrained student goes through the recipe's passes from the captured graph to integers, without training and
measuring, and is deployed into a folder of its own: capture, placement, emission, manifest and layer parity. The
teacher's float file is held against the teacher. Weights, random state and files of the compile are not touched.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from pqk.core.modes import fused_layers
from pqk.core.pipeline import verify
from pqk.core.program import Pass, Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.interface import describe_interface
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.deploy.torch_emitter import emit_torch
from pqk.errors import InputError, PqkError, Reason, first_line
from pqk.passes import Capture, Convert, Quantize
from pqk.report.schema import LayerParity
from pqk.scratch import ScratchFolder
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.float_parity import why_not_as_torch
from pqk.verify.fused_parity import check_launches
from pqk.verify.other_sizes import why_not_at_other_sizes, why_not_the_teacher
from pqk.verify.parity import check_layers_of
from pqk.verify.verdict import divergence_of

LAYER_SAMPLES = 16
"""validation samples that layers are compared on, as at the end of a compile"""


def rehearse(
    teacher: nn.Module,
    task: Task,
    passes: Sequence[Pass],
    target: Target,
    *,
    student: nn.Module | None = None,
    parity: bool = True,
) -> Program:
    """Takes an untrained student through `passes` to its deployed form, in seconds.

    Args:
        teacher: frozen, in eval mode.
        task: example inputs, and validation data of which a few samples are read.
        passes: the recipe's.
        target: what the student is for.
        student: a network of another shape that the passes begin with, frozen; None: a copy of the teacher.
        parity: whether layers whose numbers differ are an error.

    Returns:
        The INT8 program of the untrained student.

    Raises:
        InputError: this network cannot be compiled so, in the words in which the compile would end.
    """
    with untouched_randomness(), fused_layers(False), ScratchFolder("rehearsal") as name:
        folder = Path(name)
        program = Program.begin(teacher, target, RunContext(), student)
        for p in short_forms(passes):
            program = _after(program, task, p)
        optimized = target.why_not_measured() is None
        problems = [*why_not_deployed(program, task, folder, optimized, parity=parity)]
        if target.runtime == "onnxruntime":
            problems += [*why_not_exported(program, task, folder / "teacher.onnx")]
        if problems:
            raise InputError("; ".join(problems[:3]) + ". This is of the untrained student: nothing was trained")
        return program


def why_not_deployed(
    program: Program, task: Task, folder: Path, optimized: bool, *, parity: bool = True
) -> Iterator[Reason]:
    """Writes an INT8 student into `folder` as a compile does, and yields what refuses it there.

    A model.onnx that lies there already is taken for that of this very student.
    """
    graph, fused = program.student, program.fused
    assert isinstance(graph, fx.GraphModule)
    layers: list[LayerParity] = []
    elsewhere: Reason | None = None
    try:
        path = None
        describe_interface(graph, task)
        inputs = next(task.calibration(LAYER_SAMPLES))
        if fused is not None:
            emit_torch(fused, task.example, folder / "student.pt2", task.axes)
            layers += check_launches(graph, fused, inputs)
        if program.target.runtime == "onnxruntime":
            path = folder / "model.onnx"
            if not path.exists():
                emit_onnx_for(graph, task, path)
            layers += check_layers_of(graph, path, task, inputs, optimized=optimized)
        elsewhere = why_not_at_other_sizes(program.teacher, graph, task, onnx=path, fused=fused, optimized=optimized)
    except PqkError as error:
        yield str(error)
    except Exception as error:  # whatever emitters and runtimes raise
        yield f"emit: {first_line(error, 300)}"
    broken = [layer for layer in layers if parity and not layer.passed]
    yield from (f"parity: {divergence_of(layer)}" for layer in broken)
    if elsewhere is not None and parity:
        yield f"parity: {elsewhere}"


def why_not_exported(program: Program, task: Task, path: Path) -> Iterator[Reason]:
    """Writes the teacher's float file to `path`, where it is not yet, and yields why it is not the teacher, at the
    example's or at other sizes of its free axes."""
    teacher, graph = program.teacher, program.student
    assert isinstance(graph, fx.GraphModule)
    try:
        if not path.exists():
            emit_onnx_for(teacher, task, path)
        reason = why_not_as_torch(teacher, path, task) or why_not_the_teacher(teacher, path, task, graph.meta["sizes"])
        if reason is not None:
            yield f"teacher: {reason}"
    except PqkError as error:
        yield f"teacher: {error}"
    except Exception as error:  # as above
        yield f"teacher: {first_line(error, 300)}"


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Whatever is drawn meanwhile, the next draws are what they would have been."""
    ours, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(arrays)


def short_forms(passes: Sequence[Pass]) -> list[Pass]:
    """What leads from a module to the deployed form: the recipe's own passes, or the default ones, none of them timed.

    Ranges are found on few samples, and layers that a measurement would leave in float are not looked for.
    """
    named = {p.name: p for p in (Capture(), Quantize(), Convert(), *passes)}
    forms = [named[p.name].timed_form(()) for p in (Capture, Quantize, Convert)]
    return [p for p in forms if p is not None] + [p for p in passes if p.consumes == {Stage.INT8}]


def _after(program: Program, task: Task, p: Pass) -> Program:
    try:
        torch.manual_seed(0)
        after = p.apply(replace(program, run=program.run.enter(p.name), details={}), task)
        after = replace(after, stage=p.result_stage(program.stage))
        verify(after, task, p.name)
    except PqkError:
        raise
    except Exception as error:  # a rehearsal exists to find what nobody thought of
        raise InputError(f'the untrained student, "{p.name}": {first_line(error, 300)}') from error
    return after
