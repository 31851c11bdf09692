"""Searches for what to cut: by width alone, along a schedule of narrowings, or by depth, greedily on data.

Both measure through the run's journal, so that a resumed prune decides as it did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pqk.copies import copy_of
from pqk.core.program import Program
from pqk.core.progress import Observer
from pqk.data.structures import concatenate
from pqk.errors import InputError, PqkError, first_line
from pqk.passes.prune.blocks import Block, Edit, Inputs, edit_costs, find_blocks, without_block
from pqk.passes.prune.budget import UNITS, Budget, Missed, digest
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.cuts import Skip, cut_channels, drop_block
from pqk.passes.prune.groups import trace_groups
from pqk.passes.prune.importance import CRITERIA, Narrowing, cuts_of, narrowing_schedule, unit_importance
from pqk.passes.prune.law import Law, exact_groups, masked
from pqk.passes.prune.settings import PruneSettings
from pqk.task.task import Task

CLOSE = 0.9
"""share of the goal from which on an estimated latency is measured: the next removal may be the last"""


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
            floor, members = config.minimum(program.teacher, group), config.minimums(program.teacher, group)
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
            measured = None if observe is None else observe(student, self.task, self.config.samples)
            scores = (unit_importance(student, group, kind, measured) for group in groups)
            return [s if isinstance(s, str) else s.tolist() for s in scores]

        return program.run.decide(f"importance/{key}/{_journal_key((g.name, g.channels) for g in groups)}", measure)

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

        try:
            if self.budget.kind == "latency":
                count = self._fewest_timed(program.run.observer, len(schedule), ratio, goal)
            else:
                count = _fewest(len(schedule), ratio, goal)
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

    def _fewest_timed(self, observer: Observer, most: int, ratio: Callable[[int], float], goal: float) -> int | None:
        """The fewest narrowings that meet the goal of those timed: latency does not fall with width, so all are."""
        candidates = min(most, self.config.candidates)
        counts = sorted({round(most * i / candidates) for i in range(1, candidates + 1)})
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


def _fewest(most: int, ratio: Callable[[int], float], goal: float) -> int | None:
    """The fewest narrowings that meet the goal, by bisection: what is counted falls with every one."""
    if ratio(most) < goal:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(middle) >= goal else (middle, high)
    return high


@dataclass(frozen=True)
class Removable:
    """Candidates for removal from a student: residual blocks, and the next narrowing of each channel group, by name."""

    blocks: dict[str, Block]
    narrowings: dict[str, Narrowing]

    @property
    def edits(self) -> list[Edit]:
        """A trial of each candidate, blocks first."""
        blocks = [Edit(path, _trial_without(block), (path,)) for path, block in self.blocks.items()]
        return blocks + [
            Edit(name, _trial_masked(narrowing), tuple(cut["module"] for cut in narrowing.cuts))
            for name, narrowing in self.narrowings.items()
        ]

    def alike(self, block: str) -> list[str]:
        """The blocks of this one's signature, itself among them."""
        return [path for path, other in self.blocks.items() if other.signature == self.blocks[block].signature]


@dataclass
class Search:
    """State of a search by depth: the student so far, what it is to reach, and the data that it is ranked on."""

    program: Program
    goal: float
    value: float
    """what the student spends, in the budget's unit; for a latency that is far from the goal an estimate"""
    inputs: Inputs
    answers: Any
    """the teacher's outputs for `inputs`"""

    @property
    def student(self) -> nn.Module:
        return self.program.student


