"""The networks that one search tries: each is made, judged and journaled once, and what it took is counted."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from pqk.search.trials import choose_training
from pqk.search.verdict import Terms, Tried
from pqk.task.task import Task

TRIALS, LONGEST_TRIALS = 0.08, 600.0
"""share of the budget that is left, and seconds, for trying how to train"""
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

    def judged(self, candidate: Candidate) -> Tried:
        """Makes a candidate and judges it, once in a run; one that does not compile is told why."""
        candidate = self._fitted(candidate)

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
        self.spending.count(candidate.passes, entry["seconds"], candidate.shape)
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
            mine = [self._fitted(c) for c in candidates if c.name in todo][rank() :: world_size()]
            began = time.perf_counter()
            with alone():
                for candidate in mine:
                    with contextlib.suppress(PqkError):  # the main process meets it, too, and notes it
                        self.runs.program(candidate.passes, candidate.shape)
            wait_for_all()
            took = time.perf_counter() - began
            self.spending.seconds += self.context.decide(f"together/{'; '.join(names)}", lambda: took)
        return [self.judged(c) for c in candidates]

    def _fitted(self, candidate: Candidate) -> Candidate:
        return replace(candidate, passes=tuple(p.fitted(self.task, self.outputs) for p in candidate.passes))

    def file(self, candidate: Candidate) -> Path | None:
        """What is deployed of a candidate that another tool makes; None: what its passes make."""
        return None if candidate.tool is None else self.judge.by_tool(candidate.tool, self.runs.target)

    def untried(self, candidate: Candidate, why: str) -> Tried:
        """Notes a candidate that was not made, and why."""
        return self._add(Tried(candidate, None, 0.0, why))

    def training(self, program: Callable[[], Program], what: str = "", share: float = 1.0) -> TrainingChoice | str:
        """How a student learns, tried on a program with it, or why nothing can be trained.

        `what` names the student where it is not cut out of the teacher; `share` is that of the usual time for trials.
        """
        room = share * min(TRIALS * self.spending.room, LONGEST_TRIALS)

        def measure() -> Any:
            began = time.perf_counter()
            try:
                with alone():
                    found: Any = asdict(choose_training(program(), self.task, self.outputs, room))
            except PqkError as error:
                found = str(error)
            return {"training": found, "seconds": time.perf_counter() - began}

        entry = self.context.decide(f"training/{what}" if what else "training", measure)
        self.spending.seconds += entry["seconds"]
        found = entry["training"]
        return found if isinstance(found, str) else TrainingChoice(**found)

    def worth_training(self, start: Tried) -> bool:
        """Whether a student may become better, in what is free, than the best of what there is."""
        best = self.best
        if self.terms.lacks_speed(start.known):
            return False
        if not self.terms.holds(best.worth):
            return True
        return self.contract.free == "speed" and start.known.speed > FASTER * best.known.speed

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
