"""Which axis classes are on: known answers for two, three and four axes, and a refusal where it cannot be told."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk import Evaluation, compress
from pqk.check import check
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.errors import InputError
from pqk.knowledge import (
    DIST,
    CrossEntropy,
    DecoupledKD,
    EnsembleTeacher,
    FrozenTeacher,
    KLDivergence,
    LabelSmoothing,
    LogitMSE,
    StandardizedKD,
    TaskNeurons,
    Term,
    View,
)
from pqk.knowledge.objective import Distillation
from pqk.knowledge.weighting import GATES
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.classes import axis_by_labels
from pqk.task.metrics import Metric, accuracy, argmax, cross_entropy
from pqk.task.task import Task

ERROR = Metric("error", "distance", lambda outputs, targets: -float((outputs - targets).square().mean()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task_of(outputs: tuple[int, ...], labels: tuple[int, ...] | None, classes: int = 2, **options: Any) -> Task:
    """Data whose inputs are themselves outputs of that shape, with integer labels of theirs (None: without labels)."""
    x = torch.randn(outputs, generator=generator())
    y = None if labels is None else torch.randint(0, classes, labels, generator=generator(1))
    data = ArrayData(x, y, 4)
    return Task(data, data, validation=data, **options)


@pytest.mark.parametrize(
    ("outputs", "labels", "axis"),
    [
        ((8, 5), (8,), 1),
        ((8, 1), (8,), 1),
        ((8, 3, 5), (8, 5), 1),
        ((8, 3, 5), (8, 3), 2),
        ((8, 3, 6, 5), (8, 6, 5), 1),
        ((8, 3, 6, 5), (8, 3, 6), 3),
        ((8, 3, 6, 5), (8, 3, 5), 2),
        ((8, 3, 7, 7), (8, 7, 7), 1),
        ((8, 3, 4, 6, 5), (8, 4, 6, 5), 1),
        ((8, 5, 1, 1), (8, 1, 1), 1),
    ],
)
def test_the_labels_show_the_axis(outputs: tuple[int, ...], labels: tuple[int, ...], axis: int) -> None:
    task = task_of(outputs, labels, 1)
    task.check(nn.Identity())
    z = torch.randn(outputs, generator=generator(3))
    assert task.class_axis_of(z) == axis
    assert torch.equal(task.decision(z), z.argmax(axis))
    assert torch.equal(task.classes_last(z), z.movedim(axis, -1))
    assert task.notes == () if len(outputs) == 2 else f"classes are on axis {axis} of outputs" in task.notes[0]
    y = z.argmax(axis)
    y[0] = (y[0] + 1) % z.shape[axis]
    assert task.metric.function(z, y) == float((z.argmax(axis) == y).double().mean())
    want = F.cross_entropy(z.movedim(axis, 1), y, reduction="none").flatten(1).mean(1) if z.dim() > 2 else None
    torch.testing.assert_close(task.loss(z, y), F.cross_entropy(z, y, reduction="none") if want is None else want)


@pytest.mark.parametrize(
    ("outputs", "labels", "what"),
    [
        ((8, 5, 5), (8, 5), r"labels \[B, 5\] leave open whether classes are on axis 1 or 2 of outputs \[B, 5, 5\]"),
        ((8, 4, 4, 4), (8, 4, 4), "axis 1 or 2 or 3"),
        ((8, 3, 6, 5), (8,), r"labels \[B\] are those of classes on no axis of outputs \[B, 3, 6, 5\]"),
        ((8, 3, 6, 5), (8, 12, 10), "on no axis"),
    ],
)
def test_what_cannot_be_told_is_refused_and_can_be_given(
    outputs: tuple[int, ...], labels: tuple[int, ...], what: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Identity())
    with pytest.raises(InputError, match=what + r".*Task\(class_axis=…\)"):
        task_of(outputs, labels).check(model)
    with pytest.raises(InputError, match=what):
        compress(model, task_of(outputs, labels), out=tmp_path)
    with pytest.raises(InputError, match=what):
        check(model, task_of(outputs, labels), Recipe.default(True))
    if len(labels) == len(outputs) - 1 and outputs[1] == outputs[2]:
        for axis in (1, 2, -1):
            task = task_of(outputs, labels, class_axis=axis)
            task.check(model)
            assert task.class_axis_of(task.example[0]) == axis % len(outputs) and task.notes == ()


def test_the_axis_can_be_told_by_data_of_another_length() -> None:
    """Five tokens and five classes leave it open; seven tokens do not."""
    five, seven = ((torch.randn(4, n, 5), torch.zeros(4, n, dtype=torch.long)) for n in (5, 7))
    task = Task([five], [five], validation=[seven], dynamic_axes={"input": {1: "tokens"}})
    task.check(nn.Identity())
    assert task.class_axis_of(five[0]) == 2


@pytest.mark.parametrize("loss", [nn.NLLLoss(reduction="none"), functools.partial(F.cross_entropy, reduction="none")])
def test_torchs_own_losses_say_axis_1(loss: Any) -> None:
    task = task_of((8, 5, 5), (8, 5), loss=loss)
    task.check(nn.Identity())
    assert task.class_axis_of(task.example[0]) == 1 and task.notes == ()


@pytest.mark.parametrize(
    ("axis", "what"), [(0, "not 0, which is the batch"), ("last", "number of an axis"), (4, "no axis of outputs")]
)
def test_an_axis_that_is_none_is_refused(axis: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        task_of((8, 3, 6, 5), (8, 6, 5), class_axis=axis).check(nn.Identity())


def test_labels_that_do_not_fit_the_given_axis_are_refused() -> None:
    with pytest.raises(InputError, match=r"classes on axis 1, labels must be \[B, 6, 5\], and are \[B, 3, 6\]"):
        task_of((8, 3, 6, 5), (8, 3, 6), class_axis=1).check(nn.Identity())


class Counted(ArrayData):
    """Counts how often it is read."""

    reads = 0

    def batches(self, *args: Any, **options: Any) -> Iterator[Batch]:
        self.reads += 1
        return super().batches(*args, **options)


def test_outputs_that_are_no_classes_are_left_alone_and_said() -> None:
    """Their own metric judges them; only what needs classes is refused, by the pass that has it."""
    x = torch.randn(8, 2, 6, 5, generator=generator())
    data = Counted(x, x + 1, 4)
    task = Task(data, data, validation=data, metric=ERROR, loss=lambda o, t: (o - t).square().flatten(1).mean(1))
    task.check(nn.Identity())
    assert torch.equal(task.decision(x), x.argmax(-1))
    assert "decisions are the argmax over the last axis: no labels show which axis" in task.notes[0]
    reads = data.reads
    assert isinstance(task.class_axis_or_reason(x), str) and data.reads == reads  # nor is it looked for again
    reason = Distill().why_not_applied(task, x)
    assert reason is not None and "KLDivergence compares classes, and no labels show" in reason
    fitted = Distill().fitted(task, x)
    assert isinstance(fitted, Distill) and fitted.why_not_applied(task, x) is None
    assert [type(t) for t in fitted.terms] == [CrossEntropy, LogitMSE] and fitted.terms[1].weight == 1.0


def test_of_several_outputs_those_with_classes_are_compared() -> None:
    task = task_of((8, 3, 6, 5), (8, 6, 5))
    outputs = {"out": torch.randn(2, 3, 6, 5), "aux": torch.randn(2, 3, 6, 5)}
    task.check(lambdas(lambda x: {"out": x, "aux": x}))
    assert Distill().why_not_applied(task, outputs) is None
    outputs["states"] = torch.randn(2, 7, 4)
    assert "classes on no axis of outputs [B, 7, 4]" in (Distill().why_not_applied(task, outputs) or "")
    fitted = Distill().fitted(task, outputs)
    assert fitted.why_not_applied(task, outputs) is None and fitted.terms[1].output == "out"  # type: ignore[attr-defined]


def lambdas(function: Callable[[Tensor], Any]) -> nn.Module:
    module = nn.Module()
    module.forward = function  # type: ignore[method-assign]
    return module.eval()


# ---- every place that looks along classes


def images_and_rows() -> tuple[Tensor, Tensor, Tensor, Task, Task]:
    """Logits [B, C, H, W] of a student and a teacher with labels, and two tasks: classes on axis 1, and on the last."""
    s, t = (torch.randn(6, 5, 2, 3, generator=generator(i)) for i in (0, 1))
    y = torch.randint(0, 5, (6, 2, 3), generator=generator(2))
    return s, t, y, task_of((8, 5, 2, 3), (8, 2, 3), 5), task_of((8, 2, 3, 5), (8, 2, 3), 5)


TERMS: list[Term] = [
    CrossEntropy(), KLDivergence(), LogitMSE(centred=True), LogitMSE(), DecoupledKD(), StandardizedKD(), DIST(),
    LabelSmoothing(),
]  # fmt: skip


@pytest.mark.parametrize("term", TERMS, ids=lambda t: type(t).__name__)
def test_a_term_along_axis_1_is_the_term_of_each_positions_logits(term: Term) -> None:
    """As it is for the same logits with classes at the end, with the same gradient."""
    s, t, y, first, last = images_and_rows()
    losses, grads = [], []
    for task, axis in ((first, 1), (last, -1)):
        z = s.movedim(1, axis).clone().requires_grad_(True)
        losses.append(term(View(z, t.movedim(1, axis), y, {}, {}, task), None))
        (grad,) = torch.autograd.grad(losses[-1].sum(), z)
        grads.append(grad.movedim(axis, 1))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)
    if isinstance(term, KLDivergence):
        p, q = (F.log_softmax(z / 4, 1) for z in (t, s))
        torch.testing.assert_close(losses[0], 16 * (p.exp() * (p - q)).sum(1).flatten(1).mean(1))


@pytest.mark.parametrize("term", [CrossEntropy(), DecoupledKD(), LabelSmoothing()], ids=lambda t: type(t).__name__)
def test_positions_without_a_label_do_not_count(term: Term) -> None:
    """The loss is that of the labelled rest; a sample without any is worth nothing, and nothing is learned of it."""
    s, t, y, task, _ = images_and_rows()
    s.requires_grad_(True)
    y[0, :, 1:] = -100
    y[1] = -100
    loss = term(View(s, t, y, {}, {}, task), None)
    narrow = term(View(s[:1, ..., :1], t[:1, ..., :1], y[:1, :, :1], {}, {}, task), None)
    torch.testing.assert_close(loss[:1], narrow)
    assert float(loss.detach()[1]) == 0
    (grad,) = torch.autograd.grad(loss.sum(), s)
    assert float(grad[1].abs().max()) == 0 == float(grad[0, ..., 1:].abs().max()) and bool(grad.isfinite().all())


def test_labels_of_padding_are_taken_and_others_refused() -> None:
    z, y = torch.randn(4, 3, 5), torch.tensor([[0, 1, -100]] * 4)
    task = Task([(z, y)], [(z, y)], validation=[(z, y)])
    task.check(nn.Identity())
    want = F.cross_entropy(z[:, :2].flatten(0, 1), y[:, :2].flatten(), reduction="none")
    torch.testing.assert_close(task.loss(z, y), want.view(4, 2).mean(1))
    right = z.argmax(2)
    right[:, 2] = -100
    assert task.metric.function(z, right) == 1
    with pytest.raises(InputError, match="labels run from -1 to 1"):
        Task([(z, y.clamp_min(-1))], [(z, y)], validation=[(z, y)]).check(nn.Identity())
    with pytest.raises(InputError, match="all 12 labels are -100"):
        task.metric.function(z, torch.full_like(y, -100))
    loss = nn.CrossEntropyLoss(reduction="none", ignore_index=255)
    own = Task([(z, y)], [(z, y)], validation=[(z, y)], loss=loss, class_axis=2)
    assert own.ignored == 255
    void = y.where(y >= 0, torch.full_like(y, 255))
    for term in (DecoupledKD(), LabelSmoothing()):
        padded = term(View(z, z.flip(0), void, {}, {}, own), None)
        torch.testing.assert_close(padded, term(View(z[:, :2], z.flip(0)[:, :2], void[:, :2], {}, {}, own), None))
    flat = torch.tensor([1, -100, 0, 2])
    assert float(cross_entropy(z[:, 0], flat)[1]) == 0 and accuracy(z[:, 0], flat) in (0, 1 / 3, 2 / 3, 1)


def test_texts_of_several_lengths_are_scored_on_their_tokens() -> None:
    """What a shorter batch is padded by is no label, and no answer that is right."""
    batches = []
    for length in (3, 5):
        z = torch.zeros(4, length, 6)
        z[..., 2] = 1
        batches.append((z, torch.full((4, length), 2 if length == 5 else 1)))
    task = Task(None, batches, validation=batches, dynamic_axes={"input": {1: "tokens"}})
    assert task.score(nn.Identity(), task.evaluation) == 20 / 32


def test_gates_and_ensembles_look_along_classes() -> None:
    s, t, y, first, last = images_and_rows()
    y[0, 0] = -100
    for gate in GATES[:3]:
        views = [View(s.movedim(1, a), t.movedim(1, a), y, {}, {}, task) for task, a in ((first, 1), (last, -1))]
        torch.testing.assert_close(gate(views[0]), gate(views[1]))
    members = [FrozenTeacher(lambdas(lambda x, k=k: x * k)) for k in (1.0, 2.0)]  # type: ignore[misc]
    for by in (None, "confidence", "surest"):
        answers = []
        for task, axis in ((first, 1), (last, -1)):
            ensemble = EnsembleTeacher(members, by=by, class_axis=task.class_axis_of)
            answers.append(ensemble(Batch((t.movedim(1, axis),), None, None))[0].movedim(axis, 1))
        torch.testing.assert_close(*answers)
        assert not torch.allclose(answers[0], 1.5 * t)


def test_distance_is_a_divergence_where_there_are_classes() -> None:
    s, t, _, first, last = images_and_rows()
    rows = [z.movedim(1, -1).flatten(0, -2) for z in (t, s)]
    want = float(F.kl_div(rows[1].log_softmax(1), rows[0].log_softmax(1), log_target=True, reduction="batchmean"))
    assert first.distance(s, t) == pytest.approx(want)
    assert last.distance(s.movedim(1, -1), t.movedim(1, -1)) == pytest.approx(want)
    data = ArrayData(s, t, 4)
    none = Task(data, data, validation=data, metric=ERROR)
    assert none.distance(s, t) == pytest.approx(float((s - t).square().mean()))


def test_functions_on_their_own_ask_for_the_axis() -> None:
    s, _, y, _, _ = images_and_rows()
    with pytest.raises(InputError, match=r"argmax of outputs \[B, 5, 2, 3\] needs the axis"):
        argmax(s)
    assert torch.equal(argmax(s, 1), s.argmax(1)) and torch.equal(argmax(s[..., 0, 0]), s[..., 0, 0].argmax(1))
    torch.testing.assert_close(cross_entropy(s, y), F.cross_entropy(s, y, reduction="none").flatten(1).mean(1))
    assert accuracy(s, y) == float((s.argmax(1) == y).double().mean())
    with pytest.raises(InputError, match="leave open"):
        cross_entropy(torch.randn(4, 3, 3), torch.zeros(4, 3, dtype=torch.long))
    assert axis_by_labels((2, 3, 4), (2, 3)) == 2


# ---- training


class Pixels(nn.Module):
    """[B, 3, H, W] -> logits [B, 4, H, W] of each pixel, with a residual block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 4, 1)
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


