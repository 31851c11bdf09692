"""The one training loop, for every stage of the student and every objective.

It runs under Hugging Face accelerate, so several processes, GPUs and mixed precision are a launch option. Everything
that it draws is a function of (seed, pass, epoch), its checkpoints hold everything else, and so a run that was killed
ends in the same student, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.convolutions import UnitStrides
from pqk.core.distributed import rank, world_size
from pqk.core.run_context import RunContext
from pqk.data.data import Batch, Data
from pqk.data.structures import map_tensors, tensors
from pqk.errors import InputError, PqkError, Reason, first_line
from pqk.quant.fake_quant import bounded_steps
from pqk.target.machine import autocast
from pqk.training.checkpoint import Checkpoint, TrainingState
from pqk.training.integer_form import integer_form
from pqk.training.settings import Training, optimizer_for, rate

log = logging.getLogger(__name__)

RETRIES = 3
"""how often a non-finite loss is answered by the last good state at a lower rate"""


@dataclass
class TrainingLog:
    """What happened in a training."""

    losses: list[float] = field(default_factory=list)
    """mean loss of each epoch"""
    steps: int = 0
    """how many there were"""
    retries: int = 0
    """how often it went back to a lower rate"""
    left_out: int = 0
    """samples of batches too small for a norm over the batch, over all epochs"""

    @property
    def notes(self) -> dict[str, int]:
        """What a record says of the data: samples that were left out, where there are some."""
        return {"left_out": self.left_out} if self.left_out else {}


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
    """The Accelerator of this launch, over one process or over those of `accelerate launch` or `torchrun`.

    The first call sets up devices and, for several processes, torch's process group, which `pqk.core.distributed`
    then reads; all later ones share that state. It is told whether there is an accelerator, because without one it does
    not connect processes by itself.
    """
    return Accelerator(cpu=not torch.accelerator.is_available())


def fit(run: RunContext, student: nn.Module, data: Data, objective: Objective, training: Training) -> TrainingLog:
    """Train `student` in place.

    A batch that leaves a process one sample is left out where the student cannot train on one, as a norm over the batch
    cannot: the last of 65 samples in batches of 8. The log says how many samples that were.

    Raises `InputError` where a checkpoint exists and the data cannot be entered in the middle of an epoch, or all
    batches are so small; and `PqkError` when the loss is still not finite after three retries.
    """
    return _Trainer(run, student, data, objective, training).train()


def why_not_alone(student: nn.Module, batch: Batch) -> Reason | None:
    """Why `student` (unchanged) cannot train on the first sample of `batch` alone, though on two of it; else None.

    Tried, not looked up: a norm over the batch may have positions enough in one sample, and may be anybody's code.
    """
    device = next(student.parameters()).device
    trial = copy_of(student, "student")
    trial.train()

    def why_not_of(count: int) -> Reason | None:
        inputs = map_tensors(lambda t: torch.cat([t[:1]] * count).to(device), batch.inputs)
        try:
            outputs = trial(*inputs)
        except Exception as error:  # whatever torch or the user's code raises
            return first_line(error)
        finite = all(bool(t.isfinite().all()) for t in tensors(outputs) if t.is_floating_point())
        return None if finite else "its outputs are not finite"

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        alone = why_not_of(1)
        return alone if alone is not None and why_not_of(2) is None else None


class SmallBatches:
    """Tells batches that leave a process one sample, on which the student cannot train. All processes agree."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.alone: bool | None = None
        """whether the student can train on a single sample, once that is asked"""

    def __contains__(self, batch: Batch) -> bool:
        if len(batch.inputs[0]) >= 2 * world_size():
            return False
        if self.alone is None:
            self.alone = why_not_alone(self.student, batch) is None
        return not self.alone

    def check(self, data: Data, first: Batch, where: str) -> None:
        """Raises `InputError`, beginning with `where`, where no batch of `data` is large enough to train on."""
        least = 2 * world_size()
        if data.samples < least * len(data) and first in self:
            shared = "" if world_size() == 1 else f" over {world_size()} processes"
            raise InputError(
                f"{where}: {data.samples} samples in {len(data)} batches{shared} leave one sample to a step, and the "
                f"student cannot train on one ({why_not_alone(self.student, first)}): take batches of at least {least} "
                "samples"
            )


