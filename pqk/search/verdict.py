"""Which of the networks that were tried keeps a contract, which one ships, and what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pqk.recipe.contract import Contract
from pqk.report.promise import Clause, Promise, TriedStudent
from pqk.search.candidates import Candidate
from pqk.search.judge import NONE_OF, Judge, Worth

NUMBERS = ("metric", "drop", "drop_high", "ratio", "ratio_low", "ratio_high", "size_bytes", "macs")
"""of a candidate's worth, that the report has"""
ALIKE = 0.97
"""share of the highest speed from which on students are as fast, and the one that loses least is taken"""


@dataclass
class Tried:
    """A candidate, what it is worth (None where it does not compile, or was not tried), and what became of it."""

    candidate: Candidate
    worth: Worth | None
    seconds: float
    fate: str = ""

    @property
    def known(self) -> Worth:
        """What it is worth, of one that compiles."""
        assert self.worth is not None
        return self.worth


@dataclass(frozen=True)
class Terms:
    """A contract with its numbers for one teacher."""

    contract: Contract
    allowed: float
    """the most that the metric may fall, as a fraction for a share"""
    share: bool
    """whether the metric is one"""

    def clauses(self, worth: Worth) -> list[Clause]:
        """Every clause of the contract for one student, on validation data."""
        found = []
        if math.isfinite(self.allowed):
            scale = 100.0 if self.share else 1.0
            values = (self.allowed, worth.drop, worth.drop_high)
            bound, value, certain = (scale * v for v in values)
            found.append(Clause(name="max_drop", bound=bound, validation=value, certain=certain, held=certain <= bound))
        if self.contract.min_speedup is not None and worth.ratio is not None and worth.ratio_low is not None:
            bound = self.contract.min_speedup
            held = worth.ratio_low >= bound
            found.append(
                Clause(name="min_speedup", bound=bound, validation=worth.ratio, certain=worth.ratio_low, held=held)
            )
        if self.contract.max_latency_ms is not None and worth.milliseconds_high is not None:
            assert worth.ratio is not None and worth.ratio_low is not None
            bound, slowest = self.contract.max_latency_ms, worth.milliseconds_high
            usual = slowest * worth.ratio_low / worth.ratio
            found.append(
                Clause(name="max_latency_ms", bound=bound, validation=usual, certain=slowest, held=slowest <= bound)
            )
        if self.contract.max_size_mb is not None:
            bound, size = self.contract.max_size_mb, worth.size_bytes / 1e6
            found.append(Clause(name="max_size_mb", bound=bound, validation=size, certain=size, held=size <= bound))
        return found

    def in_words(self, drop: float) -> str:
        """A drop in the unit of the contract."""
        number = f"{100 * drop if self.share else drop:.3g}"
        return f"{number} point{'' if number == '1' else 's'}" if self.share else number

    def holds(self, worth: Worth | None) -> bool:
        return worth is not None and all(clause.held for clause in self.clauses(worth))

    def lacks_speed(self, worth: Worth) -> bool:
        """Whether a clause that only a smaller student could keep is not kept."""
        return any(not c.held for c in self.clauses(worth) if c.name != "max_drop")

    def best(self, tried: Sequence[Tried]) -> Tried:
        """The one that ships: of those that keep every clause the best in what is free, else the nearest one."""
        judged = [(t, t.worth) for t in tried if t.worth is not None]
        kept = [(t, w) for t, w in judged if self.holds(w)]
        if not kept:
            return min(judged, key=lambda pair: (self._violation(pair[1]), pair[1].drop))[0]
        if self.contract.free == "metric":
            return min(kept, key=lambda pair: (pair[1].drop, -pair[1].speed))[0]
        fastest = max(w.speed for _, w in kept)
        alike = [(t, w) for t, w in kept if w.speed >= ALIKE * fastest]
        return min(alike, key=lambda pair: (pair[1].drop, -pair[1].speed))[0]

    def _violation(self, worth: Worth) -> float:
        """How far the clauses are from being kept, each as a share of its bound (a point, where that is nothing)."""
        total = 0.0
        for clause in self.clauses(worth):
            least = clause.name == "min_speedup"
            missing = clause.bound - clause.certain if least else clause.certain - clause.bound
            total += max(0.0, missing) / max(clause.bound, 0.01)
        return total


