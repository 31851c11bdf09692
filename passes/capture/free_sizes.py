"""What tracing took for granted of the sizes of free axes, and whether the graph is right where that does not hold.

A traced graph holds for the sizes that its guards allow, and it is used without them. Most guards are torch's own and
of no consequence (a layout in memory). Some are limits that the model has itself, such as a table of positions or
strides: beyond them the model cannot be run. And some are Python's: `int(x.shape[1] / 2)`, or a branch on a length,
keep the value that the example gave. Their text does not tell them apart, so graph and model are both run where a
guard does not hold. Where both answer alike the guard means nothing; where the model fails it is a limit, which the
artifact states; where both run and answer differently, the model is refused, with the line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import sympy
from torch import Tensor, nn

from pqk.core.trial import Outcome, Trial
from pqk.errors import InputError
from pqk.passes.capture.traced_axes import Guard, Sized, TracedAxes, value_of
from pqk.task.axes import BATCH, Axes, Sizes, sizes_of

FARTHEST = 1024
"""sizes up to which guards are tried: four times the example's, and no more than this or its double"""
SMALLEST = 4
"""steps that are tried below the least size that guards leave"""
STEPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 64)
"""between the sizes that strides, patches and windows take"""


def check_free_sizes(
    model: nn.Module,
    graph: nn.Module,
    example: Sequence[Tensor],
    axes: Axes,
    traced: TracedAxes,
    outputs: Sequence[Sequence[int | sympy.Basic]],
) -> tuple[dict[str, Sizes], list[list[int | str]]]:
    """The sizes that every free axis may have, by name, and those of the outputs.

    `outputs` are the latter as the tracer has them. Raises `InputError`, naming the axis and the line, where the graph
    answers otherwise than the model at a size that the model takes; also where it does at the example's.
    """
    known = sizes_of(example, axes)
    trial = Trial(model, graph, example, axes)
    if trial.at_example.outcome in ("graph", "shape") or trial.two_models():
        raise InputError(
            f"capture: the traced graph is not the model already on the task's example: {trial.at_example.words}. A "
            "model must not do otherwise while it is traced, such as by what torch.compiler says or str() of a size"
        )
    found = {}
    for name in dict.fromkeys(traced.first.get(n, n) for n in known):
        group = [n for n in known if traced.first.get(n, n) == name]
        found[name] = _FreeAxis(name, group, known, traced.guards, trial).sizes()
    sizes = {n: found[n] if n in found else replace(found[traced.first[n]], equals=traced.first[n]) for n in known}
    _check_together(trial, known, sizes, traced.guards)
    results = [({}, trial.at_example), *((dict(at), result) for at, result in trial.results.items())]
    seen = [({**known, **at}, result.shapes) for at, result in results if result.outcome == "same"]
    return sizes, [
        [_described(size, [(at, shapes[i][axis]) for at, shapes in seen], sizes) for axis, size in enumerate(shape)]
        for i, shape in enumerate(outputs)
    ]


def _check_together(trial: Trial, known: Sized, sizes: Mapping[str, Sizes], guards: Sequence[Guard]) -> None:
    """Several axes at once. Raises `InputError` where graph and model answer differently."""
    for at in _combinations(known, sizes, guards):
        if all(n in sizes[name] for name, n in at.items()) and trial.affordable(at):
            result = trial.run(at)
            broken = [g for g in guards if not g.holds({**known, **at})]
            if result.outcome in ("shape", "value") or (result.outcome == "graph" and any(g.line for g in broken)):
                raise _refusal(" and ".join(at), known, at, result.words, broken)


def _combinations(known: Sized, sizes: Mapping[str, Sizes], guards: Iterable[Guard]) -> Iterator[dict[str, int]]:
    """All lengths twice and half the example's, as some models take them in one proportion only; then for each guard
    of Python's on several axes the first sizes where it does not hold, such as a large area of two short sides."""
    lengths = [name for name in known if name != BATCH]
    if len(lengths) > 1:
        yield from ({name: int(factor * known[name]) for name in lengths} for factor in (2.0, 0.5))
    for guard in guards:
        names = sorted(guard.axes)
        if guard.line and len(names) > 1:
            several = (
                dict(zip(names, each, strict=True)) for each in itertools.product(*(sizes[n].some() for n in names))
            )
            yield from itertools.islice((at for at in several if not guard.holds({**known, **at})), 1)


