"""Checkpoints of a training, which hold all that its next step depends on and that no seed gives.

Order and augmentation of the data are functions of (seed, pass, epoch); everything else is in the tensors and the few
numbers that are saved, so a training that goes on from a checkpoint ends in the same student, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.core.distributed import is_main_process
from pqk.data.data import Data, digest_of
from pqk.documents import SEAL
from pqk.errors import InputError
from pqk.files import read_tensors, write_tensors


@dataclass
class TrainingState:
    """How far a training is: the numbers of a checkpoint."""

    step: int = 0
    """steps that are done"""
    factor: float = 1.0
    """of the learning rate, which each retry lowers"""
    losses: list[float] = field(default_factory=list)
    """mean loss of each epoch that is done"""
    retries: int = 0
    """how often it went back to a lower rate"""
    epoch_loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """of the present epoch: the sum of its losses, and their number"""
    left_out: int = 0
    """samples of batches that were too small to train on"""


@dataclass
class Checkpoint:
    """The last good state of a training, in a file and, where it must, in memory."""

    path: Path | None
    """None: in memory only"""
    data: Data
    student: nn.Module
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    identity: str
    """what this is a training of, a digest: the checkpoint of another is refused"""
    average: dict[str, Tensor]
    """the moving average of the student's tensors, empty where there is none"""
    memory: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    def save(self, state: TrainingState) -> None:
        """Keeps the tensors as they are now, the state of torch's global generator, and `state`."""
        tensors, numbers = {**dict(self._tensors()), "rng": torch.get_rng_state()}, asdict(state)
        # Where an epoch cannot be entered in the middle, a retry goes back to its start, which no file may overwrite.
        if self.path is None or (self.data.resume_reason is not None and state.step % len(self.data) == 0):
            self.memory = ({k: v.detach().clone() for k, v in tensors.items()}, numbers)
        if self.path is not None and is_main_process():
            text = json.dumps(numbers)
            write_tensors(self.path, tensors, {"training": text, SEAL: self._seal(tensors, text)})

    def restore(self, scope: str) -> TrainingState | None:
        """Goes back to what was saved last, and gives its state; None: nothing was.

        Raises `InputError`, which begins with `scope`, where it is in the middle of an epoch and the data cannot be
        entered there, and for a file that was changed or is of another training.
        """
        if self.memory is not None:
            tensors, numbers = self.memory
        elif self.path is not None and self.path.exists():
            tensors, numbers = self._read(self.path, scope)
        else:
            return None
        if numbers["step"] % len(self.data) and self.data.resume_reason is not None:
            raise InputError(
                f"{scope}: cannot resume at step {numbers['step']}, in the middle of an epoch: "
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
        self._restore_optimizer(parts["optimizer"])
        torch.set_rng_state(tensors["rng"])
        lists = {"losses": list(numbers["losses"]), "epoch_loss": list(numbers["epoch_loss"])}
        return TrainingState(**{**numbers, **lists})

    def _read(self, path: Path, scope: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, metadata = read_tensors(path)
        text = metadata.get("training", "")
        if metadata.get(SEAL) != self._seal(tensors, text):
            raise InputError(
                f"{scope}: the checkpoint {path} was changed, or is of another training or version of pqk; delete it, "
                "and the training begins anew"
            )
        return tensors, json.loads(text)

    def _seal(self, tensors: dict[str, Tensor], numbers: str) -> str:
        names = sorted(tensors)
        return digest_of((self.identity, numbers, names), (tensors[name] for name in names))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"student/{k}", v) for k, v in self.student.state_dict().items())
        yield from ((f"average/{k}", v) for k, v in self.average.items())
        yield from ((f"objective/{k}", v) for k, v in self.objective.state_dict().items())
        for i, state in self.optimizer.state_dict()["state"].items():
            yield from ((f"optimizer/{i}/{k}", v) for k, v in state.items() if isinstance(v, Tensor))

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition("/")
            p = parameters[int(index)]
            # A copy, never the saved tensor itself, which may be needed again; in the parameter's memory format.
            like = torch.empty_like(p) if value.shape == p.shape else torch.empty_like(value)
            state.setdefault(int(index), {})[name] = like.copy_(value).detach()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
