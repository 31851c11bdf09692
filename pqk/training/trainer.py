"""The one training loop: whatever stage the student is in, whatever the objective is.

It runs under Hugging Face accelerate, so several processes, GPUs and mixed precision are a launch option. Everything
that it draws is a function of (seed, pass, epoch), its checkpoints hold everything else, and so a run that was killed
ends in the same student, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from pydantic import Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from pqk.core.program import CONFIG
from pqk.core.run_context import RunContext
from pqk.data.data import Batch, Data
from pqk.data.structures import map_tensors
from pqk.errors import InputError, PqkError
from pqk.files import read_tensors, write_tensors
from pqk.quant.fake_quant import bounded_steps
from pqk.target.machine import autocast

log = logging.getLogger(__name__)

RETRIES = 3
"""how often a non-finite loss is answered by the last good state at a lower rate"""


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class Training:
    """How a student is trained; the fields that every training pass shares."""

    epochs: float = Field(default=1.0, gt=0)
    """epochs over the training data; a fraction is allowed"""
    learning_rate: float = Field(default=0.05, gt=0)
    """the peak learning rate"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is with Nesterov momentum"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """of sgd"""
    weight_decay: float = Field(default=1e-4, ge=0)
    """of weight matrices and filters only, never of biases, norms and quantizer scales"""
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    """cosine falls from the peak after the warm-up; one_cycle rises over the warm-up from 1/25 and falls to 1e-4"""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """share of the steps over which the rate rises"""
    clip: float | None = Field(default=None, gt=0)
    """gradients are scaled to at most this norm; by default not at all, and in `distill` after `capture` to 1.0"""
    average: float = Field(default=0.0, ge=0)
    """the student ends as the exponential moving average of its weights over this many epochs; 0: the last weights"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes forward passes in bfloat16 autocast, weights stay float32; on a CPU without bfloat16 instructions,
    where that is slower, it is fp32, which is logged"""
    checkpoint_seconds: float = Field(default=100.0, gt=0)
    """a killed run loses at most this much"""

    @property
    def training_epochs(self) -> float:
        """Epochs over the training data that the pass takes."""
        return self.epochs

    @property
    def notes_losses(self) -> bool:
        """Whether what the pass notes is about its training, of which a rehearsal says nothing."""
        return True

    def rehearsal(self, epochs: float) -> Any:
        """The same training of at most so many epochs."""
        return dataclasses.replace(self, epochs=min(self.epochs, epochs))


@dataclass
class TrainingLog:
    """What happened: mean loss of each epoch, steps, and how often it went back to a lower rate."""

    losses: list[float] = field(default_factory=list)
    steps: int = 0
    retries: int = 0


class Objective(nn.Module):
    """What is minimised. A module, because it may own parameters that train along (projectors)."""

    def wrap(self, student: nn.Module) -> nn.Module:
        """What `forward` gets as `student`: a module over the same parameters, such as one that also shows features."""
        return student

    def begin(self, progress: float) -> None:
        """Called before each step with the share of the training that is done, 0 to 1."""

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        """Per-sample losses [B], float32."""
        raise NotImplementedError

    def end_epoch(self, student: nn.Module, epoch: int) -> None:
        """Called after each epoch."""


def accelerator() -> Accelerator:
    """The processes of this launch: one, or those of `accelerate launch` or `torchrun`.

    Accelerate takes processes on a machine without an accelerator for strangers to each other unless it is told.
    """
    return Accelerator(cpu=not torch.accelerator.is_available())


