"""Training at length: which student gets the rest of the budget, and what follows when it keeps the contract or not.

What a student loses after a brief training, it wins back in part. The fastest one that is expected to keep the contract
goes first; where none is, the one that loses least, as a promise that is kept slowly is worth more than a fast one that
is not. One that keeps it is cut further, and what it learned stays, or, where the metric is free, goes on as long as
that helps; after one that does not keep it comes the next slower one, and the last of them goes on as long as it helps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pqk.passes.distill.keep_best import Criterion
from pqk.search.attempts import LEFT, Attempts
from pqk.search.candidates import finished
from pqk.search.ladder import Ladder
from pqk.search.shapes import Entrant
from pqk.search.spending import size_of
from pqk.search.verdict import Tried

HELPS = 0.9
"""share of the drop before a training that is left at most, if it is worth to go on"""


@dataclass(frozen=True)
class Finals:
    """Trainings at length of what a ladder and shapes have left."""

    attempts: Attempts
    ladder: Ladder | None
    """None where nothing that is cut out of the teacher can be trained"""
    entrant: Entrant | None
    """the shape that learned best"""
    deeper: list[Tried] = field(default_factory=list)
    """what was cut out of students that were trained at length"""

    def run(self, starts: list[Tried]) -> None:
        """Trains of `starts`, in any order, what may become the student that ships, as long as the budget lasts."""
        start = self._first(starts)
        if start is None:
            self._note_why_none(starts)
        while start is not None:
            done = self._at_length(start)
            if done is None or done.worth is None:
                return
            starts = [t for t in starts if t is not start]
            start = self._following(start, done, starts)

    def _first(self, starts: list[Tried]) -> Tried | None:
        """The fastest that is expected to keep the contract, or else, and where the metric is free, the one that loses
        least."""
        worth = [t for t in starts if self.attempts.worth_training(t)]
        if not worth:
            return None
        sure = [t for t in worth if self._expected(t) <= self.attempts.terms.allowed]
        if sure and self.attempts.contract.free == "speed":
            return max(sure, key=lambda t: t.known.speed)
        return min(sure or worth, key=lambda t: t.known.drop)

    def _note_why_none(self, starts: list[Tried]) -> None:
        """Notes what none of them gains, where it is not one of them that ships."""
        cut, best = [t for t in starts if t.candidate.cut is not None], self.attempts.best
        if cut and not any(t is best for t in cut) and self.attempts.terms.holds(best.worth):
            fastest = max(cut, key=lambda t: t.known.speed)
            why = f"it gains nothing over {best.candidate.name}, which keeps the contract"
            self.attempts.ends(fastest, why)

    def _expected(self, tried: Tried) -> float:
        """The upper end of the drop that a training at length is expected to leave."""
        worth = tried.known
        return LEFT * max(0.0, worth.drop) + (worth.drop_high - worth.drop)

    def _following(self, start: Tried, done: Tried, others: list[Tried]) -> Tried | None:
        """What is trained after a student was, None: nothing."""
        helped = done.known.drop <= HELPS * start.known.drop
        if self.attempts.contract.free == "metric" and self.attempts.terms.holds(done.worth):
            return done if helped and self.attempts.worth_training(done) else self._first(others)
        if self.attempts.terms.holds(done.worth):
            deeper = [] if self.ladder is None else self.ladder.deeper(done)
            self.deeper.extend(deeper)
            faster = [t for t in others if t.known.speed > done.known.speed]
            if deeper and self._first(deeper) is None:
                self._note_why_none(deeper)
            return self._first(deeper) or self._first(faster)
        terms = self.attempts.terms
        if any(t is start for t in self.deeper) and done.known.drop_high > terms.allowed:
            lost = f"up to {terms.in_words(done.known.drop_high)}, and {terms.in_words(terms.allowed)} are allowed"
            self.attempts.ends(done, f"after a training at length it may lose {lost}")
        slower = [t for t in others if t.known.speed < start.known.speed]
        following = self._first(slower)
        if following is None and helped and self.attempts.worth_training(done):
            return done
        return following

    def _at_length(self, start: Tried) -> Tried | None:
        """A student, trained; None where no budget is left for it."""
        attempts = self.attempts
        if start.candidate.shape is not None:
            assert self.entrant is not None
            form, training, share = self.entrant.form, self.entrant.training, 1.0
        else:
            assert self.ladder is not None
            form, training, share = self.ladder.form, self.ladder.training, start.known.macs / attempts.macs
        epochs = attempts.spending.at_length(training, share)
        if not epochs:
            start.fate = "no budget was left to train it at length"
            if any(t is start for t in self.deeper):
                attempts.ends(start, start.fate)
            return None
        keep: Criterion = "metric" if attempts.task.validation.labelled else "teacher"
        return attempts.judged(finished(start.candidate, form, training, epochs, keep), size_of(share))
