"""The networks that one search tries: each is made, judged and journaled once, and what it took is counted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pqk.core.distributed import alone, from_main, rank, wait_for_all, world_size
from pqk.core.program import Program
from pqk.core.progress import Advance
from pqk.core.run_context import RunContext
from pqk.errors import PqkError
from pqk.recipe.contract import Contract
from pqk.search.candidates import Candidate, TrainingChoice
from pqk.search.judge import Judge, Worth
from pqk.search.runs import Runs
from pqk.search.spending import Spending
from pqk.search.trials import choose_training, first_step
from pqk.search.verdict import Terms, Tried
from pqk.task.task import Task

TRIALS, LONGEST_TRIALS = 0.08, 600.0
"""share of the budget that is left, and seconds, for trying how to train"""
LEFT = 0.35
"""share of the drop after a brief training that is expected to be left after one at length"""
FASTER = 1.05
"""by which a student must be faster than what holds already to be trained"""


@dataclass
class Attempts:
    """What was tried so far, by what terms, and what may still be spent."""

    task: Task
    outputs: Any
    """the teacher's for the example"""
    context: RunContext
    """of the whole compile"""
    runs: Runs
    judge: Judge
    terms: Terms
    spending: Spending
    advance: Advance
    tried: list[Tried] = field(default_factory=list)
    ended: str | None = None
    """why no student was pruned further, in words; None: none was pruned"""
    shown: int = 0
    """per cent of the budget that were shown as spent"""

    @property
    def contract(self) -> Contract:
        return self.terms.contract

    @property
    def macs(self) -> int:
        """MACs of the whole teacher, in integers."""
        return next(t.worth.macs for t in self.tried if t.worth is not None)

    @property
    def best(self) -> Tried:
        """What would ship if nothing else were tried."""
        return self.terms.best(self.tried)

    def within(self, candidates: Sequence[Candidate], keeping: float = 0.0) -> list[Candidate]:
        """Those that what is left of the budget but for `keeping` seconds pays for, first come; notes the others."""
        seconds, epochs, found = keeping, 0.0, []
        for candidate in map(self.fitted, candidates):
            more = self.spending.expected(candidate.passes, candidate.shape)
            if reason := self.spending.why_not_begun(*more, seconds, epochs):
                self.untried(candidate, reason)
            else:
                seconds, epochs = seconds + more[0], epochs + more[1]
                found.append(candidate)
        return found

    def judged(self, candidate: Candidate, size: float = 1.0) -> Tried:
        """Makes a candidate and judges it, once in a run; one that does not compile is told why.

        `size` is as in `Spending.expected`.
        """
        candidate = self.fitted(candidate)

        def measure() -> Any:
            began, worth, fate = time.perf_counter(), None, ""
            try:
                with alone():
                    program = self.runs.program(candidate.passes, candidate.shape)
                    worth = asdict(self.judge.worth(program, self.file(candidate)))
            except PqkError as error:
                fate = f"does not compile: {error}"
            return {"worth": worth, "fate": fate, "seconds": time.perf_counter() - began}

        entry = self.context.decide(f"candidate/{candidate.name}", measure)
        self.spending.count(candidate.name, candidate.passes, entry["seconds"], candidate.shape, size)
        worth = None if entry["worth"] is None else Worth(**entry["worth"])
        return self._add(Tried(candidate, worth, entry["seconds"], entry["fate"]))

    def all_judged(self, candidates: Sequence[Candidate]) -> list[Tried]:
        """Judges candidates that do not depend on each other; several processes make a share of them each.

        Where there is one process it makes them one after the other, with the same result: a candidate is made by one
        process, whose passes the others find in the folder that they share.
        """
        if world_size() > 1:
            names = [c.name for c in candidates]
            todo = from_main(lambda: [n for n in names if not self.context.is_decided(f"candidate/{n}")])
            mine = [self.fitted(c) for c in candidates if c.name in todo][rank() :: world_size()]
            began = time.perf_counter()
            with alone():
                for candidate in mine:
                    with contextlib.suppress(PqkError):  # the main process meets it, too, and notes it
                        self.runs.program(candidate.passes, candidate.shape)
            wait_for_all()
            took = time.perf_counter() - began
            spent = self.context.decide(f"together/{'; '.join(names)}", lambda: took)
            longest = max((self.spending.expected(c.passes, c.shape)[0] for c in candidates), default=0.0)
            self.spending.add(", ".join(names), spent, longest)
        return [self.judged(c) for c in candidates]

    def fitted(self, candidate: Candidate) -> Candidate:
        """A candidate as this task can have it."""
        return replace(candidate, passes=tuple(p.fitted(self.task, self.outputs) for p in candidate.passes))

    def file(self, candidate: Candidate) -> Path | None:
        """What is deployed of a candidate that another tool makes; None: what its passes make."""
        return None if candidate.tool is None else self.judge.by_tool(candidate.tool, self.runs.target)

    def untried(self, candidate: Candidate, why: str, seconds: float = 0.0) -> Tried:
        """Notes a candidate that was not judged, why, and the seconds in which that was found."""
        return self._add(Tried(candidate, None, seconds, why))

    def training(self, program: Callable[[], Program], what: str = "", share: float = 1.0) -> TrainingChoice | str:
        """How a student learns, tried on a program with it, or why nothing can be trained.

        `what` names the student where it is not cut out of the teacher; `share` is that of the usual time for trials.
        """
        spending = self.spending
        least = spending.least_training
        if reason := spending.why_not_begun(least, 0.0):
            return reason
        room = share * min(TRIALS * spending.room, LONGEST_TRIALS)

        def measure() -> Any:
            began, made = time.perf_counter(), 0.0
            try:
                with alone():
                    begun = program()
                    made = time.perf_counter() - began
                    found: Any = asdict(choose_training(begun, self.task, self.outputs, room))
            except PqkError as error:
                found = str(error)
            return {"training": found, "seconds": time.perf_counter() - began, "made": made}

        entry = self.context.decide(f"training/{what}" if what else "training", measure)
        spending.add(f"trying how {what or 'students'} can be trained".strip(), entry["seconds"], max(room, least))
        found = entry["training"]
        if isinstance(found, str):
            return found
        spending.beside = max(spending.beside, spending.overhead + entry["made"])
        spending.paces[what or None] = found["seconds"]
        return TrainingChoice(**found)

    def prepare(self) -> None:
        """What is made of the teacher once, so that no candidate's time has it."""

        def measure() -> float:
            began = time.perf_counter()
            with alone():
                self.judge.prepare()
            return time.perf_counter() - began

        self.spending.add("what is known of the teacher", self.context.decide("prepared", measure), 0.0)

    def time_a_step(self) -> None:
        """Times a first training step, of a student that is not cut, where the budget is a time."""
        if math.isinf(self.contract.seconds) or not self.spending.steps:
            return

        def measure() -> Any:
            began = time.perf_counter()
            try:
                with alone():
                    step = first_step(self.runs.program(()), self.task, self.outputs)
            except PqkError:  # it will be said when a student is to be trained
                step = 0.0
            return {"step": step, "seconds": time.perf_counter() - began}

        entry = self.context.decide("first step", measure)
        self.spending.add("a first training step", entry["seconds"], 0.0)
        if entry["step"]:
            self.spending.paces[None] = entry["step"] * self.spending.steps

    def ends(self, last: Tried, why: str) -> Literal[False]:
        """Notes why nothing is cut out of `last`."""
        self.ended = f"pruning ended at {last.candidate.name}: {why}"
        return False

    def worth_training(self, start: Tried) -> bool:
        """Whether a student may become better, in what is free, than the best of what there is."""
        best = self.best
        if self.terms.lacks_speed(start.known):
            return False
        if not self.terms.holds(best.worth):
            return True
        if self.contract.free == "metric":
            return LEFT * max(0.0, start.known.drop) < best.known.drop
        return start.known.speed > FASTER * best.known.speed

    def _add(self, tried: Tried) -> Tried:
        self.tried.append(tried)
        percent = round(100 * self.spending.part)
        text = tried.fate.partition("\n")[0] if tried.worth is None else _numbers(tried.worth)
        self.advance(percent - self.shown, f"{tried.candidate.name}: {text}"[:60])
        self.shown = percent
        return tried


def _numbers(worth: Worth) -> str:
    speed = "" if worth.ratio is None else f", {worth.ratio:.2f}x"
    return f"{worth.metric:.4g}{speed}, {worth.size_bytes / 1e6:.2f} MB"
