"""Runs the passes of a recipe. After every pass it verifies, records and saves; no pass does any of this itself."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.copies import copy_of
from pqk.core.costs import count_macs, count_parameters
from pqk.core.distributed import from_main, is_main_process
from pqk.core.program import Pass, Program, Rewrite, RewriteFunction, Snapshot, Stage, parse_plan, replay
from pqk.core.run_folder import RunFolder, scope_of
from pqk.data.structures import tensors
from pqk.documents import digest_of_file
from pqk.errors import InputError, PqkError, first_line
from pqk.files import read_sealed, read_tensors, write_sealed, write_tensors
from pqk.report.schema import Declined, PassRecord
from pqk.target.machine import peak_memory
from pqk.task.task import Task

STUDENT = "student.safetensors"
"""the tensors of a saved program"""


def check_order(passes: Sequence[Pass], start: Stage = Stage.MODULE) -> Stage:
    """The stage in which the passes leave the student. Raises `InputError` for an order that no student can take."""
    stage = start
    for i, p in enumerate(passes):
        if stage not in p.consumes:
            wants = " or ".join(str(s) for s in sorted(p.consumes))
            raise InputError(
                f'recipe: pass {i + 1} "{p.name}" consumes {wants}, but the student is in stage {stage} there'
                + (f', after "{passes[i - 1].name}"' if i else "")
            )
        if p.result_stage(stage) < stage:
            raise InputError(f'recipe: pass {i + 1} "{p.name}" would move the student back from {stage}')
        stage = p.result_stage(stage)
    return stage


def prepared(passes: Sequence[Pass], teacher: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """Teacher and task as the passes need them. Raises `InputError` where one that changes them is not the first."""
    for number, p in enumerate(passes, 1):
        if type(p).prepare is Pass.prepare:
            continue
        if number > 1:
            raise InputError(f'recipe: pass {number} "{p.name}" changes teacher and task, so it must be the first')
        teacher, task = p.prepare(teacher, task)
        task.check(teacher)
    return teacher, task


def run_passes(
    program: Program, task: Task, passes: Sequence[Pass], start: int = 0, earlier: Sequence[Pass] = ()
) -> Program:
    """Apply `passes` in order; those whose result is saved in the run's folder are loaded instead.

    `start` numbers the first of them; `earlier` are passes that the program went through before, whose rewrites a saved
    plan names. Raises what a pass raises, and `PqkError` where verification finds a pass wrong.
    """
    table = {f.__name__: f for p in (*earlier, *passes) for f in p.rewrites}
    for index, p in enumerate(passes, start):
        scope = scope_of(index, p.name)
        folder = None if program.run.folder is None else RunFolder(program.run.folder)
        program = replace(program, run=program.run.enter(scope), details={})
        # Rank 0 looks: it may have saved a pass that another process has yet to begin.
        if folder is not None and from_main(partial(folder.is_finished, index, p.name)):
            program = p.derive(load(program, task, folder.of_pass(index, p.name), table))
        else:
            program = _finished(program, task, index, p)
            if folder is not None and is_main_process():
                save(program, folder.of_pass(index, p.name))
                folder.drop_checkpoints(scope)
        if folder is not None:
            bare = replace(program, student=program.origin, fused=None)  # a snapshot keeps no student in memory
            restore = partial(load, bare, task, folder.of_pass(index, p.name), table)
            snapshot = Snapshot(index, p, program.stage, restore)
            program = replace(program, snapshots=(*program.snapshots, snapshot))
    return program


def _finished(program: Program, task: Task, index: int, p: Pass) -> Program:
    """The program after one pass, verified and recorded."""
    began = time.perf_counter()
    torch.manual_seed(program.run.seed_for("pass"))
    after = p.apply(program, task)
    after = replace(after, stage=p.result_stage(program.stage))
    verify(after, task, program.run.scope)
    seconds = time.perf_counter() - began
    return replace(after, records=(*after.records, _record(after, task, index, p, seconds)))


def verify(program: Program, task: Task, scope: str) -> None:
    """The graph lints, outputs have the teacher's shapes and dtypes, values are finite."""
    if isinstance(program.student, torch.fx.GraphModule):
        program.student.graph.lint()
    program.student.eval()
    forms = {"student": program.student} | ({} if program.fused is None else {"fused student": program.fused})
    for form, module in forms.items():
        with torch.no_grad():
            want, got = tensors(program.teacher(*task.example)), tensors(module(*task.example))
        shapes = [[(tuple(t.shape), t.dtype) for t in side] for side in (want, got)]
        if shapes[0] != shapes[1]:
            raise PqkError(f"{scope}: the {form}'s outputs are {shapes[1]} and the teacher's {shapes[0]}")
        for i, t in enumerate(got):
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise PqkError(f"{scope}: output {i} of the {form} is not finite on the example inputs")
    trained = {name for name, _ in program.student.named_parameters()}
    for name, t in program.student.state_dict().items():
        # A buffer may hold infinities: masks and open bounds do.
        wrong = t.isnan() | t.isinf() if name in trained else t.isnan()
        if t.is_floating_point() and bool(wrong.any()):
            raise PqkError(f"{scope}: {name} of the student is not finite")


