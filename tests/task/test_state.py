"""What a forward pass writes: counters are held still, state is refused by name, what is filled once is neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk import Evaluation, compress
from pqk.check import check
from pqk.copies import copy_of
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.knowledge.teachers.base import weights_fingerprint
from pqk.passes import Capture, Convert, Distill, Quantize
from pqk.passes.capture.capture import capture
from pqk.recipe.recipe import Recipe
from pqk.task.state import frozen_copy, held_counters
from pqk.task.task import Task

Writes = Callable[[Any, Tensor], Tensor]


class Writer(nn.Module):
    """A classifier [B, 6] -> [B, 4] whose forward pass also does `writes(self, hidden) -> hidden`."""

    seen: Tensor
    mean: Tensor
    table: Tensor

    def __init__(self, writes: Writes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.writes = nn.Linear(6, 8), nn.Linear(8, 4), writes
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.calls, self.last, self.cache = 0, torch.zeros(1), None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.writes(self, torch.tanh(self.body(x))))


@torch.no_grad()
def counted(m: Writer, h: Tensor) -> None:
    m.seen += 1


def counter(m: Writer, h: Tensor) -> Tensor:
    counted(m, h)
    return h


def replaced(m: Writer, h: Tensor) -> Tensor:
    m.seen = m.seen + 1
    return h


def unread_mean(m: Writer, h: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    return h


def kept(m: Writer, h: Tensor) -> Tensor:
    m.last, m.calls = h, m.calls + 1
    return h


def filled(m: Writer, h: Tensor) -> Tensor:
    if len(m.table) == 0:
        m.table = torch.linspace(0, 1, 8)
    return h + m.table


def filled_attribute(m: Writer, h: Tensor) -> Tensor:
    if m.cache is None:
        m.cache = torch.linspace(0, 1, 8)
    return h + m.cache


def running_mean(m: Writer, h: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * h.detach().mean(0)
    return h - m.mean


def previous(m: Writer, h: Tensor) -> Tensor:
    """The same inputs again leave it as it is: only others show that it moves."""
    before = m.last.detach()
    m.last = h.detach().mean()
    return h + before


def warms_up(m: Writer, h: Tensor) -> Tensor:
    counted(m, h)
    return h * 2 if int(m.seen) > 5000 else h


def pointer(m: Writer, h: Tensor) -> Tensor:
    m.calls = (m.calls + 1) % 8
    return h + torch.eye(8)[m.calls] * 1e-2


def hidden(m: Writer, h: Tensor) -> Tensor:
    kept = m.__dict__.setdefault("history", [])
    kept.append(h.detach())
    return h + 0.1 * torch.stack([t.mean() for t in kept]).sum()


def task(count: int = 32) -> Task:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    part = ArrayData(x, torch.arange(count) % 4, 8)
    return Task(part, part, validation=part)


X = task().example


def values(m: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in (*m.named_buffers(), *m.named_parameters())}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and not [n for n in a if not torch.equal(a[n], b[n])]


@pytest.mark.parametrize("writes", [counter, replaced, unread_mean])
def test_a_counter_is_held_still_by_every_call(writes: Writes) -> None:
    """Of the copy and of its copies, in eval mode; the user's own module, and any in training, writes on."""
    user = Writer(writes).eval()
    user(*X)
    want, before = user(*X), values(user)
    teacher = frozen_copy(user, X)
    student = copy_of(teacher)
    for model in (teacher, student):
        for inputs in (X[0], X[0] + 1):
            model(inputs)
        assert torch.equal(model(*X), want)
        assert_same(values(model), before)
    assert weights_fingerprint(teacher) == weights_fingerprint(user)
    student.train()(*X)
    assert [n for n, t in values(student).items() if not torch.equal(t, before[n])]
    captured = capture(copy_of(teacher), X)
    torch.testing.assert_close(captured(*X), want)
    assert not [n for n, _ in captured.named_buffers()]  # no output needs it


@pytest.mark.parametrize("writes", [kept, filled, filled_attribute, lambda m, h: h])
def test_what_no_answer_depends_on_and_what_is_filled_once_is_fine(writes: Writes) -> None:
    teacher = frozen_copy(Writer(writes).eval(), X)
    assert torch.equal(teacher(*X), Writer(writes).eval()(*X))
    assert not teacher._forward_hooks and not teacher._forward_pre_hooks  # and costs nothing


@pytest.mark.parametrize(
    ("writes", "name"),
    [(running_mean, "mean"), (previous, "last"), (warms_up, "seen"), (pointer, "calls")],
)
def test_state_that_an_answer_depends_on_is_refused_by_name(writes: Writes, name: str, tmp_path: Path) -> None:
    """By the check of a task, the rehearsal and the compile, and nothing is left behind."""
    user = Writer(writes).eval()
    before = values(user)
    message = rf"teacher: its outputs depend on {name}, which its forward pass writes.*keeps no state"
    recipe = Recipe(passes=(Capture(), Quantize(), Distill(), Convert()))
    for refused in (
        lambda: task().check(user),
        lambda: check(user, task(), recipe),
        lambda: compress(user, task(), recipe, out=tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=message):
            refused()
    assert_same(values(user), before)


def test_state_that_nobody_sees_is_refused_by_what_it_does() -> None:
    with pytest.raises(InputError, match="another answer when it is asked the same again"):
        task().check(Writer(hidden).eval())


def test_checking_a_task_leaves_the_teacher_as_it_was() -> None:
    for writes in (counter, unread_mean):
        user = Writer(writes).eval()
        before = values(user)
        task().check(user)
        assert_same(values(user), before)
        assert not user._forward_hooks and not user._forward_pre_hooks


def test_counters_are_held_for_a_while() -> None:
    user = Writer(counter).eval()
    with held_counters(user, X):
        user(*X)
        assert int(user.seen) == 0
    user(*X)
    assert int(user.seen) == 1


def test_random_numbers_of_torch_are_no_state() -> None:
    """The seed of a call is the caller's; a draw in eval mode is not what this is about."""
    task().check(Writer(lambda m, h: h + torch.rand(())).eval())


@pytest.mark.full
def test_a_counter_compiles_to_the_teachers_first_answer(tmp_path: Path) -> None:
    user = Writer(counter).eval()
    artifact = compress(
        user, task(), Recipe(passes=(Capture(), Quantize(), Convert())), out=tmp_path, evaluation=Evaluation.quick()
    )
    want = user(*X).detach()
    found = torch.from_numpy(artifact.run(X[0].numpy()))
    assert float((found - want).abs().max()) < 0.1 * float(want.abs().max()) and int(user.seen) == 1
