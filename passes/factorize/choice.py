"""Which layers to split into which ranks: the least harm on data for what is saved.

Each layer has a few options, a rank with its cost and its saving, of which it takes one at most. The options that are
ever worth taking lie on the lower convex hull of cost over saving; going along all layers' hulls by rising slope is the
greedy solution of the multiple-choice knapsack problem, which is the best there is for every saving that it stops at
(Sinha and Zoltners 1979, "The multiple-choice knapsack problem", Operations Research 27, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankOption:
    """A rank of a layer: what splitting it alone costs on data, and what it saves in the budget's unit."""

    layer: str
    rank: int
    cost: float
    """growth of the divergence from the teacher"""
    saved: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def hull(options: Iterable[RankOption]) -> list[RankOption]:
    """The options of one layer that are worth taking for some price, by rising saving; each saves something."""
    points: list[RankOption] = []
    for option in sorted((o for o in options if o.saved > 0), key=lambda o: (o.saved, -o.cost)):
        while points and (points[-1].cost >= option.cost or _slope(points, option) <= _slope(points[:-1], points[-1])):
            points.pop()
        points.append(option)
    return points


def _slope(points: Sequence[RankOption], option: RankOption) -> float:
    """Cost for each unit saved from the last of `points`, or from the whole layer, to `option`."""
    cost, saved = (points[-1].cost, points[-1].saved) if points else (0.0, 0.0)
    return (option.cost - cost) / (option.saved - saved)


def schedule(options: Iterable[RankOption]) -> list[RankOption]:
    """The steps in which to split, the cheapest for what they save first; a later one of a layer replaces its earlier.

    Costs below 0, which a small sample shows of what does no harm, count as none.
    """
    by_layer: dict[str, list[RankOption]] = {}
    for option in options:
        harmless = RankOption(option.layer, option.rank, max(0.0, option.cost), option.saved)
        by_layer.setdefault(option.layer, []).append(harmless)
    keyed = []
    for own in by_layer.values():
        points = hull(own)
        keyed += [(_slope(points[:i], option), option) for i, option in enumerate(points)]
    # stable, and slopes rise along a hull: a layer's steps stay in order
    return [option for _, option in sorted(keyed, key=lambda entry: entry[0])]


def ranks_after(steps: Sequence[RankOption]) -> dict[str, int]:
    """The rank of each layer after these steps of a schedule."""
    return {step.layer: step.rank for step in steps}
