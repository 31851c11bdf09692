"""The multiple-choice knapsack whose items share: which pick of each variable is cheapest for the time that it takes.

What a layer takes depends on two widths at once, the one that it reads and the one that it makes, and on whether its
block stays; so items are not independent, and a plain knapsack by dynamic programming does not apply. Variables are
eliminated one after the other (Dechter 1999, "Bucket elimination", Artificial Intelligence 113:41), and for every
setting of those around them the Pareto front of time and cost is kept: all budgets are solved at once, and exactly as
long as a front has at most `POINTS` points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 600
"""points of a front; of more, the cheapest in each of so many equal parts of its times stays, and the fastest"""
MOST = 20_000
"""settings of the variables that are looked at together, at most"""

Floats = NDArray[np.float64]
Scope = tuple[int, ...]
"""variables, by number"""


@dataclass(frozen=True)
class KnapsackTerm:
    """What a part of the whole takes and costs, by the picks of the variables that it depends on."""

    scope: Scope
    times: Floats
    """[picks of the first, picks of the second, …]"""
    costs: Floats


@dataclass(frozen=True)
class Allocation:
    """A pick of every variable, with the time and the cost of all."""

    time: float
    cost: float
    picks: tuple[int, ...]


@dataclass(frozen=True)
class _Front:
    """Points that are not both slower and dearer than another one, by rising time."""

    times: Floats
    costs: Floats
    picks: NDArray[np.int16]
    """[points, variables]; 0 where a variable is not decided yet"""

    @classmethod
    def of(cls, times: Floats, costs: Floats, picks: NDArray[np.int16]) -> _Front:
        order = np.lexsort((costs, times))
        times, costs, picks = times[order], costs[order], picks[order]
        better = np.r_[True, costs[1:] < np.minimum.accumulate(costs)[:-1]]
        times, costs, picks = times[better], costs[better], picks[better]
        if len(times) > POINTS:
            part = ((times - times[0]) / (times[-1] - times[0]) * (POINTS - 1)).astype(int)
            last = np.r_[part[1:] != part[:-1], True]  # later points are cheaper
            last[0] = True
            times, costs, picks = times[last], costs[last], picks[last]
        return cls(times, costs, picks)

    def plus(self, other: _Front) -> _Front:
        """The front of all sums of a point of each."""
        size = len(self.times) * len(other.times)
        times, costs = (np.add.outer(a, b).ravel() for a, b in ((self.times, other.times), (self.costs, other.costs)))
        picks = (self.picks[:, None] + other.picks[None]).reshape(size, -1)
        return _Front.of(times, costs, picks)


class _Table:
    """A front for each setting of some variables."""

    def __init__(self, scope: Scope, fronts: dict[Scope, _Front]) -> None:
        self.scope, self.fronts = scope, fronts

    def at(self, setting: dict[int, int]) -> _Front:
        return self.fronts[tuple(setting[v] for v in self.scope)]


def too_tangled(sizes: Sequence[int], scopes: Iterable[Scope]) -> bool:
    """Whether some variable is tied to so many others that it cannot be eliminated."""
    return any(math.prod(sizes[v] for v in around) > MOST for _, around in _order(sizes, scopes))


def allocations(sizes: Sequence[int], terms: Sequence[KnapsackTerm]) -> list[Allocation]:
    """The Pareto front of all picks of all variables, by rising time; no pick is faster and cheaper than one of it.

    `sizes` are how many picks each variable has. Times and costs add up over terms.
    """
    count = len(sizes)
    tables = [
        _Table(
            t.scope,
            {
                setting: _Front(t.times[setting][None], t.costs[setting][None], np.zeros((1, count), np.int16))
                for setting in itertools.product(*(range(sizes[v]) for v in t.scope))
            },
        )
        for t in terms
    ]
    for variable, around in _order(sizes, [t.scope for t in terms]):
        mine = [t for t in tables if variable in t.scope]
        others = tuple(sorted(around - {variable}))
        fronts = {}
        for setting in itertools.product(*(range(sizes[v]) for v in others)):
            known = dict(zip(others, setting, strict=True))
            fronts[setting] = _eliminated(variable, sizes[variable], mine, known, count)
        tables = [t for t in tables if variable not in t.scope] + [_Table(others, fronts)]
    whole = _sum_of((t.at({}) for t in tables), count)
    return [
        Allocation(float(time), float(cost), tuple(map(int, picks)))
        for time, cost, picks in zip(whole.times, whole.costs, whole.picks, strict=True)
    ]


def _eliminated(variable: int, size: int, tables: Sequence[_Table], known: dict[int, int], count: int) -> _Front:
    """The front over all picks of a variable, those around it being `known`."""
    fronts = []
    for pick in range(size):
        front = _sum_of((t.at({**known, variable: pick}) for t in tables), count)
        chosen = front.picks.copy()
        chosen[:, variable] = pick
        fronts.append(_Front(front.times, front.costs, chosen))
    times, costs, picks = (np.concatenate([getattr(f, n) for f in fronts]) for n in ("times", "costs", "picks"))
    return _Front.of(times, costs, picks)


def _sum_of(fronts: Iterable[_Front], count: int) -> _Front:
    nothing = _Front(np.zeros(1), np.zeros(1), np.zeros((1, count), np.int16))
    for front in sorted(fronts, key=lambda f: len(f.times)):
        nothing = nothing.plus(front)
    return nothing


def _order(sizes: Sequence[int], scopes: Iterable[Scope]) -> list[tuple[int, set[int]]]:
    """The variables as they are eliminated, with those around each then: always the one with the fewest settings."""
    left, groups, order = set(range(len(sizes))), [set(scope) for scope in scopes], []
    while left:
        around = {v: set().union({v}, *(g for g in groups if v in g)) for v in left}
        chosen = min(left, key=lambda v: (math.prod(sizes[u] for u in around[v]), v))
        order.append((chosen, around[chosen]))
        groups = [g for g in groups if chosen not in g] + [around[chosen] - {chosen}]
        left.remove(chosen)
    return order
