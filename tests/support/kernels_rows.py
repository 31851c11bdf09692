"""What the tests of the memory-bound kernels share: a launch's size, and launches at the far end of large tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from pqk.kernels.common.launch import Launch, launch


def programs(run: Launch) -> int:
    """How many programs a launch has: the interpreter takes some 20 ms for each."""
    return math.prod(run.grid)


def far(monkeypatch: pytest.MonkeyPatch, run: Launch, first: int) -> None:
    """Run a launch whose first program is number `first` of the first axis, as one among very many would be."""
    from triton.runtime import interpreter

    with monkeypatch.context() as patch:
        patch.setattr(
            interpreter.interpreter_builder,
            "set_grid_idx",
            lambda x, y, z: setattr(interpreter.interpreter_builder, "grid_idx", (first + x, y, z)),
        )
        launch(run)


def faked(operator: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> Any:
    """What the operator's fake, which `torch.export` traces with, gives for arguments of the same shapes and dtypes."""
    with FakeTensorMode() as mode:
        return operator(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))


def assert_alike(fake: torch.Tensor, real: torch.Tensor) -> None:
    """The fake told the truth about everything but the values."""
    told, true = ((t.shape, t.dtype, t.stride(), t.device) for t in (fake, real))
    assert told == true
