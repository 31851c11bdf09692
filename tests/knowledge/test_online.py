"""Teachers that learn beside the student, and those that earlier work left: peers, exits, shadow heads, assistants."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.pipeline import load, save
from pqk.core.program import Program, Snapshot, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.knowledge import CallableTeacher, CrossEntropy, EnsembleTeacher, FrozenTeacher, KLDivergence, LogitMSE, Teacher
from pqk.knowledge.objective import Distillation
from pqk.knowledge.sources import (
    AnySource,
    FromArtifact,
    FromAssistant,
    FromEnsemble,
    FromExits,
    FromModule,
    FromPeer,
    FromShadow,
    TeacherContext,
)
from pqk.knowledge.teachers.online import ExitsTeacher, PeerTeacher, ShadowTeacher, exit_for
from pqk.models.images import CropFlip
from pqk.passes import REWRITES, Capture, Distill, Prune, Quantize
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, fit


class Net(nn.Module):
    """[B, 3, 6, 6] -> logits [B, 5]: two convolutions with batch norm."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.low = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.high(self.low(x)).mean((2, 3)))


def data(count: int = 12) -> ArrayData:
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(count, 3, 6, 6, generator=g), torch.arange(count) % 5
    return ArrayData(inputs, labels, 4, augment=CropFlip(count, pad=1), views=2)


TASK = Task(data(), data(), validation=data())
BATCH = next(data().batches())
TERMS = (CrossEntropy(), KLDivergence())
SOURCES: dict[str, AnySource] = {
    "peer": FromPeer(),
    "fresh peer": FromPeer(restart=True, noise=0),
    "peers": FromEnsemble(members=(FromPeer(), FromPeer(seed=2), FromModule())),
    "exits": FromExits(points=("low", "high")),
    "exits of a peer": FromExits(points=("low",), teacher=FromPeer()),
    "shadow": FromShadow(point="high"),
}
every = pytest.mark.parametrize("name", SOURCES)


def made(name: str, student: nn.Module) -> Teacher:
    torch.manual_seed(5)
    return SOURCES[name].make(TeacherContext(Net(7).eval().requires_grad_(False), student, (), "fp32", TASK.example))


def program(folder: Path | None = None) -> Program:
    teacher = Net(7).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1, folder).enter("00-distill"))


def frozen(teacher: nn.Module) -> list[nn.Module]:
    """The models of the frozen teachers in it."""
    return [m._model[0] for m in teacher.modules() if isinstance(m, FrozenTeacher)]


@every
def test_it_learns_and_the_student_keeps_its_own(name: str) -> None:
    """What is frozen stays bit for bit, statistics included; the student has no tensor more than before."""
    student = Net()
    teacher = made(name, student)
    keys, before = set(student.state_dict()), copy.deepcopy(teacher.state_dict())
    still = [copy.deepcopy(m.state_dict()) for m in frozen(teacher)]
    objective = Distillation(TERMS, TASK, student, teacher)
    fit(RunContext(), student, data(), objective, Training(epochs=2, learning_rate=0.05))
    after = teacher.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])]
    for model, state in zip(frozen(teacher), still, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert set(student.state_dict()) == keys
    answer, _ = teacher(BATCH)
    assert not answer.requires_grad and not any(m.training for m in teacher.modules() if isinstance(m, Teacher))
    assert teacher.why_not_cached() is None if name == "exits" else "every step" in str(teacher.why_not_cached())


@pytest.mark.parametrize("name", ["peer", "peers", "shadow"])
def test_both_hear_each_other_detached(name: str) -> None:
    """A term gives the teacher no gradient, a lesson none to the student."""
    student = Net()
    teacher = made(name, student)
    objective = Distillation([KLDivergence()], TASK, student, teacher)
    lesson, teacher.auxiliary_loss = teacher.auxiliary_loss, lambda view: None  # type: ignore[method-assign, assignment]
    objective(objective.wrap(student), BATCH).sum().backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.head.weight.grad is not None
    student.zero_grad()

    def alone(view: Any) -> Tensor:
        own = lesson(view)
        assert own is not None and own.shape == (4,)
        own.sum().backward()
        return torch.zeros(4)

    teacher.auxiliary_loss = alone  # type: ignore[method-assign, assignment]
    objective(objective.wrap(student), BATCH)
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in teacher.parameters() if p.requires_grad)


def test_an_exit_trains_the_layers_below_it_and_no_others() -> None:
    student = Net()
    teacher = FromExits(points=("low",)).make(TeacherContext(Net(7), student, (), "fp32", TASK.example))
    objective = Distillation([CrossEntropy()], TASK, student, teacher)
    with torch.no_grad():
        plain = Distillation([CrossEntropy()], TASK, student, FrozenTeacher(Net(7)))
        assert torch.equal(objective(objective.wrap(student), BATCH), plain(plain.wrap(student), BATCH))
    (objective(objective.wrap(student), BATCH) - plain(plain.wrap(student), BATCH)).sum().backward()
    grads = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in student.named_parameters()}
    assert grads["low.0.weight"] > 1e-3 and all(grads[n] < 1e-5 for n in grads if not n.startswith("low"))


