"""The search for ranks: what each split costs and saves, and how many of them meet the budget.

What is measured is journaled, so that a resumed pass decides as it did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from pqk.copies import copy_of
from pqk.core.program import Program
from pqk.data.structures import concatenate
from pqk.errors import InputError, PqkError, Reason, first_line
from pqk.passes.factorize.choice import RankOption, ranks_after, schedule
from pqk.passes.factorize.layers import SplitLayer, reasons_against, replaced
from pqk.passes.factorize.responses import spectra
from pqk.passes.factorize.settings import FactorizeSettings
from pqk.passes.prune.blocks import Edit, edit_costs
from pqk.passes.prune.budget import UNITS, Budget, Missed
from pqk.passes.prune.low_rank import LowRank, weighted_layer
from pqk.task.task import Task

Ranks = Mapping[str, int]
"""layer -> the rank of its halves; others are whole"""
NOTHING = 0.002
"""share of what the student spends that all layers of one shape together must save to be split: timings differ by it"""
SPLIT_MORE = "Lower the ratio below that, give lower ranks or more layers, or raise max_divergence; or set best_effort."
"""what to do where splitting cannot meet a budget"""
NOT_NEEDED = "other splits do less harm for what they save"
TOO_FAR = "with it the answers would be further from the teacher's than max_divergence allows"


class RankSearch:
    """Chooses the ranks of a student's layers; `refused` gains the reasons for those that stay whole."""

    def __init__(
        self,
        config: FactorizeSettings,
        program: Program,
        task: Task,
        budget: Budget,
        value: float,
        refused: dict[str, Reason],
    ) -> None:
        self.config, self.task, self.budget, self.refused = config, task, budget, refused
        self.run, self.student, self.value = program.run, program.student, value
        self.inputs = concatenate(list(task.calibration(config.ranking_samples)))
        with torch.no_grad():
            self.answers = program.teacher(*self.inputs)
        self.options: list[RankOption] = []
        """every rank of a layer that saves something"""
        self._made: dict[tuple[str, int], LowRank] = {}

    def choose(self, layers: list[SplitLayer]) -> dict[str, int]:
        """The rank of each layer that is to be split.

        Raises `InputError` where the budget cannot be met and `best_effort` is not set.
        """
        layers = self._make_halves(layers)
        saved = self._savings(layers)
        signatures = {layer.path: layer.signature for layer in layers}
        candidates = [(x.path, rank) for x in layers for rank in x.ranks if (x.signature, rank) in saved]
        self.options = [
            RankOption(path, rank, cost, saved[signatures[path], rank])
            for (path, rank), cost in zip(candidates, self._costs(candidates), strict=True)
        ]
        steps = schedule(self.options)
        ranks = ranks_after(steps[: self._how_many(steps)])
        reason = NOT_NEEDED if self.budget.goal < math.inf else TOO_FAR
        self.refused |= {path: reason for path in signatures if path not in ranks and path not in self.refused}
        return ranks

    def halves(self, ranks: Ranks) -> dict[str, LowRank]:
        """The halves of these layers."""
        return {path: self._made[path, rank] for path, rank in ranks.items()}

    def divergence(self, ranks: Ranks) -> float:
        """How far from the teacher's answers the student's are with these layers split."""

        def measure() -> float:
            with torch.no_grad(), replaced(self.student, self.halves(ranks)) as model:
                return self.task.distance(model(*self.inputs), self.answers)

        return float(self.run.decide(f"divergence/{_key(sorted(ranks.items()))}", measure))

    def _make_halves(self, layers: list[SplitLayer]) -> list[SplitLayer]:
        """Makes the halves of all ranks, and returns the layers that are their halves to the model."""
        found = spectra(self.student, [layer.path for layer in layers], self.task.calibration(self.config.samples))
        self.refused |= {x.path: "the model does not call it on validation data" for x in layers if x.path not in found}
        for layer in (layer for layer in layers if layer.path in found):
            module = weighted_layer(self.student, layer.path)
            self._made |= {(layer.path, rank): found[layer.path].halves(module, rank) for rank in layer.ranks}
        first = {layer.path: self._made[layer.path, layer.ranks[0]] for layer in layers if layer.path in found}
        self.refused |= reasons_against(self.student, self.task.example, first)
        return [layer for layer in layers if layer.path not in self.refused]

    def _savings(self, layers: list[SplitLayer]) -> dict[tuple[str, int], float]:
        """What splitting a layer saves, by signature and rank, where it saves anything.

        The mean over all layers of the signature: one layer of many is worth no more than the noise of a measurement.
        """
        alike: dict[str, list[SplitLayer]] = {}
        for layer in layers:
            alike.setdefault(layer.signature, []).append(layer)
        pairs = [(signature, rank) for signature, own in alike.items() for rank in own[0].ranks]
        saved: dict[tuple[str, int], float] = {}
        with self.run.observer.task(f"{self.run.scope}: measuring what splits save", len(pairs)) as advance:
            for signature, rank in pairs:
                together = self.value - self.spent({layer.path: rank for layer in alike[signature]})
                if together > NOTHING * self.value:
                    saved[signature, rank] = together / len(alike[signature])
                advance(1, f"{alike[signature][0].path} into rank {rank}")
        for signature, own in alike.items():
            if not any((signature, rank) in saved for rank in own[0].ranks):
                ranks = ", ".join(map(str, own[0].ranks))
                reason = f"its halves of rank {ranks} save no {UNITS[self.budget.kind]}"
                self.refused |= {layer.path: reason for layer in own}
        return saved

    def spent(self, ranks: Ranks) -> float:
        """What the student spends with these layers split, in the budget's unit."""
        try:
            with replaced(copy_of(self.student, "student"), self.halves(ranks)) as part:
                return self.budget.compare(self.student, self.value, part)[1]
        except PqkError:
            raise
        except Exception as error:  # whatever measuring a model of the user's raises
            raise InputError(
                f"factorize: the student cannot be measured once it is split: {first_line(error)}"
            ) from error

    def _costs(self, candidates: list[tuple[str, int]]) -> list[float]:
        """How much each split alone takes the student away from the teacher's answers."""

        def trial(path: str, rank: int) -> Callable[[nn.Module], AbstractContextManager[nn.Module]]:
            return lambda model: replaced(model, {path: self._made[path, rank]})

        edits = [Edit(path, trial(path, rank), (path,)) for path, rank in candidates]
        paths = list(dict.fromkeys(path for path, _ in candidates))

        def measure() -> list[float]:
            return edit_costs(self.student, self.inputs, self.answers, edits, paths, self.task.distance)

        now = self.divergence({})
        with torch.no_grad():
            return [cost - now for cost in self.run.decide(f"costs/{_key(candidates)}", measure)]

    def _how_many(self, steps: list[RankOption]) -> int:
        """How many steps of the schedule to take."""
        goal, most = self.budget.goal, len(steps)
        count: int | None = most
        if goal < math.inf:
            count = fewest(most, lambda n: self.budget.ratio(self.spent(ranks_after(steps[:n]))) >= goal)
        allowed = most if self.config.max_divergence is None else self._allowed(steps, self.config.max_divergence)
        if goal == math.inf or (count is not None and count <= allowed):
            return min(allowed, most if count is None else count)
        if self.config.best_effort:
            return allowed
        raise self._missed(steps, allowed, limited=allowed < most)

    def _allowed(self, steps: list[RankOption], limit: float) -> int:
        """How many steps keep the divergence's growth within the limit."""
        now = self.divergence({})
        beyond = fewest(len(steps), lambda n: self.divergence(ranks_after(steps[:n])) - now > limit)
        return len(steps) if beyond is None else beyond - 1

    def _missed(self, steps: list[RankOption], allowed: int, limited: bool) -> Missed:
        within = f"split as far as max_divergence = {self.config.max_divergence:.4g} allows" if limited else "all split"
        reached = self.spent(ranks_after(steps[:allowed])) if allowed else self.value
        return self.budget.missed(reached, f"the student, {within},", self.refused, SPLIT_MORE, "split")


def fewest(most: int, holds: Callable[[int], bool]) -> int | None:
    """The fewest of 1 … `most` that something holds for, which then holds for all more, by bisection; or None."""
    if not most or not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _key(measurements: Any) -> str:
    return hashlib.sha256(repr(measurements).encode()).hexdigest()[:16]
