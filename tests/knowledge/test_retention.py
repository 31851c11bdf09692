"""What must not be forgotten: what is added to a training, what is measured, and that a kill changes nothing."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_decoder import sequence_task, sequences, small_decoder
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch, Data
from pqk.data.views import Views
from pqk.errors import InputError
from pqk.knowledge import (
    JSD,
    CrossEntropy,
    FromSnapshot,
    FrozenTeacher,
    Hint,
    KLDivergence,
    LogitMSE,
    MiniLLM,
    Retention,
)
from pqk.knowledge.objective import Distillation
from pqk.knowledge.retention import Memory, RetainedBatches, RetainingObjective
from pqk.passes import Distill
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, fit


def net(seed: int = 0, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 24), *([nn.BatchNorm1d(24)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(24, 4)).eval()


OLD = net(3)


def samples(where: float, seed: int, count: int = 24) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)) + where


def new_data() -> ArrayData:
    """What the teacher never saw, with labels that have nothing to do with what it knows."""
    return ArrayData(samples(1, 0), torch.arange(24) % 4, 6)


def old_data(count: int = 24, batch_size: int = 6) -> ArrayData:
    """What the teacher knows by heart."""
    inputs = samples(-1, 1, count)
    with torch.no_grad():
        return ArrayData(inputs, OLD(inputs).argmax(1), batch_size)


def task(retained: Any = None, **settings: Any) -> Task:
    settings = {"validation_share": 0.25, **settings}
    return Task(new_data(), new_data(), new_data(), retained=retained, **settings)


def program(teacher: nn.Module = OLD, folder: Path | None = None) -> Program:
    frozen = copy.deepcopy(teacher).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    run = RunContext(1, folder).enter("00-distill")
    return Program(frozen, student, Stage.MODULE, Target.named("x86-avx2"), run)


def distill(retain: Retention | None, **settings: Any) -> Distill:
    values = {"terms": (CrossEntropy(),), "epochs": 12, "learning_rate": 0.05, **settings}
    return Distill(retain=retain, **values)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


# ---- the loss


def test_the_loss_is_that_of_the_training_and_a_weight_times_the_divergence_on_the_other_batch() -> None:
    student, whole = net(5), task(old_data())
    memory = Memory(whole, FrozenTeacher(OLD))
    terms = (KLDivergence(weight=0.5, temperature=2.0),)
    own = Distillation((CrossEntropy(),), whole, student, memory.old)
    objective = memory.retaining(own, terms, student, 7)
    assert isinstance(objective, RetainingObjective) and whole.retained is not None
    batch = next(new_data().batches(0))
    losses = objective(objective.wrap(student), batch)
    (shown, *_) = RetainedBatches(whole.retained, student, 7)(), None
    s, t = student(*shown.inputs), OLD(*shown.inputs)
    divergence = nn.functional.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    plain = nn.functional.cross_entropy(student(*batch.inputs), batch.targets, reduction="none")
    torch.testing.assert_close(losses, plain + 0.5 * 4 * divergence)


def test_a_student_that_is_its_old_model_is_held_by_nothing() -> None:
    """Zero loss and zero gradient, whatever else it learns."""
    student, whole = net(5), task(old_data())
    memory = Memory(whole, FrozenTeacher(copy.deepcopy(student)))
    own = Distillation((CrossEntropy(),), whole, student, memory.old)
    gradients = []
    for objective in (own, memory.retaining(own, (KLDivergence(temperature=2.0), LogitMSE()), student, 7)):
        student.zero_grad()
        objective(objective.wrap(student), next(new_data().batches(0))).mean().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    for plain, held in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, held, atol=1e-7, rtol=0)


# ---- what is measured


def test_the_held_student_forgets_less_and_both_say_so() -> None:
    held: Data | None = task(old_data()).retained_evaluation
    assert held is not None and held.samples == 6
    found = {}
    for name, retain in {"free": None, "held": Retention(terms=(KLDivergence(weight=4.0, temperature=2.0),))}.items():
        found[name] = distill(retain).apply(program(), task(old_data())).details["retained"]
        assert found[name].keys() == {
            "samples", "old", "before", "after", "divergence_before", "divergence_after",
        }  # fmt: skip
        assert (found[name]["samples"], found[name]["old"], found[name]["before"]) == (6, 1.0, 1.0)
        assert found[name]["divergence_before"] == pytest.approx(0, abs=1e-7)
    assert found["held"]["divergence_after"] < 0.5 * found["free"]["divergence_after"]
    assert found["held"]["after"] >= found["free"]["after"]


def test_the_old_model_may_be_the_student_as_it_began() -> None:
    start = program()
    with torch.no_grad():
        start.student[0].weight.mul_(-1)  # type: ignore[index, operator, union-attr]
    before = copy.deepcopy(start.student).eval()
    retain = Retention(old=FromSnapshot(), terms=(LogitMSE(weight=50.0),))
    said = distill(retain, learning_rate=1e-3).apply(start, task(old_data())).details["retained"]
    held = task(old_data()).retained_evaluation
    assert held is not None and said["old"] == task(old_data()).score(before, held) == said["before"] < 1
    assert said["divergence_before"] == pytest.approx(0, abs=1e-7) and said["divergence_after"] < 1e-2


def test_without_labels_the_divergence_tells() -> None:
    unlabelled = ArrayData(samples(-1, 1), None, 6)
    said = distill(Retention()).apply(program(), task(unlabelled)).details["retained"]
    assert said.keys() == {"samples", "divergence_before", "divergence_after"} and said["divergence_after"] > 0
    only = task(None, retained_evaluation=old_data())
    assert only.retained is None and distill(None).apply(program(), only).details["retained"]["samples"] == 24
    assert "retained" not in distill(None).apply(program(), task()).details


def test_the_teacher_of_the_recipe_sees_its_own_view() -> None:
    """The student's is what is left when three inputs fail: to agree there, both are asked about their own."""
    hidden = torch.tensor([1.0, 1, 1, 0, 0, 0])
    views = Views(teacher=lambda x: x, student=lambda x: (x[0] * hidden,))
    viewed = task(old_data(), views=views)
    start = program()
    (held,) = [viewed.retained_evaluation]
    assert held is not None
    said = Memory(viewed, FrozenTeacher(OLD)).figures(start.student)
    inputs = torch.cat([b.inputs[0] for b in held.batches()])
    whole = torch.cat([b.for_teacher().inputs[0] for b in held.batches()])
    assert torch.equal(inputs, whole * hidden) and said["old"] == 1.0
    with torch.no_grad():
        s, t = start.student(inputs).log_softmax(1), OLD(whole).log_softmax(1)
    expected = nn.functional.kl_div(s, t, log_target=True, reduction="batchmean")
    assert said["divergence"] == pytest.approx(float(expected), rel=1e-5)