def test_lessons_have_known_answers() -> None:
    """A peer: task + T² KL(student ‖ peer). An exit: the same of the student's output. A shadow: of both."""
    student, inner = Net(), FrozenTeacher(Net(7), ["high"])
    z = student.eval()(*BATCH.inputs).detach()
    y, log = BATCH.targets, lambda t: F.log_softmax(t, -1)

    def kl(teacher: Tensor, said: Tensor, t: float) -> Tensor:
        return t * t * (log(teacher / t).exp() * (log(teacher / t) - log(said / t))).sum(-1)

    def lesson(teacher: Teacher) -> Tensor:
        objective = Distillation([LogitMSE()], TASK, student, teacher)
        found: list[Tensor] = []
        original = teacher.auxiliary_loss

        def heard(view: Any) -> None:
            own = original(view)
            assert own is not None
            found.append(own)

        teacher.auxiliary_loss = heard  # type: ignore[method-assign, assignment]
        objective(objective.wrap(student), BATCH)
        return found[0].detach()

    peer = Net(3)
    said = copy.deepcopy(peer).train()(*BATCH.inputs).detach()
    want = F.cross_entropy(said, y, reduction="none") + 0.5 * kl(z, said, 2)
    torch.testing.assert_close(lesson(PeerTeacher(peer, kd_weight=0.5, temperature=2.0)), want)
    head = exit_for(student.low(BATCH.inputs[0]), z, "a test")
    said = head(student.low(*BATCH.inputs)).detach()
    want = 0.3 * F.cross_entropy(said, y, reduction="none") + 0.7 * kl(z, said, 3)
    torch.testing.assert_close(lesson(ExitsTeacher(FrozenTeacher(Net(7)), {"low": head})), want)
    answer, features = inner(BATCH)
    said = head(features["high"]).detach()
    want = kl(answer, said, 4) + kl(z, said, 4)
    shadow = ShadowTeacher(inner, "high", head)
    torch.testing.assert_close(lesson(shadow), want)
    assert torch.equal(shadow(BATCH)[0], said)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@every
