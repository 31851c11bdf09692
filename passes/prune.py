"""Structured pruning: fewer channels (width) and fewer residual blocks (depth), up to a budget.

Narrower is not faster: an INT8 convolution of 8 channels can be slower than the FP32 one. So the budget may be the
measured latency of the deployed INT8 form; candidates are exported and timed.

*Width* alone walks down a ladder of narrowings, least important first, and takes the first network (for latency: the
least damaged of the timed ones) that meets the budget. *Depth* is greedy on data: of all blocks (and, with width, all
next narrowings) the one goes that moves the outputs least away from the teacher's for what it saves; and again.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from pqk.data import Batch
from pqk.errors import InputError, nearest
from pqk.measure import count_macs, count_parameters, float_bytes, integer_bytes
from pqk.passes._blocks import Block, Edit, Inputs, distance, edit_costs, find_blocks, without_block
from pqk.passes._budget import UNITS, Budget, digest
from pqk.passes._cut import Skip, channels_of, cut_channels, drop_block
from pqk.passes._groups import ChannelGroup, find_groups, law_reason, masked, probe
from pqk.passes._width import Rung, cuts_of, gradients, ladder, unit_importance
from pqk.program import CONFIG, Pass, Program, RewriteFunction, Stage
from pqk.run import Observer
from pqk.task import Task
from pqk.train import Objective, Training, fit


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Prune(Pass):
    """Cut channels and residual blocks until the student is so many times smaller or faster than the teacher."""

    name: ClassVar[str] = "prune"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.MODULE
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = (cut_channels, drop_block)

    width: bool = True
    """cut channels"""
    depth: bool = False
    """remove whole residual blocks, ranked by what removing them costs on validation data"""
    macs_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's multiply-accumulates over the student's"""
    parameters_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's parameters over the student's"""
    size_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 bytes over the bytes of the student's INT8 form"""
    latency_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 latency over that of the student's INT8 form, both in the target's runtime"""
    importance: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    """what a channel is worth: weight norm, first-order effect on the task loss, or batch-norm scale"""
    scope: Literal["global", "per_layer"] = "global"
    """channels compete across the network, or every layer loses the same share"""
    multiple: int | None = Field(default=None, ge=1)
    """widths are multiples of this; by default what the target's kernels like"""
    floor: float = Field(default=0.25, gt=0)
    """what every layer keeps at least: a share of the teacher's channels if below 1, else a number of channels"""
    ignore: tuple[str, ...] = ()
    """layers, or modules around them, that are never cut (shell patterns: `layer1.*`, `conv1`)"""
    protect: tuple[str, ...] = ()
    """blocks that are never removed (shell patterns)"""
    keep_blocks: dict[str, int] = Field(default_factory=dict)
    """the fewest children that a container keeps, by its path: `{ layer3 = 5 }`. What a block costs on data before
    recovery says little about how much the student can learn again; late blocks hold most of the parameters"""
    steps: int = Field(default=1, ge=1)
    """the budget is approached in this many equal factors, with recovery after each"""
    recovery_epochs: float = Field(default=0.0, ge=0)
    """training after each step, in epochs"""
    recovery_rate: float = Field(default=0.01, gt=0)
    """peak learning rate of that training"""
    samples: int = Field(default=256, ge=2)
    """validation samples that blocks are ranked on, and that taylor importance is measured on"""
    removals_per_ranking: int = Field(default=1, ge=1)
    """with depth: how many blocks (and narrowings) go before the rest is ranked again; more is faster and coarser"""
    candidates: int = Field(default=8, ge=1)
    """networks timed on the ladder of widths, for a latency budget"""

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        given = [f"{kind}_ratio" for kind in UNITS if getattr(self, f"{kind}_ratio") is not None]
        if len(given) != 1:
            raise InputError(
                f"prune: exactly one of {', '.join(f'{k}_ratio' for k in UNITS)} is the budget; "
                f"{' and '.join(given) + ' are' if given else 'none is'} given"
            )
        if not (self.width or self.depth):
            raise InputError("prune: width and depth are both false, so nothing could be cut; set one of them")
        if self.floor > 1 and self.floor != int(self.floor):
            raise InputError(f"prune: floor = {self.floor} is neither a share below 1 nor a whole number of channels")
        return self

    def apply(self, program: Program, task: Task) -> Program:
        """Raises `InputError` where the budget cannot be met, measured, or the model not traced."""
        program.student.eval()
        for container in self.keep_blocks:
            if container not in dict(program.student.named_modules()):
                known = [n for n, m in program.student.named_modules() if n and any(m.children())]
                raise InputError(
                    f'prune: keep_blocks names "{container}", which is no module{nearest(container, known)}'
                )
        budget = self._budget(program, task)
        before = self._costs(program.student, task)
        start = budget.ratio(budget.value(program.student))
        if start >= budget.goal:
            return program.decline(self.name, [("*", f"the student already is {start:.3g} times less")])
        ranking: list[dict[str, Any]] = []
        refused: dict[str, str] = {}
        for step in range(1, self.steps + 1):
            goal = start * (budget.goal / start) ** (step / self.steps)
            cut = (
                _Depth(self, task, budget, refused, ranking)
                if self.depth
                else _Width(self, task, budget, refused, ranking)
            )
            program = cut.reach(program, goal, step)
            if self.recovery_epochs:
                program = recover(self, program, task, step)
        reached = budget.ratio(budget.value(program.student))
        there = dict(program.student.named_modules())
        declined = [(layer, reason) for layer, reason in refused.items() if layer in there]
        return program.decline(self.name, declined).note(
            budget={"kind": budget.kind, "goal": budget.goal, "reached": reached, "teacher": budget.reference},
            before=before,
            after=self._costs(program.student, task),
            widths=_widths(program),
            blocks_removed=[r.arguments["block"] for r in program.plan if r.function == drop_block.__name__],
            ranking=ranking,
        )

    def _budget(self, program: Program, task: Task) -> Budget:
        kind = next(k for k in UNITS if getattr(self, f"{k}_ratio") is not None)
        teacher, run = program.teacher, program.run
        measures: dict[str, Callable[[], float]] = {
            "macs": lambda: count_macs(teacher, task.example),
            "parameters": lambda: count_parameters(teacher),
            "size": lambda: float_bytes(teacher),
            "latency": lambda: run.decide("baseline", lambda: run.baseline_latency("prune.latency_ratio")),
        }
        return Budget(kind, getattr(self, f"{kind}_ratio"), measures[kind](), run, task.example)

    @staticmethod
    def _costs(model: nn.Module, task: Task) -> dict[str, int]:
        return {
            "macs": count_macs(model, task.example),
            "parameters": count_parameters(model),
            "int8_bytes": integer_bytes(model),
        }

    def minimum(self, teacher: nn.Module, group: ChannelGroup) -> int:
        """The fewest channels that a group keeps."""
        if self.floor >= 1:
            return int(self.floor)
        return math.ceil(self.floor * (channels_of(teacher.get_submodule(group.name), "out") or group.channels))


