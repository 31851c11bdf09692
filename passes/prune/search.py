"""How a prune reaches its budget: by width alone, down a ladder of narrowings, or by depth, greedily on data.

Both measure through the run's journal, so that a resumed prune decides as it did.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pqk.core.program import Program
from pqk.core.progress import Observer
from pqk.data.structures import concatenate
from pqk.errors import InputError
from pqk.passes.prune.blocks import Block, Edit, Inputs, edit_costs, find_blocks, without_block
from pqk.passes.prune.budget import UNITS, Budget, Missed, digest
from pqk.passes.prune.cuts import Skip, cut_channels, drop_block
from pqk.passes.prune.groups import ChannelGroup, find_groups, masked, why_not_cut, why_not_exact
from pqk.passes.prune.importance import MEASURES, Narrowing, cuts_of, narrowing_schedule, unit_importance
from pqk.passes.prune.settings import PruneSettings
from pqk.task.metrics import distance
from pqk.task.task import Task


class Width:
    """Cuts channels until a goal is reached; holds what one step of the pass shares."""

    def __init__(
        self, config: PruneSettings, task: Task, budget: Budget, refused: dict[str, str], ranking: list[dict[str, Any]]
    ) -> None:
        self.config, self.task, self.budget, self.refused, self.ranking = config, task, budget, refused, ranking
        self.savings: dict[str, float] = {}

    def rungs(self, program: Program, key: str, check: bool) -> list[Narrowing]:
        """The ladder of the student. Groups that may not be cut are refused, with `check` those that fail the law."""
        config, student = self.config, program.student
        multiple = config.multiple or program.target.channel_multiple
        groups = []
        for group in find_groups(student, self.task.example, config.ignore):
            reason = group.reason or (why_not_cut(student, self.task.example, group) if check else None)
            if reason is not None:
                self.refused.setdefault(group.name, reason)
            if group.name not in self.refused:
                groups.append(group)
        scored, floors = [], []
        for group, scores in zip(groups, self._importance(program, groups, key), strict=True):
            floor = config.minimum(program.teacher, group)
            if isinstance(scores, str):
                self.refused[group.name] = scores
            elif not narrowing_schedule([(group, torch.tensor(scores))], multiple, [floor], config.scope):
                width = f"its {group.channels} channels and the floor of {floor}"
                self.refused[group.name] = f"no multiple of {multiple} fits between {width}"
            else:
                scored.append((group, torch.tensor(scores)))
                floors.append(floor)
        return narrowing_schedule(scored, multiple, floors, config.scope)

    def _importance(self, program: Program, groups: list[ChannelGroup], key: str) -> list[list[float] | str]:
        kind, student = self.config.importance, program.student

        def measure() -> list[list[float] | str]:
            measured = MEASURES[kind](student, self.task, self.config.samples) if kind in MEASURES else None
            scores = (unit_importance(student, group, kind, measured) for group in groups)
            return [s if isinstance(s, str) else s.tolist() for s in scores]

        return program.run.decide(f"importance/{key}/{_named((g.name, g.channels) for g in groups)}", measure)

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Cut the least important channels that bring the student to `goal`. Raises `InputError` where none do."""
        rungs = self.rungs(program, str(step), check=True)
        if not rungs:
            if self.config.best_effort:
                return program
            raise self.budget.missed(self.budget.value(program.student), "no channel group can be cut, and the student")
        considered: list[dict[str, float]] = []
        unit = UNITS[self.budget.kind]

        def ratio(count: int) -> float:
            student = cut_channels(copy.deepcopy(program.student), self.task.example, cuts=cuts_of(rungs[:count]))
            value, lost = self.budget.value(student), sum(r.lost for r in rungs[:count])
            considered.append({"narrowings": count, unit: value, "importance_lost": lost})
            return self.budget.ratio(value)

        if self.budget.kind == "latency":
            count = self._timed(program.run.observer, len(rungs), ratio, goal)
        else:
            count = _first(len(rungs), ratio, goal)
        if count is None and self.config.best_effort:
            count = int(min(considered, key=lambda c: c[unit])["narrowings"])
        if count is None:
            raise self.budget.missed(min(c[unit] for c in considered), "the least that is allowed")
        self.ranking.append({"step": step, "chosen": count, "considered": considered})
        cuts = cuts_of(rungs[:count])
        reason = why_not_exact(program.student, self.task.example, cuts)
        if reason is not None:
            raise InputError(f"prune: the groups may be cut one by one but not together: {reason}; ignore some of them")
        return program.rewrite(cut_channels, self.task.example, cuts=cuts)

    def _timed(self, observer: Observer, rungs: int, ratio: Callable[[int], float], goal: float) -> int | None:
        """The fewest rungs that meet the goal of those timed: latency does not fall with width, so all are."""
        tried = min(rungs, self.config.candidates)
        counts = sorted({round(rungs * i / tried) for i in range(1, tried + 1)})
        ratios = {}
        with observer.task("timing candidates", len(counts)) as advance:
            for count in counts:
                ratios[count] = ratio(count)
                advance(1, f"{ratios[count]:.2f} of {goal:.2f} times")
        return next((count for count in counts if ratios[count] >= goal), None)