def test_a_resumed_training_is_the_whole_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and everything beside it, bit for bit."""
    monkeypatch.setattr(os, "fsync", lambda f: None)

    def train(folder: Path | None, kill: float = 2.0) -> dict[str, Tensor]:
        student = Net()

        def on_progress(progress: float) -> None:
            if progress >= kill:
                raise Killed

        objective = Distillation(TERMS, TASK, student, made(name, student), on_progress=on_progress)
        training = Training(epochs=2, learning_rate=0.05, checkpoint_seconds=1e-9)
        fit(RunContext(3, folder).enter("00-distill"), student, data(), objective, training)
        return {**student.state_dict(), **{f"objective.{k}": v for k, v in objective.state_dict().items()}}

    whole = train(None)
    assert any(k.startswith("objective.teacher.") for k in whole)
    with pytest.raises(Killed):
        train(tmp_path, kill=0.6)
    rest = train(tmp_path)
    assert rest.keys() == whole.keys() and not [k for k in whole if not torch.equal(whole[k], rest[k])]


@pytest.mark.parametrize("name", ["peer", *(pytest.param(n, marks=pytest.mark.full) for n in ("exits", "shadow"))])
def test_nothing_of_it_is_exported(name: str, tmp_path: Path) -> None:
    """Through a quantization-aware training: the file has the tensors that it would have had."""
    done = program(tmp_path)
    for number, step in enumerate((Capture(), Quantize(samples=8))):
        done = replace(step.apply(done, TASK), stage=Stage(number + 1))
    files = []
    for trained in (False, True):
        if trained:
            before = copy.deepcopy(done.student.state_dict())
            done = Distill(epochs=1, learning_rate=0.01, teacher=SOURCES[name]).apply(done, TASK)
            after = done.student.state_dict()
            assert before.keys() == after.keys() and [k for k in before if not torch.equal(before[k], after[k])]
        plain = copy.deepcopy(done.student)
        for module in plain.modules():
            module.__dict__.update({"mode": "off"} if "mode" in module.__dict__ else {})
        path = tmp_path / f"{trained}.onnx"
        emit_onnx(plain.eval(), TASK.example, path, TASK.input_names)
        graph = onnx.load(str(path)).graph
        files.append(sorted(tuple(t.dims) for t in graph.initializer))
    assert files[0] == files[1]


@every
def test_a_recipe_can_ask_for_it(name: str, tmp_path: Path) -> None:
    distill = Distill(epochs=1, learning_rate=0.01, teacher=SOURCES[name])
    recipe = Recipe(passes=(distill,))
    assert Recipe.loads(recipe.dumps()) == recipe
    done = distill.apply(program(tmp_path), TASK)
    assert done.details["teacher"] == ("cached" if name == "exits" else done.details["teacher"])
    assert ("every step" in done.details["teacher"]) == (name != "exits")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{ source = "peer", noise = 0.0 }', "student's twin"),
        ('{ source = "exits", points = [] }', "points"),
        ('{ source = "exits", points = ["low"], teacher = { source = "shadow", point = "x" } }', "source"),
        ('{ source = "shadow" }', "point"),
        ('{ source = "assistant", after = -1 }', "after"),
        ('{ source = "artifact" }', "path"),
    ],
)
def test_what_no_recipe_may_ask_for(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.loads(f'[[pass]]\nname = "distill"\nteacher = {line}\n')


def test_points_and_outputs_that_are_not_there() -> None:
    given = TeacherContext(Net(7), Net(), (), "fp32", TASK.example)
    for source in (FromExits(points=("middle",)), FromShadow(point="middle")):
        with pytest.raises(InputError, match='no module "middle"'):
            source.make(given)
    with pytest.raises(InputError, match=r"first output is \(2, 4, 5\); it must be \[B, classes\]"):
        exit_for(torch.zeros(2, 8, 3, 3), torch.zeros(2, 4, 5), "an exit")


# ---- what earlier work left


def test_an_assistant_is_the_student_of_an_earlier_pass(tmp_path: Path) -> None:
    """Pruned once, saved, pruned again: the first student teaches, with its own channels and its own weights."""
    first = program(tmp_path)
    first = Prune(macs_ratio=1.4, multiple=1).apply(replace(first, run=first.run.enter("00-prune")), TASK)
    with torch.no_grad():
        first.student.head.bias.add_(1)  # type: ignore[union-attr, operator]
    save(first, tmp_path / "00-prune")
    student = copy.deepcopy(first)
    second = Prune(macs_ratio=2.5, multiple=1).apply(replace(student, run=first.run.enter("01-prune")), TASK)
    prune = Prune(macs_ratio=1.4, multiple=1)
    kept = Snapshot(0, prune, Stage.MODULE, partial(load, first, TASK, tmp_path / "00-prune", REWRITES))
    second = replace(second, run=first.run.enter("02-distill"), snapshots=(kept,))
    seen: list[nn.Module] = []
    distill = Distill(epochs=1, learning_rate=1e-9, teacher=FromAssistant(after=0), terms=(LogitMSE(),), warmup=0)
    original = FromAssistant.make

    def make(self: FromAssistant, given: TeacherContext) -> Teacher:
        teacher = original(self, given)
        assert teacher.module is not None
        seen.append(teacher.module)
        return teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FromAssistant, "make", make)
        done = distill.apply(second, TASK)
    (assistant,) = seen
    assert done.details["losses"][0] > 0 and done.details["teacher"] == "cached"
    assert torch.equal(assistant(*TASK.example), first.student.eval()(*TASK.example))
    assert not any(p.requires_grad for p in assistant.parameters())
    with pytest.raises(InputError, match="after pass 5 of this run, and none is saved"):
        Distill(teacher=FromAssistant(after=5)).apply(second, TASK)
    graph = replace(kept, index=1, finished=Capture(), stage=Stage.GRAPH)
    with pytest.raises(InputError, match='"01-capture", is in stage GRAPH'):
        Distill(teacher=FromAssistant(after=1)).apply(replace(second, snapshots=(kept, graph)), TASK)
    with pytest.raises(InputError, match="there is no run here"):
        FromAssistant(after=0).make(TeacherContext(Net(7), Net(), (), "fp32", TASK.example))


@pytest.mark.slow
def test_an_artifact_teaches_on_new_data_and_is_checked(tmp_path: Path) -> None:
    old = Net(9).eval()
    emit_onnx(old, TASK.example, tmp_path / "model.onnx", TASK.input_names)
    with pytest.raises(InputError, match="no finished artifact"):
        FromArtifact(path=str(tmp_path)).make(TeacherContext(Net(7), Net(), (), "fp32", TASK.example))
    sealed = hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"model.onnx": {"sha256": sealed}}}))
    teacher = FromArtifact(path=str(tmp_path)).make(TeacherContext(Net(7), Net(), (), "fp32", TASK.example))
    torch.testing.assert_close(teacher(BATCH)[0], old(*BATCH.inputs).detach(), rtol=0, atol=1e-5)
    done = Distill(epochs=1, teacher=FromArtifact(path=str(tmp_path))).apply(program(tmp_path / "work"), TASK)
    assert done.details["teacher"] == "cached"
    with (tmp_path / "model.onnx").open("ab") as f:
        f.write(b"\0")
    with pytest.raises(InputError, match="changed after its compile"):
        FromArtifact(path=str(tmp_path)).make(TeacherContext(Net(7), Net(), (), "fp32", TASK.example))


def test_the_best_on_a_label_answers_alone() -> None:
    z = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 4.0]]])
    members = [CallableTeacher(lambda x, m=m: m) for m in z]
    batch = Batch((torch.zeros(2, 1),), torch.tensor([0, 1]), None)
    answer, _ = EnsembleTeacher(members, by="best_on_label")(batch)
    torch.testing.assert_close(answer, torch.stack([z[0, 0], z[1, 1]]))
    with pytest.raises(InputError, match='"best_on_label" need one class label'):
        EnsembleTeacher(members, by="best_on_label")(Batch(batch.inputs, None, None))