def _refusal(name: str, known: Sized, at: Sized, words: str, broken: Sequence[Guard]) -> InputError:
    """The error where graph and model differ, with the line of the first of the `broken` guards that has one."""
    guard = next((g for g in broken if g.line), next((g for g in broken if g.operator_line), (*broken, None)[0]))
    line = "" if guard is None else guard.line or guard.operator_line
    example, there = (" x ".join(str(sizes[n]) for n in at) for sizes in (known, at))
    return InputError(
        f"capture: the model keeps something of the example's {name}, {example}{line and f', at {line}'}: at {there} "
        f"the captured graph is wrong: {words}"
        + ("" if guard is None else f" (it took {guard.expression} for granted)")
        + ". A free axis needs sizes that are computed from x.shape with + - * // alone, without int(), /, or branches "
        "on them; or do not call it free in the task's dynamic_axes"
    )


def _described(size: int | sympy.Basic, seen: Sequence[tuple[Sized, int]], sizes: Mapping[str, Sizes]) -> int | str:
    """The size of an output's axis: a number, a name, or an expression of names, whichever is simplest.

    Where it is not what was seen, as of a crop to 6 steps of a length that may be 4, it is `Min(6, time)`, or `any`.
    """
    expression = sympy.Integer(size) if isinstance(size, int) else size
    expected = [(at, value_of(expression, at, {}), actual) for at, actual in seen]
    if all(value == actual for _, value, actual in expected):
        return _simplest(expression, sizes)
    names = (n for n in sizes if all(min(value, at[n]) == actual for at, value, actual in expected))
    return next((f"Min({expression}, {name})" for name in names), "any")


def _simplest(expression: sympy.Basic, sizes: Mapping[str, Sizes]) -> int | str:
    """What an expression is at all `sizes`: a number or the name of an axis, if so."""
    names = sorted(str(s) for s in expression.free_symbols)
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if any(name not in sizes for name in names):
        return str(expression)
    some = [sizes[name].some() for name in names]
    values = []
    for i in range(3 * max(map(len, some))):  # combinations of them, of which none is an axis alone
        at = {name: few[i * (j + 1) % len(few)] for j, (name, few) in enumerate(zip(names, some, strict=True))}
        values.append((at, value_of(expression, at, {})))
    for name in names:
        if all(value == at[name] for at, value in values):
            return name
    numbers = {value for _, value in values}
    return numbers.pop() if len(numbers) == 1 and isinstance(next(iter(numbers)), int) else str(expression)


