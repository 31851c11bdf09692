"""`compress`: teacher, task, recipe and target in; an artifact out. Everything else is called from here."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.bench.baselines import Tool
from pqk.bench.oracle import Oracle
from pqk.core.decisions import Journal
from pqk.core.distributed import from_main, is_main_process, wait_for_all
from pqk.core.modes import fused_layers
from pqk.core.onnxruntime_session import copy_files
from pqk.core.pipeline import run_passes
from pqk.core.program import Program
from pqk.core.progress import Observer, Silent
from pqk.core.run_context import RunContext
from pqk.deploy.artifact import (
    MANIFEST,
    MODEL,
    Artifact,
    name_two_files,
    seal,
    write_report,
    write_student,
)
from pqk.deploy.cascade import CASCADE_TEACHER, Routing
from pqk.deploy.interface import describe_interface
from pqk.deploy.tuning import Tuning
from pqk.documents import digest_of_file, digest_of_values
from pqk.errors import ContractError, InputError, ParityError, Reason
from pqk.evaluation.cascade import measure_cascade
from pqk.evaluation.evaluate import evaluate
from pqk.evaluation.settings import Evaluation
from pqk.files import read_sealed
from pqk.gpu.autotune import choose_tuning, gpu_for, read_tuning
from pqk.job import Job, job_of
from pqk.knowledge.teachers.base import network_fingerprint
from pqk.recipe.contract import Contract
from pqk.recipe.recipe import Recipe
from pqk.rehearsal import rehearse
from pqk.report.schema import Report, VariantName
from pqk.search.on_evaluation import broken_in_words, dominating, on_evaluation
from pqk.search.search import ContractSearch, SearchResult
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.axes import BATCH
from pqk.task.task import Task
from pqk.verify.other_sizes import answers_none, why_not_at_other_sizes


def compress(
    teacher: nn.Module,
    task: Task,
    recipe: Recipe | str | Path | None = None,
    target: Target | str | None = None,
    out: str | Path = "out",
    *,
    student: nn.Module | Sequence[nn.Module] | None = None,
    seed: int | None = None,
    resume: bool = False,
    evaluation: Evaluation | None = None,
    allow_parity_failure: bool = False,
    observer: Observer | None = None,
    contract: Contract | None = None,
) -> Artifact:
    """Compiles `teacher` into an INT8 student for `target`, and measures what it is worth.

    Where there is a contract, in the recipe or beside it, a student that keeps it is searched for; so it is, with
    `Contract()`, where there is neither a recipe nor a contract.

    Args:
        teacher: a trained module in float32; it is copied, put into eval mode and never changed.
        task: data, metric and loss.
        recipe: a `Recipe`, or the path of its TOML file; None: whatever keeps the contract.
        target: a `Target` or its name; the recipe's, or this machine, where None.
        out: the artifact's directory, empty or new (or, with `resume`, that of the run to continue).
        student: a network of another shape that the passes begin with, in place of a copy of the teacher; its weights
            may be random, and its outputs must have the structure, shapes and dtypes of the teacher's. None: what the
            recipe's `[student]` names, or else a copy of the teacher. Under a contract it competes with what is cut out
            of the teacher, and may be several. A resume needs the same modules again, with the same weights.
        seed: overrides the recipe's.
        resume: continue the run in `out` at its last finished pass.
        evaluation: what is measured of the student, beside what, and how long; `Evaluation()` where None.
        allow_parity_failure: finish the artifact although its numbers differ from the trained ones.
        observer: shows progress.
        contract: what must hold of the student, instead of the recipe's; the recipe's passes compete for it.

    Returns:
        The artifact in `out`.

    Raises:
        InputError: teacher, student, task, recipe, target and out do not fit, and nothing was trained; or the disk is
            full.
        ParityError: the deployed numbers differ from the trained ones; saved passes are kept.
        ContractError: no student keeps the contract; the nearest one is in `out`.
    """
    job = job_of(teacher, student, task, recipe, target, Path(out), seed, evaluation or Evaluation(), contract)
    with contextlib.ExitStack() as held, _unwritable(job.out):
        identity = job.identity()
        from_main(lambda: held.enter_context(job.folder.opened(identity, resume)))
        if not (job.out / MANIFEST).exists():
            with fused_layers(False):
                _compile(job, digest_of_values(identity), observer or Silent(), allow_parity_failure)
            wait_for_all()
    artifact = Artifact.load(job.out)
    promise = artifact.report.promise
    if promise is not None and not promise.kept:
        found = artifact.report.metric
        said = broken_in_words(promise, share=found is None or found.unit == "share")
        raise ContractError(f"contract: {said}. It is in {job.out}, with what was tried")
    return artifact


def _compile(job: Job, identity: str, observer: Observer, allow_parity_failure: bool) -> None:
    """Rehearse, run the passes, and leave the artifact where it goes."""
    if is_main_process():
        _rehearse(job, allow_parity_failure)
    if job.recipe.contract is None:
        program = _run(job, identity, observer)
        if is_main_process():
            _ship(job, program, _finished(job, program, None, allow_parity_failure), allow_parity_failure)
        return
    assert job.deciding is not None
    context = _context(job, identity, observer)
    search = ContractSearch(job.teacher, job.students, job.task, job.target, job.recipe, context, job.deciding)
    result: SearchResult | None = search.run()
    while result is not None:  # until no row of the table beats what ships
        job = dataclasses.replace(job, recipe=result.recipe, students=result.students)
        shipped, program = result, result.program
        finished = _finished(job, program, result, allow_parity_failure) if is_main_process() else None
        better = from_main(partial(_beaten_by, finished))
        file = job.folder.unfinished_artifact / MODEL
        instead = (search.instead(shipped, row, file) for row in better)
        result = next((other for other in instead if other is not None), None)
    if finished is not None:
        finished = _with_disputes(job, finished, search.disputed)
        _ship(job, program, finished, allow_parity_failure)


def _with_disputes(job: Job, finished: Finished, disputed: Mapping[VariantName, Reason]) -> Finished:
    """The report with what was timed again of rows that seemed to beat what ships."""
    report = finished.report
    seeming = [row.variant for row in dominating(report) if row.variant in disputed]
    if not seeming or report.promise is None:
        return finished
    promise, notes = on_evaluation(report.promise, report, seeming), (*report.notes, *(disputed[v] for v in seeming))
    report = report.model_copy(update={"promise": promise, "notes": notes})
    write_report(report, job.folder.unfinished_artifact)
    return dataclasses.replace(finished, report=report)


def _beaten_by(finished: Finished | None) -> list[VariantName]:
    """The rows of the report's table that beat what ships."""
    assert finished is not None
    return [row.variant for row in dominating(finished.report)]


