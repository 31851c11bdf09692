"""The search for a student that keeps a contract, within its budget.

First what costs no training: integer forms of the teacher. Then a ladder of ever smaller students, each cut out of the
one before and trained briefly, all judged in integers; then the fastest rung that promises to keep the contract is
trained for the rest of the budget, and where it does not, the one above it. Everything is judged on validation data.
Each decision is journaled, and each pass saved: a search that was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pqk.core.program import Pass, Program
from pqk.core.run_context import RunContext
from pqk.errors import InputError, PqkError, Reason
from pqk.passes.distill.keep_best import Criterion
from pqk.recipe.contract import Contract
from pqk.recipe.recipe import Recipe
from pqk.report.promise import Promise
from pqk.search.candidates import (
    FLOAT,
    GOALS,
    STATIC,
    Candidate,
    CutKind,
    TrainingChoice,
    finished,
    forms,
    given,
    mixed,
    prune,
    rung,
)
from pqk.search.judge import Judge, Worth
from pqk.search.runs import Runs
from pqk.search.spending import Spending
from pqk.search.trials import choose_training
from pqk.search.verdict import Terms, Tried, promise_of
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import accelerator

TRIALS, LONGEST_TRIALS = 0.08, 600.0
"""share of the budget that is left, and seconds, for trying how to train"""
PROMISING = 8.0
"""times the drop that is allowed that a rung may lose before it is trained at length"""
FASTER = 1.05
"""by which a student must be faster than what holds already to be trained"""
LEAST_CUT = 0.95
"""share of the MACs that a rung leaves at most, else nothing more can be cut"""
NEXT = 1.15
"""by which the goal of a rung is at least below what the one above it reached"""
TIMING = 0.25
"""share of the budget that is left that timing single layers may take"""
SLOW = 2.0
"""times faster than float from which on integers pay in the layers that are many, and none is timed"""
LAYER_SHARE = 0.5
"""of the time of one candidate, that timing one of its layers takes"""
CUTS: tuple[CutKind, ...] = ("width", "depth")


@dataclass(frozen=True)
class SearchResult:
    """What a search ends in."""

    recipe: Recipe
    """the passes that were chosen"""
    program: Program
    promise: Promise


@dataclass
class ContractSearch:
    """One search for a student of `teacher`. `run` does it."""

    teacher: nn.Module
    task: Task
    target: Target
    recipe: Recipe
    """with the contract; its passes compete with what is found"""
    context: RunContext
    """of the whole compile: each candidate has a folder of its own below its folder"""
    tried: list[Tried] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.recipe.contract is not None and self.context.folder is not None
        self.contract = self.recipe.contract
        place = self.context.folder / "search"
        place.mkdir(parents=True, exist_ok=True)
        self.runs = Runs(self.teacher, self.task, self.target, self.context, place)
        self.spending = Spending(self.contract, 0 if self.task.train is None else len(self.task.train))
        timed = self.target.why_not_measured() is None
        self.judge = Judge(self.teacher, self.task, place, timed=timed, seed=self.recipe.seed)
        with torch.no_grad():
            self.outputs = self.teacher(*self.task.example)

    def run(self) -> SearchResult:
        """Searches, and leaves the chosen student's passes saved.

        Raises `InputError` before anything is trained where contract, data and target do not fit each other, or the
        budget is too small for one candidate.
        """
        value = self.judge.teacher_value
        allowed = self.contract.allowed_drop(self.judge.unit, value)
        self.judge.refuse_few(allowed)
        self.terms = Terms(self.contract, allowed, self.judge.unit == "share")
        with self.context.observer.task("searching", 100) as advance:
            self.advance, self.shown = advance, 0
            form = self._forms()
            if self.task.train is not None:
                self._train(form)
        chosen = self.terms.best(self.tried)
        promise = promise_of(self.terms, self.tried, chosen, self.judge, self.spending.seconds)
        recipe = replace(self.recipe, passes=chosen.candidate.passes, contract=None)
        return SearchResult(recipe, self.runs.program(chosen.candidate.passes), promise)

    # ---- the teacher without training

    def _forms(self) -> Candidate:
        """Judges the teacher's integer forms and the recipe of the user; returns the form that students will have."""
        for candidate in forms(self.teacher):
            judged = self._judge(candidate)
            if candidate.name == STATIC:
                self.spending.overhead = judged.seconds
            if candidate.name == STATIC and self.spending.room == 0:
                raise InputError(
                    f'contract: budget = "{self.contract.budget}" is too small for one candidate: INT8 without '
                    f"training took {judged.seconds:.0f} s; give it more"
                )
        if self.judge.timed:
            self._time_layers()
        ready = [(t, t.worth) for t in self.tried if t.worth is not None]
        for candidate in given(self.recipe.passes):
            self._judge(candidate)
        if not ready:
            raise InputError(f"contract: the teacher compiles in no form: {self.tried[0].fate}")
        near = [pair for pair in ready if pair[1].drop <= PROMISING * self.terms.allowed] or ready
        return max(near, key=lambda pair: pair[1].speed)[0].candidate

    def _time_layers(self) -> None:
        """The form in which each layer is what it is faster as, where the budget allows to time them."""
        static = next(t for t in self.tried if t.candidate.name == STATIC)
        layers = sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear) for m in self.teacher.modules())
        cost = LAYER_SHARE * layers * static.seconds
        if static.worth is None:
            return
        if cost > TIMING * self.spending.room:
            why = f"not tried: timing its {layers} layers would take about {cost:.0f} s, too much of what is left"
            self.tried.append(Tried(mixed(), None, 0.0, why))
        elif static.worth.speed < SLOW:
            self._judge(mixed())

    # ---- students

    def _train(self, form: Candidate) -> None:
        """Goes down the ladder, and trains at length what promises to keep the contract, as long as it does."""
        training = self._choose_training()
        if training is None:
            return
        self.form, self.training = form, training
        first = {}
        for cut in CUTS:
            if (found := self._rung((), cut, 1)) is not None:
                first[cut] = found
        starts = self._down(self._better(first), first) if first else []
        whole = next(t for t in self.tried if t.candidate.name == form.name)
        if not self.terms.holds(whole.worth) and form.name != FLOAT:
            starts.insert(0, whole)  # all of the teacher, trained under quantization
        while starts:
            start = starts.pop()
            if not self._worth_training(start):
                continue
            done = self._at_length(start)
            if done is None:
                return
            if self.terms.holds(done.worth):
                starts = self._deeper(done)

    def _down(self, cut: CutKind, first: dict[CutKind, Tried]) -> list[Tried]:
        """The rungs of one ladder as far as they promise to keep the contract, each cut out of the one before."""
        rungs = [first[cut]]
        while self._goes_on(rungs[-1]):
            following = self._next(rungs[-1], cut)
            if following is None:
                break
            rungs.append(following)
        while len(rungs) > 1 and not self._promises(rungs[-1]):
            rungs.pop().fate = "loses too much for a training at length to be tried"
        return rungs

    def _deeper(self, done: Tried) -> list[Tried]:
        """What to train next where a student keeps the contract: one that is cut out of it, if speed is free."""
        if self.contract.free == "metric" or done.candidate.cut is None or not self.spending.allows_more:
            return []
        following = self._next(done, done.candidate.cut)
        return [] if following is None else [following]

    def _at_length(self, start: Tried) -> Tried | None:
        """A rung, trained; None where no budget is left for it."""
        assert start.worth is not None
        epochs = self.spending.at_length(self.training, start.worth.macs / self._macs)
        if not epochs:
            start.fate = "no budget was left to train it at length"
            return None
        keep: Criterion = "metric" if self.task.validation.labelled else "teacher"
        return self._judge(self._fitted(finished(start.candidate, self.form, self.training, epochs, keep)))

    def _choose_training(self) -> TrainingChoice | None:
        """How students learn, tried on the teacher's own first rung; None where nothing can be trained."""
        room = min(TRIALS * self.spending.room, LONGEST_TRIALS)

        def measure() -> Any:
            began = time.perf_counter()
            try:
                found: Any = asdict(choose_training(self._first_cut(), self.task, self.outputs, room))
            except PqkError as error:
                found = str(error)
            return {"training": found, "seconds": time.perf_counter() - began}

        entry = self.context.decide("training", measure)
        self.spending.seconds += entry["seconds"]
        if isinstance(entry["training"], str):
            self.tried.append(
                Tried(Candidate("trained", "a student that is trained", ()), None, 0.0, entry["training"])
            )
            return None
        return TrainingChoice(**entry["training"])

    def _first_cut(self) -> Program:
        """The teacher cut to the first rung, by width or else by depth; as it is where nothing is cut."""
        for cut in CUTS:
            program = self.runs.program((prune(1, cut).fitted(self.task, self.outputs),))
            if program.plan:
                return program
        return self.runs.program(())

    def _worth_training(self, start: Tried) -> bool:
        """Whether a student may become better, in what is free, than the best of what there is."""
        best = self.terms.best(self.tried)
        assert start.worth is not None and best.worth is not None
        if self.terms.lacks_speed(start.worth):
            return False
        if not self.terms.holds(best.worth):
            return True
        return self.contract.free == "speed" and start.worth.speed > FASTER * best.worth.speed

    def _better(self, first: dict[CutKind, Tried]) -> CutKind:
        """The faster way to cut, unless it loses more by half of what is allowed, or by a point."""
        worths = {cut: t.worth for cut, t in first.items() if t.worth is not None}
        slack = 0.5 * min(self.terms.allowed, 0.02)
        least = min(w.drop for w in worths.values())
        return min(worths, key=lambda cut: (worths[cut].drop > least + slack, -worths[cut].speed))

    def _goes_on(self, last: Tried) -> bool:
        """Whether a still smaller student may be wanted, and may keep the contract."""
        if not self.spending.allows_more:
            return False
        assert last.worth is not None
        return self.terms.lacks_speed(last.worth) if self.contract.free == "metric" else self._promises(last)

    def _promises(self, rung: Tried) -> bool:
        assert rung.worth is not None
        return rung.worth.drop <= PROMISING * self.terms.allowed

    def _next(self, last: Tried, cut: CutKind) -> Tried | None:
        """The rung below one, which may have gone further than its own goal; None where there is none."""
        assert last.worth is not None
        reached = NEXT * self._macs / last.worth.macs
        level = next((i for i, goal in enumerate(GOALS, 1) if goal >= reached and i > last.candidate.level), None)
        return None if level is None else self._rung(last.candidate.floats, cut, level)

    @property
    def _macs(self) -> int:
        """MACs of the whole teacher, in integers."""
        return next(t.worth.macs for t in self.tried if t.worth is not None)

    def _rung(self, above: Sequence[Pass], cut: CutKind, level: int) -> Tried | None:
        """The next rung of a ladder in integers, briefly trained; None where nothing more can be cut."""
        candidate = self._fitted(rung(above, cut, level, self.form, self.training, self.spending.brief(self.training)))
        if any(t.candidate.name == candidate.name for t in self.tried):
            candidate = replace(candidate, name=f"{candidate.name}, of what was trained")
        known = [(t.candidate.floats, t.worth.macs) for t in self.tried if t.worth is not None]
        before = min((macs for floats, macs in known if floats == tuple(above)), default=self._macs)
        found = self._judge(candidate)
        if found.worth is None:
            return None
        if found.worth.macs <= LEAST_CUT * before:
            return found
        found.fate = f"{cut} leaves {found.worth.macs / before:.0%} of the MACs: no more can be cut so"
        return None

    # ---- candidates

    def _fitted(self, candidate: Candidate) -> Candidate:
        return replace(candidate, passes=tuple(p.fitted(self.task, self.outputs) for p in candidate.passes))

    def _judge(self, candidate: Candidate) -> Tried:
        """Makes a candidate and judges it, once in a run; one that does not compile is told why."""

        def measure() -> Any:
            began, worth, fate = time.perf_counter(), None, ""
            try:
                worth = asdict(self.judge.worth(self.runs.program(candidate.passes)))
            except PqkError as error:
                fate = f"does not compile: {error}"
            return {"worth": worth, "fate": fate, "seconds": time.perf_counter() - began}

        entry = self.context.decide(f"candidate/{candidate.name}", measure)
        self.spending.count(candidate.passes, entry["seconds"])
        worth = None if entry["worth"] is None else Worth(**entry["worth"])
        tried = Tried(candidate, worth, entry["seconds"], entry["fate"])
        self.tried.append(tried)
        self._show(tried)
        return tried

    def _show(self, tried: Tried) -> None:
        percent = round(100 * self.spending.part)
        text = tried.fate.partition("\n")[0] if tried.worth is None else _numbers(tried.worth)
        self.advance(percent - self.shown, f"{tried.candidate.name}: {text}"[:60])
        self.shown = percent


def why_not_searched(contract: Contract, machine: Target, begun: bool) -> Reason | None:
    """Why no student is searched for under this contract, for this target and in this many processes, else None.

    `begun`: whether the compile begins with a student of another shape.
    """
    if accelerator().num_processes > 1:
        return "the search runs in one process; start it in one, or give the passes in a recipe"
    if machine.runtime != "onnxruntime":
        return f"the search is for ONNX Runtime, and {machine.name} runs {machine.runtime}; give the passes in a recipe"
    if contract.timed and (reason := machine.why_not_measured()) is not None:
        return f"{reason}; leave out min_speedup and max_latency_ms, or compile on the target"
    if begun:
        return (
            "the search cuts students out of the teacher, and does not begin with another one; give the passes for a "
            "student of another shape in a recipe, without a contract"
        )
    return None


def _numbers(worth: Worth) -> str:
    speed = "" if worth.ratio is None else f", {worth.ratio:.2f}x"
    return f"{worth.metric:.4g}{speed}, {worth.size_bytes / 1e6:.2f} MB"