class _FreeAxis:
    """One free axis: where guards on it do not hold, and what model and graph do there."""

    def __init__(self, name: str, group: Sequence[str], known: Sized, guards: Iterable[Guard], trial: Trial) -> None:
        self.name, self.group, self.known, self.trial = name, group, known, trial
        self.size = known[name]
        self.guards = [g for g in guards if name in g.axes]
        self.scanned = range(1, max(2 * self.size, min(4 * self.size, FARTHEST), 16) + 1)
        self.broken = {n: self._broken(n) for n in (*self.scanned, *self._critical())}

    def _broken(self, n: int) -> list[Guard]:
        """The guards that do not hold at size `n`, the other axes as in the example."""
        sizes, values = {**self.known, **self._at(n)}, dict[sympy.Basic, Any]()
        return [g for g in self.guards if not g.holds(sizes, values)]

    def _at(self, n: int) -> dict[str, int]:
        return dict.fromkeys(self.group, n)

    def _critical(self) -> list[int]:
        """Sizes beyond those that are scanned around the numbers in guards, such as the length of a table."""
        numbers = {int(i) for g in self.guards for i in g.expression.atoms(sympy.Integer) if 0 < i < 1 << 20}
        return sorted({i + d for i in numbers for d in (-1, 0, 1)} - set(self.scanned) - {0})

    def sizes(self) -> Sizes:
        """The sizes that the axis may have. Raises `InputError` where graph and model answer differently."""
        outcomes = {n: self._outcome(n) for n in self._probes() if self.trial.affordable(self._at(n))}
        limits = self._limits(outcomes)
        fine = {n for n, found in self.broken.items() if outcomes.get(n) == "same" or not limits.intersection(found)}
        allowed = self._stepped(sorted(fine), outcomes)
        least, most = self._ends(allowed, [n for n, o in outcomes.items() if o != "same"])
        inside = [n for n in allowed if n in self.scanned and least <= n <= (most or n)]
        if inside[:1] == [1] and not _regular(inside) and _regular(inside[1:]):
            del inside[0]
            least = inside[0]
        step = self._step(inside)
        if not _regular(inside):
            least, most, step = *_run_around(self.size, inside), 1
        for _ in range(SMALLEST):  # guards of torch's own may leave out the smallest sizes without need
            least -= step if least > step and self._runs(least - step) else 0
        return Sizes(least, most, step)

    def _probes(self) -> list[int]:
        """One; the nearest sizes and about the double where all guards hold; the nearest where each does not."""
        legal = [n for n in self.scanned if not self.broken[n] and n != self.size]
        below, above = [n for n in legal if n < self.size], [n for n in legal if self.size < n <= 2 * self.size]
        probes = {1, *below[-1:], *above[:1], *above[-1:]}
        for guard in self.guards:
            where = [n for n in self.broken if guard in self.broken[n]]
            probes.update([n for n in where if n < self.size][-1:] + sorted(n for n in where if n > self.size)[:1])
        return sorted(probes - {self.size})

    def _outcome(self, n: int) -> Outcome:
        result = self.trial.run(self._at(n))
        outcome, broken = result.outcome, self.broken.get(n, [])
        lines = [g.line for g in broken if g.line]
        alone = n == 1 and not lines and outcome != "value"  # such as a squeeze, which takes one for no axis at all
        if outcome in ("same", "model") or alone or (outcome == "graph" and broken and not lines):
            return outcome
        raise _refusal(self.name, self.known, {self.name: n}, result.words, broken)

    def _limits(self, outcomes: Mapping[int, Outcome]) -> set[Guard]:
        """The guards that are the model's own limits: those without which it never ran."""
        ran = [n for n, outcome in outcomes.items() if outcome == "same" and n > 1]  # one goes with any other
        harmless = {g for g in self.guards if any(g in self.broken[n] for n in ran)}
        return {g for g in self.guards if g.axes == {self.name}} - harmless

    def _stepped(self, allowed: list[int], outcomes: Mapping[int, Outcome]) -> list[int]:
        """What is left of the sizes where a model fails next to the example's on both sides: strides without guards."""
        beside = [outcomes.get(n) for n in (self.size - 1, self.size + 1) if n in allowed]
        if not beside or "same" in beside:
            return allowed
        for step in STEPS:
            if self._runs(self.size + step) and (step >= self.size or self._runs(self.size - step)):
                return [n for n in allowed if (n - self.size) % step == 0]
        return allowed

    def _runs(self, n: int) -> bool:
        return n > 0 and self.trial.affordable(self._at(n)) and self.trial.run(self._at(n)).outcome == "same"

    def _ends(self, allowed: Sequence[int], failed: Sequence[int]) -> tuple[int, int | None]:
        """The least and the most of the sizes that are allowed, and at which the model runs."""
        below, above = [n for n in allowed if n < self.size], [n for n in allowed if n > self.size]
        low, high = [n for n in failed if n in below], [n for n in failed if n in above]
        step = self._step(allowed)
        farthest = max(n for n in self.broken if (n - self.size) % step == 0)
        most = None if above and above[-1] == farthest else (above or [self.size])[-1]
        if high and not (low and low[-1] == below[-1]):  # where it fails on both sides, it is not because of the size
            most = self._last_fine([n for n in above if n < high[0]])
        least = (below or [self.size])[0]
        if low and not (high and high[0] == above[0]):
            least = self._last_fine([n for n in reversed(below) if n > low[-1]])
        if self.name == BATCH:  # one sample without its axis is a sample, and none may be none
            least = 1 if self.trial.run(self._at(1)).outcome == "shape" else least
            least = 0 if least == 1 and self.trial.answers_none() else least
        return least, most

    def _step(self, sizes: Iterable[int]) -> int:
        """What sizes are apart, without one, which goes with any other, and those that were not all tried."""
        return reduce(math.gcd, (n - self.size for n in sizes if n > 1 and n in self.scanned), 0) or 1

    def _last_fine(self, outwards: Sequence[int]) -> int:
        """The last of the sizes, from the example's outwards, at which the model runs: by bisection."""
        fine, unknown = -1, len(outwards)
        while unknown - fine > 1:
            middle = (fine + unknown) // 2
            if self._runs(outwards[middle]):
                fine = middle
            else:
                unknown = middle
        return self.size if fine < 0 else outwards[fine]


def _regular(sizes: Sequence[int]) -> bool:
    """Whether sizes are at equal distances."""
    return len({b - a for a, b in itertools.pairwise(sizes)}) <= 1


def _run_around(size: int, sizes: Sequence[int]) -> tuple[int, int]:
    """The ends of the unbroken run of `sizes` around `size`."""
    least = most = size
    while least - 1 in sizes:
        least -= 1
    while most + 1 in sizes:
        most += 1
    return least, most
