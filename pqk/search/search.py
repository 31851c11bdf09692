"""The search for a student that keeps a contract, within its budget.

First what costs no training: integer forms of the teacher. Then a ladder of ever smaller students, each cut out of the
one before and trained briefly, and students of another shape where some are given, all judged in integers; then those
that may keep the contract are trained at length (see `finals`).
Each decision is journaled, and each pass saved: a search that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pqk.bench.baselines import FOR_TEXTS, TOOLS, Tool, is_transformer
from pqk.core.distributed import alone
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.errors import InputError, Reason
from pqk.passes.quantize.blocks import why_not_in_blocks
from pqk.recipe.contract import Contract
from pqk.recipe.factories import GivenStudent
from pqk.recipe.recipe import Recipe
from pqk.report.promise import Promise
from pqk.report.schema import VariantName
from pqk.search.attempts import Attempts
from pqk.search.candidates import FLOAT, STATIC, Candidate, by_tool, forms, gentler, given, in_float, mixed
from pqk.search.cascade import ChosenCascade, best_cascade
from pqk.search.deciding import Deciding
from pqk.search.finals import Finals
from pqk.search.judge import Judge
from pqk.search.ladder import HOPELESS, Ladder, promises
from pqk.search.reach import refuse_out_of_reach, why_not_in_reach
from pqk.search.runs import Runs
from pqk.search.shapes import best_shape
from pqk.search.spending import Spending
from pqk.search.verdict import Terms, Tried, promise_of
from pqk.target.target import Target
from pqk.task.task import Task

TIMING = 0.25
"""share of the budget that is left that timing single layers may take"""
SLOW = 2.0
"""times faster than float from which on integers pay in the layers that are many, and none is timed"""
LAYER_SHARE = 0.5
"""of the time of one candidate, that timing one of its layers takes"""


@dataclass(frozen=True)
class SearchResult:
    """What a search ends in."""

    recipe: Recipe
    """the passes that were chosen"""
    students: tuple[GivenStudent, ...]
    """what they begin with, where that is not a copy of the teacher"""
    program: Program
    promise: Promise
    tool: Tool | None = None
    """whose file is deployed, in place of what the passes make"""
    file: Path | None = None
    """that file"""
    cascade: ChosenCascade | None = None
    """where the student answers what it is sure of alone"""
    overrun: str | None = None
    """by how much the budget was overrun, and why; None where it was not"""


@dataclass
class ContractSearch:
    """One search for a student of `teacher`. `run` does it."""

    teacher: nn.Module
    students: Sequence[GivenStudent]
    """of another shape, which compete"""
    task: Task
    target: Target
    recipe: Recipe
    """with the contract; its passes compete with what is found"""
    context: RunContext
    """of the whole compile: each candidate has a folder of its own below its folder"""
    deciding: Deciding
    """what it is decided on"""

    def __post_init__(self) -> None:
        assert self.recipe.contract is not None and self.context.folder is not None
        self.contract = self.recipe.contract
        place = self.context.folder / "search"
        place.mkdir(parents=True, exist_ok=True)
        self.out_of_reach: Reason | None = None
        self.disputed: dict[VariantName, Reason] = {}
        """rows of the report's table that seemed to beat what ships, and what was found where both were timed again"""
        self.shapes = {student.name: student for student in self.students}
        modules = {name: student.module for name, student in self.shapes.items()}
        self.runs = Runs(self.teacher, self.task, self.target, self.context, place, modules)
        timed = self.target.why_not_measured() is None
        self.judge = Judge(self.teacher, self.task, self.deciding.data, place, timed=timed, seed=self.recipe.seed)

    def run(self) -> SearchResult:
        """Searches, and leaves the chosen student's passes saved.

        Raises `InputError` before anything is trained where contract, data and target do not fit each other, or the
        budget is too small for one candidate.
        """
        allowed = self.contract.allowed_drop(self.judge.unit, self.judge.teacher_value)
        self.judge.refuse_few(allowed)
        terms = Terms(self.contract, allowed, self.judge.unit == "share")
        spending = Spending(self.contract, 0 if self.task.train is None else len(self.task.train))
        spending.refuse_few_epochs()
        with torch.no_grad():
            outputs = self.teacher(*self.task.example)
        with self.context.observer.task("searching", 100) as advance:
            self.attempts = Attempts(
                self.task, outputs, self.context, self.runs, self.judge, terms, spending, advance
            )  # fmt: skip
            form = self._forms()
            if self.task.train is not None:
                self._train(form)
            else:
                self.attempts.ended = "nothing was cut out of the teacher: there is no training data"
        best = self.attempts.best
        if self.contract.cascade and not terms.holds(best.worth):
            cascade = best_cascade(self.attempts)
            if cascade is not None:
                return replace(self._result(cascade.tried), cascade=cascade)
            result = self._result(best)
            obstacle = f"{result.promise.obstacle}; no cascade of a student and the teacher keeps it either"
            return replace(result, promise=result.promise.model_copy(update={"obstacle": obstacle}))
        return self._result(best)

    def instead(self, result: SearchResult, row: VariantName, file: Path) -> SearchResult | None:
        """What ships in place of a student, in `file`, that a row of the report's table beats.

        None where that cannot be made, or is no faster where both are timed again: see `disputed`.
        """
        attempts = self.attempts
        beaten = next(t for t in attempts.tried if t.candidate.name == result.promise.chosen)
        tool = next((name for name in TOOLS if name == row), None)
        if tool is not None:
            candidate = by_tool(tool)
        elif row == "teacher_fp32":
            candidate = next(c for c in forms(self.teacher) if c.name == FLOAT)
        elif row in ("pruned", "factorized", "pruned_distilled", "given_distilled"):
            candidate = in_float(beaten.candidate if result.cascade is None else result.cascade.student)
        else:
            return None
        known = (t for t in attempts.tried if t.candidate.name == candidate.name)
        tried = next(known, None) or attempts.judged(candidate)
        certain = attempts.terms.holds(tried.worth) or not attempts.terms.holds(beaten.worth)
        if tried.worth is None or tried.fate.startswith("ships") or not certain:
            return None  # it cannot be made, did ship before, or breaks the contract for all that is known
        if result.cascade is None and (reason := self._why_not_faster(tried, beaten, file)):
            self.disputed[row] = reason
            return None
        self.disputed.clear()  # they were of what shipped before
        tried.fate = f"ships: on evaluation data better in metric and speed than {beaten.candidate.name}"
        return self._result(tried)

    def _why_not_faster(self, tried: Tried, beaten: Tried, file: Path) -> Reason | None:
        """Why `tried` is not faster than what is in `file` for sure, both in turn, in two sessions each."""
        if not self.judge.timed:
            return None
        name, candidate = tried.candidate.name, tried.candidate

        def measure() -> list[float]:
            with alone():
                program = self.runs.program(candidate.passes, candidate.shape)
                return [*self.judge.faster(program, self.attempts.file(candidate), than=file)]

        ratio, low, high = self.context.decide(f"again/{name} and {beaten.candidate.name}", measure)
        if low > 1:
            return None
        return (
            f"{name} is {ratio:.2f}x as fast as what ships ({low:.2f} to {high:.2f}), where both are timed again in "
            "turn, in two sessions each: other work disturbed the times of the table"
        )

    def _result(self, chosen: Tried) -> SearchResult:
        attempts, candidate = self.attempts, chosen.candidate
        promise = promise_of(
            attempts.terms, attempts.tried, chosen, self.judge, attempts.spending.seconds, self.deciding.caution,
            attempts.ended,
        )  # fmt: skip
        if promise.obstacle and self.out_of_reach:
            promise = promise.model_copy(update={"obstacle": f"{promise.obstacle}; {self.out_of_reach}"})
        begun = () if candidate.shape is None else (self.shapes[candidate.shape],)
        recipe = replace(self.recipe, passes=candidate.passes, contract=None, student=begun[0].spec if begun else None)
        program = self.runs.program(candidate.passes, candidate.shape)
        overrun = attempts.spending.why_not_in_budget()
        return SearchResult(recipe, begun, program, promise, candidate.tool, attempts.file(candidate), overrun=overrun)

    # ---- the teacher without training

    def _forms(self) -> Candidate:
        """Judges the teacher's integer forms and the recipe of the user; returns the form that students will have."""
        attempts = self.attempts
        texts = self.judge.task.generates
        first, *others = forms(self.teacher, blocks=texts and why_not_in_blocks(self.runs.target) is None)
        attempts.prepare()
        refuse_out_of_reach(attempts)
        attempts.spending.overhead = attempts.judged(first).seconds
        attempts.time_a_step()
        attempts.spending.refuse_few_seconds()
        kept_free = attempts.spending.kept_free
        if not attempts.terms.holds(attempts.tried[0].worth):
            others += gentler()
        attempts.all_judged(attempts.within(others, kept_free))
        if self.judge.timed:
            self._time_layers()
            tools = FOR_TEXTS if texts else self._tools()
            attempts.all_judged(attempts.within([by_tool(tool) for tool in tools], kept_free))
        ready = [t for t in attempts.tried if t.worth is not None and t.candidate.tool is None]
        own = next((s.name for s in self.students if self.recipe.student is not None), None)
        for candidate in attempts.within(given(self.recipe.passes, own)):
            attempts.judged(candidate)
        if not ready:
            raise InputError(f"contract: the teacher compiles in no form: {attempts.tried[0].fate}")
        near = [t for t in ready if promises(attempts.terms, t)] or ready
        return max(near, key=lambda t: t.known.speed).candidate

    def _tools(self) -> tuple[Tool, ...]:
        """Other tools whose form of the teacher is tried."""
        transformer = self.context.decide("transformer", lambda: is_transformer(self.judge.teacher_files[0]))
        return ("teacher_ptq", "teacher_dynamic") if transformer else ("teacher_ptq",)

    def _time_layers(self) -> None:
        """The form in which each layer is what it is faster as, where the budget allows to time them."""
        attempts = self.attempts
        static = next(t for t in attempts.tried if t.candidate.name == STATIC)
        layers = sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear) for m in self.teacher.modules())
        cost = LAYER_SHARE * layers * static.seconds
        if static.worth is None:
            return
        if cost > TIMING * attempts.spending.room:
            why = f"not tried: timing its {layers} layers would take about {cost:.0f} s, too much of what is left"
            attempts.untried(mixed(), why)
        elif static.worth.speed < SLOW:
            attempts.judged(mixed())

    def _train(self, form: Candidate) -> None:
        """Cuts and trains students while the budget lasts."""
        self.out_of_reach = why_not_in_reach(self.attempts, form)
        ladder = None if self.out_of_reach else Ladder.of(self.attempts, form)
        if self.out_of_reach:
            self.attempts.ended = "nothing was cut out of the teacher: even the smallest students are too slow"
        starts = [] if ladder is None else ladder.starts()
        entrant = best_shape(self.attempts, list(self.shapes)) if self.shapes else None
        if entrant is not None and promises(self.attempts.terms, entrant.tried):
            starts.append(entrant.tried)
        elif entrant is not None:
            entrant.tried.fate = HOPELESS
        Finals(self.attempts, ladder, entrant).run(starts)


def why_not_searched(contract: Contract, machine: Target) -> Reason | None:
    """Why no student is searched for under this contract and for this target, else None."""
    if machine.runtime != "onnxruntime":
        return f"the search is for ONNX Runtime, and {machine.name} runs {machine.runtime}; give the passes in a recipe"
    if contract.timed and (reason := machine.why_not_measured()) is not None:
        return f"{reason}; leave out min_speedup and max_latency_ms, or compile on the target"
    return None
