"""What the tests of all kernels share: poisoned outputs, integers to draw, and what "equals its reference" means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pqk.kernels.common import checks

POISON = 0x5A
ROUNDING = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""of float outputs, relative: float32 sums in another order; one step of float16; one of bfloat16, to which Triton's
interpreter truncates where a GPU rounds to nearest"""


def poison(tensor: Tensor) -> None:
    """Fill with what no kernel should leave behind: NaN, or 0x5A in every byte."""
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.numel():
        tensor.view(torch.uint8).fill_(POISON)


@contextmanager
def poisoned() -> Iterator[list[Tensor]]:
    """Within it, every output is poisoned before its kernel runs. Gives the list of them, in order."""
    seen: list[Tensor] = []

    def hook(tensor: Tensor) -> None:
        poison(tensor)
        seen.append(tensor)

    with checks.allocations(hook):
        yield seen


def assert_matches(reference: Tensor, got: Tensor, *, exact: float = 0.999, atol: float = 1e-6) -> None:
    """Shape, dtype, and the contract of numbers.

    int32 and int64 are equal; int8 and uint8 are within 1 step everywhere and equal on a share `exact`; floats are
    within the rounding of their dtype, or `atol` (float32 cancellation).
    """
    assert got.shape == reference.shape and got.dtype == reference.dtype, (got.shape, got.dtype, reference.dtype)
    assert got.is_contiguous()
    if reference.is_floating_point():
        torch.testing.assert_close(got, reference, rtol=ROUNDING[reference.dtype], atol=atol)
    elif reference.dtype in (torch.int8, torch.uint8):
        off = (got.int() - reference.int()).abs()
        assert not off.numel() or int(off.max()) <= 1, f"off by {int(off.max())} at {off.argmax().item()}"
        # one step in a tensor too small for the share is still allowed
        assert int((off > 0).sum()) <= max(1, (1 - exact) * off.numel()), f"{int((off > 0).sum())} of {off.numel()}"
    else:
        assert torch.equal(got, reference)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, low: int = -128, high: int = 127) -> Tensor:
    """Uniform integers of uint8 [0, 255] or of int8 and int32 [low, high]; normal floats times 3."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)
    if dtype == torch.uint8:
        low, high = 0, 255
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def restrided(tensor: Tensor, step: int = 2, offset: int = 3) -> Tensor:
    """The same values in memory that is `offset` elements into its storage and has gaps along the last axis."""
    size = list(tensor.shape)
    size[-1] *= step
    room = tensor.new_zeros(int(torch.Size(size).numel()) + offset)
    view = room[offset:].reshape(size)[..., ::step]
    return view.copy_(tensor)


def outside_interpreter(code: str, timeout: float = 900) -> Any:
    """What `code` leaves in `result` (JSON), run in a process where kernels compile: without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONSAFEPATH": "1"}
    program = f"{code}\nimport json\nprint('RESULT' + json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])


@contextmanager
def recorded_addresses() -> Iterator[dict[str, list[Any]]]:
    """Within it, interpreted kernels touch no memory: loads give 0, and the byte addresses are noted.

    `{"loads": [...], "stores": [...]}`, for every block an array of the addresses whose mask is on.
    """
    from triton.runtime import interpreter

    seen: dict[str, list[Any]] = {"loads": [], "stores": []}
    builder = interpreter.InterpreterBuilder

    def load(self: Any, ptrs: Any, mask: Any, other: Any, *policy: Any) -> Any:
        seen["loads"].append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)])
        element = ptrs.get_element_ty()
        return interpreter.TensorHandle(np.zeros(ptrs.data.shape, interpreter._get_np_dtype(element)), element)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *policy: Any) -> None:
        seen["stores"].append(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        yield seen
