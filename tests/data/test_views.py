"""Two views of one batch: who sees what, in training, in the cache and in the report."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import TABLE
from torch import Tensor, nn

from pqk.compiler import compress
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch, LoaderData
from pqk.data.views import Take, TeachersView, TwoViews, Views
from pqk.errors import InputError
from pqk.knowledge import CallableTeacher, EMATeacher, KLDivergence, LogitMSE
from pqk.knowledge.objective import Distillation
from pqk.knowledge.sources import FromModule, FromSnapshot, TeacherContext
from pqk.passes import Distill
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, fit

COUNT = 96


class Net(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def blurred(x: Tensor) -> Tensor:
    """A quarter of the values, each in four places."""
    return nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def stored(first: int, count: int, batch_size: int = 16) -> ArrayData:
    """Teacher's and student's pictures of four classes, side by side."""
    g = torch.Generator().manual_seed(first)
    labels = torch.arange(count) % 4
    x = torch.randn(count, 1, 8, 8, generator=g) + 2 * labels.view(-1, 1, 1, 1)
    return ArrayData((x, blurred(x)), labels, batch_size)


SIDES = Views(teacher=Take(0), student=Take(1))


def task() -> Task:
    return Task(stored(0, COUNT), stored(1, 32), stored(2, 32), views=SIDES)


def seen_by(module: nn.Module) -> list[Tensor]:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    return seen


def test_each_side_sees_its_own() -> None:
    data, plain = task().train, stored(0, COUNT)
    assert data is not None and (data.samples, len(data), data.key_count) == (COUNT, 6, COUNT)
    for batch, whole in zip(data.batches(seed=3), plain.batches(seed=3), strict=True):
        assert torch.equal(batch.inputs[0], whole.inputs[1]) and batch.teacher_inputs is not None
        assert torch.equal(batch.teacher_inputs[0], whole.inputs[0])
        assert (
            torch.equal(batch.for_teacher().inputs[0], whole.inputs[0]) and batch.for_teacher().teacher_inputs is None
        )
        assert torch.equal(batch.keys, whole.keys) and torch.equal(batch.targets, whole.targets)
    assert Batch((torch.zeros(1),), None, None).for_teacher().inputs[0].shape == (1,)
    assert torch.equal(task().example[0], stored(1, 32).inputs[1][:2])


def test_a_loader_shows_two_views_too() -> None:
    x = torch.randn(4, 1, 8, 8)
    batch = next(TwoViews(LoaderData([(x, blurred(x), torch.arange(4))]), SIDES).batches())
    assert torch.equal(batch.inputs[0], blurred(x)) and torch.equal(batch.for_teacher().inputs[0], x)
    functions = Views(teacher=lambda inputs: inputs, student=lambda inputs: (blurred(inputs[0]),))
    batch = next(TwoViews(LoaderData([(x, torch.arange(4))]), functions).batches())
    assert torch.equal(batch.inputs[0], blurred(x)) and torch.equal(batch.for_teacher().inputs[0], x)


def test_the_fingerprint_is_of_what_is_shown() -> None:
    """Also where only a function's inside differs."""
    shown = [SIDES, Views(Take(1), Take(0)), Views(Take(0), Take(0)), Views(Take(0), lambda x: (x[1] * 2,))]
    prints = [d.fingerprint() for v in shown for d in [TwoViews(stored(0, 8), v)]]
    prints += [stored(0, 8).fingerprint(), TeachersView(TwoViews(stored(0, 8), SIDES)).fingerprint()]
    assert len(set(prints)) == len(prints) and TwoViews(stored(0, 8), SIDES).fingerprint() == prints[0]


def test_scores_and_calibration_are_on_the_right_view() -> None:
    both, model = task(), Net().eval()
    seen = seen_by(model)
    both.score(model, both.evaluation)
    both.score(model, both.teachers(both.evaluation))
    want = stored(1, 32)
    assert torch.equal(torch.cat(seen[:2]), want.inputs[1]) and torch.equal(torch.cat(seen[2:]), want.inputs[0])
    calibration = [torch.cat([x for (x,) in both.calibration(20, teacher=t)]) for t in (False, True)]
    assert torch.equal(calibration[0], stored(2, 32).inputs[1][:20])
    assert torch.equal(calibration[1], stored(2, 32).inputs[0][:20])
    one = Task(stored(0, 8), stored(1, 8), stored(2, 8), example=(torch.zeros(2, 1, 8, 8),) * 2)
    assert one.teachers(one.evaluation) is one.evaluation and not one.notes


