"""What would refuse a student at the end refuses it before training, and answers are held against before times are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk import ArrayData, Evaluation, Recipe, Target, Task, compress
from pqk.bench.contenders import Contender
from pqk.copies import copy_of
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.evaluation.agreement import agreement
from pqk.evaluation.attempts import Failure, attempt
from pqk.passes.capture.capture import capture
from pqk.rehearsal import rehearse, why_not_exported
from pqk.verify.float_parity import why_not_as_torch

pytestmark = pytest.mark.slow
RECIPE = Recipe.loads(
    '[[pass]]\nname = "distill"\nepochs = 1\n[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n'
    '[[pass]]\nname = "convert"\n'
)


class Net(nn.Module):
    """Channels last in the head's input, so that a wrong axis or weight would show."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.branches = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), branches

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.head(self.conv(x).relu().mean((2, 3)))


class Untouchable(ArrayData):
    """Training data of which only the first batch may be read, as the check of the task does."""

    def batches(self, *arguments: Any, **options: Any) -> Any:
        yield next(iter(super().batches(*arguments, **options)))
        pytest.fail("the student was trained")


def task(train: type[ArrayData] = ArrayData) -> Task:
    x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(32) % 4
    part = ArrayData(x, y, 8)
    return Task(train(x, y, 8), part, validation=part)


def net(branches: bool = False, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(branches).eval().requires_grad_(False)


def test_what_cannot_be_captured_is_refused_before_any_training(tmp_path: Path) -> None:
    """Training comes first in this recipe; without the rehearsal it would run, and capture would refuse after it."""
    with pytest.raises(InputError, match="capture: torch.export cannot trace Net"):
        compress(net(branches=True), task(Untouchable), RECIPE, "x86-avx2", tmp_path / "out", evaluation=Evaluation())
    assert not list((tmp_path / "out").glob(".work/0*"))


def test_a_rehearsal_changes_nothing() -> None:
    teacher, state = net(), torch.get_rng_state()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    program = rehearse(teacher, task(), RECIPE.passes, Target.named("x86-avx2"))
    assert str(program.stage) == "INT8" and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in teacher.state_dict().items())


def test_a_file_of_another_network_is_not_the_teacher(tmp_path: Path) -> None:
    data = task()
    emit_onnx_for(net(), data, tmp_path / "teacher.onnx")
    assert why_not_as_torch(net(), tmp_path / "teacher.onnx", data) is None
    reason = why_not_as_torch(net(seed=1), tmp_path / "teacher.onnx", data)
    assert reason is not None and "the ONNX file of Net is off by" in reason


def test_a_file_of_the_teacher_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    def of(teacher: nn.Module) -> Program:
        student = capture(copy_of(teacher), task().example)
        return Program(teacher, student, Stage.GRAPH, Target.named("x86-avx2"), RunContext())

    path = tmp_path / "teacher.onnx"
    assert not [*why_not_exported(of(net()), task(), path)]
    before = path.stat()
    assert not [*why_not_exported(of(net()), task(), path)]
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "is off by" in next(why_not_exported(of(net(seed=1)), task(), path)), "but it is held against the teacher"


def test_a_contender_is_asked_before_it_is_timed() -> None:
    data, teacher = task(), net()
    batches = [(x,) for x in torch.randn(6, 2, 3, 6, 6, generator=torch.Generator().manual_seed(1))]

    def contender(answers: Any) -> Contender:
        return Contender("student", "test", 2, 1, lambda: None, answers=answers)

    assert agreement(contender(lambda inputs: [teacher(*inputs)]), teacher, data, batches) == (1.0, 12)
    wrong = agreement(contender(lambda inputs: [-teacher(*inputs)]), teacher, data, batches)
    assert wrong is not None and wrong[0] == 0.0
    assert agreement(contender(None), teacher, data, batches) is None


def test_a_statistic_that_fails_is_a_reason() -> None:
    def fails() -> float:
        raise ZeroDivisionError("no samples")

    assert attempt(lambda: 2) == 2
    assert attempt(fails) == Failure("ZeroDivisionError: no samples")
    with pytest.raises(OSError, match="full"):
        attempt(lambda: (_ for _ in ()).throw(OSError("the disk is full")))
