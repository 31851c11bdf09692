"""What a teacher is, the frozen one, and its answers on disk.

With a keyed augmentation the teacher sees each (sample, view) once; later epochs read its logits from a memory-mapped
file. A row is written only after it was computed, and rows that are not yet there are NaN, so a killed run leaves a
file that is merely less full. The file is named by teacher, data and precision: another teacher or another
augmentation never reads it.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.data import Batch, Data, Inputs, map_tensors
from pqk.files import write_whole
from pqk.knowledge.taps import tap
from pqk.task import widened

Answer = tuple[Any, dict[str, Tensor]]
"""(outputs, {point: feature}) of a batch"""

ROWS = 4096
"""rows of a new cache that are written at once"""


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's tensors and their names."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class LogitCache:
    """Rows [C…] in float32 by key, in a memory-mapped .npy file; NaN: not there yet."""

    def __init__(self, path: Path, rows: int, shape: Sequence[int]) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written, not mapped: a full disk is then an error here and not a crash in the middle of the training.
            write_whole(path, lambda p: _blank(p, (rows, *shape)))
        self.array = np.load(path, mmap_mode="r+", allow_pickle=False)

    def get(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [B, C…], present bool [B])."""
        rows = torch.from_numpy(np.asarray(self.array[keys.cpu().numpy()]))
        return rows, rows.flatten(1).isfinite().all(1)

    def put(self, keys: Tensor, rows: Tensor) -> None:
        self.array[keys.cpu().numpy()] = rows.detach().float().cpu().numpy()


def _blank(path: Path, shape: tuple[int, ...]) -> None:
    """A .npy file of float32 NaN."""
    with path.open("wb") as f:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(f, header)
        row = np.full(shape[1:], np.nan, "<f4").tobytes()
        for start in range(0, shape[0], ROWS):
            f.write(row * min(ROWS, shape[0] - start))


class Teacher(nn.Module, ABC):
    """Answers batches: always in eval mode, never with a gradient, in float32 at least.

    `cache`, if any, holds the answers that were given before.
    """

    cache: LogitCache | None = None
    featureless = "the teacher was made without that point; name it in its `points`"
    """why a feature is missing"""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    @property
    def module(self) -> nn.Module | None:
        """The model that answers, for terms that look into it; None: it is a black box."""
        return None

    @abstractmethod
    def live(self, batch: Batch) -> Answer:
        """The answer to a batch, computed."""

    def identity(self) -> str:
        """A digest of everything that the answers depend on. Only asked for where they can be kept."""
        raise NotImplementedError

    def uncached(self) -> str | None:
        """Why the answers cannot be kept for the next epoch, else None."""
        return None

    def check(self, example: Inputs) -> None:
        """Raises `InputError` where it cannot answer these inputs."""

    def begin(self, progress: float) -> None:
        """Called before each training step with the share of the training that is done, 0 to 1."""

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Answer:
        """(outputs, {point: feature}) of a batch, without a gradient. Raises `InputError` where it cannot answer."""
        # Whatever precision the student trains in: an answer is the same when it is kept.
        with torch.autocast(batch.inputs[0].device.type, enabled=False):
            if self.cache is None or batch.keys is None:
                return self.live(batch)
            rows, present = self.cache.get(batch.keys)
            device = batch.inputs[0].device
            if bool(present.all()):
                return rows.to(device), {}
            live, _ = self.live(batch)
            self.cache.put(batch.keys[~present.to(batch.keys.device)], live[~present.to(device)])
            return torch.where(present.view(-1, *[1] * (live.dim() - 1)).to(device), rows.to(device), live), {}


def asked(tapped: nn.Module, batch: Batch, precision: str = "fp32") -> Answer:
    """What a tapped model says, in float32 at least; "bf16": computed in bfloat16 autocast."""
    with torch.autocast(batch.inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        outputs, features = tapped(*batch.inputs)
    return map_tensors(lambda t: widened(t) if t.is_floating_point() else t, outputs), features


class FrozenTeacher(Teacher):
    """A module in eval mode, without gradients, its buffers never touched; optionally cached.

    `precision` "bf16" computes its convolutions and matmuls in bfloat16 autocast (about twice as fast where the CPU
    has the instructions); outputs are float32.
    """

    def __init__(
        self, model: nn.Module, points: Sequence[str] = (), precision: str = "fp32", cache: LogitCache | None = None
    ) -> None:
        super().__init__()
        # Hidden from `parameters()` and `state_dict()`: the teacher is read only and is not part of any checkpoint.
        self._model = [tap(model.eval(), points)]
        self.precision, self.cache = precision, None if points else cache

    @property
    def module(self) -> nn.Module | None:
        return getattr(self._model[0], "model", None)

    def train(self, mode: bool = True) -> FrozenTeacher:
        self._model[0].eval()
        super().train(False)
        return self

    def identity(self) -> str:
        made_of = fingerprint(self.module or self._model[0])
        return made_of if self.precision == "fp32" else f"{made_of} {self.precision}"

    def live(self, batch: Batch) -> Answer:
        device = batch.inputs[0].device
        if any(t.device != device for t in self._model[0].parameters()):
            self._model = [copy.deepcopy(self._model[0]).to(device)]  # the program's teacher stays where it is
        return asked(self._model[0], batch, self.precision)


def cache_for(folder: Path | None, teacher: nn.Module, data: Data, precision: str, example: Any) -> LogitCache | str:
    """The cache of this teacher on this data, shared by all passes of a run; or the reason why there is none.

    `teacher`: a `Teacher`, or the model of a frozen one.
    """
    if isinstance(teacher, Teacher) and (reason := teacher.uncached()) is not None:
        return reason
    if folder is None:
        return "nothing is saved in this run"
    if data.key_count is None:
        return data.unkeyed_reason
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "several processes would write one file"
    outputs = _example_outputs(teacher, data, example)
    if not isinstance(outputs, Tensor):
        return f"the teacher's output is a {type(outputs).__name__}; only single tensors are cached"
    identity = teacher.identity() if isinstance(teacher, Teacher) else fingerprint(teacher)
    key = hashlib.sha256(f"{identity} {data.fingerprint()} {precision}".encode()).hexdigest()
    path = folder / "cache" / f"{key}.npy"
    size, free = 4 * data.key_count * outputs[0].numel(), shutil.disk_usage(folder).free
    if not path.exists() and size > free / 2:
        return f"the answers would take {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free"
    return LogitCache(path, data.key_count, outputs.shape[1:])


@torch.no_grad()
def _example_outputs(teacher: nn.Module, data: Data, example: Any) -> Any:
    """What the teacher says of a few samples."""
    if not isinstance(teacher, Teacher):
        return teacher(*example)
    batch = next(data.batches())  # with its labels, on which an answer may depend
    inputs, targets = map_tensors(lambda t: t[:2], (batch.inputs, batch.targets))
    return teacher.live(Batch(inputs, targets, None))[0]