class _Width:
    """Cuts channels until a goal is reached; holds what one step of the pass shares."""

    def __init__(
        self, config: Prune, task: Task, budget: Budget, refused: dict[str, str], ranking: list[dict[str, Any]]
    ) -> None:
        self.config, self.task, self.budget, self.refused, self.ranking = config, task, budget, refused, ranking
        self.savings: dict[str, float] = {}

    def rungs(self, program: Program, key: str, check: bool) -> list[Rung]:
        """The ladder of the student. Groups that may not be cut are refused, with `check` those that fail the law."""
        config, student = self.config, program.student
        multiple = config.multiple or program.target.channel_multiple
        groups = []
        for group in find_groups(student, self.task.example, config.ignore):
            reason = group.reason or (probe(student, self.task.example, group) if check else None)
            if reason is not None:
                self.refused.setdefault(group.name, reason)
            if group.name not in self.refused:
                groups.append(group)
        scored, floors = [], []
        for group, scores in zip(groups, self._importance(program, groups, key), strict=True):
            floor = config.minimum(program.teacher, group)
            if isinstance(scores, str):
                self.refused[group.name] = scores
            elif not ladder([(group, torch.tensor(scores))], multiple, [floor], config.scope):
                width = f"its {group.channels} channels and the floor of {floor}"
                self.refused[group.name] = f"no multiple of {multiple} fits between {width}"
            else:
                scored.append((group, torch.tensor(scores)))
                floors.append(floor)
        return ladder(scored, multiple, floors, config.scope)

    def _importance(self, program: Program, groups: list[ChannelGroup], key: str) -> list[list[float] | str]:
        kind, student = self.config.importance, program.student

        def measure() -> list[list[float] | str]:
            grads = gradients(student, self.task, self.config.samples) if kind == "taylor" else None
            scores = (unit_importance(student, group, kind, grads) for group in groups)
            return [s if isinstance(s, str) else s.tolist() for s in scores]

        return program.run.decide(f"importance/{key}/{_named((g.name, g.channels) for g in groups)}", measure)

    def reach(self, program: Program, goal: float, step: int) -> Program:
        """Cut the least important channels that bring the student to `goal`. Raises `InputError` where none do."""
        rungs = self.rungs(program, str(step), check=True)
        if not rungs:
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
        if count is None:
            raise self.budget.missed(min(c[unit] for c in considered), "the least that is allowed")
        self.ranking.append({"step": step, "chosen": count, "considered": considered})
        cuts = cuts_of(rungs[:count])
        reason = law_reason(program.student, self.task.example, cuts)
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


