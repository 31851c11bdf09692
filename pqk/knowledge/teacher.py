"""The frozen teacher, and its answers on disk.

With a keyed augmentation the teacher sees each (sample, view) once; later epochs read its logits from a memory-mapped
file. A row is written only after it was computed, and rows that are not yet there are NaN, so a killed run leaves a
file that is merely less full. The file is named by teacher, data and precision: another teacher or another
augmentation never reads it.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.data import Batch, Data, map_tensors
from pqk.files import write_whole
from pqk.knowledge.taps import tap
from pqk.task import widened

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


class FrozenTeacher(nn.Module):
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

    def train(self, mode: bool = True) -> FrozenTeacher:
        self._model[0].eval()
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """(outputs, {point: feature}) of a batch."""
        if self.cache is None or batch.keys is None:
            return self._live(batch)
        rows, present = self.cache.get(batch.keys)
        device = batch.inputs[0].device
        if bool(present.all()):
            return rows.to(device), {}
        live, _ = self._live(batch)
        self.cache.put(batch.keys[~present.to(batch.keys.device)], live[~present.to(device)])
        return torch.where(present.view(-1, *[1] * (live.dim() - 1)).to(device), rows.to(device), live), {}

    def _live(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        device = batch.inputs[0].device
        if any(t.device != device for t in self._model[0].parameters()):
            self._model = [copy.deepcopy(self._model[0]).to(device)]  # the program's teacher stays where it is
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            outputs, features = self._model[0](*batch.inputs)
        return map_tensors(lambda t: widened(t) if t.is_floating_point() else t, outputs), features


def cache_for(folder: Path | None, teacher: nn.Module, data: Data, precision: str, example: Any) -> LogitCache | str:
    """The cache of this teacher on this data, shared by all passes of a run; or the reason why there is none."""
    if folder is None:
        return "nothing is saved in this run"
    if data.key_count is None:
        return data.unkeyed_reason
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "several processes would write one file"
    with torch.no_grad():
        outputs = teacher(*example)
    if not isinstance(outputs, Tensor):
        return f"the teacher's output is a {type(outputs).__name__}; only single tensors are cached"
    key = hashlib.sha256(f"{fingerprint(teacher)} {data.fingerprint()} {precision}".encode()).hexdigest()
    path = folder / "cache" / f"{key}.npy"
    size, free = 4 * data.key_count * outputs[0].numel(), shutil.disk_usage(folder).free
    if not path.exists() and size > free / 2:
        return f"the answers would take {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free"
    return LogitCache(path, data.key_count, outputs.shape[1:])
