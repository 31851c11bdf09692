"""The search by a table: depth and width decided together, the cheapest of all that are predicted to be small enough.

What each group's channels and each block cost on data, and what each layer spends with fewer channels, is found once;
then a knapsack (see `knapsack`) picks a width for each group and whether each block stays. What it picks is cut from a
copy and measured; where the prediction was off it is corrected, and picked again. What is measured is journaled, so
that a resumed prune decides as it did.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk.copies import copy_of
from pqk.core.program import Program, RewriteFunction
from pqk.core.run_context import WidthPair
from pqk.data.structures import concatenate
from pqk.errors import InputError, PqkError, first_line
from pqk.passes.prune.blocks import Block, Edit, find_blocks
from pqk.passes.prune.budget import UNITS
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.cuts import Skip, cut_channels, drop_block, is_depthwise
from pqk.passes.prune.depth_search import inside, trial_masked, trial_without
from pqk.passes.prune.importance import Narrowing, cuts_of
from pqk.passes.prune.knapsack import Allocation, KnapsackTerm, Scope, allocations, too_tangled
from pqk.passes.prune.layer_budgets import layer_budgets, layers_of
from pqk.passes.prune.ranking import FEW, RankingData
from pqk.passes.prune.width_search import WidthSearch, journal_key

WIDTHS = 5
"""widths of each group that are considered beside its own, at most"""
TRIES = 4
"""picks that are cut and measured, until one is at the goal and not far beyond it"""
TOGETHER = 2
"""groups of a layer whose widths are looked at together: those that it reads and makes"""
BEYOND = 0.97
"""of what the goal allows, below which a student is smaller than it had to be"""


@dataclass(frozen=True)
class Choices:
    """What can be cut from a student. Of each block there are two picks, of each group one more than widths."""

    blocks: list[Block]
    groups: list[list[list[Narrowing]]]
    """for each group, for each width below its own, the narrowings that lead there"""

    @property
    def sizes(self) -> list[int]:
        return [2] * len(self.blocks) + [1 + len(widths) for widths in self.groups]

    @property
    def edits(self) -> list[Edit]:
        """A trial of each pick but those that change nothing, blocks first."""
        edits = [Edit(b.path, trial_without(b), (b.path,)) for b in self.blocks]
        for some in itertools.chain(*self.groups):
            cuts = cuts_of(some)
            name = f"{some[-1].group.name}: {some[-1].width}"
            edits.append(Edit(name, trial_masked(cuts), tuple(cut["module"] for cut in cuts)))
        return edits

    def blocks_around(self, layers: Sequence[str]) -> Scope:
        """The block that all of these layers are in, as the variable that it is; () where there is none."""
        return tuple(i for i, b in enumerate(self.blocks) if all(inside(layer, [b.path]) for layer in layers))

    def removed(self, picks: Sequence[int]) -> list[Block]:
        return [b for b, pick in zip(self.blocks, picks, strict=False) if pick]

    def narrowed(self, picks: Sequence[int]) -> list[Narrowing]:
        """The narrowings that were picked, but for those of groups that are inside of blocks that go."""
        chosen = zip(self.groups, picks[len(self.blocks) :], strict=True)
        wanted = [widths[pick - 1] for widths, pick in chosen if pick]
        return [n for some in wanted if not any(picks[b] for b in self.blocks_around(_paths(some))) for n in some]


@dataclass(frozen=True)
class _Layer:
    """A layer as the knapsack sees it."""

    path: str
    scope: Scope
    """the groups whose channels it reads or makes, as variables"""
    widths: NDArray[np.int64]
    """[picks of the first, …, 2]: its channels in and out"""


class AllocationSearch(WidthSearch):
    """Cuts channels and blocks at once: those that cost least, of what a table says is small enough."""

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Cuts the student to `goal`. Raises `Missed` where all that may go is not enough."""
        groups = self._groups(program, check=True) if self.config.width else []
        while True:
            choices = self._choices(program, groups, step)
            if not choices.sizes:
                if self.config.best_effort:
                    return program
                raise self._missed(self.budget.value(program.student), "nothing can be cut, and the student")
            costs = self._costs(program, choices, step)
            kept = self._kept_back(program.student, choices, costs)
            if kept:
                choices = Choices([b for b in choices.blocks if b.path not in kept], choices.groups)
                costs = {name: cost for name, cost in costs.items() if name not in kept}
            cut = self._cut(program, choices, costs, goal, step)
            if cut is not None:
                return cut

    # ---- what can be cut, and what it costs on data

    def _choices(self, program: Program, groups: Sequence[ChannelGroup], step: int) -> Choices:
        config = self.config
        by_name: dict[str, list[Narrowing]] = {}
        for narrowing in self._schedule(program, str(step), groups):
            by_name.setdefault(narrowing.group.name, []).append(narrowing)
        widths = [[some[:count] for count in _spread(len(some))] for some in by_name.values()]
        blocks: list[Block] = []
        if config.depth:
            few = concatenate(list(self.task.calibration(min(FEW, config.samples))))
            blocks, declined = find_blocks(program.student, few, config.protect)
            self.refused.update(declined)
        return Choices(blocks, widths)

    def _costs(self, program: Program, choices: Choices, step: int) -> dict[str, float]:
        """How far each edit alone moves the outputs from the teacher's, the norms of both settled; not below zero."""
        edits = choices.edits

        def measure() -> list[float]:
            teacher, student = (settling(copy_of(m, "student")) for m in (program.teacher, program.student))
            data = RankingData(self.task, teacher, self.config.samples)
            now, found = data.measure(student, edits, [b.path for b in choices.blocks])
            return [max(0.0, cost - now) for cost in found]

        key = journal_key((e.name, e.touches) for e in edits)
        costs = program.run.decide(f"allocation/{step}/{key}", measure)
        return {edit.name: cost for edit, cost in zip(edits, costs, strict=True)}

    def _kept_back(self, student: nn.Module, choices: Choices, costs: dict[str, float]) -> set[str]:
        """The blocks that `keep_blocks` leaves in their containers: those that cost most."""
        kept = set()
        for container, fewest in self.config.keep_blocks.items():
            own = [b.path for b in choices.blocks if b.path.rpartition(".")[0] == container]
            left = sum(not isinstance(child, Skip) for child in student.get_submodule(container).children())
            for path in sorted(own, key=lambda path: costs[path])[max(0, left - fewest) :]:
                kept.add(path)
                self.refused[path] = f"keep_blocks leaves at least {fewest} in {container}"
        return kept

    # ---- what is picked

    def _cut(
        self, program: Program, choices: Choices, costs: dict[str, float], goal: float, step: int
    ) -> Program | None:
        """The student with what is picked gone; None where that breaks the law, and groups were refused."""
        layers = _layers(program.student, choices)
        asked = {layer.path: _distinct(layer.widths) for layer in layers}
        budgets = layer_budgets(program.run, self.budget, program.student, asked, str(step))
        spent = [
            np.array([budgets.layers[layer.path][read, made] for read, made in layer.widths.reshape(-1, 2).tolist()])
            for layer in layers
        ]
        surfaces = [each.reshape(layer.widths.shape[:-1]) for each, layer in zip(spent, layers, strict=True)]
        terms: list[KnapsackTerm] = []
        for together in (TOGETHER, 1):
            terms = [*_costs_of(choices, costs)]
            for layer, surface in zip(layers, surfaces, strict=True):
                terms += _spent(choices, layer, surface, together)
            if not too_tangled(choices.sizes, [t.scope for t in terms]):
                break
        front = allocations(choices.sizes, terms)
        uncut = sum(float(t.times.flat[0]) for t in terms)
        picked, considered = self._measured(program, choices, front, (uncut, budgets.rest), goal)
        narrowed = choices.narrowed(picked.picks)
        if narrowed and self._broken(program.student, narrowed):
            return None
        removed = [block.path for block in choices.removed(picked.picks)]
        widths = {n.group.name: n.width for n in narrowed}
        self.ranking.append({
            "step": step, "considered": considered, "cost": picked.cost, "removed": removed, "widths": widths,
            "costs": costs,
        })  # fmt: skip
        for function, arguments in _rewrites(choices, picked.picks):
            program = program.rewrite(function, self.task.example, **arguments)
        return program

    def _measured(
        self, program: Program, choices: Choices, front: Sequence[Allocation], whole: tuple[float, float], goal: float
    ) -> tuple[Allocation, list[dict[str, float]]]:
        """The cheapest allocation that meets the goal where it is measured, and all that were.

        `whole` is what the uncut layers should take, and everything else. Raises `Missed` where the smallest does not;
        with `best_effort` that one is taken.
        """
        budget, student = self.budget, program.student
        allowed, now = budget.reference / goal, budget.value(student)
        uncut, rest = whole
        scale = now / max(uncut + rest, 1e-12)
        considered: list[dict[str, float]] = []
        found: dict[tuple[int, ...], float] = {}
        with program.run.observer.task(f"{program.run.scope}: measuring picks", TRIES) as advance:
            for _ in range(TRIES):
                fitting = [a for a in front if scale * (a.time + rest) <= allowed]
                pick = fitting[-1] if fitting else front[0]
                if pick.picks in found:
                    break
                value = found[pick.picks] = self._value(program, choices, pick, now)
                considered.append(
                    {UNITS[budget.kind]: value, "predicted": scale * (pick.time + rest), "cost": pick.cost}
                )
                advance(1, f"{budget.ratio(value):.2f} of {goal:.2f} times")
                if BEYOND * allowed <= value <= allowed:
                    break
                scale = value / max(pick.time + rest, 1e-12)
        met = [a for a in front if found.get(a.picks, math.inf) <= allowed]
        if not met and not self.config.best_effort:
            raise self._missed(min(found.values()), "the least that is allowed")
        chosen = met[-1] if met else min((a for a in front if a.picks in found), key=lambda a: found[a.picks])
        return chosen, considered

    def _value(self, program: Program, choices: Choices, pick: Allocation, now: float) -> float:
        """What the student spends with a pick made, measured on a copy."""
        student = copy_of(program.student, "student")
        for function, arguments in _rewrites(choices, pick.picks):
            student = function(student, self.task.example, **arguments)
        try:
            value = self.budget.compare(program.student, now, student)[1]
        except PqkError:
            raise
        except Exception as error:  # whatever the user's forward raises when a shape is not what it expects
            raise InputError(f"prune: the student cannot be measured once it is cut: {first_line(error)}") from error
        return self.budget.take(student, value) if self.budget.run.rough else value