def pixels(samples: int = 16) -> Task:
    x = torch.randn(samples, 3, 6, 10, generator=generator())
    y = x.mean(1).mul(4).round().long() % 4
    data = ArrayData(x, y, 8)
    return Task(data, data, validation=data)


def program_of(teacher: nn.Module, student: nn.Module) -> Program:
    teacher.eval().requires_grad_(False)
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1))


def test_a_student_learns_what_each_pixel_is() -> None:
    """Distilled on [B, C, H, W] it agrees with its teacher; along image columns its loss fell and it did not."""
    task, teacher, student = pixels(), Pixels(), Pixels()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(2)
        student.head.weight.add_(torch.randn(student.head.weight.shape, generator=generator(5)))
    task.check(teacher.eval())
    x = task.example[0]
    before = float((student(x).argmax(1) == teacher(x).argmax(1)).double().mean())
    taught = Distill(terms=(KLDivergence(temperature=1.0),), epochs=40, learning_rate=0.02)
    taught.apply(program_of(teacher, student), task)
    after = float((student.eval()(x).argmax(1) == teacher(x).argmax(1)).double().mean())
    assert before < 0.6 and after > 0.9


def test_blocks_and_neurons_are_ranked_along_classes() -> None:
    task, teacher = pixels(), Pixels()
    task.check(teacher.eval())
    done = Prune(parameters_ratio=1.2, depth=True, width=False).apply(program_of(teacher, Pixels()), task)
    ranking = done.details["ranking"][0]["ranking"]
    inputs = torch.cat([x for (x,) in task.calibration(512)])
    for row in ranking:
        short = Pixels().eval()
        name = row["name"].rpartition(".")[2]
        short.blocks[int(name)] = nn.Identity()
        with torch.no_grad():
            assert row["distance"] == pytest.approx(task.distance(short(inputs), teacher(inputs)), rel=1e-4)
    Distillation([TaskNeurons(point="stem"), KLDivergence()], task, Pixels(), FrozenTeacher(teacher, ["stem"]))


@pytest.mark.full
def test_a_segmentation_compiles_by_the_default_recipe(tmp_path: Path) -> None:
    task, teacher = pixels(32), Pixels()
    recipe = Recipe(passes=(Distill(epochs=1), Capture(), Quantize(), Distill(epochs=1, keep="teacher"), Convert()))
    compress(teacher, task, recipe, out=tmp_path / "a", evaluation=Evaluation.quick())
    report = (tmp_path / "a" / "report.md").read_text()
    assert "classes are on axis 1 of outputs [B, 4, 6, 10], as labels [B, 6, 10] show" in report
