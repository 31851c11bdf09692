"""The knapsack of picks that share: what brute force finds, for every budget at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pqk.passes.prune import knapsack
from pqk.passes.prune.knapsack import KnapsackTerm, allocations, too_tangled

Scopes = list[tuple[int, ...]]


def terms_of(sizes: list[int], scopes: Scopes, seed: int) -> list[KnapsackTerm]:
    draw = np.random.default_rng(seed)
    shapes = [tuple(sizes[v] for v in scope) for scope in scopes]
    return [KnapsackTerm(s, draw.uniform(0, 9, n), draw.uniform(0, 9, n)) for s, n in zip(scopes, shapes, strict=True)]


def brute(sizes: list[int], terms: list[KnapsackTerm]) -> list[tuple[float, float, tuple[int, ...]]]:
    """Every pick of all variables with its time and cost."""
    found = []
    for picks in itertools.product(*map(range, sizes)):
        at = [tuple(picks[v] for v in t.scope) for t in terms]
        time, cost = (sum(float(getattr(t, n)[a]) for t, a in zip(terms, at, strict=True)) for n in ("times", "costs"))
        found.append((time, cost, picks))
    return found


GRAPHS: dict[str, tuple[list[int], Scopes]] = {
    "independent": ([3, 4, 2], [(0,), (1,), (2,)]),
    "chain": ([3, 3, 3, 3], [(0,), (0, 1), (1, 2), (2, 3), (3,)]),
    "hub": ([3, 4, 2, 3], [(0, 1), (0, 2), (0, 3), (1,), (2,)]),
    "blocks": ([2, 2, 3, 3, 3], [(0, 2, 3), (1, 2, 4), (0,), (1,), (0, 3), (2,), ()]),
    "circle": ([3, 3, 3, 3], [(0, 1), (1, 2), (2, 3), (3, 0)]),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_the_front_is_what_brute_force_finds(name: str, seed: int) -> None:
    sizes, scopes = GRAPHS[name]
    terms = terms_of(sizes, scopes, seed)
    everything = brute(sizes, terms)
    front = allocations(sizes, terms)
    for allocation in front:
        time, cost, _ = next(e for e in everything if e[2] == allocation.picks)
        assert (allocation.time, allocation.cost) == pytest.approx((time, cost))
    assert [a.time for a in front] == sorted(a.time for a in front)
    for time, _, _ in everything:  # each time as a budget
        best = min(cost for t, cost, _ in everything if t <= time)
        assert min(a.cost for a in front if a.time <= time + 1e-9) == pytest.approx(best)


def test_a_known_answer() -> None:
    """Items of weight 1, 3, 4, 5 and worth 1, 4, 5, 7 in a knapsack of 7 (the cost is the worth left behind)."""
    weights, worth = [1.0, 3.0, 4.0, 5.0], [1.0, 4.0, 5.0, 7.0]
    items = enumerate(zip(weights, worth, strict=True))
    terms = [KnapsackTerm((i,), np.array([w, 0.0]), np.array([0.0, v])) for i, (w, v) in items]
    front = allocations([2] * 4, terms)
    best = min((a for a in front if a.time <= 7), key=lambda a: a.cost)
    assert best.picks == (1, 0, 0, 1) and sum(worth) - best.cost == 9


def test_a_long_front_is_thinned_and_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, draw = [4] * 7, np.random.default_rng(0)
    terms = [KnapsackTerm((v,), np.sort(draw.uniform(0, 9, 4)), -np.sort(-draw.uniform(0, 9, 4))) for v in range(7)]
    whole = allocations(sizes, terms)
    monkeypatch.setattr(knapsack, "POINTS", 20)
    thin = allocations(sizes, terms)
    assert len(thin) <= 21 < len(whole)
    assert thin[0].time == whole[0].time and thin[-1].cost == whole[-1].cost
    step = (whole[-1].time - whole[0].time) / 20
    for allocation in whole:
        assert min(a.cost for a in thin if a.time <= allocation.time + 7 * step) <= allocation.cost + 1e-9


def test_what_is_tied_to_too_much_is_told() -> None:
    chain = [(i, i + 1) for i in range(40)]
    assert not too_tangled([5] * 41, chain)
    everything = list(itertools.combinations(range(12), 2))
    assert too_tangled([5] * 12, everything)
