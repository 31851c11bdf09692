"""The GPU that a launch is planned for: the device of its tensors, or one that is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pqk.errors import Reason

OLDEST = (8, 0)
"""the oldest compute capability that the kernels are written for: asynchronous copies and `mma.s8` of 16x8x32"""


@cache
def why_not_run(index: int) -> Reason | None:
    """Why CUDA device `index` cannot run the kernels, else None."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or capability >= OLDEST:
        return None
    name = torch.cuda.get_device_name(index)
    have, want = (".".join(map(str, c)) for c in (capability, OLDEST))
    return f"{name} has compute capability {have}; the kernels need {want}"


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU that a launch's plan depends on."""

    capability: tuple[int, int]
    """compute capability; an AMD GPU, which numbers otherwise, counts as the oldest"""
    processors: int
    """streaming multiprocessors, or compute units"""
    shared: int
    """bytes of shared memory that one program may have"""


_absent = Gpu(OLDEST, 108, 163 * 1024)
"""the GPU that launches are planned for where there is none: an A100"""


@contextlib.contextmanager
def planning_for(gpu: Gpu) -> Iterator[None]:
    """Plans launches of tensors that are on no GPU for this one, within the context."""
    global _absent
    before, _absent = _absent, gpu
    try:
        yield
    finally:
        _absent = before


def gpu_of(device: torch.device | str) -> Gpu:
    """The GPU of a device; for one that is no CUDA device the GPU that is planned for."""
    device = torch.device(device)
    if device.type != "cuda":
        return _absent
    return _present(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _present(index: int) -> Gpu:
    p: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Gpu(OLDEST, p.multi_processor_count, p.shared_memory_per_block)
    return Gpu((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)
