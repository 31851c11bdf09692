"""Convolutions whose backward pass writes over other memory are computed in another way, whoever calls them.

Everything here is of 64-bit floats, which oneDNN does not compute: without a guard nothing is written over, either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqk.core.convolutions import UnitStrides, strides_of_few
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.passes.prune.importance import gradients
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, fit

aten = torch.ops.aten


class Calls(TorchFunctionMode):
    """Notes the weight's axes but the first, and the stride, of every convolution that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "").startswith("conv"):
            self.seen.append((tuple(args[1].shape[1:]), args[3] if len(args) > 3 else 1))
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[tuple[tuple[int, ...], Any]]]:
    with Calls() as calls:
        yield calls.seen


def weight(channels: int = 3, kernel: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, channels, kernel, kernel, dtype=torch.double)


@pytest.mark.parametrize(
    ("described", "strides"),
    [
        ((weight(3), 2, 0, 1), (2, 2)),
        ((weight(15), (1, 2), (0, 0), 1), (1, 2)),
        ((weight(3), [3], [0], 1), (3, 3)),
        ((weight(3), (2, 2), "valid", 1), (2, 2)),
        ((weight(16), 2, 0, 1), None),
        ((weight(3), 1, 0, 1), None),
        ((weight(3), 2, 1, 1), None),
        ((weight(3), (1, 1), "same", 1), None),
        ((weight(3, kernel=3), 2, 0, 1), None),
        ((weight(1), 2, 0, 8), None),
    ],
)
def test_what_is_computed_in_another_way_is_told_from_its_description(
    described: tuple[Any, ...], strides: tuple[int, ...] | None
) -> None:
    assert strides_of_few(*described) == strides


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a function": lambda x, w: F.conv2d(x, w, None, 2),
    "keywords": lambda x, w: F.conv2d(input=x, weight=w, stride=(2, 1), padding=0),
    "valid": lambda x, w: F.conv2d(x, w, weight()[:, 0, 0, 0], (1, 3), "valid"),
    "an operator of a graph": lambda x, w: aten.conv2d.default(x, w, None, [2, 2]),
    "its form with words": lambda x, w: aten.conv2d.padding(x, w, None, [2, 2], "valid"),
    "one sample": lambda x, w: F.conv2d(x[0], w, None, 2),
    "transposed": lambda x, w: F.conv_transpose2d(x, w[:3], weight()[0, :, 0, 0], 2, 0, 1),
    "transposed, with borders": lambda x, w: aten.conv_transpose2d.input(
        x[:, :, :1], w[:3], None, [3, 2], [0, 0], [1, 0]
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_values_and_gradients_are_those_of_torch(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    """In both layouts, and for sizes that the stride does not divide; torch is asked for one without a stride."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 7, 6, dtype=torch.double).to(memory_format=memory_format).requires_grad_()
        w = weight().requires_grad_()
        expected = form(x, w)
        loss = torch.randn(expected.shape, dtype=torch.double)
        with watched() as calls, UnitStrides() as guard:
            value = form(x, w)
        torch.testing.assert_close(value, expected)
        grads = [torch.autograd.grad(y, (x, w), loss) for y in (value, expected)]
        torch.testing.assert_close(grads[0], grads[1])
        assert len(guard.found) == 1 and [stride for _, stride in calls] == [1]


def test_all_others_are_left_to_torch() -> None:
    with watched() as calls, UnitStrides() as guard:
        x = torch.randn(2, 16, 8, 8, dtype=torch.double)
        F.conv2d(x, weight(16), None, 2)
        F.conv2d(x[:, :3], weight(3, kernel=3), None, 2)
        F.conv2d(x[:, :8], weight(1), None, 2, 0, 1, 8)
        F.conv_transpose2d(x[:, :8], weight(16), None, 2, 0, 1)
    assert calls == [((16, 1, 1), 2), ((3, 3, 3), 2), ((1, 1, 1), 2), ((16, 1, 1), 2)] and not guard.found


class Stem(nn.Module):
    """A pointwise branch over the image's three channels with a stride, as networks of merged branches begin."""

    def __init__(self, strided: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = 1 if strided else 2
        self.wide = nn.Conv2d(3, 8, 3, 2, 1)
        self.pointwise = nn.Conv2d(3, 8, 1, 2 if strided else 1)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[..., :: self.step, :: self.step]
        return self.head((self.wide(x) + self.pointwise(pixels)).relu().mean((2, 3)))


class Classify(Objective):
    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(student(*batch.inputs), batch.targets, reduction="none")


def data() -> ArrayData:
    torch.manual_seed(2)
    return ArrayData(torch.randn(12, 3, 8, 8, dtype=torch.double), torch.arange(12) % 3, 4)


def test_a_training_computes_none_of_them(caplog: pytest.LogCaptureFixture) -> None:
    """In no step of two epochs, which is said once; the student is that of the same network without a stride."""
    caplog.set_level(logging.INFO, "pqk")
    students = {}
    for strided in (True, False):
        students[strided] = Stem(strided)
        with watched() as calls:
            fit(RunContext(1), students[strided], data(), Classify(), Training(epochs=2, learning_rate=0.1))
        assert sum(calls.count(((3, 1, 1), stride)) for stride in (1, (1, 1))) == 6 and ((3, 1, 1), (2, 2)) not in calls
        assert calls.count(((3, 3, 3), (2, 2))) == 6
    torch.testing.assert_close(students[True].state_dict(), students[False].state_dict())
    assert len([r for r in caplog.messages if "1 x 1 convolution of 3 channels with stride 2 x 2" in r]) == 1


def test_importance_by_gradients_computes_none_of_them() -> None:
    task = Task(None, data(), data())
    with watched() as calls:
        assert "pointwise.weight" in gradients(Stem(), task, 8)
    assert ((3, 1, 1), 1) in calls and ((3, 1, 1), (2, 2)) not in calls