# ---- batches


class Noisy(Dataset[Any]):
    """Samples that are other ones each time they are read, as torch's generator draws."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return samples(-1, 1)[index] + torch.rand(6), torch.tensor(index % 4)


def noisy() -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, shuffle=True)


@pytest.mark.parametrize("make", [noisy, old_data])
def test_a_resumed_training_is_the_whole_one(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, a loader that draws, and a kill in the middle of an epoch of both data."""
    monkeypatch.setattr(os, "fsync", lambda f: None)

    def trained(folder: Path | None, kill: float = 2.0) -> dict[str, Tensor]:
        start, whole = program(net(3, dropout=0.3), folder), task(make(), retained_evaluation=old_data())
        memory = Memory(whole, FrozenTeacher(start.teacher))

        def progress(done: float) -> None:
            if done > kill:
                raise Killed

        own = Distillation((CrossEntropy(),), whole, start.student, memory.old, on_progress=progress)
        objective = memory.retaining(own, (JSD(),), start.student, 7)
        training = Training(epochs=5, learning_rate=0.05, checkpoint_seconds=1e-9)
        assert whole.train is not None
        fit(start.run, start.student, whole.train, objective, training)
        return {**start.student.state_dict(), **objective.state_dict()}

    whole = trained(None)
    with pytest.raises(Killed):
        trained(tmp_path, 0.45)
    resumed = trained(tmp_path)
    assert whole.keys() == resumed.keys() and all(torch.equal(v, resumed[k]) for k, v in whole.items())
    assert int(whole["batches.step"]) == 20