def promise_of(
    terms: Terms,
    tried: Sequence[Tried],
    chosen: Tried,
    judge: Judge,
    seconds: float,
    caution: str | None,
    ended: str | None = None,
) -> Promise:
    """The report's part on the contract, as far as validation data says it."""
    assert chosen.worth is not None
    kept = terms.holds(chosen.worth)
    front = _front(tried)
    rows = []
    for t in tried:
        fate = t.fate or _fate(t, chosen, terms)
        if t is chosen and not t.fate.startswith("ships"):
            fate = _fate(t, chosen, terms)
        numbers: dict[str, Any] = {} if t.worth is None else {name: getattr(t.worth, name) for name in NUMBERS}
        candidate = t.candidate
        rows.append(
            TriedStudent(
                name=candidate.name, what=candidate.what, epochs=candidate.epochs, seconds=t.seconds,
                on_front=t in front, fate=fate, **numbers,
            )
        )  # fmt: skip
    return Promise(
        kept=kept,
        chosen=chosen.candidate.name,
        free=terms.contract.free,
        metric=judge.name,
        teacher=judge.teacher_value,
        clauses=tuple(terms.clauses(chosen.worth)),
        tried=tuple(rows),
        obstacle=None if kept else obstacle(terms, chosen.worth, judge),
        caution=caution,
        ended=ended,
        validation_samples=judge.samples,
        budget=terms.contract.budget,
        seconds=seconds,
    )


def _front(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other one beats in metric and speed."""

    def beaten(t: Tried) -> bool:
        assert t.worth is not None
        mine = (t.worth.metric, t.worth.speed)
        others = [(o.worth.metric, o.worth.speed) for o in tried if o.worth is not None and o is not t]
        return any(m >= mine[0] and s >= mine[1] and (m, s) != mine for m, s in others)

    return [t for t in tried if t.worth is not None and not beaten(t)]


def _fate(t: Tried, chosen: Tried, terms: Terms) -> str:
    if t is chosen:
        return "chosen" if terms.holds(t.worth) else "the nearest one"
    assert t.worth is not None and chosen.worth is not None
    broken = [c.name for c in terms.clauses(t.worth) if not c.held]
    if broken:
        return f"breaks {' and '.join(broken)}"
    if terms.contract.free == "metric":
        more = t.worth.drop > chosen.worth.drop
        return f"keeps the contract, and {'loses more of the metric' if more else 'is no better'}"
    slower = t.worth.speed < ALIKE * chosen.worth.speed
    if slower:
        return "keeps the contract, and is slower"
    more = t.worth.drop > chosen.worth.drop
    return "keeps the contract, as fast, and loses more" if more else "keeps the contract, and is no better"


def obstacle(terms: Terms, worth: Worth, judge: Judge) -> str:
    """What stands in the way of the nearest student, in words."""
    said = []
    for clause in terms.clauses(worth):
        if clause.held:
            continue
        if clause.name == "max_drop" and clause.validation <= clause.bound:
            needed = math.ceil(
                judge.samples
                * ((clause.certain - clause.validation) / max(1e-9, clause.bound - clause.validation)) ** 2
            )
            needed = (
                max(needed, math.ceil(NONE_OF / max(terms.allowed, 1e-9))) if terms.share and terms.allowed else needed
            )
            said.append(
                f"data: it loses {clause.validation:.3g} where {clause.bound:.3g} are allowed, but on "
                f"{judge.samples} validation samples up to {clause.certain:.3g} may be lost; about {needed} samples "
                "would tell"
            )
        else:
            said.append(
                f"{clause.name}: {clause.validation:.3g} ({clause.certain:.3g} for certain), bound {clause.bound:g}"
            )
    return "; ".join(said)
