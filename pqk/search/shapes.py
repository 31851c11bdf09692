"""Students of another shape in a search: networks that are given, and compete with what is cut out of the teacher.

How fast one is shows before it is trained; what it can learn does not. Those that are fast enough are trained equally
long, the better half goes on for twice as long, and so on until one is left (successive halving; Jamieson and Talwalkar
2016, arXiv:1502.07943, algorithm 1). Each round goes on where the one before ended, with the rate raised again (warm
restarts; Loshchilov and Hutter 2017, arXiv:1608.03983).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pqk.search.attempts import FASTER, Attempts
from pqk.search.candidates import DYNAMIC, STATIC, Candidate, TrainingChoice, continued, forms, shaped
from pqk.search.verdict import Tried

SHARE = 0.5
"""of the budget that is left, that all rounds together may take"""


@dataclass(frozen=True)
class Entrant:
    """A shape that is fast enough, and how it learns."""

    tried: Tried
    form: Candidate
    """what it becomes: INT8 with fixed ranges or those of each run"""
    training: TrainingChoice


def best_shape(attempts: Attempts, names: Sequence[str]) -> Entrant | None:
    """The shape that learned best in rounds of equal length, as the last one left it; None where none is fast enough.

    Every shape, and every round of one, is a row of its own in what was tried.
    """
    entrants = [e for name in names if (e := _entrant(attempts, name, 1 / len(names))) is not None]
    if not entrants:
        return None
    rounds = max(1, math.ceil(math.log2(len(entrants))) + 1)
    # equal cost of a round: the number of entrants halves while their time doubles
    room = SHARE * attempts.spending.room / rounds
    epochs_left = SHARE * attempts.spending.epochs_left / rounds
    for number in range(rounds):
        count = len(entrants)
        further = [_continued(attempts, e, number, room / count, epochs_left / count) for e in entrants]
        by_shape = {e.tried.candidate.shape: e for e in entrants}
        begun = attempts.within(further)
        alive = [
            Entrant(t, e.form, e.training)
            for t in attempts.all_judged(begun)
            if t.worth is not None and (e := by_shape[t.candidate.shape])
        ]
        if not begun and number:
            break  # the budget is spent: the best of the round before it
        if not alive:
            return None
        alive.sort(key=lambda e: e.tried.known.drop)
        keep = max(1, math.ceil(len(alive) / 2))
        for loser in alive[keep:]:
            loser.tried.fate = f"learned less than {alive[0].tried.candidate.shape} in as long"
        entrants = alive[:keep]
    return entrants[0]


def _entrant(attempts: Attempts, name: str, share: float) -> Entrant | None:
    """A shape as it is deployed untrained, if that is faster than what holds already, and it can be trained."""
    fastest: tuple[Candidate, Tried] | None = None
    for form in forms(attempts.runs.teacher):
        if form.name in (STATIC, DYNAMIC) and (begun := attempts.within([shaped(name, form)])):
            tried = attempts.judged(begun[0])
            tried.fate = tried.fate or "not trained yet: its weights are those that it was given with"
            if tried.worth is not None and (fastest is None or tried.known.speed > fastest[1].known.speed):
                fastest = (form, tried)
    if fastest is None:
        return None
    form, tried = fastest
    if not attempts.worth_training(tried):
        tried.fate = f"is not {FASTER:g} times faster than {attempts.best.candidate.name}, which keeps the contract"
        if attempts.terms.lacks_speed(tried.known):
            tried.fate = "is too slow or too large for the contract"
        return None
    training = attempts.training(lambda: attempts.runs.program((), name), name, share)
    if isinstance(training, str):
        tried.fate = training
        return None
    return Entrant(tried, form, training)


def _continued(attempts: Attempts, entrant: Entrant, number: int, seconds: float, epochs: float) -> Candidate:
    """An entrant with a further round."""
    within = attempts.spending.epochs_in(entrant.training, seconds, epochs)
    return continued(entrant.tried.candidate, entrant.form, entrant.training, within, number + 1)