@pytest.mark.parametrize("make", [noisy, old_data])
def test_nothing_else_is_drawn_otherwise(make: Any) -> None:
    batches = RetainedBatches(task(make(), retained_evaluation=old_data()).retained, net(), 7)  # type: ignore[arg-type]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    seen = [batches() for _ in range(9)]
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(seen[0].inputs[0], seen[4].inputs[0]), "the next epoch has another order"


def test_batches_on_which_the_student_cannot_train_are_left_out() -> None:
    """The last of 13 samples in batches of 4, for a norm over the batch."""
    student = net(norm=True).train()
    batches = RetainedBatches(old_data(13, 4), student, 7)
    assert [len(batches().inputs[0]) for _ in range(6)] == [4] * 6 and int(batches.step) == 7
    free = RetainedBatches(old_data(13, 4), net().train(), 7)
    assert [len(free().inputs[0]) for _ in range(5)] == [4, 4, 4, 1, 4]
    with pytest.raises(InputError, match="retained data: 3 samples in 3 batches leave one sample to a step"):
        RetainedBatches(old_data(3, 1), student, 7)


# ---- texts, recipes, refusals


def test_texts_are_held_word_by_word() -> None:
    whole = sequence_task(retained=sequences(12, 5), retained_evaluation=sequences(6, 6))
    teacher = small_decoder(7).requires_grad_(False)
    start = Program(
        teacher, small_decoder(0), Stage.MODULE, Target.named("x86-avx2"), RunContext(1).enter("00-distill")
    )
    said = Distill(terms=(KLDivergence(),), epochs=1, learning_rate=1e-3, retain=Retention()).apply(start, whole)
    found = said.details["retained"]
    assert found["old"] < 0 and 0 < found["divergence_after"] < found["divergence_before"]


def test_a_recipe_says_what_holds() -> None:
    text = (
        '[[pass]]\nname = "distill"\n'
        'retain = { terms = [{ term = "jsd", weight = 2.0 }], old = { source = "snapshot" } }\n'
    )
    recipe = Recipe.loads(text)
    assert recipe.passes[0] == Distill(retain=Retention(terms=(JSD(weight=2.0),), old=FromSnapshot()))
    assert Recipe.loads(recipe.dumps()) == recipe
    with pytest.raises(InputError, match='unknown source "snapshop".*"snapshot"'):
        Recipe.loads(text.replace("snapshot", "snapshop"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retention(terms=(JSD(weight=0),)), "no term has a weight above 0"),
        (lambda: Retention(terms=(Hint(point="0"),)), "Hint compares features, and here outputs are compared"),
        (lambda: Retention(terms=(MiniLLM(),)), "answers that the student writes; take reverse_kl"),
        (lambda: Retention(old=FromSnapshot(restart=True)), "has forgotten everything"),
        (lambda: task([(samples(0, 0, 4), torch.arange(4))] * 4), "25% of the retained data, 16 samples, cannot be"),
        (lambda: task(3), "task retained: a int is no data"),
        (lambda: task(retained_evaluation=3), "task retained_evaluation: a int is no data"),
        (
            lambda: task(ArrayData(samples(0, 0), torch.arange(24), 6)).check(OLD),
            "retained data: labels run from 0 to 23 and the model has 4",
        ),
        (
            lambda: task(ArrayData(torch.zeros(24, 5), None, 6)).check(OLD),
            r"retained data: .* is \(6, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_task_without_such_data_is_refused_before_training() -> None:
    logits = OLD(samples(0, 0, 2))

    def reason(retain: Retention, data: Any) -> str | None:
        held = old_data() if data is not None else None
        return distill(retain).why_not_applied(task(data, retained_evaluation=held), logits)

    assert reason(Retention(), old_data()) is None
    assert "Task(retained=…)" in str(reason(Retention(), None))
    assert "needs labels" in str(reason(Retention(terms=(CrossEntropy(),)), ArrayData(samples(0, 0), None, 6)))
    own = DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator())
    assert "generator of its own" in str(reason(Retention(), own))


def test_batches_are_those_of_the_data() -> None:
    data = old_data()
    batches = RetainedBatches(data, net(), 7)
    rows = torch.cat([Batch(*batches()).inputs[0] for _ in range(len(data))])
    assert torch.equal(rows.sort(0).values, data.inputs[0].sort(0).values)