def test_in_training_both_are_fed_theirs() -> None:
    both, teacher, student = task(), Net().eval(), Net()
    taught, trained = seen_by(teacher), seen_by(student)
    given = TeacherContext(teacher, student, (), "fp32", both.example)
    objective = Distillation((KLDivergence(),), both, student, FromModule().make(given))
    assert both.train is not None
    fit(RunContext(), student, both.train, objective, Training(epochs=1))
    for t, s in zip(taught[-6:], trained[-6:], strict=True):
        torch.testing.assert_close(blurred(t), s)


def _black_box(student: nn.Module, seen: list[Tensor]) -> Any:
    def answer(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean((2, 3)).expand(-1, 4)

    return CallableTeacher(answer)


@pytest.mark.parametrize("who", ["black box", "snapshot", "ema"])
def test_who_was_the_student_sees_what_the_student_sees(who: str) -> None:
    student, seen = Net(), []
    if who == "black box":
        teacher = _black_box(student, seen)
    elif who == "ema":
        teacher = EMATeacher(student)
        seen = seen_by(teacher.average)
    else:
        teacher = FromSnapshot().make(TeacherContext(Net(), student, (), "fp32", task().example))
        assert teacher.module is not None
        seen = seen_by(teacher.module)
    batch = next(task().evaluation.batches())
    teacher(batch)
    want = batch.for_teacher().inputs[0] if who == "black box" else batch.inputs[0]
    assert len(seen) == 1 and torch.equal(seen[0], want)


def test_a_temperature_is_chosen_where_the_teacher_is_at_home() -> None:
    both, teacher = task(), Net().eval()
    seen = seen_by(teacher)
    made = FromModule().make(TeacherContext(teacher, Net(), (), "fp32", both.example))
    Distillation((KLDivergence(teacher_top=0.5),), both, Net(), made)
    assert torch.equal(torch.cat(seen)[-32:], stored(2, 32).inputs[0])


def test_cached_training_equals_live_training(tmp_path: Path) -> None:
    def state(folder: Path | None) -> dict[str, Tensor]:
        teacher = Net().eval().requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_(True)
        start = Program(
            teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1, folder).enter("00-distill")
        )
        done = Distill(epochs=3, terms=(LogitMSE(),)).apply(start, task())
        assert done.details["teacher"] == ("cached" if folder else "live: nothing is saved in this run")
        return done.student.state_dict()

    cached, live = state(tmp_path), state(None)
    for k in cached:
        torch.testing.assert_close(cached[k], live[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shown", "message"),
    [
        (
            Views(Take(0), lambda x: (x[1][:, :, ::2],)),
            r"teacher's view is .*8, 8.*student's .*4, 8.*inputs of the same shapes",
        ),
        (Views(Take(0), lambda x: (x[1].double(),)), "float64"),
        (Views(Take(2), Take(0)), r"Take\(first=2, count=1\) of 2 inputs"),
    ],
)
def test_views_of_other_shapes_are_refused(shown: Views, message: str) -> None:
    """Teacher and student are compared and timed on inputs of the same shapes."""
    with pytest.raises(InputError, match=message):
        Task(stored(0, 8), stored(1, 8), stored(2, 8), views=shown).check(Net())


@pytest.mark.slow
def test_the_report_judges_each_on_its_own_view_and_says_so(tmp_path: Path) -> None:
    passes = "".join(f'[[pass]]\nname = "{name}"\n' for name in ("capture", "quantize", "convert"))
    recipe = Recipe.loads(f'[target]\nname = "arm-dotprod"\n{passes}')  # not this machine: nothing is timed
    shown = Views(teacher=Take(0), student=lambda x: (x[0] / 100,))
    both = Task(None, stored(1, 32), stored(2, 32), views=shown)
    teacher = Net().eval()
    with torch.no_grad():  # a mean of the picture, and its nearest class
        teacher.body[0].weight.fill_(0)
        teacher.body[0].bias.fill_(0)
        teacher.body[0].weight[0, 0, 1, 1] = 1
        teacher.head.weight.fill_(0)
        teacher.head.weight[:, 0] = 4 * torch.arange(4.0)
        teacher.head.bias.copy_(-4 * torch.arange(4.0).square())
    report = compress(teacher, both, recipe, out=tmp_path / "out", evaluation=TABLE).report
    assert report.metric.teacher > 0.9 and report.metric.student == 0.25  # the faintest is of the first class
    rows = {r.variant: r.metric for r in report.attribution if r.runtime == "onnxruntime"}
    assert rows["teacher_ptq"] is not None and rows["teacher_ptq"] > 0.9
    assert report.parity is not None and report.parity.passed
    assert any("different views" in note for note in report.notes)
    assert math.isclose(report.metric.teacher, both.score(teacher, both.teachers(both.evaluation)))