def rate(training: Training, progress: float) -> float:
    """The learning rate's factor at `progress` (0 to 1) of the training."""
    if progress < training.warmup:
        low = 0.04 if training.schedule == "one_cycle" else 0.0
        return low + (1 - low) * (progress / training.warmup)
    if training.schedule == "constant":
        return 1.0
    done = (progress - training.warmup) / (1 - training.warmup)
    low = 1e-4 if training.schedule == "one_cycle" else 0.0
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_for(training: Training, *modules: nn.Module) -> torch.optim.Optimizer:
    """Decay for tensors of two or more axes only: never for biases, norms and scales (LSQ: no decay on s)."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("distill: the student has no trainable parameters")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if training.optimizer == "adamw":
        # Fused: one pass over each tensor; of an encoder's step, ten over its word table were the half.
        return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
    return torch.optim.SGD(
        groups, lr=training.learning_rate, momentum=training.momentum, nesterov=training.momentum > 0
    )


def fit(run: RunContext, student: nn.Module, data: Data, objective: Objective, training: Training) -> TrainingLog:
    """Train `student` in place.

    Raises `InputError` where a checkpoint exists and the data cannot be entered in the middle of an epoch, and
    `PqkError` when the loss is still not finite after three retries.
    """
    return _Fit(run, student, data, objective, training).train()


class _Fit:
    """The state of one training run, and how it is saved and restored."""

    def __init__(
        self, run: RunContext, student: nn.Module, data: Data, objective: Objective, training: Training
    ) -> None:
        self.run, self.student, self.data, self.objective, self.training = run, student, data, objective, training
        self.total = max(1, round(training.epochs * len(data)))
        self.accelerator = accelerator()
        if any(t.dim() == 4 for t in next(data.batches()).inputs):
            for t in (*student.parameters(), *student.buffers()):  # Module.to refuses captured constants of five axes
                if t.dim() == 4:
                    t.data = t.data.contiguous(memory_format=torch.channels_last)
        self.optimizer = optimizer_for(training, student, objective)
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if training.average else {}
        self.step, self.factor, self.log, self.epoch_loss = 0, 1.0, TrainingLog(), [0.0, 0.0]
        self.saved_at = time.monotonic()
        self.path = None if run.scratch is None else run.scratch / "checkpoint.safetensors"
        self.memory: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def train(self) -> TrainingLog:
        self._restore()
        if self.step == 0 or self.data.resume_reason is not None:
            self._save()  # the state that a non-finite loss in this epoch goes back to
        home = next(self.student.parameters()).device
        # Not DDP, which would leave out projectors and trip over step sizes that freeze: `_reduce` does its work.
        model = self.accelerator.prepare_model(self.objective.wrap(self.student), evaluation_mode=True)
        optimizer = self.accelerator.prepare(self.optimizer)
        self.objective.to(self.accelerator.device)
        with self.run.observer.task(self.run.scope, self.total) as advance:
            advance(self.step, "")
            while self.step < self.total:
                if not self._epoch(model, optimizer, advance):
                    failed = self.step
                    self._retry()
                    advance(self.step - failed, "lower rate")
        if self.average:
            self.student.load_state_dict(self.average)
        if self.accelerator.num_processes > 1:  # each process has seen other samples: batch norm's are those of rank 0
            for t in self.student.buffers():
                t.copy_(broadcast(t))
        # As a student loaded from its saved tensors: convolutions round differently in another memory format.
        self.student.to(device=home, memory_format=torch.contiguous_format).train(False)  # type: ignore[call-overload]
        self.log.steps = self.step
        return self.log

    def _epoch(self, model: nn.Module, optimizer: Any, advance: Callable[[int, str], None]) -> bool:
        """Train to the end of the current epoch. False where a loss was not finite."""
        epoch, start = divmod(self.step, len(self.data))
        seed = self.run.seed_for("epoch", epoch)
        state = torch.get_rng_state() if start else None
        set_seed(seed & 0xFFFFFFFF)
        batches = self.data.batches(seed, epoch, start, state)
        for batch in batches:
            model.train()
            loss, due = self._step(model, optimizer, batch)
            if not math.isfinite(loss):
                return False
            self.step += 1
            self.epoch_loss[0] += loss
            self.epoch_loss[1] += 1
            advance(1, f"loss {self.epoch_loss[0] / self.epoch_loss[1]:.3f}")
            if self.step >= self.total:
                break
            if due and self.step % len(self.data):
                if not self._finite():
                    return False
                self._save()
        if not self._finite():
            return False
        self.log.losses.append(self.epoch_loss[0] / max(1.0, self.epoch_loss[1]))
        log.info("%s epoch %d loss %.4f", self.run.scope, epoch + 1, self.log.losses[-1])
        self.epoch_loss = [0.0, 0.0]
        self.objective.end_epoch(self.student, epoch)
        self._save()
        return True

    def _finite(self) -> bool:
        """Whether the student may become the last good state: a finite loss can have had an infinite gradient."""
        return all(bool(p.isfinite().all()) for p in self.student.parameters())

    def _step(self, model: nn.Module, optimizer: Any, batch: Batch) -> tuple[float, bool]:
        """One step: the mean loss of all processes, and whether one of them finds that a checkpoint is due."""
        progress = self.step / self.total
        self.objective.begin(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * self.factor * rate(self.training, progress)
        batch = self._local(batch)
        with autocast(self.accelerator.device.type, self.training.precision):
            losses = self.objective(model, batch)
        loss = losses.float().mean()
        late = float(time.monotonic() - self.saved_at > self.training.checkpoint_seconds)
        value, due = self.accelerator.reduce(torch.stack([loss.detach(), loss.new_tensor(late)]), "mean").tolist()
        if not math.isfinite(value):
            return value, False
        optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._reduce(trained)
        if self.training.clip is not None:
            self.accelerator.clip_grad_norm_(trained, self.training.clip)
        with bounded_steps(self.student, self.optimizer.param_groups[0]["lr"]):
            optimizer.step()
        if self.average:
            self._average()
        return value, due > 0

    def _reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients become their mean over the processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.accelerator.num_processes > 1 and grads:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), "mean")
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))

    def _local(self, batch: Batch) -> Batch:
        """This process's part of a batch, on its device. Every process gets at least one sample."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        count = len(batch.inputs[0])

        def part(t: Tensor) -> Tensor:
            t = t if world == 1 else t[rank % count :: world]
            t = t.to(self.accelerator.device)
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

        return map_tensors(part, batch)

    def _average(self) -> None:
        """Exponential moving average with a horizon of `average` epochs, unbiased at the start."""
        horizon = self.training.average * len(self.data)
        weight = max(1 / (self.step + 1), 1 / max(1.0, horizon))
        for key, value in self.student.state_dict().items():
            mean = self.average[key]
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.device), weight)
            else:
                mean.copy_(value)

    def _retry(self) -> None:
        self.log.retries += 1
        if self.log.retries > RETRIES:
            raise PqkError(
                f"{self.run.scope}: the loss is not finite at step {self.step} of {self.total}, after {RETRIES} "
                f"retries down to a learning rate of {self.training.learning_rate * self.factor:.2g}; lower "
                "learning_rate, set clip, or look for extreme values in the data"
            )
        retries, factor = self.log.retries, self.factor / 4
        self._restore()
        self.log.retries, self.factor = retries, factor
        self._save()  # a run that is killed from here on goes on at the lower rate, too
        log.warning("%s: non-finite loss; back to step %d at %.2g of the rate", self.run.scope, self.step, factor)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"student/{k}", v) for k, v in self.student.state_dict().items())
        yield from ((f"average/{k}", v) for k, v in self.average.items())
        yield from ((f"objective/{k}", v) for k, v in self.objective.state_dict().items())
        for i, state in self.optimizer.state_dict()["state"].items():
            yield from ((f"optimizer/{i}/{k}", v) for k, v in state.items() if isinstance(v, Tensor))

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        meta = {
            "step": self.step,
            "factor": self.factor,
            "losses": list(self.log.losses),
            "retries": self.log.retries,
            "epoch_loss": list(self.epoch_loss),
        }
        tensors = {**dict(self._tensors()), "rng": torch.get_rng_state()}
        # Where an epoch cannot be entered in the middle, a retry goes back to its start, which no file may overwrite.
        if self.path is None or (self.data.resume_reason is not None and self.step % len(self.data) == 0):
            self.memory = ({k: v.detach().clone() for k, v in tensors.items()}, meta)
        if self.path is not None and self.accelerator.is_main_process:
            write_tensors(self.path, tensors, {"training": json.dumps(meta)})

    def _restore(self) -> None:
        """Go to the last saved state, if there is one."""
        if self.memory is not None:
            tensors, meta = self.memory
        elif self.path is not None and self.path.exists():
            tensors, metadata = read_tensors(self.path)
            meta = json.loads(metadata["training"])
        else:
            return
        if meta["step"] % len(self.data) and self.data.resume_reason is not None:
            raise InputError(
                f"{self.run.scope}: cannot resume at step {meta['step']}, in the middle of an epoch: "
                f"{self.data.resume_reason}"
            )
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "average": {}, "objective": {}, "optimizer": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind in parts:
                parts[kind][name] = value
        self.student.load_state_dict(parts["student"])
        self.objective.load_state_dict(parts["objective"])
        for key, mean in self.average.items():
            mean.copy_(parts["average"][key])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition("/")
            p = parameters[int(index)]
            # A copy, never the saved tensor itself, which may be needed again; in the parameter's memory format.
            like = torch.empty_like(p) if value.shape == p.shape else torch.empty_like(value)
            state.setdefault(int(index), {})[name] = like.copy_(value).detach()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        torch.set_rng_state(tensors["rng"])
        self.step, self.factor, self.epoch_loss = meta["step"], meta["factor"], list(meta["epoch_loss"])
        self.log = TrainingLog(list(meta["losses"]), meta["step"], meta["retries"])
