"""A rehearsal of a compile, in seconds to minutes: everything is done except that training takes a few steps.

It finds what a long run would stumble over (a model that cannot be captured, a budget out of reach, a term whose layer
does not exist, an operator that the runtime refuses), and what it will cost: the time of a training step times the
steps, the memory at its highest, and the latency of the student, which does not depend on its weights.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from pqk.bench.measure import THREADS, ratio_to
from pqk.bench.oracle import ROUNDS as ROUNDS_OF_COMPILE
from pqk.bench.oracle import Oracle
from pqk.bench.statistics import Ratio
from pqk.bench.stopwatch import Stopwatch, training_seconds
from pqk.copies import copy_of
from pqk.core.costs import count_macs, count_parameters, float_bytes, why_not_counted
from pqk.core.modes import evaluating, fused_layers
from pqk.core.onnxruntime_session import copy_files, session, size_of
from pqk.core.pipeline import prepared, verify
from pqk.core.program import Pass, Program, Stage
from pqk.core.progress import Observer, Silent
from pqk.core.run_context import RunContext
from pqk.core.run_folder import scope_of
from pqk.data.augmentation import why_not_augmented
from pqk.errors import InputError, PqkError, Reason, first_line
from pqk.passes.prune.blocks import find_blocks
from pqk.passes.prune.law import check_groups
from pqk.recipe.factories import students_of
from pqk.recipe.recipe import Recipe, why_not_for_target
from pqk.rehearsal import why_not_deployed, why_not_exported
from pqk.scratch import ScratchFolder
from pqk.search.candidates import first_student
from pqk.target.machine import peak_memory
from pqk.target.target import Target
from pqk.task.state import frozen_copy
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage

STEPS = 6
"""training steps that are timed; the first two warm up"""
ROUNDS = 5
"""turns in which a candidate is timed"""


@dataclass
class Rehearsed:
    """One pass of the recipe: what it would leave alone and why, its time, and what is wrong with it."""

    index: int
    name: str
    stage: str
    seconds: float | None = None
    """estimate for the whole pass"""
    steps: int = 0
    """training steps"""
    step_ms: float | None = None
    declined: list[dict[str, str]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class Findings:
    """What `check` found. `problems` will make the compile fail; reasons stand where a number is None."""

    target: str
    seed: int
    teacher: dict[str, int]
    """parameters, macs (per sample), float_bytes"""
    given: dict[str, int] | None = None
    """the same of a student that is not cut out of its teacher; None: it is"""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """channel groups under the law: name, channels, layers, reason (None: it may be cut)"""
    blocks: dict[str, Any] = field(default_factory=dict)
    """residual blocks: `removable` paths and `declined`, path -> reason"""
    passes: list[Rehearsed] = field(default_factory=list)
    student: dict[str, int] | None = None
    """integer weights and biases, macs (per sample), size_bytes of model.onnx (on a GPU: of student.pt2)"""
    latency: dict[str, float] | None = None
    """teacher_ms, student_ms, ratio, ratio_low, ratio_high: ONNX Runtime, batch 1, two threads"""
    latency_reason: str | None = None
    integer_coverage: float | None = None
    begins_search: bool = False
    """whether `passes` are what the search for a contract begins with, and nobody's recipe"""
    no_gain: str | None = None
    """why this student is not worth a compile, where it is not significantly faster than its teacher"""
    memory_bytes: int = 0
    """the highest resident memory of this rehearsal, which takes every step that the compile takes"""
    seconds: float = 0.0
    """estimate for all passes; the evaluation at the end takes a few minutes more"""
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check(
    teacher: nn.Module,
    task: Task,
    recipe: Recipe,
    observer: Observer | None = None,
    *,
    student: nn.Module | None = None,
) -> Findings:
    """Rehearse `recipe` on a copy of `student`, or of what its `[student]` names, or else of `teacher`. Nothing is
    written.

    Of a contract without passes, the first student that the search cuts is rehearsed.

    Raises `InputError` where teacher, student and task do not fit each other; everything later is a finding.
    """
    rehearsal = Rehearsal(teacher, task, recipe, observer or Silent(), student)
    try:
        with fused_layers(False):
            return rehearsal.run()
    finally:
        rehearsal.oracle.folder.cleanup()


