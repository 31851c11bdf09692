"""The greedy search by depth: of blocks, and narrowings of channel groups, the one goes that does least harm.

What is measured is journaled, so that a resumed prune decides as it did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pqk.copies import copy_of
from pqk.core.program import Program
from pqk.errors import InputError, PqkError, first_line
from pqk.passes.prune.blocks import Block, Edit, find_blocks, without_block
from pqk.passes.prune.budget import Budget, Missed, digest
from pqk.passes.prune.cuts import Cut, Skip, cut_channels, drop_block
from pqk.passes.prune.importance import Narrowing, cuts_of
from pqk.passes.prune.law import masked
from pqk.passes.prune.ranking import RankingData
from pqk.passes.prune.settings import PruneSettings
from pqk.passes.prune.width_search import WidthSearch, journal_key
from pqk.task.task import Task

CLOSE = 0.9
"""share of the goal from which on an estimated latency is measured: the next removal may be the last"""


@dataclass(frozen=True)
class Removable:
    """Candidates for removal from a student: residual blocks, and the next narrowing of each channel group, by name."""

    blocks: dict[str, Block]
    narrowings: dict[str, Narrowing]

    @property
    def edits(self) -> list[Edit]:
        """A trial of each candidate, blocks first."""
        blocks = [Edit(path, trial_without(block), (path,)) for path, block in self.blocks.items()]
        return blocks + [
            Edit(name, trial_masked(narrowing.cuts), tuple(cut["module"] for cut in narrowing.cuts))
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
    data: RankingData

    @property
    def student(self) -> nn.Module:
        return self.program.student


class DepthSearch(WidthSearch):
    """Removes residual blocks (with width also channels), one after the other: the least harm for what it saves."""

    def __init__(self, config: PruneSettings, task: Task, budget: Budget) -> None:
        super().__init__(config, task, budget)
        self.savings: dict[str, float] = {}
        """signature of a block, or a narrowing of one architecture -> what its removal saves"""
        self.near_goal = False
        """a rehearsal has measured a latency at the goal, from which the next ones are estimated"""

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Remove what does least harm until the student is at `goal`. Raises `Missed` where all of it is not enough."""
        self.savings.clear()  # each step measures the student that it begins with
        data = RankingData(self.task, program.teacher, self.config.samples)
        search = Search(program, goal, self.budget.value(program.student), data)
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
        if self.budget.kind != "latency" or self._worth_measuring(estimate, search.goal):
            search.value = self.budget.value(search.student)
        else:
            search.value = self.budget.take(search.student, estimate) if self.budget.run.rough else estimate

    def _worth_measuring(self, estimate: float, goal: float) -> bool:
        """Whether a latency may be the last one; in a rehearsal, whether it is the first that seems so."""
        if not self.budget.run.rough:
            return self.budget.ratio(estimate) >= CLOSE * goal
        first, self.near_goal = not self.near_goal, self.near_goal or self.budget.ratio(estimate) >= goal
        return first and self.near_goal

    def _removable(self, search: Search, key: str) -> Removable:
        """The candidates for removal; why everything else may not go is noted in `refused`."""
        blocks, declined = find_blocks(search.student, search.data.few, self.config.protect)
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
            began = time.perf_counter()
            now, costs = search.data.measure(student, edits, [*removable.blocks])
            self.ranking_seconds += time.perf_counter() - began
            return {"now": now, "costs": costs}

        measurements = journal_key((e.name, e.touches) for e in edits)
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
            if inside(name, removed) or (block is not None and self._at_floor(search.student, name)):
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
        narrowed = [narrowing for narrowing in narrowed if not inside(narrowing.group.name, removed)]
        cuts = [cut for cut in cuts_of(narrowed) if not inside(cut["module"], removed)]
        if not cuts:
            return saved
        if self._broken(search.student, narrowed):
            return 0.0
        search.program = search.program.rewrite(cut_channels, self.task.example, cuts=cuts)
        return saved


def alternation(model: nn.Module, block: str) -> tuple[int, int]:
    """Sort key of a block where every other one goes: places 1, 3, 5 …, then 2, 6, 10 …, then 4, 12 …, at last 0.

    What has gone keeps its place in its container, so the turns do not depend on how far one has come.
    """
    container, _, name = block.rpartition(".")
    place = [n for n, _ in model.get_submodule(container).named_children()].index(name)
    return (place & -place if place else 1 << 30), place


def inside(path: str, blocks: Sequence[str]) -> bool:
    """Whether a module is one of `blocks`, or in one."""
    return any(f"{path}.".startswith(f"{block}.") for block in blocks)


def _harm(cost: float, saved: float) -> float:
    """Cost for each unit saved; what costs nothing is better the more it saves."""
    return cost / saved if cost > 0 else cost * saved


def trial_without(block: Block) -> Callable[[nn.Module], Any]:
    """A trial in which a block is replaced by its shortcut."""
    return lambda model: without_block(model, block.path, block.returns)


def trial_masked(cuts: Sequence[Cut]) -> Callable[[nn.Module], Any]:
    """A trial in which the channels that these cuts remove are zero."""
    return lambda model: masked(model, cuts)