@dataclass(frozen=True)
class Finished:
    """An artifact that is written and judged, and has not moved to where it goes."""

    interface: dict[str, Any]
    """inputs, outputs and axes, as the manifest has them"""
    names: tuple[str, ...]
    """of its files"""
    report: Report
    tool: Tool | None
    """whose file is deployed; None: what the passes make"""
    routing: Routing | None = None
    """of a cascade, whose teacher's file is among the others"""


def _finished(job: Job, program: Program, result: SearchResult | None, allow_parity_failure: bool) -> Finished:
    """Write what is deployed, and judge it."""
    tool = None if result is None else result.tool
    interface = _interface(job, program)
    names = _write(job, program)
    if tool is None:
        _compare_sizes(job, program, interface, allow_parity_failure)
    else:
        assert result is not None and result.file is not None
        copy_files(result.file, job.folder.unfinished_artifact / MODEL)
    cascade = None if result is None else result.cascade
    if cascade is not None:
        shutil.copyfile(cascade.teacher, job.folder.unfinished_artifact / CASCADE_TEACHER)
    report = _judge(job, program, result)
    return Finished(interface, names, report, tool, None if cascade is None else cascade.choice.routing)


@contextmanager
def _unwritable(out: Path) -> Iterator[None]:
    """A full disk, or a folder that may not be written to, is an error with what to do; the finished passes stay."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{out}: {error.strerror}; make room and go on with --resume") from error
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not _is_in(error.filename, out):
            raise
        raise InputError(f"cannot write {error.filename}: {error.strerror}; go on with --resume") from error


def _is_in(path: object, folder: Path) -> bool:
    return isinstance(path, str) and Path(path).absolute().is_relative_to(folder.absolute())


def _rehearse(job: Job, allow_parity_failure: bool) -> None:
    """Deploy the untrained student, unless a pass of this run is finished. Raises `InputError` before any training."""
    begun = job.recipe.contract is not None or job.folder.is_finished(0, job.recipe.passes[0].name)
    if job.evaluation.rehearsal and not begun:
        passes, parity = job.recipe.passes, not allow_parity_failure
        rehearse(job.teacher, job.task, passes, job.target, student=job.student, parity=parity)


def _run(job: Job, identity: str, observer: Observer) -> Program:
    """The passes, with a latency oracle where this machine is the target."""
    run = _context(job, identity, observer)
    program = Program.begin(job.teacher, job.target, run, job.student)
    if job.target.why_not_measured() is not None:
        return run_passes(program, job.task, job.recipe.passes)
    oracle = Oracle(job.teacher, job.task, job.target, job.recipe.passes, run)
    try:
        run = dataclasses.replace(run, oracle=oracle)
        return run_passes(dataclasses.replace(program, run=run), job.task, job.recipe.passes)
    finally:
        oracle.folder.cleanup()


def _context(job: Job, identity: str, observer: Observer) -> RunContext:
    journal = Journal(job.folder.journal if is_main_process() else None, identity)
    return RunContext(job.recipe.seed, job.folder.path, journal, observer, identity=identity)


def _interface(job: Job, program: Program) -> dict[str, Any]:
    """What the manifest says of inputs and outputs, before anything is written."""
    assert isinstance(program.student, torch.fx.GraphModule)
    return describe_interface(program.student, job.task)


def _write(job: Job, program: Program) -> tuple[str, ...]:
    """Emit the student into the unfinished artifact; the names of its files."""
    folder = job.folder.unfinished_artifact
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return write_student(program, job.task, job.recipe, folder, _tuning(job, program))


def _tuning(job: Job, program: Program) -> Tuning | None:
    """The configurations of the fused student's kernels: those of a file, or by rule for one sample."""
    if program.fused is None:
        return None
    sample = tuple(x[:1] if x.ndim else x for x in job.task.example)
    return read_tuning(job.recipe.passes) or choose_tuning(program.fused, sample, gpu_for(job.target.name))


