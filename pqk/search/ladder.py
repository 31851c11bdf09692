"""A ladder of ever smaller students, each cut out of the one before and trained briefly, judged in integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pqk.core.program import Pass, Program
from pqk.search.attempts import Attempts
from pqk.search.candidates import FLOAT, GOALS, Candidate, CutKind, TrainingChoice, prune, rung
from pqk.search.verdict import Terms, Tried

PROMISING = 5.0
"""times the drop that is allowed that a student may lose before it is trained at length"""
LEAST_CUT = 0.95
"""share of the MACs that a rung leaves at most, else nothing more can be cut"""
NEXT = 1.15
"""by which the goal of a rung is at least below what the one above it reached"""
CUTS: tuple[CutKind, ...] = ("width", "depth", "both")
HOPELESS = "loses too much for a training at length to be tried"


def promises(terms: Terms, tried: Tried) -> bool:
    """Whether a training at length may bring a student to keep the contract."""
    return tried.known.drop <= PROMISING * terms.allowed


@dataclass(frozen=True)
class Ladder:
    """The students that are cut out of one teacher."""

    attempts: Attempts
    form: Candidate
    """what they become"""
    training: TrainingChoice

    @staticmethod
    def of(attempts: Attempts, form: Candidate) -> Ladder | None:
        """The ladder, with what the trials chose; None where nothing can be trained."""
        training = attempts.training(lambda: _first_cut(attempts))
        if isinstance(training, str):
            attempts.untried(Candidate("trained", "a student that is trained", ()), training)
            attempts.ended = f"nothing was cut out of the teacher: {training}"
            return None
        return Ladder(attempts, form, training)

    def starts(self) -> list[Tried]:
        """What may be trained at length, the fastest last: rungs, and the whole teacher where its form loses much."""
        before = len(self.attempts.tried)
        first = self._rungs((), CUTS, 1)
        starts = self._down(self._better(first), first) if first else []
        if not first:
            self.attempts.ended = f"nothing was cut out of the teacher: {_fates(self.attempts.tried[before:])}"
        whole = next(t for t in self.attempts.tried if t.candidate.name == self.form.name)
        if not self.attempts.terms.holds(whole.worth) and self.form.name != FLOAT:
            starts.insert(0, whole)  # all of the teacher, trained under quantization
        return starts

    def deeper(self, done: Tried) -> list[Tried]:
        """What to train next where a student keeps the contract: one that is cut out of it, if speed is free."""
        attempts, cut = self.attempts, done.candidate.cut
        if attempts.contract.free == "metric" or cut is None:
            return []
        if not attempts.spending.allows_more:
            attempts.ends(done, attempts.spending.too_little)
            return []
        following = self._next(done, cut)
        return [] if following is None else [following]

    def _down(self, cut: CutKind, first: dict[CutKind, Tried]) -> list[Tried]:
        """The rungs of one way to cut as far as they promise to keep the contract, each cut out of the one before."""
        rungs = [first[cut]]
        while self._goes_on(rungs[-1]) and (following := self._next(rungs[-1], cut)) is not None:
            rungs.append(following)
        while len(rungs) > 1 and not promises(self.attempts.terms, rungs[-1]):
            rungs.pop().fate = HOPELESS
        return rungs

    def _better(self, first: dict[CutKind, Tried]) -> CutKind:
        """The faster way to cut, unless it loses more by half of what is allowed, or by a point."""
        slack = 0.5 * min(self.attempts.terms.allowed, 0.02)
        least = min(t.known.drop for t in first.values())
        return min(first, key=lambda cut: (first[cut].known.drop > least + slack, -first[cut].known.speed))

    def _goes_on(self, last: Tried) -> bool:
        """Whether a still smaller student may be wanted, and may keep the contract."""
        attempts, terms = self.attempts, self.attempts.terms
        if attempts.contract.free == "metric" and not terms.lacks_speed(last.known):
            return attempts.ends(last, "it is as fast and as small as the contract asks for")
        if attempts.contract.free == "speed" and not promises(terms, last):
            lost, most = terms.in_words(last.known.drop), terms.in_words(PROMISING * terms.allowed)
            return attempts.ends(last, f"it loses {lost} after a brief training, and {most} at most may be won back")
        if not attempts.spending.allows_more:
            return attempts.ends(last, attempts.spending.too_little)
        return True

    def _next(self, last: Tried, cut: CutKind) -> Tried | None:
        """The rung below one, which may have gone further than its own goal; None where there is none."""
        reached = NEXT * self.attempts.macs / last.known.macs
        level = next((i for i, goal in enumerate(GOALS, 1) if goal >= reached and i > last.candidate.level), None)
        if level is None:
            self.attempts.ends(last, f"there is no deeper rung than {GOALS[-1]:g} times fewer MACs")
            return None
        before = len(self.attempts.tried)
        following = self._rungs(last.candidate.floats, (cut,), level).get(cut)
        if following is None:
            self.attempts.ends(last, f"the next rung was {_fates(self.attempts.tried[before:])}")
        return following

    def _rungs(self, above: Sequence[Pass], cuts: Sequence[CutKind], level: int) -> dict[CutKind, Tried]:
        """The next rung by each way to cut, in integers, trained briefly and equally; not those that cut nothing."""
        attempts = self.attempts
        epochs = attempts.spending.brief(self.training)
        names = {t.candidate.name for t in attempts.tried}
        candidates = [rung(above, cut, level, self.form, self.training, epochs) for cut in cuts]
        candidates = [replace(c, name=f"{c.name}, of what was trained") if c.name in names else c for c in candidates]
        known = [(t.candidate.floats, t.worth.macs) for t in attempts.tried if t.worth is not None]
        before = min((macs for floats, macs in known if floats == tuple(above)), default=attempts.macs)
        found: dict[CutKind, Tried] = {}
        for tried in attempts.all_judged(attempts.within(candidates)):
            cut = tried.candidate.cut
            if tried.worth is None or cut is None:
                continue
            if tried.worth.macs <= LEAST_CUT * before:
                found[cut] = tried
            else:
                tried.fate = f"{cut} leaves {tried.worth.macs / before:.0%} of the MACs: no more can be cut so"
        return found


def _fates(tried: Sequence[Tried]) -> str:
    return "; ".join(dict.fromkeys(t.fate.partition("\n")[0] for t in tried))


def _first_cut(attempts: Attempts) -> Program:
    """The teacher cut to the first rung, by width or else by depth; as it is where nothing is cut."""
    for cut in CUTS:
        program = attempts.runs.program((prune(1, cut).fitted(attempts.task, attempts.outputs),))
        if program.plan:
            return program
    return attempts.runs.program(())