def _record(program: Program, task: Task, index: int, p: Pass, seconds: float) -> PassRecord:
    student = program.student
    metric = task.score(student, task.validation) if task.validation.labelled else None
    return PassRecord(
        index=index,
        pass_name=p.name,
        stage=str(program.stage),
        seconds=round(seconds, 3),
        parameters=count_parameters(student),
        macs=count_macs(student, task.example),
        size_bytes=sum(t.numel() * t.element_size() for t in student.state_dict().values()),
        metric=metric if metric is None or math.isfinite(metric) else None,
        peak_memory_bytes=peak_memory(),
        details=dict(program.details),
    )


def state(program: Program) -> dict[str, Any]:
    """A program without its tensors, as JSON."""
    return {
        "stage": str(program.stage),
        "plan": [asdict(r) for r in program.plan],
        "declined": [d.model_dump(by_alias=False) for d in program.declined],
        "records": [r.model_dump(by_alias=False) for r in program.records],
    }


def save(program: Program, folder: Path) -> None:
    """Write a program; the folder appears under its name when everything is in it."""
    unfinished = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write_tensors(unfinished / STUDENT, program.student.state_dict())
        seal = {"run": program.run.identity, "scope": folder.name, "student": digest_of_file(unfinished / STUDENT)}
        write_sealed(unfinished / "program.json", {**seal, **state(program)})
        unfinished.replace(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(program: Program, task: Task, folder: Path, rewrites: Mapping[str, RewriteFunction]) -> Program:
    """The program saved in `folder`, rebuilt from what its plan begins with: the given student, or the teacher.

    Raises `InputError` for files that do not fit, were changed, or are of another run or pass.
    """
    path = folder / "program.json"
    saved = read_sealed(path, ("run", "scope", "student", "stage", "plan", "declined", "records"))
    here = {"run": program.run.identity, "scope": folder.name}
    if any(saved[key] != value for key, value in here.items()):
        raise InputError(f"{folder} is of another run or pass ({saved['scope']}); delete it, and it is made anew")
    if saved["student"] != digest_of_file(folder / STUDENT):
        raise InputError(f"{folder / STUDENT} was changed after it was written; delete {folder}, and it is made anew")
    plan = parse_plan(saved["plan"], path)
    weights, _ = read_tensors(folder / STUDENT)
    try:
        stage, declined = Stage[saved["stage"]], tuple(Declined(**d) for d in saved["declined"])
        records = tuple(PassRecord(**r) for r in saved["records"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} was changed or is of another version of pqk: {first_line(error)}") from error
    whose = "teacher" if program.given is None else "student"
    student = rebuild(program.origin, task.example, plan, rewrites, weights, whose)
    return replace(program, student=student, stage=stage, plan=plan, declined=declined, records=records)


def rebuild(
    origin: nn.Module,
    example: tuple[torch.Tensor, ...],
    plan: Sequence[Rewrite],
    rewrites: Mapping[str, RewriteFunction],
    weights: dict[str, torch.Tensor],
    whose: str = "teacher",
) -> nn.Module:
    """The student: the plan replayed on a copy of `origin`, filled with `weights`, in eval mode.

    `origin` is the teacher or, as `whose` says for messages, the student of another shape that was given. Raises
    `InputError` where the plan or the weights are of another network.
    """
    unknown = sorted({r.function for r in plan} - set(rewrites))
    if unknown:
        raise InputError(f"plan: unknown rewrites {unknown}; it was written by another version of pqk")
    try:
        # A frozen origin makes a student that trains: rewrites freeze what must not.
        student = replay(copy_of(origin, whose).requires_grad_(True), example, plan, rewrites)
        student.load_state_dict(weights)
    except PqkError:
        raise
    except Exception as error:  # whatever a rewrite raises that is given another network's, or no, arguments
        raise InputError(f"plan: it does not fit this {whose}: {first_line(error, 400)}") from error
    for module in student.modules():
        module.training = False
    return student