def _first(rungs: int, ratio: Callable[[int], float], goal: float) -> int | None:
    """The fewest rungs that meet the goal, by bisection: what is counted falls with every rung."""
    if ratio(rungs) < goal:
        return None
    low, high = 0, rungs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(middle) >= goal else (middle, high)
    return high


class Depth(Width):
    """Removes residual blocks (with width also channels), one after the other: the least harm for what it saves."""

    def reach(self, program: Program, goal: float, step: int) -> Program:
        inputs = concatenate(list(self.task.calibration(self.config.samples)))
        with torch.no_grad():
            teacher = program.teacher(*inputs)
        value, round_ = self.budget.value(program.student), 0
        start, done = self.budget.ratio(value), 0
        with program.run.observer.task(f"{program.run.scope}: ranking", 100) as advance:
            while self.budget.ratio(value) < goal:
                round_ += 1
                try:
                    program, saved = self._round(program, inputs, teacher, value, goal, f"{step}/{round_}")
                except Missed:
                    if self.config.best_effort:
                        break
                    raise
                estimate = value - saved
                # a latency is worth measuring when it may be the last one
                close = self.budget.kind != "latency" or self.budget.ratio(estimate) >= 0.9 * goal
                value = self.budget.value(program.student) if close else estimate
                reached = self.budget.ratio(value)
                percent = min(100, max(done, round(100 * math.log(reached / start) / math.log(goal / start))))
                advance(percent - done, f"{reached:.2f} of {goal:.2f} times")
                done = percent
        return program

    def _round(
        self, program: Program, inputs: Inputs, teacher: Any, value: float, goal: float, key: str
    ) -> tuple[Program, float]:
        """Rank everything that could go and let the best go. Returns what that should save, too."""
        head = tuple(t[:8] for t in inputs)
        blocks, declined = find_blocks(program.student, head, self.config.protect)
        self.refused.update(declined)
        blocks = [b for b in blocks if not self._at_floor(program.student, b.path)]
        returns = {b.path: b.returns for b in blocks}
        edits = [Edit(b.path, _without(b), (b.path,)) for b in blocks]
        rungs = _lowest(self.rungs(program, key, check=key.endswith("/1"))) if self.config.width else {}
        edits += [Edit(n, _masked(r), tuple(c["module"] for c in r.cuts)) for n, r in rungs.items()]
        if not edits:
            raise self.budget.missed(self.budget.value(program.student), "with everything removable gone, the student")
        signatures = {b.path: b.signature for b in blocks}
        rows: list[dict[str, Any]] = [
            {"name": e.name, "saved": self._saved(program, e, rungs, signatures, returns)} for e in edits
        ]
        if self.config.blocks == "every_other":
            rows.sort(key=lambda row: alternation(program.student, row["name"]))
        else:
            self._rank(program, rows, edits, [b.path for b in blocks], (inputs, teacher), key)
        return self._remove(program, rows, rungs, returns, value, goal)

    @staticmethod
    def _rank(
        program: Program,
        rows: list[dict[str, Any]],
        edits: list[Edit],
        blocks: list[str],
        data: tuple[Inputs, Any],
        key: str,
    ) -> None:
        """Sort the rows of `edits` by the harm on data, which is (inputs, the teacher's outputs)."""
        inputs, teacher = data

        def measure() -> dict[str, Any]:
            now = distance(program.student(*inputs), teacher)
            return {"now": now, "costs": edit_costs(program.student, inputs, teacher, edits, blocks)}

        with torch.no_grad():
            ranked = program.run.decide(f"rank/{key}/{_named((e.name, e.touches) for e in edits)}", measure)
        for row, cost in zip(rows, ranked["costs"], strict=True):
            row["distance"] = cost
        rows.sort(key=lambda row: _harm(row["distance"] - ranked["now"], row["saved"]))

    def _at_floor(self, student: nn.Module, block: str) -> bool:
        """Whether the container of `block` is down to its `keep_blocks`, which is then the reason to keep it."""
        container = block.rpartition(".")[0]
        fewest = self.config.keep_blocks.get(container)
        if fewest is None:
            return False
        left = sum(not isinstance(child, Skip) for child in student.get_submodule(container).children())
        if left <= fewest:
            self.refused[block] = f"keep_blocks leaves at least {fewest} in {container}"
        return left <= fewest

    def _saved(
        self,
        program: Program,
        edit: Edit,
        rungs: dict[str, Narrowing],
        signatures: dict[str, str],
        returns: dict[str, int],
    ) -> float:
        """What an edit saves in the budget's unit; for blocks of one shape the mean over all of them, measured once.

        One block of many is worth no more than the noise of a measurement; all of them together are.
        """
        signature = signatures.get(edit.name) or f"{edit.name}/{digest(program.student)}"
        if signature not in self.savings:
            student, alike = copy.deepcopy(program.student), [edit.name]
            if edit.name in rungs:
                student = cut_channels(student, self.task.example, cuts=rungs[edit.name].cuts)
            else:
                alike = [path for path, s in signatures.items() if s == signature]
                for path in alike:
                    student = drop_block(student, self.task.example, block=path, returns=returns[path])
            before = self.budget.value(program.student)
            self.savings[signature] = max((before - self.budget.value(student)) / len(alike), 1e-4 * before)
        return self.savings[signature]

    def _remove(
        self,
        program: Program,
        rows: list[dict[str, Any]],
        rungs: dict[str, Narrowing],
        returns: dict[str, int],
        value: float,
        goal: float,
    ) -> tuple[Program, float]:
        """Let the best rows go, until the goal is near. Narrowings go last and together: their indices are of now."""
        gone: list[str] = []
        narrowed: list[Narrowing] = []
        saved = 0.0
        for row in rows[: self.config.removals_per_ranking]:
            name = row["name"]
            if _inside(name, gone) or (name not in rungs and self._at_floor(program.student, name)):
                continue
            if name in rungs:
                narrowed.append(rungs[name])
            else:
                gone.append(name)
                wrap = {"returns": returns[name]} if returns[name] else {}
                program = program.rewrite(drop_block, self.task.example, block=name, **wrap)
            saved += row["saved"]
            self.ranking.append({"removed": name, "ranking": rows if not self.ranking else rows[:3]})
            if self.budget.ratio(value - saved) >= goal:
                break
        narrowed = [r for r in narrowed if not _inside(r.group.name, gone)]
        cuts = [c for c in cuts_of(narrowed) if not _inside(c["module"], gone)]
        reason = why_not_exact(program.student, self.task.example, cuts) if cuts else None
        if reason is not None:
            self.refused.update({r.group.name: reason for r in narrowed})
            return program, 0.0
        return program.rewrite(cut_channels, self.task.example, cuts=cuts) if cuts else program, saved


def _named(things: Iterable[tuple[Any, ...]]) -> str:
    """What a list of measurements is of: two prunes of one run may measure other groups and must not share them."""
    return hashlib.sha256(repr(list(things)).encode()).hexdigest()[:16]


def alternation(model: nn.Module, block: str) -> tuple[int, int]:
    """When a block's turn comes if every other one goes: places 1, 3, 5 …, then 2, 6, 10 …, then 4, 12 …, at last 0.

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


def _without(block: Block) -> Callable[[nn.Module], Any]:
    return lambda model: without_block(model, block.path, block.returns)


def _masked(rung: Narrowing) -> Callable[[nn.Module], Any]:
    return lambda model: masked(model, rung.cuts)


def _lowest(rungs: list[Narrowing]) -> dict[str, Narrowing]:
    """The next rung of each group."""
    found: dict[str, Narrowing] = {}
    for rung in rungs:
        found.setdefault(rung.group.name, rung)
    return found