class Rehearsal:
    """One rehearsal of a recipe, and what it has found so far."""

    def __init__(
        self, teacher: nn.Module, task: Task, recipe: Recipe, observer: Observer, student: nn.Module | None = None
    ) -> None:
        self.teacher = frozen_copy(teacher, task.example)
        task.check(self.teacher)
        self.teacher, task = prepared(recipe.passes, self.teacher, task)
        with torch.no_grad():
            self.outputs = self.teacher(*task.example)
        searched = recipe.contract is not None and not recipe.passes
        if searched:
            recipe = dataclasses.replace(recipe, passes=first_student(self.teacher, task, self.outputs))
        students = students_of(student, recipe, self.teacher, task)
        # of a contract, what is rehearsed is cut out of the teacher
        given = students[0].module if students and recipe.contract is None else None
        self.task, self.recipe = task, recipe
        self.target = Target.detect() if recipe.target is None else Target.named(recipe.target.name)
        self.watch = Stopwatch(observer)
        run = RunContext(recipe.seed, observer=self.watch, rough=True)
        self.oracle = Oracle(self.teacher, task, self.target, recipe.passes, run, THREADS, ROUNDS)
        mismatch = self.target.why_not_measured()
        if mismatch is None:
            run = dataclasses.replace(run, oracle=self.oracle)
        self.program = Program.begin(self.teacher, self.target, run, given)
        self.found = Findings(self.target.name, recipe.seed, _costs(self.teacher, task), latency_reason=mismatch)
        self.found.begins_search = searched
        self.found.given = None if given is None else _costs(given, task)
        if mismatch is not None:
            self.found.warnings.append(mismatch)
        for whose, model in (("teacher", self.teacher), ("student", given)):
            if model is not None and (reason := why_not_counted(model, task.example)) is not None:
                self.found.warnings.append(f"{whose}: {reason}")
        if task.train is not None and (reason := why_not_augmented(task.train)) is not None:
            self.found.warnings.append(reason)
        self.found.warnings.extend(task.decoder_form.notes)
        if (reason := why_not_for_target(recipe.passes, self.target)) is not None:
            self.found.problems.append(reason)
        self.fresh_steps = _cacheable_steps(task)

    def run(self) -> Findings:
        self._prunable()
        with self.watch.task("rehearsing the passes", len(self.recipe.passes)) as advance:
            for index, p in enumerate(self.recipe.passes):
                row = self._rehearse(index, p)
                self.found.passes.append(row)
                advance(1, f"{row.name}: {row.problem or 'fine'}"[:60])
                if row.problem is not None and p.result_stage(self.program.stage) != self.program.stage:
                    break
        if self.program.stage == Stage.INT8:
            self.deploy()
        elif not any(p.problem for p in self.found.passes):
            self.found.problems.append(
                f"recipe: it leaves the student in stage {self.program.stage}; an artifact needs INT8: end it with "
                "capture, quantize, convert"
            )
        self.found.problems[:0] = [f"pass {r.index + 1} {r.problem}" for r in self.found.passes if r.problem]
        self.found.seconds = sum(r.seconds or 0 for r in self.found.passes)
        self.found.memory_bytes = peak_memory()
        return self.found

    def _prunable(self) -> None:
        """Every channel group under the law, and the blocks that can be left out."""
        ignore = tuple(pattern for p in self.recipe.passes for pattern in p.ignore)
        protect = tuple(pattern for p in self.recipe.passes for pattern in p.protect)
        try:
            with self.watch.task("checking channel groups", 1) as advance:
                groups = check_groups(self.program.origin, self.task.example, ignore)
                advance(1, f"{len(groups)} groups")
            self.found.groups = [dataclasses.asdict(g) for g in groups]
        except InputError as error:
            self.found.warnings.append(str(error))
        try:
            samples = next(self.task.calibration(8))
            blocks, declined = find_blocks(self.program.origin, samples, protect)
            self.found.blocks = {"removable": [b.path for b in blocks], "declined": declined}
        except Exception as error:  # user-defined blocks, called in ways that they do not expect
            self.found.warnings.append(f"blocks: {first_line(error, 300)}")

    def _rehearse(self, index: int, p: Pass) -> Rehearsed:
        row = Rehearsed(index, p.name, str(self.program.stage))
        program = dataclasses.replace(
            self.program, run=self.program.run.enter(scope_of(index, p.name)), declined=(), details={}
        )
        if program.stage == Stage.MODULE:  # a pass that fails half-way must not leave its cuts to the next one
            program = dataclasses.replace(program, student=copy_of(program.student, "student"))
        self.watch.clear()
        self.oracle.seconds.clear()
        began = time.perf_counter()
        try:
            if (reason := p.why_not_applied(self.task, self.outputs)) is not None:
                raise InputError(reason)
            torch.manual_seed(program.run.seed_for("pass"))
            after = self._short(p).apply(program, self.task)
            after = dataclasses.replace(after, stage=p.result_stage(program.stage))
            verify(after, self.task, program.run.scope)
        except PqkError as error:
            row.problem = str(error)
            return row
        except Exception as error:  # a rehearsal exists to find what nobody thought of
            row.problem = f'"{p.name}": {first_line(error, 300)}'
            return row
        took = time.perf_counter() - began
        row.declined = [{"layer": d.layer, "reason": d.reason} for d in after.declined]
        row.details = {} if p.notes_losses else dict(after.details)
        self.program = after
        self._cost(row, p, took, after.details)
        return row

    def _short(self, p: Pass) -> Pass:
        """`p` with a few training steps instead of its epochs."""
        return p if self.task.train is None else p.rehearsal(STEPS / len(self.task.train))

    def _cost(self, row: Rehearsed, p: Pass, took: float, details: Mapping[str, Any]) -> None:
        """The estimate of a pass: what it took, and its remaining steps at the time of those that were taken."""
        timed, ends = self.watch.of_trainings(self.program.run.scope)
        rest = took - sum(timed) + p.unrehearsed_seconds(details, self.task.validation.samples)
        rest += self._longer_timing(details)
        if timed and p.training_epochs and self.task.train is not None:
            row.steps = max(1, round(p.training_epochs * len(self.task.train)))
            step = statistics.median(timed[2:] or timed)
            row.step_ms = round(1e3 * step, 3)
            fresh = None if self.fresh_steps is None or p.why_not_cached() is not None else self.fresh_steps
            if fresh is not None:
                self.fresh_steps = max(0, fresh - row.steps)
            answer = float(details.get("teacher_seconds", 0.0))
            rest = p.rounds * rest + training_seconds(row.steps, fresh, step, answer)
            rest += max(0, math.ceil(p.training_epochs) - p.rounds) * statistics.median(ends)
        row.seconds = round(max(rest, 0.0) + self._scoring(), 3)

    def _longer_timing(self, details: Mapping[str, Any]) -> float:
        """Seconds by which a compile times candidates longer: over more turns."""
        if not self.oracle.seconds:
            return 0.0
        count = len(self.oracle.seconds) + int(details.get("estimated", {}).get("candidates", 0))
        return count * statistics.median(self.oracle.seconds) * (ROUNDS_OF_COMPILE / ROUNDS - 1)

    def _scoring(self) -> float:
        """Seconds of the metric on validation data, which is noted after every pass."""
        batch = next(self.task.validation.batches())
        return len(self.task.validation) * forward_seconds(self.program.student, batch.inputs)

    def deploy(self) -> None:
        """Emit student and teacher, hold them to their contracts, and time the student in turn with the teacher."""
        with ScratchFolder("check") as name:
            folder, here, teacher = Path(name), self.found.latency_reason is None, self.oracle.teacher_path
            self._take_emitted(folder / "model.onnx")
            self.found.problems += why_not_deployed(self.program, self.task, folder, here)
            if self.target.runtime == "onnxruntime":
                self.found.problems += why_not_exported(self.program, self.task, teacher)
            # A student that is fused for later, and runs on this CPU in ONNX Runtime until then, is measured there.
            file = folder / ("student.pt2" if self.target.runtime == "triton" else "model.onnx")
            try:
                self._measure(file, teacher, here)
            except PqkError as error:
                self.found.problems.append(str(error))
            except FileNotFoundError:
                pass  # it was not written, which is a problem already
            except Exception as error:  # as above
                self.found.problems.append(f"emit: {first_line(error, 300)}")

    def _take_emitted(self, path: Path) -> None:
        """Goes on with the student that was timed last, and its file, where it is the same graph with other weights.

        Writing a file takes seconds; what refuses or slows it does not lie in its weights.
        """
        if self.oracle.emitted is None or self.program.fused is not None or self.target.runtime != "onnxruntime":
            return
        graph, file = self.oracle.emitted
        if _alike(graph, self.program.student):
            copy_files(file, path)
            self.program = dataclasses.replace(self.program, student=graph)

    def _measure(self, path: Path, teacher: Path, here: bool) -> None:
        task = self.task
        weights = [n for n, t in self.program.student.state_dict().items() if t.dtype in (torch.int8, torch.int32)]
        tensors = self.program.student.state_dict()
        self.found.student = {
            "weights": sum(tensors[n].numel() for n in weights),
            "macs": count_macs(self.program.student, task.example),
            "size_bytes": size_of(path),
        }
        if not here:
            return
        feeds = task.feeds(1)
        with self.watch.task("timing the student beside its teacher", 1) as advance:
            ratio = ratio_to(session(teacher, threads=THREADS), session(path, threads=THREADS), feeds)
            advance(1, f"{ratio.ratio:.2f}x")
        milliseconds = self.oracle.baseline()
        self.found.latency = {
            "teacher_ms": milliseconds,
            "student_ms": milliseconds / ratio.ratio,
            "ratio": ratio.ratio,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }
        coverage = integer_coverage(path, feeds)
        self.found.integer_coverage = coverage.share
        if ratio.low <= 1:
            self.found.no_gain = why_no_gain(self.found, ratio)
        if (reason := self.task.why_not_everywhere(self.program.student)) is not None:
            self.found.warnings.append(reason)
        if coverage.reason is not None:
            self.found.warnings.append(f"integer coverage: {coverage.reason}")