class DepthSearch(WidthSearch):
    """Removes residual blocks (with width also channels), one after the other: the least harm for what it saves."""

    def __init__(self, config: PruneSettings, task: Task, budget: Budget) -> None:
        super().__init__(config, task, budget)
        self.savings: dict[str, float] = {}
        """signature of a block, or a narrowing of one architecture -> what its removal saves"""

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Remove what does least harm until the student is at `goal`. Raises `Missed` where all of it is not enough."""
        self.savings.clear()  # each step measures the student that it begins with
        inputs = concatenate(list(self.task.calibration(self.config.samples)))
        with torch.no_grad():
            answers = program.teacher(*inputs)
        search = Search(program, goal, self.budget.value(program.student), inputs, answers)
        start, done, round_ = self.budget.ratio(search.value), 0, 0
        with program.run.observer.task(f"{program.run.scope}: ranking", 100) as advance:
            while self.budget.ratio(search.value) < goal:
                round_ += 1
                try:
                    self._round(search, f"{step}/{round_}")
                except Missed:
                    if self.config.best_effort:
                        break
                    raise
                reached = self.budget.ratio(search.value)
                percent = min(100, max(done, round(100 * math.log(reached / start) / math.log(goal / start))))
                advance(percent - done, f"{reached:.2f} of {goal:.2f} times")
                done = percent
        return search.program

    def _round(self, search: Search, key: str) -> None:
        """Rank everything that could go, and remove the best of it."""
        removable = self._removable(search, key)
        if not removable.edits:
            raise self._missed(self.budget.value(search.student), "with everything removable gone, the student")
        names = [edit.name for edit in removable.edits]
        savings = {name: self._saving(search, removable, name) for name in names}
        for name in [name for name, saved in savings.items() if saved is None]:
            del savings[name], removable.narrowings[name]
        if not savings:
            raise self._missed(self.budget.value(search.student), "with everything removable gone, the student")
        rows: list[dict[str, Any]] = [{"name": name, "saved": saved} for name, saved in savings.items()]
        if self.config.blocks == "every_other":
            rows.sort(key=lambda row: alternation(search.student, row["name"]))
        else:
            self._rank(search, removable, rows, key)
        estimate = search.value - self._remove(search, rows, removable)
        # a latency is worth measuring when it may be the last one; in a rehearsal, when it seems so
        close = 1.0 if self.budget.run.rough else CLOSE
        measured = self.budget.kind != "latency" or self.budget.ratio(estimate) >= close * search.goal
        search.value = self.budget.value(search.student) if measured else estimate

    def _removable(self, search: Search, key: str) -> Removable:
        """The candidates for removal; why everything else may not go is noted in `refused`."""
        batch = tuple(t[:8] for t in search.inputs)
        blocks, declined = find_blocks(search.student, batch, self.config.protect)
        self.refused.update(declined)
        blocks = [b for b in blocks if not self._at_floor(search.student, b.path)]
        narrowings: dict[str, Narrowing] = {}
        if self.config.width:
            for narrowing in self.schedule(search.program, key, check=key.endswith("/1")):
                narrowings.setdefault(narrowing.group.name, narrowing)
        return Removable({b.path: b for b in blocks}, narrowings)

    def _rank(self, search: Search, removable: Removable, rows: list[dict[str, Any]], key: str) -> None:
        """Sort the rows, one for each edit, by the harm that the edit does to the outputs for what it saves."""
        student, edits = search.student, removable.edits

        def measure() -> dict[str, Any]:
            distance = self.task.distance
            now = distance(student(*search.inputs), search.answers)
            costs = edit_costs(student, search.inputs, search.answers, edits, [*removable.blocks], distance)
            return {"now": now, "costs": costs}

        measurements = _journal_key((e.name, e.touches) for e in edits)
        with torch.no_grad():
            ranked = search.program.run.decide(f"rank/{key}/{measurements}", measure)
        for row, cost in zip(rows, ranked["costs"], strict=True):
            row["distance"] = cost
        rows.sort(key=lambda row: _harm(row["distance"] - ranked["now"], row["saved"]))

    def _at_floor(self, student: nn.Module, block: str) -> bool:
        """Whether the container of `block` is down to its `keep_blocks`, which is then the reason to keep it."""
        container = block.rpartition(".")[0]
        fewest = self.config.keep_blocks.get(container)
        if fewest is None:
            return False
        remaining = sum(not isinstance(child, Skip) for child in student.get_submodule(container).children())
        if remaining <= fewest:
            self.refused[block] = f"keep_blocks leaves at least {fewest} in {container}"
        return remaining <= fewest

    def _saving(self, search: Search, removable: Removable, name: str) -> float | None:
        """What an edit saves in the budget's unit; for blocks of one shape the mean over all of them, measured once.

        One block of many is worth no more than the noise of a measurement; all of them together are. None for a
        narrowing that breaks the law, which is refused.
        """
        block = removable.blocks.get(name)
        signature = f"{name}/{digest(search.student)}" if block is None else block.signature
        if signature not in self.savings:
            student, count = copy_of(search.student, "student"), 1
            if block is None:
                student = cut_channels(student, self.task.example, cuts=removable.narrowings[name].cuts)
            else:
                paths = removable.alike(name)
                count = len(paths)
                for path in paths:
                    returns = removable.blocks[path].returns
                    student = drop_block(student, self.task.example, block=path, returns=returns)
            try:
                before, after = self.budget.compare(search.student, search.value, student)
            except PqkError:
                raise
            except Exception as error:  # as in a search by width
                if block is None and self._broken(search.student, [removable.narrowings[name]]):
                    return None
                raise InputError(
                    f'prune: the student cannot be measured without "{name}": {first_line(error)}'
                ) from error
            self.savings[signature] = max((before - after) / count, 1e-4 * before)
        return self.savings[signature]

    def _remove(self, search: Search, rows: list[dict[str, Any]], removable: Removable) -> float:
        """Remove the best rows, until the goal is near; returns what that should save.

        Narrowings go last and together, since their indices are counted in the student as it is.
        """
        removed: list[str] = []
        narrowed: list[Narrowing] = []
        saved = 0.0
        for row in rows[: self.config.removals_per_ranking]:
            name = row["name"]
            block = removable.blocks.get(name)
            if _inside(name, removed) or (block is not None and self._at_floor(search.student, name)):
                continue
            if block is None:
                narrowed.append(removable.narrowings[name])
            else:
                removed.append(name)
                wrap = {"returns": block.returns} if block.returns else {}
                search.program = search.program.rewrite(drop_block, self.task.example, block=name, **wrap)
            saved += row["saved"]
            self.ranking.append({"removed": name, "ranking": rows if not self.ranking else rows[:3]})
            if self.budget.ratio(search.value - saved) >= search.goal:
                break
        narrowed = [narrowing for narrowing in narrowed if not _inside(narrowing.group.name, removed)]
        cuts = [cut for cut in cuts_of(narrowed) if not _inside(cut["module"], removed)]
        if not cuts:
            return saved
        if self._broken(search.student, narrowed):
            return 0.0
        search.program = search.program.rewrite(cut_channels, self.task.example, cuts=cuts)
        return saved


def _journal_key(measurements: Iterable[tuple[Any, ...]]) -> str:
    """Names a list of measurements: two prunes of one run may measure other groups and must not share them."""
    return hashlib.sha256(repr(list(measurements)).encode()).hexdigest()[:16]


def alternation(model: nn.Module, block: str) -> tuple[int, int]:
    """Sort key of a block where every other one goes: places 1, 3, 5 …, then 2, 6, 10 …, then 4, 12 …, at last 0.

    What has gone keeps its place in its container, so the turns do not depend on how far one has come.
    """
    container, _, name = block.rpartition(".")
    place = [n for n, _ in model.get_submodule(container).named_children()].index(name)
    return (place & -place if place else 1 << 30), place


def _inside(path: str, blocks: list[str]) -> bool:
    return any(f"{path}.".startswith(f"{block}.") for block in blocks)


def _harm(cost: float, saved: float) -> float:
    """Cost for each unit saved; what costs nothing is better the more it saves."""
    return cost / saved if cost > 0 else cost * saved


def _trial_without(block: Block) -> Callable[[nn.Module], Any]:
    return lambda model: without_block(model, block.path, block.returns)


def _trial_masked(narrowing: Narrowing) -> Callable[[nn.Module], Any]:
    return lambda model: masked(model, narrowing.cuts)
