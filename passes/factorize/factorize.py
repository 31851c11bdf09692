"""Splits large linear and convolution layers into two of low rank each.

Three things are known of every layer and rank before anything is split: the best two layers of that rank on data
(`responses`), the divergence from the teacher that they alone lead to, and what they save, in milliseconds of the
deployed INT8 form where that is the budget (`rank_search`). Two layers in integers are not always faster than one with
more multiplications, so a layer whose halves save nothing stays whole. What is split, and how far, is then a knapsack
(`choice`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from pqk.core.costs import count_macs, count_parameters, float_bytes, why_not_counted
from pqk.core.program import Pass, Program, RewriteFunction, Stage
from pqk.errors import InputError, Reason
from pqk.passes.factorize.layers import find_layers
from pqk.passes.factorize.rank_search import RankSearch
from pqk.passes.factorize.settings import FactorizeSettings
from pqk.passes.prune.budget import UNITS, Budget
from pqk.passes.prune.low_rank import Split, split_layers
from pqk.settings import settings
from pqk.target.target import Target
from pqk.task.task import Task

REHEARSED_SAMPLES = 64
"""what a rehearsal looks at at most"""


@settings
class Factorize(FactorizeSettings, Pass):
    """Split large linear and convolution layers into two of low rank, by what it costs on data and what it saves.

    The halves are the best ones for the layer's responses on data (Zhang et al. 2015, arXiv:1505.06798, section 3.1),
    which is what whitening its inputs gives (Wang et al. 2024, SVD-LLM, arXiv:2403.07378, section 3.1).
    """

    name: ClassVar[str] = "factorize"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.MODULE
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = (split_layers,)
    row: ClassVar[str | None] = "factorized"

    def rehearsal(self, epochs: float) -> Pass:
        few = min(self.samples, REHEARSED_SAMPLES), min(self.ranking_samples, REHEARSED_SAMPLES)
        return dataclasses.replace(self, samples=few[0], ranking_samples=few[1])

    def why_not_for(self, target: Target) -> Reason | None:
        if self.latency_ratio is None or (reason := target.why_not_measured()) is None:
            return None
        return f"factorize.latency_ratio times students, but {reason}; use another budget, or compile on the target"

    def apply(self, program: Program, task: Task) -> Program:
        """Splits the layers that do least harm for what they save, until the budget is met.

        Args:
            program: the student to split, a module, beside the teacher that the budget is relative to.
            task: example inputs and validation data.

        Returns:
            The program with its splits, the reasons for what stayed whole, and every option in its details.

        Raises:
            InputError: the budget cannot be met or measured, or `layers` names no layer.
        """
        student = program.student.eval()
        budget = self._budget(program, task)
        value, goal = budget.value(student), budget.goal
        multiple = self.multiple or program.target.channel_multiple
        layers, refused = find_layers(student, task.example, self.layers, self.ranks, multiple)
        if budget.ratio(value) >= goal:
            ratio = f"its {budget.kind}_ratio is {budget.ratio(value):.3g}, the goal {goal:.4g}"
            return program.decline(self.name, [("*", f"the student already meets the budget: {ratio}")])
        search = RankSearch(self, program, task, budget, value, refused)
        ranks = search.choose(layers)
        divergence = [search.divergence({}), search.divergence(ranks)]
        if ranks:
            splits = [Split(layer=layer, rank=rank) for layer, rank in ranks.items()]
            program = program.rewrite(split_layers, task.example, splits=splits)
            for layer, halves in search.halves(ranks).items():  # values are saved beside the plan, not in it
                program.student.get_submodule(layer).load_state_dict(halves.state_dict())
        reached = budget.ratio(budget.value(program.student))
        declined = list(refused.items())
        if reached < goal < math.inf:
            declined.append(("*", f"{budget.kind}_ratio = {goal:.4g} is out of reach: it is {reached:.3g}"))
        return program.decline(self.name, declined).note(
            budget={"kind": budget.kind, "goal": self.goal, "reached": reached, "teacher": budget.reference},
            ranks=ranks,
            divergence=divergence,
            options=[dataclasses.asdict(option) for option in search.options],
            **({"estimated": estimated} if (estimated := budget.unmeasured.estimate()) else {}),
        )

    @property
    def goal(self) -> float | None:
        """The ratio that is asked for; None where the divergence alone says how far to go."""
        return next((r for k in UNITS if (r := getattr(self, f"{k}_ratio")) is not None), None)

    def _budget(self, program: Program, task: Task) -> Budget:
        teacher, run = program.teacher, program.run
        fallback = "macs" if run.oracle is None else "latency"
        kind = next((k for k in UNITS if getattr(self, f"{k}_ratio") is not None), fallback)
        if kind == "macs" and (reason := why_not_counted(teacher, task.example)) is not None:
            raise InputError(f"factorize: macs_ratio: {reason}")
        measures = {
            "macs": lambda: count_macs(teacher, task.example),
            "parameters": lambda: count_parameters(teacher),
            "size": lambda: float_bytes(teacher),
            "latency": lambda: run.decide("baseline", lambda: run.baseline_latency("factorize.latency_ratio")),
        }
        return Budget(kind, self.goal or math.inf, measures[kind](), run, task.example, self.name)