def settling(model: nn.Module) -> nn.Module:
    """`model` with batch norms that go by the statistics of the batch, as they will once they have settled anew.

    Changes it. What a cut costs is then less what it costs until statistics are those of the cut network, which the
    first steps of any training repair, and more what they cannot.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
            module.momentum = 0.0
    return model


def _spread(count: int) -> list[int]:
    """How many narrowings of `count` lead to each width that is considered: all, and evenly fewer."""
    return sorted({math.ceil(count * i / WIDTHS) for i in range(1, WIDTHS + 1)}) if count else []


def _paths(narrowings: Sequence[Narrowing]) -> list[str]:
    return [member.path for member in narrowings[0].group.members]


def _rewrites(choices: Choices, picks: Sequence[int]) -> Iterator[tuple[RewriteFunction, dict[str, Any]]]:
    """The rewrites of a pick with their arguments: channels first, whose indices are those of the uncut student."""
    if narrowed := choices.narrowed(picks):
        yield cut_channels, {"cuts": cuts_of(narrowed)}
    for block in choices.removed(picks):
        yield drop_block, {"block": block.path, **({"returns": block.returns} if block.returns else {})}


# ---- the terms of the knapsack


def _distinct(widths: NDArray[np.int64]) -> list[WidthPair]:
    """The pairs of channels that a layer may have, each once."""
    return list(dict.fromkeys((int(read), int(made)) for read, made in widths.reshape(-1, 2)))


def _layers(student: nn.Module, choices: Choices) -> list[_Layer]:
    """Every layer with its channels at each pick of the groups that it is part of."""
    first = len(choices.blocks)
    less = [[_less(some) for some in widths] for widths in choices.groups]
    layers = []
    for path, (read, made) in layers_of(student).items():
        scope = tuple(first + g for g, widths in enumerate(less) if any(path in lost for lost in widths))
        sizes = [choices.sizes[v] for v in scope]
        widths = np.empty((*sizes, 2), np.int64)
        for picks in np.ndindex(*sizes):
            lost = [less[v - first][pick - 1].get(path, (0, 0)) for v, pick in zip(scope, picks, strict=True) if pick]
            left = [max(1, n - sum(each[side] for each in lost)) for side, n in enumerate((read, made))]
            if is_depthwise(student.get_submodule(path)):
                left = [min(left)] * 2
            widths[picks] = left
        layers.append(_Layer(path, scope, widths))
    return layers


def _less(narrowings: Sequence[Narrowing]) -> dict[str, WidthPair]:
    """How many channels each layer loses, in and out."""
    lost: dict[str, list[int]] = {}
    for cut in cuts_of(narrowings):
        if cut["dim"] in ("in", "out"):
            lost.setdefault(cut["module"], [0, 0])[cut["dim"] == "out"] += len(cut["indices"])
    return {path: (read, made) for path, (read, made) in lost.items()}


def _costs_of(choices: Choices, costs: dict[str, float]) -> Iterator[KnapsackTerm]:
    """What picks cost: a block that goes, and a narrower group, which is no cheaper than a wider one of it.

    A group inside of a block costs nothing where the block goes.
    """
    for i, block in enumerate(choices.blocks):
        yield KnapsackTerm((i,), np.zeros(2), np.array([0.0, costs[block.path]]))
    edits = iter([e.name for e in choices.edits][len(choices.blocks) :])
    for variable, widths in enumerate(choices.groups, len(choices.blocks)):
        cost = np.maximum.accumulate([0.0, *(costs[next(edits)] for _ in widths)])
        around = choices.blocks_around(_paths(widths[0]))
        yield _within(around, (variable,), np.zeros(len(cost)), cost)


def _spent(choices: Choices, layer: _Layer, spent: NDArray[np.float64], together: int) -> Iterator[KnapsackTerm]:
    """What a layer spends, by the picks of its groups, and of the block that it is in.

    A layer of more groups than are looked at `together`, as one that reads a concatenation, spends what it does uncut,
    less what each of them alone saves.
    """
    around = choices.blocks_around([layer.path])
    if len(layer.scope) <= together:
        yield _within(around, layer.scope, spent)
        return
    uncut = spent[(0,) * len(layer.scope)]
    yield _within(around, (), np.array(uncut))
    for axis, variable in enumerate(layer.scope):
        alone = spent[tuple(slice(None) if a == axis else 0 for a in range(len(layer.scope)))]
        yield _within(around, (variable,), alone - uncut)


def _within(
    around: Scope, scope: Scope, times: NDArray[np.float64], costs: NDArray[np.float64] | None = None
) -> KnapsackTerm:
    """A term that is nothing where the block around it goes."""
    both = [times, np.zeros_like(times) if costs is None else costs]
    if around:
        both = [np.stack([each, np.zeros_like(each)]) for each in both]
    return KnapsackTerm((*around, *scope), *both)
