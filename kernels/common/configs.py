"""The choice of a launch's block sizes: of those that fit the GPU the one that is known to be best, else a guess.

A kernel that has a choice asks `chosen`. What is *known* is what was measured, or chosen when a student was compiled,
for one shape on one kind of GPU; it holds for every student in the process, as it says nothing about their weights and
changes none of their numbers. `noting` shows which choices came up, for those who store them or measure them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pqk.errors import InputError
from pqk.kernels.common.gpu import Gpu


@dataclass(frozen=True)
class Config:
    """Block sizes of a matmul-shaped kernel, and how Triton is to compile it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    """row blocks that are walked together, so that a column of weight blocks is read while it is in the L2 cache"""
    split_k: int = 1
    """programs that share one block of the output, each with a part of K"""
    persistent: bool = False
    """as many programs as the GPU has processors, each walking many blocks"""

    @property
    def shared_bytes(self) -> int:
        """Shared memory of int8 operands: `num_stages` slices of both in flight. Blocks of the epilogue reuse it."""
        return (self.block_m + self.block_n) * self.block_k * self.num_stages


def fits(config: Config, shared: int) -> bool:
    """Whether the operands in flight fit so many bytes of shared memory."""
    return config.shared_bytes <= shared


def fitting(configs: Sequence[Config], gpu: Gpu, fits: Callable[[Config, int], bool] = fits) -> list[Config]:
    """The configurations that `fits` lets a program on `gpu` have, in order. Raises `InputError` where none fits."""
    usable = [c for c in configs if fits(c, gpu.shared)]
    if not usable:
        raise InputError(f"no configuration fits {gpu.shared} bytes of shared memory; the GPU is too small")
    return usable


@dataclass(frozen=True)
class Choice:
    """A choice that came up: kernel `op` for a shape, as words in `key`, on `gpu`."""

    op: str
    key: str
    gpu: Gpu
    config: Config
    """what was chosen"""
    candidates: tuple[Config, ...]
    """what there was to choose from"""


_known: dict[tuple[Gpu, str, str], Config] = {}
_noted: list[Choice] | None = None


def chosen(
    op: str, key: str, gpu: Gpu, guess: Callable[[], Config], candidates: Callable[[], Sequence[Config]]
) -> Config:
    """The known configuration of `op` for `key` on `gpu`, or `guess()`."""
    config = _known.get((gpu, op, key)) or guess()
    if _noted is not None:
        _noted.append(Choice(op, key, gpu, config, tuple(candidates())))
    return config


def remember(gpu: Gpu, op: str, key: str, config: Config) -> None:
    """Gives `config` to every later launch of `op` for `key` on `gpu`."""
    _known[gpu, op, key] = config


@contextlib.contextmanager
def trying() -> Iterator[None]:
    """Forgets at its end what was remembered within it."""
    global _known
    before, _known = _known, dict(_known)
    try:
        yield
    finally:
        _known = before


@contextlib.contextmanager
def noting() -> Iterator[list[Choice]]:
    """Notes the choices that come up within it, in order, each as often as it does."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before
