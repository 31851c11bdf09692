"""PQK: pruning, quantization and distillation in one training, without a teacher beside the student.

Kim, Chang, Kwak 2021, "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation",
arXiv:2106.14681. With weights W, a quantizer Q and a mask M of channels:

    phase 1   the slim network f(x; Q(W⊙M)) trains on the labels, while M loses channels round by round
    phase 2   the teacher is f(x; Q(W)), with the pruned-away weights put back, the student f(x; Q(W⊙M)):
              L_s = ce_weight · CE + kd_weight · T² KL(p_t ‖ p_s), p_t detached;  L_t = CE;  they are minimised together

Both are the same tensors (`slimmable` tells how), so there is no second model in memory, and a step takes two forwards.

In the end the module takes the trained tensors, its channels are cut for good, and it is captured: batch norm is
folded. It trained unfolded, with the weight's quantizer before it. Since Q has one step s_c for an output channel,
g·Q(w; s) = Q(g·w; |g|·s), so the folded channel gets the step |g_c|·s_c and keeps its integers, negated where g_c < 0.
Only the bias, float until then, is rounded to its accumulator's grid. Activation steps are carried over as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from pqk.copies import copy_of
from pqk.core.program import Pass, Program, Rewrite, RewriteFunction, Stage
from pqk.data.data import Batch
from pqk.errors import InputError, PqkError, Reason
from pqk.knowledge import KLDivergence, View
from pqk.passes.capture.capture import Capture, capture
from pqk.passes.capture.deployed_forms import offers_of, take_deployed_forms
from pqk.passes.joint.slimmable import Widths, carry, two_widths
from pqk.passes.prune.budget import UNITS
from pqk.passes.prune.channel_group import ChannelGroup, layer_of
from pqk.passes.prune.cuts import cut_channels, kept_channels
from pqk.passes.prune.groups import trace_groups
from pqk.passes.prune.law import exact_groups
from pqk.passes.prune.prune import Prune
from pqk.passes.prune.settings import WidthSettings
from pqk.passes.quantize.quantize import Quantize, insert_fake_quant
from pqk.quant.fake_quant import quantizers
from pqk.quant.qparams import Method
from pqk.settings import settings
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, TrainingLog, fit


@settings
class JointSearch(Training, WidthSettings, Pass):
    """Prune, quantize and distill in one training: the network with its pruned channels put back is the teacher.

    Kim, Chang and Kwak 2021, "PQK: Model Compression via Pruning, Quantization, and Knowledge Distillation",
    arXiv:2106.14681.
    """

    name: ClassVar[str] = "pqk"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.FAKE_QUANT
    rewrites: ClassVar[tuple[RewriteFunction, ...]] = (take_deployed_forms, cut_channels, capture, insert_fake_quant)

    epochs: float = Field(default=10.0, gt=0)
    """epochs over the training data, of both phases together"""
    learning_rate: float = Field(default=0.01, gt=0)
    """the peak learning rate of each phase"""
    clip: float | None = Field(default=1.0, gt=0)
    """gradients are scaled to at most this norm: step sizes, once they are lost, do not come back"""
    phase1: float = Field(default=0.5, gt=0, lt=1)
    """share of the epochs in which the mask is found; in the rest the two widths teach each other"""
    rounds: int = Field(default=4, ge=1)
    """in how many rounds, spread evenly over phase 1, channels go"""
    temperature: float = Field(default=2.0, gt=0)
    """of the distillation in phase 2"""
    ce_weight: float = Field(default=1.0, ge=0)
    """weight of the student's loss on the labels in phase 2"""
    kd_weight: float = Field(default=1.0, ge=0)
    """weight of what the full width teaches the student in phase 2"""
    freeze_from: float = Field(default=0.5, ge=0, le=1)
    """share of phase 2 after which the step sizes stand still"""
    calibration: Method = "mse"
    """how ranges are chosen, before the training, from the observed values"""
    samples: int = Field(default=512, ge=2)
    """validation samples that the ranges are chosen from, and taylor and activation importance are measured on"""
    float_layers: tuple[str, ...] = ()
    """patterns (such as `layer3.*`) of layers to leave in float"""

    @model_validator(mode="after")
    def _consistent(self) -> JointSearch:
        try:
            self.pruning(1)
        except InputError as error:
            raise InputError(self.name + str(error).removeprefix(Prune.name)) from error
        if self.ce_weight + self.kd_weight == 0:
            raise InputError("pqk: ce_weight and kd_weight are both 0, so the student would learn nothing in phase 2")
        return self

    def pruning(self, share: float, ignore: Sequence[str] = ()) -> Prune:
        """The pruning that takes the student `share` of the way to the budget, in powers of the ratio.

        Args:
            share: 1 for the whole budget; half of it, for a ratio of 4, is a ratio of 2.
            ignore: layers that are not cut, beside those of the configuration.

        Returns:
            The configuration of that pruning.
        """
        names = [f"{kind}_ratio" for kind in UNITS]
        ratios: dict[str, Any] = {n: r if (r := getattr(self, n)) is None else r**share for n in names}
        return Prune(
            **ratios,
            **{name: getattr(self, name) for name in ("importance", "scope", "multiple", "floor", "samples")},
            ignore=(*self.ignore, *ignore),
        )

    def apply(self, program: Program, task: Task) -> Program:
        """Trains the student in both phases, cuts what was masked, and captures it with its learned step sizes.

        Args:
            program: the student to compress, a module.
            task: training data with labels, and validation data for ranges and importance.

        Returns:
            The program with a FAKE_QUANT student; its details hold the budget, the widths and the losses.

        Raises:
            InputError: the budget cannot be met, which is known before any training; the model cannot be traced; or
                there is nothing to train on.
            PqkError: the loss is still not finite after three retries at a lower rate.
        """
        data = task.need_train("pqk")
        if self.precision == "bf16":
            raise InputError("pqk: quantization-aware training needs fp32: bfloat16 is coarser than the INT8 grid")
        if offers_of(program.student):  # the graph's tensors go back into modules, which must be those that it is of
            program = program.rewrite(take_deployed_forms, task.example)
        rounds = PruningRounds(self, program, task)
        widths, run = rounds.widths, program.run
        first = fit(run, widths.graph, data, SlimPhase(rounds), self.training_of(self.phase1))
        rounds.mask(self.rounds)  # a phase that was finished before a kill did not come by here
        widths.widen()
        scales = [q.scale for q in quantizers(widths.graph).values() if q.scale.requires_grad]
        both = MutualPhase(self, task, widths, scales)
        second = fit(run.enter(f"{run.scope}-phase2"), widths.graph, data, both, self.training_of(1 - self.phase1))
        return self.finish(rounds, task, (first, second))

    def why_not_applied(self, task: Task, outputs: Any) -> Reason | None:
        reason = KLDivergence().why_not_compared(task, outputs) if self.kd_weight else None
        return reason and f"pqk: {reason}"

    def training_of(self, share: float) -> Training:
        """The training of a phase that has `share` of the epochs."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Training)}
        return Training(**{**shared, "epochs": self.epochs * share})

    def quantize(self) -> Quantize:
        """The quantization of the captured graph."""
        return Quantize(calibration=self.calibration, samples=self.samples, float_layers=self.float_layers)

    def finish(self, rounds: PruningRounds, task: Task, logs: Sequence[TrainingLog]) -> Program:
        """Cuts the trained network for good, captures and quantizes it, and carries the learned steps over.

        Args:
            rounds: the channels that have gone, and the graph that was trained.
            task: example inputs and validation data.
            logs: of the trainings, for the record.

        Returns:
            The program with the FAKE_QUANT student.

        Raises:
            PqkError: the captured graph has quantizers that the trained one has not.
        """
        widths, slim, details = rounds.widths, rounds.student(self.rounds), rounds.details
        program = dataclasses.replace(rounds.program, student=copy_of(slim, "student"))
        program = self.quantize().apply(Capture().apply(program, task), task)
        assert isinstance(program.student, fx.GraphModule)
        untrained = carry(widths, program.student, slim, lambda layer: rounds.kept(layer, self.rounds))
        if untrained:
            raise PqkError(f"pqk: quantizers {untrained} of the deployed graph are not in the one that was trained")
        pruned: dict[str, Any] = {
            key: details[key] for key in ("budget", "before", "after", "widths") if key in details
        }
        if any(log.left_out for log in logs):
            pruned["left_out"] = sum(log.left_out for log in logs)
        return program.note(
            losses=[loss for log in logs for loss in log.losses],
            steps=sum(log.steps for log in logs),
            retries=sum(log.retries for log in logs),
            **pruned,
        )


class PruningRounds:
    """The mask of phase 1: which channels have gone after each round, as the plan of cuts that will be made."""

    def __init__(self, config: JointSearch, program: Program, task: Task) -> None:
        """Raises `InputError` where the budget cannot be met: before any training."""
        self.config, self.task = config, task
        self.module = copy_of(program.student, "student").eval()
        self.base, self.ends = len(program.plan), [len(program.plan)]
        self.details: dict[str, Any] = {}
        captured = Capture().apply(dataclasses.replace(program, student=copy_of(self.module, "student")), task)
        assert isinstance(captured.student, fx.GraphModule)
        points = dict(captured.student.meta["points"])
        quantize = config.quantize()
        quantized = quantize.apply(captured, task).student
        assert isinstance(quantized, fx.GraphModule)
        traced = trace_groups(self.module, task.example, config.ignore)
        replaced = exact_groups(self.module, task.example, traced)[-1] if traced.others else []
        groups = [g for g in [*traced.groups, *traced.replaced(replaced)] if g.reason is None]
        unmasked = {g.producers[0]: reason for g in groups if (reason := self._why_not_masked(g)) is not None}
        paths = dict.fromkeys(path for g in groups if g.producers[0] not in unmasked for path in g.producers)
        self.widths, declined = two_widths(
            quantized,
            self.module,
            points,
            [*paths],
            lambda quantizer, weight: quantizer.calibrate(weight, quantize.calibration, quantize.percentile),
        )
        hidden = [p for p in paths if self.widths.norms.get(p, p) not in self.widths.masks]
        unmasked |= dict.fromkeys(hidden, "not cut: its output is no value of the captured graph that could be masked")
        self.ignore = [*unmasked]
        self.program = program.decline(config.name, [*declined, *unmasked.items()])
        if config.rounds > 1:
            self._pruned(self.program, self.module, 1.0, "feasible")

    def _why_not_masked(self, group: ChannelGroup) -> Reason | None:
        """Why masking the channels of a group is not cutting them."""
        if any(m.dim == "values" for m in group.members):
            return "not cut: a bare parameter has these channels, which a mask of layers' outputs does not reach"
        if any(isinstance(layer_of(self.module, m.path), nn.LayerNorm) for m in group.members if m.dim == "out"):
            return "not cut: a layer norm takes its statistics over these channels, zeros among them"
        return None

    def _pruned(self, program: Program, student: nn.Module, share: float, what: str) -> Program:
        run = program.run.enter(f"{program.run.scope}-{what}")
        start = dataclasses.replace(program, student=copy_of(student, "student"), run=run, details={})
        return self.config.pruning(share, self.ignore).apply(start, self.task)

    def student(self, rounds: int) -> nn.Module:
        """The sliced module with the trained tensors, after so many rounds."""
        module = self.widths.trained(self.module)
        for step in self._cuts(rounds):
            cut_channels(module, self.task.example, **step.arguments)
        return module

    def _cuts(self, rounds: int) -> Sequence[Rewrite]:
        return self.program.plan[self.base : self.ends[rounds]]

    def kept(self, path: str, rounds: int) -> list[int] | None:
        """The channels of the module at full width that `path` still has after so many rounds."""
        return kept_channels(self._cuts(rounds), path)

    def mask(self, rounds: int) -> None:
        """Choose what goes in rounds that are due (measured decisions are journaled), and mask it."""
        while len(self.ends) <= rounds:
            number = len(self.ends)
            share = number / self.config.rounds
            after = self._pruned(self.program, self.student(number - 1), share, f"round{number}")
            before = {"before": self.details["before"]} if "before" in self.details else {}
            self.details = {**self.details, **after.details, **before}
            declined = after.declined if number == 1 else self.program.declined
            self.program = dataclasses.replace(self.program, plan=after.plan, declined=declined)
            self.ends.append(len(after.plan))
        self.widths.narrow(lambda path: self.kept(path, rounds))


class SlimPhase(Objective):
    """Phase 1: the slim network on the labels; how many rounds of channels have gone is saved with the training."""

    rounds: Tensor

    def __init__(self, pruning: PruningRounds) -> None:
        super().__init__()
        self.pruning, self.task = pruning, pruning.task
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))

    def begin(self, progress: float) -> None:
        rounds = self.pruning.config.rounds
        due = min(rounds, int(progress * rounds) + 1)
        if int(self.rounds) != due:
            self.pruning.mask(due)
            self.rounds.fill_(due)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        self.pruning.widths.show("slim")
        return self.task.loss(student(*batch.inputs), batch.targets)


class MutualPhase(Objective):
    """Phase 2: L_s + L_t, two forwards over the same weights. The divergence detaches the teacher."""

    def __init__(self, config: JointSearch, task: Task, widths: Widths, scales: Sequence[Tensor]) -> None:
        super().__init__()
        self.config, self.task, self.widths, self.scales = config, task, widths, scales
        self.kl = KLDivergence(temperature=config.temperature)

    def begin(self, progress: float) -> None:
        for scale in self.scales:
            scale.requires_grad_(progress < self.config.freeze_from)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        teacher, own = self.losses(student, batch)
        return teacher + own

    def losses(self, student: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(L_t, L_s), each [B]. The student comes last, so that its width is what the graph shows."""
        self.widths.show("full")
        full = student(*batch.inputs)
        self.widths.show("slim")
        slim = student(*batch.inputs)
        view = View(slim, full, batch.targets, {}, {}, self.task)
        own = self.config.ce_weight * self.task.loss(slim, batch.targets)
        if self.config.kd_weight:
            own = own + self.config.kd_weight * self.kl(view, None)
        return self.task.loss(full, batch.targets), own
