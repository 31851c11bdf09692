"""A teacher's answers on disk, by what they answer; each is checked when it is read.

A file is named by a digest of everything that its answers depend on, so another teacher, other data, another
augmentation or another view never finds it. Each answer carries a hash of the file's name, its own place and its
bytes. One that does not match, because it was not written yet, half written by a killed run, written by two at once,
damaged, or brought from another file, is as if it were not there and is computed again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqk.errors import InputError
from pqk.files import write_whole

SHARED = "PQK_CACHE"
"""the environment variable that names a folder of answers for all runs; without it, each run has its own"""
ROWS = 4096
"""answers of a new cache that are written at once"""
SLACK = {"fp32": 1e-3, "bf16": 5e-2}
"""how far the same teacher's answers may lie apart, over the largest of them: sums round otherwise in other batches"""


def cache_folder(run: Path | None) -> Path | None:
    """Where the answers are kept: in the folder that `PQK_CACHE` names, else in the run's own; None: nowhere."""
    shared = os.environ.get(SHARED)
    return Path(shared) if shared else None if run is None else run / "cache"


class LogitCache:
    """Answers [C…] in float32 by key, in a memory-mapped .npy file of (answer, check); several processes may write.

    `output` names the one that is kept of a teacher with several. Raises `InputError` for a file that cannot be made,
    or that is no cache of `rows` answers of this `shape`.
    """

    def __init__(self, path: Path, rows: int, shape: Sequence[int], output: str | None = None) -> None:
        self.path, self.output = path, output
        record = np.dtype([("answer", "<f4", tuple(shape)), ("check", "<u8")])
        if not path.exists():
            _create(path, rows, record)
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)  # a file that is too short: "r+" would lengthen it
            self.array = np.load(path, mmap_mode="r+", allow_pickle=False)
        except InputError:
            raise
        except Exception as error:  # numpy reads the header as Python, and raises whatever that does
            raise InputError(f"{path}: not a whole cache of a teacher's answers ({error}); delete it") from error
        if self.array.dtype != record or self.array.shape != (rows,):
            raise InputError(
                f"{path} holds {self.array.shape} of {self.array.dtype}, and the teacher gives {rows} answers "
                f"{list(shape)}; it is another teacher's or another version's: delete it"
            )
        self._hash = hashlib.blake2b(path.stem.encode(), digest_size=8)

    def get(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(answers [B, C…], which of them are present: bool [B]), on the CPU."""
        places = keys.cpu().numpy()
        records = self.array[places]
        answers = np.ascontiguousarray(records["answer"])
        return torch.from_numpy(answers), torch.from_numpy(self._checks(places, answers) == records["check"])

    def put(self, keys: Tensor, rows: Tensor) -> None:
        """Keep `rows` [B, C…] for these keys."""
        places = keys.cpu().numpy()
        records = np.empty(len(places), self.array.dtype)
        records["answer"] = rows.detach().float().cpu().numpy()
        records["check"] = self._checks(places, records["answer"])
        self.array[places] = records

    def confirm(self, keys: Tensor, live: Tensor, precision: str) -> None:
        """Raises `InputError` where answers that are kept are not what this teacher gives for the same keys."""
        kept, present = self.get(keys)
        kept, live = kept[present], live.detach().float().cpu()[present]
        if not len(kept):
            return
        apart = float((kept - live).abs().max() / live.abs().max().clamp_min(1e-6))
        if not apart <= SLACK[precision]:
            raise InputError(
                f"distill: {self.path} holds answers that are not this teacher's: they lie {apart:.2g} of its largest "
                f"answer apart (allowed {SLACK[precision]:g}). What answers has changed under the same name, or does "
                "not answer alike twice; give it another `identity`, or delete the file"
            )

    def _checks(self, places: NDArray[np.int64], answers: NDArray[np.float32]) -> NDArray[np.uint64]:
        checks = np.empty(len(places), "<u8")
        for i, (place, answer) in enumerate(zip(places.tolist(), answers, strict=True)):
            h = self._hash.copy()
            h.update(place.to_bytes(8, "little"))
            h.update(answer.tobytes())
            checks[i] = int.from_bytes(h.digest(), "little")
        return checks


def _create(path: Path, rows: int, record: np.dtype[np.void]) -> None:
    """Make an empty cache, unless another process was first: whoever maps the file maps the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Written, not mapped: a full disk is then an error here and not a crash in the middle of the training.
        write_whole(own, lambda p: write_blank(p, rows, record))
        try:
            path.hardlink_to(own)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def write_blank(path: Path, rows: int, record: np.dtype[np.void]) -> None:
    """Writes a .npy file of records that no answer matches."""
    empty = np.zeros(1, record).tobytes()
    with path.open("wb") as f:
        np.lib.format.write_array_header_1_0(
            f, {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (rows,)}
        )
        for start in range(0, rows, ROWS):
            f.write(empty * min(ROWS, rows - start))