def local_part(batch: Batch, device: torch.device) -> Batch:
    """This process's part of a batch, on its device. Every process gets at least one sample."""
    index, world = rank(), world_size()
    count = len(batch.inputs[0])

    def part(t: Tensor) -> Tensor:
        t = t if world == 1 else t[index % count :: world]
        t = t.to(device)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return map_tensors(part, batch)


class _Trainer:
    """One training run: its steps, and what follows a loss that is not finite."""

    def __init__(
        self, run: RunContext, student: nn.Module, data: Data, objective: Objective, training: Training
    ) -> None:
        self.run, self.student, self.data, self.objective, self.training = run, student, data, objective, training
        self.total = max(1, round(training.epochs * len(data)))
        self.accelerator = accelerator()
        first = next(data.batches())
        self.small = SmallBatches(student)
        self.small.check(data, first, run.scope)
        self.strides: UnitStrides | None = UnitStrides()
        """what computes convolutions in another way; None once a step has shown that there are none of them"""
        if any(t.dim() == 4 for t in first.inputs):
            for t in (*student.parameters(), *student.buffers()):  # Module.to refuses captured constants of five axes
                if t.dim() == 4:
                    t.data = t.data.contiguous(memory_format=torch.channels_last)
        self.optimizer = optimizer_for(training, student, objective)
        self.average = {k: v.detach().clone() for k, v in student.state_dict().items()} if training.average else {}
        self.state = TrainingState()
        self.saved_at = time.monotonic()
        path = None if run.scratch is None else run.scratch / "checkpoint.safetensors"
        identity = f"{run.identity}/{run.seed}/{run.scope}"
        self.checkpoint = Checkpoint(path, data, student, objective, self.optimizer, identity, self.average)

    def train(self) -> TrainingLog:
        self._restore()
        if self.state.step == 0 or self.data.resume_reason is not None:
            self._save()  # the state that a non-finite loss in this epoch goes back to
        home = next(self.student.parameters()).device
        # Not DDP, which would leave out projectors and trip over step sizes that freeze: `_reduce` does its work.
        form = integer_form(self.student, self.accelerator.device)
        model = self.accelerator.prepare_model(self.objective.wrap(form), evaluation_mode=True)
        optimizer = self.accelerator.prepare(self.optimizer)
        self.objective.to(self.accelerator.device)
        with self.run.observer.task(self.run.scope, self.total) as advance:
            advance(self.state.step, "")
            while self.state.step < self.total:
                if not self._epoch(model, optimizer, advance):
                    failed = self.state.step
                    self._retry()
                    advance(self.state.step - failed, "lower rate")
        if self.average:
            self.student.load_state_dict(self.average)
        if world_size() > 1:  # each process has seen other samples: batch norm's are those of rank 0
            for t in self.student.buffers():
                t.copy_(broadcast(t))
        # As a student loaded from its saved tensors: convolutions round differently in another memory format.
        self.student.to(device=home, memory_format=torch.contiguous_format).train(False)  # type: ignore[call-overload]
        return TrainingLog(self.state.losses, self.state.step, self.state.retries, self.state.left_out)

    def _leave_out(self, batch: Batch) -> None:
        """Count a batch as a step on which nothing is trained: schedules, checkpoints and order stay as they are."""
        if not self.state.left_out:
            log.warning(
                "%s: batch %d of an epoch is too small for a norm over the batch (samples: %d), and is left out",
                self.run.scope,
                self.state.step % len(self.data) + 1,
                len(batch.inputs[0]),
            )
        self.state.left_out += len(batch.inputs[0])
        self.state.step += 1

    def _epoch(self, model: nn.Module, optimizer: Any, advance: Callable[[int, str], None]) -> bool:
        """Train to the end of the current epoch. False where a loss was not finite."""
        state = self.state
        epoch, start = divmod(state.step, len(self.data))
        seed = self.run.seed_for("epoch", epoch)
        generator = torch.get_rng_state() if start else None
        set_seed(seed & 0xFFFFFFFF)
        batches = self.data.batches(seed, epoch, start, generator)
        for batch in batches:
            if batch in self.small:
                self._leave_out(batch)
                advance(1, "left out")
                if state.step >= self.total:
                    break
                continue
            model.train()
            loss, due = self._guarded_step(model, optimizer, batch)
            if not math.isfinite(loss):
                return False
            state.step += 1
            state.epoch_loss[0] += loss
            state.epoch_loss[1] += 1
            advance(1, f"loss {state.epoch_loss[0] / state.epoch_loss[1]:.3f}")
            if state.step >= self.total:
                break
            if due and state.step % len(self.data):
                if not self._finite():
                    return False
                self._save()
        if not self._finite():
            return False
        state.losses.append(state.epoch_loss[0] / max(1.0, state.epoch_loss[1]))
        log.info("%s epoch %d loss %.4f", self.run.scope, epoch + 1, state.losses[-1])
        state.epoch_loss = [0.0, 0.0]
        self.objective.end_epoch(self.student, epoch)
        self._save()
        return True

    def _finite(self) -> bool:
        """Whether the student may become the last good state: a finite loss can have had an infinite gradient."""
        return all(bool(p.isfinite().all()) for p in self.student.parameters())

    def _guarded_step(self, model: nn.Module, optimizer: Any, batch: Batch) -> tuple[float, bool]:
        """A step in which no convolution is computed that writes over other memory.

        Student, teacher, peers and terms are all looked at, since the first step is under the guard; it has what all
        the others have.
        """
        if self.strides is None:
            return self._step(model, optimizer, batch)
        with self.strides:
            result = self._step(model, optimizer, batch)
        if not self.strides.found:
            self.strides = None
        return result

    def _step(self, model: nn.Module, optimizer: Any, batch: Batch) -> tuple[float, bool]:
        """One step: the mean loss of all processes, and whether one of them finds that a checkpoint is due."""
        progress = self.state.step / self.total
        self.objective.begin(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * self.state.factor * rate(self.training, progress)
        batch = local_part(batch, self.accelerator.device)
        with autocast(self.accelerator.device.type, self.training.precision):
            losses = self.objective(model, batch)
        loss = losses.float().mean()
        late = float(time.monotonic() - self.saved_at > self.training.checkpoint_seconds)
        said = torch.stack([loss.detach(), loss.new_tensor(late)])
        value, due = (self.accelerator.reduce(said, "mean") if world_size() > 1 else said).tolist()
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
        if world_size() > 1 and grads:
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in grads]), "mean")
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))

    def _average(self) -> None:
        """Exponential moving average with a horizon of `average` epochs, unbiased at the start."""
        horizon = self.training.average * len(self.data)
        weight = max(1 / (self.state.step + 1), 1 / max(1.0, horizon))
        for key, value in self.student.state_dict().items():
            mean = self.average[key]
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.device), weight)
            else:
                mean.copy_(value)

    def _retry(self) -> None:
        """Go back to the last good state, at a quarter of the rate."""
        retries, factor = self.state.retries + 1, self.state.factor
        if retries > RETRIES:
            raise PqkError(
                f"{self.run.scope}: the loss is not finite at step {self.state.step} of {self.total}, after {RETRIES} "
                f"retries down to a learning rate of {self.training.learning_rate * factor:.2g}; lower "
                "learning_rate, set clip, or look for extreme values in the data"
            )
        self._restore()
        self.state.retries, self.state.factor = retries, factor / 4
        self._save()  # a run that is killed from here on goes on at the lower rate, too
        log.warning(
            "%s: non-finite loss; back to step %d at %.2g of the rate", self.run.scope, self.state.step, factor / 4
        )

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        self.checkpoint.save(self.state)

    def _restore(self) -> None:
        """Go to the last saved state, if there is one."""
        self.state = self.checkpoint.restore(self.run.scope) or self.state
