"""Structured pruning: fewer channels (width) and fewer residual blocks (depth), up to a budget.

Narrower is not faster: an INT8 convolution of 8 channels can be slower than the FP32 one. So the budget may be the
measured latency of the deployed INT8 form; candidates are exported and timed.

*Width* alone walks down a ladder of narrowings, least important first, and takes the first network (for latency: the
least damaged of the timed ones) that meets the budget. *Depth* is greedy on data: of all blocks (and, with width, all
next narrowings) the one goes that moves the outputs least away from the teacher's for what it saves; and again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from pqk.core.costs import count_macs, count_parameters, float_bytes, integer_bytes
from pqk.core.program import CONFIG, Pass, Program, RewriteFunction, Stage
from pqk.data.data import Batch
from pqk.errors import InputError, nearest
from pqk.passes.prune.budget import UNITS, Budget
from pqk.passes.prune.cuts import channels_of, cut_channels, drop_block
from pqk.passes.prune.groups import ChannelGroup
from pqk.passes.prune.importance import Importance
from pqk.passes.prune.search import Depth, Width
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, fit


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
    """remove whole residual blocks"""
    blocks: Literal["ranked", "every_other"] = "ranked"
    """which blocks go first: those whose removal costs least on validation data, or every other one of each container,
    then every other one of those that are left, the first staying to the end (as DistilBERT was started)"""
    macs_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's multiply-accumulates over the student's"""
    parameters_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's parameters over the student's"""
    size_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 bytes over the bytes of the student's INT8 form"""
    latency_ratio: float | None = Field(default=None, gt=1)
    """budget: the teacher's FP32 latency over that of the student's INT8 form, both in the target's runtime"""
    importance: Importance = "magnitude"
    """what a channel is worth: weight norm, first-order effect on the task loss, the norm of what it adds to the layers
    that read it (activation), or batch-norm scale"""
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
    best_effort: bool = False
    """where the budget cannot be met, go as far as is allowed instead of failing; the report says how far"""
    steps: int = Field(default=1, ge=1)
    """the budget is approached in this many equal factors, with recovery after each"""
    recovery_epochs: float = Field(default=0.0, ge=0)
    """training after each step, in epochs"""
    recovery_rate: float = Field(default=0.01, gt=0)
    """peak learning rate of that training"""
    samples: int = Field(default=256, ge=2)
    """validation samples that blocks are ranked on, and that taylor and activation importance are measured on"""
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
        if self.blocks == "every_other" and (self.width or not self.depth):
            raise InputError(
                'prune: blocks = "every_other" has no costs that narrowings could be compared with; set depth = true '
                "and width = false, and narrow in a prune of its own"
            )
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
                Depth(self, task, budget, refused, ranking)
                if self.depth
                else Width(self, task, budget, refused, ranking)
            )
            program = cut.reach(program, goal, step)
            if self.recovery_epochs:
                program = recover(self, program, task, step)
        reached = budget.ratio(budget.value(program.student))
        there = dict(program.student.named_modules())
        declined = [(layer, reason) for layer, reason in refused.items() if layer in there]
        if reached < budget.goal and self.best_effort:
            declined.append(("*", f"{budget.kind}_ratio = {budget.goal:.4g} is out of reach: it is {reached:.3g}"))
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