def why_no_gain(found: Findings, ratio: Ratio) -> Reason:
    """What a student that is not faster has, and has not."""
    assert found.student is not None
    left = found.student["macs"] / max(1, found.teacher["macs"])
    integer = "an unknown share" if found.integer_coverage is None else f"{100 * found.integer_coverage:.2f} %"
    return (
        f"it runs {ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f}) as fast as its teacher, which is no "
        f"significant gain: {integer} of its MACs are integer, and it has {100 * left:.0f} % of the teacher's MACs; "
        "see what was declined above, and why"
    )


def _alike(graph: fx.GraphModule, other: nn.Module) -> bool:
    """Whether two graphs compute the same but for the values of their tensors."""
    shapes = [{k: (t.shape, t.dtype) for k, t in m.state_dict().items()} for m in (graph, other)]
    return isinstance(other, fx.GraphModule) and graph.code == other.code and shapes[0] == shapes[1]


def _costs(model: nn.Module, task: Task) -> dict[str, int]:
    macs = count_macs(model, task.example)
    return {"parameters": count_parameters(model), "macs": macs, "float_bytes": float_bytes(model)}


def _cacheable_steps(task: Task) -> int | None:
    """Training steps until the teacher has answered every view of every sample; None where nothing is cached."""
    if task.train is None or task.train.key_count is None:
        return None
    views = getattr(task.train, "views", None) or 1
    return views * len(task.train)


@torch.no_grad()
def forward_seconds(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """The faster of two forward passes in eval mode; the mode is restored."""
    times = []
    with evaluating(model):
        for _ in range(2):
            began = time.perf_counter()
            model(*inputs)
            times.append(time.perf_counter() - began)
    return min(times)