def _compare_sizes(job: Job, program: Program, interface: dict[str, Any], allow_parity_failure: bool) -> None:
    """Run what was written at other sizes of its free axes. Raises `ParityError` where it is wrong there.

    A runtime that does not take a batch of none is no fault; the manifest's `interface` says it.
    """
    assert isinstance(program.student, torch.fx.GraphModule)
    file = job.folder.unfinished_artifact / MODEL
    reason = why_not_at_other_sizes(
        job.teacher,
        program.student,
        job.task,
        onnx=file if file.exists() else None,
        fused=program.fused,
        optimized=job.target.why_not_measured() is None,
    )
    batch = interface["axes"].get(BATCH)
    if batch and batch["least"] == 0 and not (file.exists() and answers_none(program.student, file, job.task)):
        batch["least"] = 1
    if reason is not None and not allow_parity_failure:
        raise ParityError(
            f"parity: {reason}. The finished passes are kept in {job.folder.path}; --resume --allow-parity-failure "
            "finishes the artifact all the same"
        )


def _judge(job: Job, program: Program, result: SearchResult | None) -> Report:
    """Measure what is deployed, and write the report beside it."""
    folder = job.folder.unfinished_artifact
    promise, tool, cascade = (None, None, None) if result is None else (result.promise, result.tool, result.cascade)
    report = evaluate(program, job.task, job.recipe.passes, folder, job.evaluation, seed=job.recipe.seed, tool=tool)
    if cascade is not None:
        choice, here = cascade.choice, job.target.why_not_measured() is None
        timed = job.evaluation.latency and here
        own = measure_cascade(folder, MODEL, job.task, choice.routing, choice.routed, timed=timed, optimized=here)
        report = report.model_copy(update={"cascade": own})
    if result is not None and promise is not None:
        notes = report.notes if result.overrun is None else (*report.notes, result.overrun)
        report = report.model_copy(update={"promise": on_evaluation(promise, report), "notes": notes})
    write_report(report, folder)
    return report


def _ship(job: Job, program: Program, finished: Finished, allow_parity_failure: bool) -> None:
    """Move the finished files to where they go, the manifest last. Raises `ParityError` for a broken contract."""
    report = finished.report
    contracts = [report.parity, None if report.fusion is None else report.fusion.parity]
    broken = next((c for c in contracts if c is not None and not c.passed), None)
    if broken is not None and not allow_parity_failure:
        raise ParityError(
            f"parity: {broken.first_divergence}. The finished passes and the report are kept in "
            f"{job.folder.path}; --resume --allow-parity-failure finishes the artifact all the same"
        )
    identity = read_sealed(job.folder.identity, ("teacher", "data"), unsealed=True)
    name_two_files(job.folder.unfinished_artifact)
    manifest = {
        "pqk": importlib.metadata.version("pqk"),
        "versions": machine_fingerprint()["versions"],
        "target": program.target.name,
        "seed": job.recipe.seed,
        "teacher": identity["teacher"],
        # only of a student that was given: the plan of one without begins with the teacher
        **({} if job.student is None else {"student": network_fingerprint(job.student)}),
        "data": identity["data"],
        # only where another tool wrote model.onnx
        **({} if finished.tool is None else {"tool": finished.tool}),
        # only where the teacher answers what the student is not sure of
        **({} if finished.routing is None else {"cascade": dataclasses.asdict(finished.routing)}),
        **finished.interface,
        "preprocessing": job.task.preprocessing,
        "teacher_files": {p.name: digest_of_file(p) for p in job.folder.teacher_files if p.exists()},
    }
    seal(job.folder.unfinished_artifact, job.out, finished.names, manifest)
