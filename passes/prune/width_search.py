"""The search by width alone, along a schedule of narrowings; what is measured is journaled, so resumed prunes agree."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pqk.copies import copy_of
from pqk.core.program import Program
from pqk.core.progress import Observer
from pqk.errors import InputError, PqkError, first_line
from pqk.passes.prune.budget import UNITS, Budget, Missed
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.cuts import cut_channels
from pqk.passes.prune.groups import trace_groups
from pqk.passes.prune.importance import CRITERIA, Narrowing, cuts_of, even_counts, narrowing_schedule, unit_importance
from pqk.passes.prune.law import Law, exact_groups
from pqk.passes.prune.settings import PruneSettings
from pqk.task.task import Task


class WidthSearch:
    """Cuts channels until a goal is reached; over the steps of a pass it collects what the report says of them."""

    def __init__(self, config: PruneSettings, task: Task, budget: Budget) -> None:
        self.config, self.task, self.budget = config, task, budget
        self.refused: dict[str, str] = {}
        """layer or block -> why it was not cut"""
        self.replaced: list[str] = []
        """groups of torch-pruning's that made way for others (see `exact_groups`)"""
        self.ranking: list[dict[str, Any]] = []
        """what was chosen, and among what"""
        self.ranking_seconds = 0.0
        """that ranking took on data, which grows with the samples"""

    def schedule(self, program: Program, key: str, check: bool) -> list[Narrowing]:
        """The narrowings of the student, in order; groups that may not be cut are refused.

        `check` holds each group to the law first (see `law`).
        """
        return self._schedule(program, key, self._groups(program, check))

    def _groups(self, program: Program, check: bool) -> list[ChannelGroup]:
        """The groups that may be cut; those that may not are refused."""
        student, example = program.student, self.task.example
        traced = trace_groups(student, example, self.config.ignore)
        if check:
            groups, reasons, self.replaced = exact_groups(student, example, traced)
        else:
            groups = traced.replaced([name for name in self.replaced if name in traced.others])
            reasons = {group.name: group.reason for group in groups}
        for name, reason in reasons.items():
            if reason is not None:
                self.refused.setdefault(name, reason)
        return groups

    def _schedule(self, program: Program, key: str, groups: Sequence[ChannelGroup]) -> list[Narrowing]:
        config = self.config
        multiple = config.multiple or program.target.channel_multiple
        groups = [group for group in groups if group.name not in self.refused]
        scored, floors, within = [], [], []
        for group, scores in zip(groups, self._importance(program, groups, key), strict=True):
            if isinstance(scores, str):
                self.refused[group.name] = scores
                continue
            entry = group, torch.tensor(scores)
            floor, members = config.minimum(program.origin, group), config.minimums(program.origin, group)
            if not narrowing_schedule([entry], multiple, [floor], config.scope, [members]):
                width = f"its {group.channels} channels and the floor of {floor}"
                self.refused[group.name] = f"no multiple of {multiple} fits between {width}"
                continue
            scored.append(entry)
            floors.append(floor)
            within.append(members)
        return narrowing_schedule(scored, multiple, floors, config.scope, within)

    def _broken(self, student: nn.Module, narrowings: Sequence[Narrowing]) -> bool:
        """Whether these narrowings break the law. Then the groups that do are refused: alone, or with those before.

        Groups were held to it in parts before; this is about the very channels that are to go.
        """
        law = Law(student, self.task.example)
        reason = law.why_not_exact(cuts_of(narrowings)) if narrowings else None
        if reason is None:
            return False
        by_group: dict[str, list[Narrowing]] = {}
        for narrowing in narrowings:
            by_group.setdefault(narrowing.group.name, []).append(narrowing)
        alone = {name: law.why_not_exact(cuts_of(some)) for name, some in by_group.items()}
        broken = {name: f"the channels that were chosen: {why}" for name, why in alone.items() if why is not None}
        before: list[Narrowing] = []
        for name, some in by_group.items() if not broken else ():
            if (why := law.why_not_exact(cuts_of([*before, *some]))) is not None:
                broken[name] = f"it may be cut, but not together with others: {why}"
                break
            before += some
        self.refused.update(broken)
        return True

    def _importance(self, program: Program, groups: list[ChannelGroup], key: str) -> list[list[float] | str]:
        kind, student = self.config.importance, program.student

        def measure() -> list[list[float] | str]:
            observe = CRITERIA[kind].measure
            began = time.perf_counter()
            measured = None if observe is None else observe(student, self.task, self.config.samples)
            self.ranking_seconds += time.perf_counter() - began
            scores = (unit_importance(student, group, kind, measured) for group in groups)
            return [s if isinstance(s, str) else s.tolist() for s in scores]

        return program.run.decide(f"importance/{key}/{journal_key((g.name, g.channels) for g in groups)}", measure)

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Cut the least important channels that bring the student to `goal`. Raises `InputError` where none do."""
        groups = self._groups(program, check=True)
        while True:
            schedule = self._schedule(program, str(step), groups)
            if not schedule:
                if self.config.best_effort:
                    return program
                raise self._missed(self.budget.value(program.student), "no channel group can be cut, and the student")
            count = self._choose(program, schedule, goal, step)
            if count is not None:
                return program.rewrite(cut_channels, self.task.example, cuts=cuts_of(schedule[:count]))

    def _choose(self, program: Program, schedule: Sequence[Narrowing], goal: float, step: int) -> int | None:
        """How many narrowings to make; None where they break the law, and groups were refused.

        Raises `InputError` where all are not enough.
        """
        considered: list[dict[str, float]] = []
        unit = UNITS[self.budget.kind]

        def ratio(count: int) -> float:
            cuts = cuts_of(schedule[:count])
            student = cut_channels(copy_of(program.student, "student"), self.task.example, cuts=cuts)
            try:
                value = self.budget.value(student)
            except PqkError:
                raise
            except Exception as error:  # whatever the user's forward raises when a shape is not what it expects
                raise _Uncountable(count, error) from error
            lost = sum(narrowing.lost for narrowing in schedule[:count])
            considered.append({"narrowings": count, unit: value, "importance_lost": lost})
            return self.budget.ratio(value)

        counts = even_counts(schedule) if self.config.scope == "uniform" else [*range(1, len(schedule) + 1)]
        try:
            if self.budget.kind == "latency":
                count = self._fewest_timed(program.run.observer, counts, ratio, goal)
            else:
                count = _fewest(counts, ratio, goal)
        except _Uncountable as error:
            if self._broken(program.student, schedule[: error.count]):
                return None
            raise InputError(f"prune: the student cannot be measured once it is cut: {error}") from error
        if count is None and self.config.best_effort:
            count = int(min(considered, key=lambda c: c[unit])["narrowings"])
        if count is None:
            raise self._missed(min(c[unit] for c in considered), "the least that is allowed")
        if self._broken(program.student, schedule[:count]):
            return None
        self.ranking.append({"step": step, "chosen": count, "considered": considered})
        return count

    def _missed(self, reached: float, what: str) -> Missed:
        """The error for a budget that cannot be met, with why each layer that was left alone is."""
        return self.budget.missed(reached, what, self.refused)

    def _fewest_timed(
        self, observer: Observer, every: Sequence[int], ratio: Callable[[int], float], goal: float
    ) -> int | None:
        """The fewest narrowings that meet the goal of those timed: latency does not fall with width, so all are."""
        candidates = min(len(every), self.config.candidates)
        counts = sorted({every[round(len(every) * i / candidates) - 1] for i in range(1, candidates + 1)})
        ratios = {}
        with observer.task("timing candidates", len(counts)) as advance:
            for count in counts:
                ratios[count] = ratio(count)
                advance(1, f"{ratios[count]:.2f} of {goal:.2f} times")
        return next((count for count in counts if ratios[count] >= goal), None)


class _Uncountable(Exception):
    """The student does not run with so many narrowings."""

    def __init__(self, count: int, error: Exception) -> None:
        super().__init__(first_line(error))
        self.count = count


def _fewest(counts: Sequence[int], ratio: Callable[[int], float], goal: float) -> int | None:
    """The fewest narrowings that meet the goal, by bisection: what is counted falls with every one."""
    if ratio(counts[-1]) < goal:
        return None
    low, high = 0, len(counts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(counts[middle - 1]) >= goal else (middle, high)
    return counts[high - 1]


def journal_key(measurements: Iterable[tuple[Any, ...]]) -> str:
    """Names a list of measurements: two prunes of one run may measure other groups and must not share them."""
    return hashlib.sha256(repr(list(measurements)).encode()).hexdigest()[:16]
