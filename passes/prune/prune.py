"""Structured pruning: fewer channels (width) and fewer residual blocks (depth), up to a budget.

Narrower is not faster: an INT8 convolution of 8 channels can be slower than the FP32 one. So the budget may be the
measured latency of the deployed INT8 form; candidates are exported and timed.

*Width* alone follows a schedule of narrowings, least important first, and takes the first network (for latency: the
least damaged of the timed ones) that meets the budget. *Depth* is greedy on data: of all blocks (and, with width, all
next narrowings) the one goes that moves the outputs least away from the teacher's for what it saves; and again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pqk.core.costs import count_macs, count_parameters, float_bytes, integer_bytes, why_not_counted
from pqk.core.program import Pass, Program, RewriteFunction, Stage
from pqk.data.data import Batch
from pqk.errors import InputError, nearest
from pqk.passes.prune.allocation import AllocationSearch
from pqk.passes.prune.budget import UNITS, Budget
from pqk.passes.prune.cuts import channels_of, cut_channels, drop_block
from pqk.passes.prune.depth_search import DepthSearch
from pqk.passes.prune.low_rank import original_layer, ranks_split
from pqk.passes.prune.settings import PruneSettings
from pqk.passes.prune.statistics import reestimate_batch_norm
from pqk.passes.prune.width_search import WidthSearch
from pqk.settings import settings
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, fit

REHEARSED_SAMPLES = 64
"""what a rehearsal ranks blocks on at most"""


@settings
class Prune(PruneSettings, Pass):
    """Cut channels and residual blocks until the student is so many times smaller or faster than the teacher.

    Which channels must go together is traced as in Fang et al. 2023, "DepGraph: Towards Any Structural Pruning",
    arXiv:2301.12900; what they are worth is `importance`. Heads go whole as in Michel et al. 2019, arXiv:1905.10650.
    """

    name: ClassVar[str] = "prune"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.MODULE
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = (cut_channels, drop_block)
    row: ClassVar[str | None] = "pruned"

    @property
    def training_epochs(self) -> float:
        return self.steps * self.recovery_epochs

    @property
    def rounds(self) -> int:
        return self.steps

    def rehearsal(self, epochs: float) -> Pass:
        recovery, samples = min(self.recovery_epochs, epochs), min(self.samples, REHEARSED_SAMPLES)
        return dataclasses.replace(self, steps=1, recovery_epochs=recovery, samples=samples)

    def unrehearsed_seconds(self, details: Mapping[str, Any], scored: int) -> float:
        estimated = details.get("estimated", {})
        more = min(self.samples, scored) / min(self.samples, REHEARSED_SAMPLES, scored) - 1
        return float(estimated.get("seconds", 0.0) + more * details.get("ranking_seconds", 0.0))

    def apply(self, program: Program, task: Task) -> Program:
        """Cuts the student until it meets the budget, in `steps`, with recovery after each where that is asked for.

        Args:
            program: the student to cut, a module, beside the teacher that the budget is relative to.
            task: example inputs and validation data; training data too, where the student is to recover.

        Returns:
            The program with its plan of cuts, the reasons for what was not cut, and the ranking in its details.

        Raises:
            InputError: the budget cannot be met or measured, the model cannot be traced, `keep_blocks` names no
                module, or there is no data for what was asked for.
        """
        student = program.student.eval()
        self._check_containers(student)
        budget = self._budget(program, task)
        if budget.reference == 0:
            if not self.best_effort:
                raise InputError(
                    f"prune: {budget.kind}_ratio = {budget.goal:.4g}: the teacher has no {budget.kind} that could go, "
                    "as it has no layer with weights; take prune out of the recipe"
                )
            return program.decline(self.name, [("*", f"the teacher has no {budget.kind} that could go")])
        before = self._costs(student, task)
        start = budget.ratio(budget.value(student))
        if start >= budget.goal:
            ratio = f"its {budget.kind}_ratio is {start:.3g}, the goal {budget.goal:.4g}"
            return program.decline(self.name, [("*", f"the student already meets the budget: {ratio}")])
        search = self._search()(self, task, budget)
        for step in range(1, self.steps + 1):
            goal = start * (budget.goal / start) ** (step / self.steps)
            program = search.reach(program, goal, step)
            if self.batch_norm_batches and program.plan:
                program = reestimate(self, program, task, step)
            if self.recovery_epochs:
                program = recover(self, program, task, step)
        reached = budget.ratio(budget.value(program.student))
        modules = dict(program.student.named_modules())
        declined = [(layer, reason) for layer, reason in search.refused.items() if layer in modules]
        if reached < budget.goal and self.best_effort:
            declined.append(("*", f"{budget.kind}_ratio = {budget.goal:.4g} is out of reach: it is {reached:.3g}"))
        return program.decline(self.name, declined).note(
            budget={"kind": budget.kind, "goal": budget.goal, "reached": reached, "teacher": budget.reference},
            before=before,
            after=self._costs(program.student, task),
            widths=_widths(program),
            blocks_removed=[r.arguments["block"] for r in program.plan if r.function == drop_block.__name__],
            ranking=search.ranking,
            **({"estimated": estimated} if (estimated := budget.unmeasured.estimate()) else {}),
            **({"ranking_seconds": search.ranking_seconds} if program.run.rough else {}),
        )

    def _search(self) -> type[WidthSearch]:
        if self.allocation == "table":
            return AllocationSearch
        return DepthSearch if self.depth else WidthSearch

    def _check_containers(self, student: nn.Module) -> None:
        modules = dict(student.named_modules())
        for container in self.keep_blocks:
            if container not in modules:
                known = [name for name, module in modules.items() if name and any(module.children())]
                raise InputError(
                    f'prune: keep_blocks names "{container}", which is no module{nearest(container, known)}'
                )

    def _budget(self, program: Program, task: Task) -> Budget:
        kind = next(k for k in UNITS if getattr(self, f"{k}_ratio") is not None)
        teacher, run, timed = program.teacher, program.run, self._timed(task)
        if kind == "macs" and (reason := why_not_counted(teacher, task.example)) is not None:
            raise InputError(f"prune: macs_ratio = {self.macs_ratio:.4g}: {reason}")
        measures: dict[str, Callable[[], float]] = {
            "macs": lambda: count_macs(teacher, task.example),
            "parameters": lambda: count_parameters(teacher),
            "size": lambda: float_bytes(teacher),
            "latency": lambda: run.decide(
                f"baseline/{timed}" if timed else "baseline", lambda: run.baseline_latency("prune.latency_ratio", timed)
            ),
        }
        return Budget(kind, getattr(self, f"{kind}_ratio"), measures[kind](), run, task.example, timed=timed)

    def _timed(self, task: Task) -> str:
        """The name of the inputs that the latency is of. Raises `InputError` where the pattern fits none or several."""
        found = [name for name in task.timed if fnmatchcase(name, self.timed)]
        if self.timed and len(found) != 1:
            raise InputError(
                f'prune: timed = "{self.timed}" fits {len(found)} of the inputs that the task is timed on: '
                f"{', '.join(task.timed) or 'there are none'}"
            )
        return found[0] if self.timed else ""

    @staticmethod
    def _costs(model: nn.Module, task: Task) -> dict[str, int]:
        return {
            "macs": count_macs(model, task.example),
            "parameters": count_parameters(model),
            "int8_bytes": integer_bytes(model),
        }


def _widths(program: Program) -> dict[str, list[int]]:
    """Output channels of every remaining layer that lost some: [before any cut, now]."""
    cuts = [c for r in program.plan if r.function == cut_channels.__name__ for c in r.arguments["cuts"]]
    paths = [c["module"] for c in cuts if c["dim"] == "out"]
    modules = dict(program.student.named_modules())
    ranks = ranks_split(program.plan)

    def uncut(path: str) -> int:
        layer = original_layer(program.origin, path)
        return (channels_of(layer, "out") or 0) if layer is not None else ranks.get(path.rpartition(".")[0], 0)

    return {p: [uncut(p), channels_of(modules[p], "out") or 0] for p in dict.fromkeys(paths) if p in modules}


class _TaskLoss(Objective):
    """The task's own loss, as recovery trains on it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(student(*batch.inputs), batch.targets)


def reestimate(config: Prune, program: Program, task: Task, step: int) -> Program:
    """Estimate the statistics of batch norms again, in place. Raises `InputError` without training data."""
    data = task.need_train("prune.batch_norm_batches")
    seed = program.run.seed_for("batch_norm", step)
    with torch.random.fork_rng(devices=[]):
        batches = itertools.islice(data.batches(seed, step - 1), config.batch_norm_batches)
        used = reestimate_batch_norm(program.student, (batch.inputs for batch in batches))
    return program.note(batch_norm_batches=used)


def recover(config: Prune, program: Program, task: Task, step: int) -> Program:
    """Train the student on the task's loss for a while, in place. Raises `InputError` without training data."""
    training = Training(epochs=config.recovery_epochs, learning_rate=config.recovery_rate)
    run = program.run.enter(f"{program.run.scope}-recovery{step}")
    log = fit(run, program.student, task.need_train("prune.recovery_epochs"), _TaskLoss(task), training)
    return program.note(**{name: program.details.get(name, 0) + count for name, count in log.notes.items()})