class _Depth(_Width):
    """Removes residual blocks (with width also channels), one after the other: the least harm for what it saves."""

    def reach(self, program: Program, goal: float, step: int) -> Program:
        inputs = _gather(self.task, self.config.samples)
        with torch.no_grad():
            teacher = program.teacher(*inputs)
        value, round_ = self.budget.value(program.student), 0
        start, done = self.budget.ratio(value), 0
        with program.run.observer.task(f"{program.run.scope}: ranking", 100) as advance:
            while self.budget.ratio(value) < goal:
                round_ += 1
                program, saved = self._round(program, inputs, teacher, value, goal, f"{step}/{round_}")
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
        paths = [b.path for b in blocks]

        def measure() -> dict[str, Any]:
            now = distance(program.student(*inputs), teacher)
            return {"now": now, "costs": edit_costs(program.student, inputs, teacher, edits, paths)}

        with torch.no_grad():
            ranked = program.run.decide(f"rank/{key}/{_named((e.name, e.touches) for e in edits)}", measure)
        signatures = {b.path: b.signature for b in blocks}
        rows = [
            {"name": e.name, "distance": cost, "saved": self._saved(program, e, rungs, signatures, returns)}
            for e, cost in zip(edits, ranked["costs"], strict=True)
        ]
        rows.sort(key=lambda row: _harm(row["distance"] - ranked["now"], row["saved"]))
        return self._remove(program, rows, rungs, returns, value, goal)

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
        rungs: dict[str, Rung],
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
        rungs: dict[str, Rung],
        returns: dict[str, int],
        value: float,
        goal: float,
    ) -> tuple[Program, float]:
        """Let the best rows go, until the goal is near. Narrowings go last and together: their indices are of now."""
        gone: list[str] = []
        narrowed: list[Rung] = []
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
        reason = law_reason(program.student, self.task.example, cuts) if cuts else None
        if reason is not None:
            self.refused.update({r.group.name: reason for r in narrowed})
            return program, 0.0
        return program.rewrite(cut_channels, self.task.example, cuts=cuts) if cuts else program, saved


def _named(things: Iterable[tuple[Any, ...]]) -> str:
    """What a list of measurements is of: two prunes of one run may measure other groups and must not share them."""
    return hashlib.sha256(repr(list(things)).encode()).hexdigest()[:16]


def _inside(path: str, blocks: list[str]) -> bool:
    return any(f"{path}.".startswith(f"{block}.") for block in blocks)


def _harm(cost: float, saved: float) -> float:
    """Cost for each unit saved; what costs nothing is better the more it saves."""
    return cost / saved if cost > 0 else cost * saved


def _without(block: Block) -> Callable[[nn.Module], Any]:
    return lambda model: without_block(model, block.path, block.returns)


def _masked(rung: Rung) -> Callable[[nn.Module], Any]:
    return lambda model: masked(model, rung.cuts)


def _lowest(rungs: list[Rung]) -> dict[str, Rung]:
    """The next rung of each group."""
    found: dict[str, Rung] = {}
    for rung in rungs:
        found.setdefault(rung.group.name, rung)
    return found


def _gather(task: Task, samples: int) -> Inputs:
    """At most `samples` validation inputs as one batch."""
    return tuple(torch.cat(parts) for parts in zip(*task.calibration(samples), strict=True))


def _widths(program: Program) -> dict[str, list[int]]:
    """Output channels of every layer that lost some and is left: [teacher, student]."""
    cuts = [c for r in program.plan if r.function == cut_channels.__name__ for c in r.arguments["cuts"]]
    paths = [c["module"] for c in cuts if c["dim"] == "out"]
    left = dict(program.student.named_modules())
    return {
        p: [channels_of(program.teacher.get_submodule(p), "out") or 0, channels_of(left[p], "out") or 0]
        for p in dict.fromkeys(paths)
        if p in left
    }


class _TaskLoss(Objective):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(student(*batch.inputs), batch.targets)


def recover(config: Prune, program: Program, task: Task, step: int) -> Program:
    """Train the student on the task's loss for a while, in place. Raises `InputError` without training data."""
    training = Training(epochs=config.recovery_epochs, learning_rate=config.recovery_rate)
    run = program.run.enter(f"{program.run.scope}-recovery{step}")
    fit(run, program.student, task.need_train("prune.recovery_epochs"), _TaskLoss(task), training)
    return program
