"""Launches: described before they run, run on a GPU or in Triton's interpreter, and the fallback to a reference.

A `Launch` is one kernel over one grid with its arguments and its compile-time constants. Each kernel module builds it
in one place, `plan`, and three things read it: `launch` runs it (a GPU, or CPU tensors under `TRITON_INTERPRET=1`),
the ahead-of-time compiler turns `signature` into machine code where there is no GPU (the tensors may then be on the
`meta` device), and the tracer counts the addresses it touches. What is proven is thereby what runs.

Contraction of `a * b + c` into one rounding is off in every launch and in every compile: the epilogues reproduce
float32 arithmetic of separate operations, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels.common.gpu import why_not_run
from pqk.kernels.common.triton import INTERPRETED, TRITON_MISSING

_log = logging.getLogger("pqk.kernels")


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid. `args` and `constexprs` together name every parameter of `kernel`."""

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float | None]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """Compile options, the same for a launch and for the ahead-of-time compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}

    def tensor(self, name: str = "out_ptr") -> Tensor:
        """An argument that is a tensor; the output where no other is named."""
        argument = self.args[name]
        assert isinstance(argument, Tensor)
        return argument

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.args.values() if isinstance(a, Tensor))


def launch(run: Launch) -> None:
    """Runs it on the device of its tensors. An empty grid runs nothing.

    Raises `InputError` where Triton is missing, and for tensors that are neither on a GPU nor interpreted.
    """
    if TRITON_MISSING is not None:
        raise InputError(f"{run.name}: {TRITON_MISSING}")
    if 0 in run.grid:
        return
    if _collected is not None:
        _collected.append(run)
        return
    device = run.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise InputError(
            f"{run.name}: tensors are on {device}; kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1"
        )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        run.kernel[run.grid](**run.args, **run.constexprs, **run.options)


def output_of(run: Launch) -> Tensor:
    """Runs it and returns its output."""
    launch(run)
    return run.tensor()


_collected: list[Launch] | None = None


@contextlib.contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Collects launches within it, in order, and does not run them: for a compiler or a tracer that reads them."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


TYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
}  # fmt: skip
"""Triton's words for dtypes"""


def signature(run: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """`(signature, constexprs, attrs)` of `triton.compiler.ASTSource`, specialized as a launch would be.

    An integer 1 and a None become constants; pointers and integers that 16 divides say so, which is what lets loads be
    wide. Tensors on the `meta` device count as aligned, as the allocator gives them.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    arguments = {**run.args, **run.constexprs}
    for i, name in enumerate(run.kernel.arg_names):
        value = arguments[name]
        if name in run.constexprs or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
            divisible = value.is_meta or value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            types[name], divisible = "fp32", False
        if divisible:
            attrs[i,] = [["tt.divisibility", 16]]
    return types, constants, attrs


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _log_once(op: str, reason: str) -> None:
    _log.warning("%s runs its reference on this device: %s", op, reason)


def falls_back(op: str, device: torch.device, reason: str | None = None) -> bool:
    """Whether `op` has to run its reference on `device`: no Triton, a GPU too old, or `reason`. Logged once."""
    if reason is None:
        reason = TRITON_MISSING
    if reason is None and device.type == "cuda":
        reason = why_not_run(device.index if device.index is not None else torch.cuda.current_device())
    if reason is not None:
        _log_once(op, reason)
    return reason is not None
