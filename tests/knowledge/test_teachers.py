"""Teachers: none gets a gradient, kept answers are the live ones, and what cannot be asked is refused by name."""

from __future__ import annotations

import copy
import functools
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.knowledge import (
    CallableTeacher,
    CrossEntropy,
    EMATeacher,
    EnsembleTeacher,
    FrozenTeacher,
    Hint,
    KLDivergence,
    LogitMSE,
    OnnxTeacher,
    SortedULD,
    Teacher,
    Term,
    UncertaintyTeacher,
    View,
)
from pqk.knowledge.objective import Distillation
from pqk.knowledge.sources import FromEMA, FromEnsemble, FromModule, FromOnnx, FromSnapshot, restart
from pqk.knowledge.teachers.base import LogitCache, cache_for
from pqk.knowledge.teachers.black_box import logits_of_labels, logits_of_top_k
from pqk.models.images import CropFlip
from pqk.passes import Capture, Distill, Quantize
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, fit


class Net(nn.Module):
    """[B, 3, 6, 6] -> logits [B, 5], with batch norm."""

    def __init__(self, seed: int = 0, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def data(count: int = 12, views: int | None = 2) -> ArrayData:
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(count, 3, 6, 6, generator=g), torch.arange(count) % 5
    return ArrayData(inputs, labels, 4, augment=CropFlip(count, pad=1), views=views)


TASK = Task(data(), data(), validation=data())
BATCH = next(data().batches())
TERMS = (CrossEntropy(), KLDivergence())


def net(seed: int = 0) -> nn.Module:
    return Net(seed).eval()


@functools.cache
def exported(seed: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.onnx"
        emit_onnx(net(seed), TASK.example, path, TASK.input_names)
        return path.read_bytes()


def onnx_of(seed: int, folder: Path) -> OnnxTeacher:
    (folder / "teacher.onnx").write_bytes(exported(seed))
    return OnnxTeacher(folder / "teacher.onnx", TASK.example)


def function(seed: int) -> Callable[..., Tensor]:
    model = net(seed)
    return lambda x: model(x)


def pair() -> list[Teacher]:
    return [FrozenTeacher(net(1)), FrozenTeacher(net(2))]


def logits(*teachers: Teacher) -> list[Tensor]:
    return [t(BATCH)[0] for t in teachers]


MAKERS: dict[str, Callable[[nn.Module, Path], Teacher]] = {
    "module": lambda student, folder: FrozenTeacher(net(1)),
    "callable": lambda student, folder: CallableTeacher(function(1), identity="net 1"),
    "onnx": lambda student, folder: onnx_of(1, folder),
    "ensemble": lambda student, folder: EnsembleTeacher(pair(), [1, 3]),
    "by label": lambda student, folder: EnsembleTeacher([*pair(), onnx_of(1, folder)], by="label_confidence"),
    "uncertainty": lambda student, folder: UncertaintyTeacher(pair()),
    "ema": lambda student, folder: EMATeacher(student, momentum=0.5),
}
every = pytest.mark.parametrize("name", MAKERS)


@pytest.mark.slow
@every
def test_no_teacher_gets_a_gradient_or_trains(name: str, tmp_path: Path) -> None:
    """Also where the student is its own teacher; and only the average changes during a training."""
    student = Net()
    teacher = MAKERS[name](student, tmp_path)
    terms = (*TERMS,) if name != "by label" else (CrossEntropy(), KLDivergence(), LogitMSE())
    objective = Distillation(terms, TASK, student, teacher)
    before, model = logits(teacher)[0], teacher.module
    assert not any(m.training for m in teacher.train().modules())
    log = fit(RunContext(), student, data(), objective, Training(epochs=2))
    assert all(math.isfinite(v) for v in log.losses) and log.steps == 6
    (after,) = logits(teacher)
    assert not after.requires_grad and after.dtype == torch.float32 and not any(m.training for m in teacher.modules())
    assert not [p for p in objective.parameters() if p.requires_grad]
    assert torch.equal(before, after) == (name != "ema")
    if model is not None:
        assert not model.training and all(p.grad is None for p in model.parameters())
    loss = objective(objective.wrap(student), BATCH).mean()
    loss.backward()
    assert any(p.grad is not None for p in student.parameters())


@every
def test_kept_answers_are_the_live_ones(name: str, tmp_path: Path) -> None:
    """Where they can be kept; where not, the reason is told."""
    teacher = MAKERS[name](net(), tmp_path)
    cache = cache_for(tmp_path, teacher, data(), "fp32")
    if name in ("ema", "uncertainty"):
        assert isinstance(cache, str) and cache == teacher.why_not_cached()
        return
    assert isinstance(cache, LogitCache), cache
    wanted = [[teacher(batch)[0] for batch in data().batches(1, epoch)] for epoch in range(4)]
    teacher.cache = cache
    calls: list[Batch] = []
    live = teacher.live
    teacher.live = lambda batch: (calls.append(batch), live(batch))[1]  # type: ignore[method-assign]
    for epoch, want in enumerate(wanted):
        got = [teacher(batch)[0] for batch in data().batches(1, epoch)]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(calls) == 6  # two views of three batches; the other two epochs are read


@pytest.mark.slow
def test_a_cache_is_of_these_members_these_weights_and_this_file(tmp_path: Path) -> None:
    def path(teacher: nn.Module) -> Path:
        cache = cache_for(tmp_path, teacher, data(), "fp32")
        assert isinstance(cache, LogitCache)
        return cache.path

    assert path(FrozenTeacher(net(1))) == path(net(1))
    one, two = pair()
    made: list[Teacher] = [
        one, EnsembleTeacher([one, two]), EnsembleTeacher([two, one]), EnsembleTeacher([one, two], [1, 2]),
        EnsembleTeacher([one, two], of="logits"), EnsembleTeacher([one, two], by="surest"),
        EnsembleTeacher([FrozenTeacher(net(1), precision="bf16"), two]),
        CallableTeacher(function(1), "a"), CallableTeacher(function(1), "b"),
    ]  # fmt: skip
    paths = [path(t) for t in made]
    for seed in (1, 2):
        paths.append(path(onnx_of(seed, tmp_path)))
    assert len(set(paths)) == len(paths)
    assert path(onnx_of(1, tmp_path)) == paths[-2] and path(EnsembleTeacher(pair())) == paths[1]
    unnamed = CallableTeacher(function(1))
    moving = [
        unnamed, EnsembleTeacher([one, unnamed]), EnsembleTeacher([one, EMATeacher(net())]),
        EnsembleTeacher([one], by=lambda z, batch: z[..., 0]),
    ]  # fmt: skip
    reasons = [t.why_not_cached() for t in moving]
    assert ["identity" in str(r) for r in reasons] == [True, True, False, False]
    assert "moving average" in str(reasons[2]) and "function" in str(reasons[3])


def test_the_files_beside_an_onnx_file_count(tmp_path: Path) -> None:
    teacher = onnx_of(1, tmp_path)
    model = onnx.load(str(teacher.path))
    onnx.save(model, str(teacher.path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = teacher.identity()
    with (tmp_path / "weights.bin").open("ab") as f:
        f.write(b"\0")
    assert teacher.identity() != before


@pytest.mark.parametrize("location", ["../weights.bin", "/dev/zero", "sub/../../weights.bin"])
def test_files_elsewhere_are_not_read(tmp_path: Path, location: str) -> None:
    """They are named by a file that may be anybody's."""
    teacher = onnx_of(1, tmp_path)
    model = onnx.load(str(teacher.path))
    onnx.save(model, str(teacher.path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(str(teacher.path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    teacher.path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="keeps tensors in .*, which is not beside it"):
        teacher.identity()


# ---- ensembles


@pytest.mark.parametrize("of", ["probabilities", "logits"])
@pytest.mark.parametrize("by", [None, "confidence", "surest", "label_confidence"])
def test_an_ensemble_of_one_is_that_one(of: Any, by: str | None) -> None:
    one = FrozenTeacher(net(1))
    assert torch.equal(*logits(one, EnsembleTeacher([one], by=by, of=of)))
    assert torch.equal(*logits(one, UncertaintyTeacher([one], by=by, of=of)))
    three = EnsembleTeacher([FrozenTeacher(net(1)) for _ in range(3)], [1, 2, 3], by=by, of=of)
    torch.testing.assert_close(*logits(one, three))


def test_means_are_of_probabilities_or_of_logits() -> None:
    a, b = logits(*pair())
    mean = logits(EnsembleTeacher(pair(), [1, 3]))[0]
    torch.testing.assert_close(mean.softmax(-1), 0.25 * a.softmax(-1) + 0.75 * b.softmax(-1))
    torch.testing.assert_close(logits(EnsembleTeacher(pair(), [1, 3], of="logits"))[0], 0.25 * a + 0.75 * b)
    assert torch.equal(logits(EnsembleTeacher(pair(), [0, 2]))[0].softmax(-1).isfinite().all(), torch.tensor(True))
    torch.testing.assert_close(logits(EnsembleTeacher(pair(), [0, 2]))[0], b)
    extreme = CallableTeacher(lambda x: torch.tensor([[1e4, -1e4]] * len(x)))
    other = CallableTeacher(lambda x: torch.tensor([[-1e4, 1e4]] * len(x)))
    torch.testing.assert_close(logits(EnsembleTeacher([extreme, other]))[0].softmax(-1), torch.full((4, 2), 0.5))


def test_weights_by_sample_have_known_answers() -> None:
    """Two members, one sure and right about sample 0, the other about sample 1."""
    z = torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 4.0]]])
    members = [CallableTeacher(lambda x, m=m: m) for m in z]
    batch = Batch((torch.zeros(2, 1),), torch.tensor([0, 1]), None)
    p = z.softmax(-1)
    top = p.amax(-1) / p.amax(-1).sum(0)
    losses = torch.stack([-z[m].log_softmax(-1)[[0, 1], [0, 1]] for m in range(2)])
    for by, w in [
        ("surest", torch.eye(2)),
        ("confidence", top),
        ("label_confidence", 1 - losses.exp() / losses.exp().sum(0)),
        (lambda z, batch: torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.25, 1.0], [0.75, 0.0]])),
    ]:
        answer, _ = EnsembleTeacher(members, by=by)(batch)
        torch.testing.assert_close(answer.softmax(-1), (w[..., None] * p).sum(0))
    with pytest.raises(InputError, match="one class label for every sample"):
        EnsembleTeacher(members, by="label_confidence")(Batch(batch.inputs, None, None))


def test_members_that_answer_by_name_are_mixed_output_by_output() -> None:
    members = [CallableTeacher(lambda x, k=k: {"a": x * k, "b": (x + k, -x)}) for k in (1.0, 3.0)]
    x = torch.randn(4, 3)
    answer, _ = EnsembleTeacher(members, of="logits")(Batch((x,), None, None))
    torch.testing.assert_close(answer, {"a": 2 * x, "b": (x + 2, -x)})


def test_ensembles_that_do_not_fit_are_refused() -> None:
    wrong = [FrozenTeacher(net(1)), FrozenTeacher(Net(classes=3).eval())]
    with pytest.raises(InputError, match=r"member 0 answers \[\(2, 5\)\] and member 1 \[\(2, 3\)\]"):
        Distillation(TERMS, TASK, Net(), EnsembleTeacher(wrong))
    for weights, message in [([1.0], "2 teachers has 1 weights"), ([0, 0], "not all 0"), ([1, -1], "at least 0")]:
        with pytest.raises(InputError, match=message):
            EnsembleTeacher(pair(), weights)
    with pytest.raises(InputError, match='"surrest" .did you mean "surest"'):
        EnsembleTeacher(pair(), by="surrest")
    with pytest.raises(InputError, match='compares the teacher\'s features at "body", but an ensemble'):
        Distillation([Hint(point="body")], TASK, Net(), EnsembleTeacher(pair()))


# ---- uncertainty


def test_disagreement_is_from_zero_to_one() -> None:
    """Alike: 0. Each sure of another class: 1. The gate is what is left."""
    alike = UncertaintyTeacher([FrozenTeacher(net(1)) for _ in range(2)])
    sure = UncertaintyTeacher([CallableTeacher(lambda x, k=k: 50.0 * torch.eye(5)[[k] * len(x)]) for k in range(2)])
    for teacher, value in ((alike, 0.0), (sure, 1.0)):
        _, features = teacher(BATCH)
        torch.testing.assert_close(features["disagreement"], torch.full((4,), value), atol=1e-5, rtol=0)
        gated = Distillation([KLDivergence(gate="teacher_agreement")], TASK, Net().eval(), teacher)
        plain = Distillation([KLDivergence()], TASK, Net().eval(), teacher)
        student = gated.wrap(net())
        torch.testing.assert_close(gated(student, BATCH), (1 - value) * plain(student, BATCH), atol=1e-4, rtol=1e-4)
    logits_ = UncertaintyTeacher(pair(), of="logits")(BATCH)[1]["disagreement"]
    v = torch.stack(logits(*pair())).var(0, unbiased=False).mean(1)
    torch.testing.assert_close(logits_, v / (1 + v))
    with pytest.raises(InputError, match="needs an ensemble that shows its uncertainty"):
        objective = Distillation([KLDivergence(gate="teacher_agreement")], TASK, Net(), EnsembleTeacher(pair()))
        objective(objective.wrap(net()), BATCH)


def test_a_student_of_uncertainty_learns_mean_and_log_variance() -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spread = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Any:
            f = self.body(x).mean((2, 3))
            return self.head(f), self.spread(f)

    teacher = UncertaintyTeacher(pair(), of="logits", target=True)
    mean, log_variance = teacher(BATCH)[0]
    both = torch.stack(logits(*pair()))
    torch.testing.assert_close(mean, both.mean(0))
    torch.testing.assert_close(log_variance, both.var(0, unbiased=False).clamp_min(1e-8).log())
    student = Two()
    objective = Distillation([LogitMSE(output=0), LogitMSE(output=1)], TASK, student, teacher)
    log = fit(RunContext(), student, data(), objective, Training(epochs=20, learning_rate=0.05))
    assert log.losses[-1] < 0.5 * log.losses[0]


# ---- black boxes


def test_an_onnx_file_answers_as_its_module(tmp_path: Path) -> None:
    teacher = onnx_of(1, tmp_path)
    torch.testing.assert_close(*logits(teacher, FrozenTeacher(net(1))), rtol=0, atol=1e-5)
    assert teacher.module is None and not [*teacher.parameters()] and not teacher.state_dict()
    for terms in ([Hint(point="body")], [CrossEntropy(), Hint(point="body", projector_kind="identity")]):
        with pytest.raises(InputError, match='Hint compares the teacher\'s features at "body", but .* black box'):
            Distillation(terms, TASK, Net(), teacher)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(2, 3, 8, 8),), r"takes \[\('input', \[.*3, 6, 6\].*the task gives \[\(\(2, 3, 8, 8\), 'float32'"),
        ((torch.zeros(2, 3, 6, 6).double(),), "float64"),
        ((torch.zeros(2, 3, 6),), r"\(2, 3, 6\)"),
        ((torch.zeros(2, 3, 6, 6), torch.zeros(2, 3)), r"\(2, 3, 6, 6\).*\(2, 3\)"),
    ],
)
def test_an_onnx_file_with_other_inputs_is_refused(example: Any, message: str, tmp_path: Path) -> None:
    path = onnx_of(1, tmp_path).path
    with pytest.raises(InputError, match=message):
        OnnxTeacher(path, example)


def test_an_onnx_file_must_run_and_take_any_batch(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for name in ("bad.onnx", "missing.onnx"):
        with pytest.raises(InputError, match=f"the teacher cannot be run: ONNX Runtime .* refuses .*{name}"):
            OnnxTeacher(tmp_path / name, TASK.example)
    path = onnx_of(1, tmp_path).path
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, str(path))
    with pytest.raises(InputError, match=r"batches of 2 only .*dynamic batch axis"):
        OnnxTeacher(path, TASK.example)


def test_a_function_must_answer_every_sample() -> None:
    with pytest.raises(InputError, match="FrozenTeacher"):
        CallableTeacher(net())  # its parameters would be the objective's
    for answer, message in [
        (lambda x: x.sum(), r"2 samples with tensors of shapes \[\(\)\]"),
        (lambda x: x[:1], r"shapes \[\(1, 3, 6, 6\)\]"),
        (lambda x: "yes", "a str without tensors"),
    ]:
        with pytest.raises(InputError, match=message):
            Distillation(TERMS, TASK, Net(), CallableTeacher(answer))


def test_labels_and_top_k_become_logits() -> None:
    sampled = torch.tensor([[0, 0, 2, 0], [1, 1, 1, 1]])
    p = logits_of_labels(sampled, 3, smoothing=0.3).softmax(-1)
    torch.testing.assert_close(p, 0.7 * torch.tensor([[0.75, 0, 0.25], [0, 1, 0]]) + 0.1)
    assert torch.equal(logits_of_labels(torch.tensor([2]), 3).argmax(-1), torch.tensor([2]))
    top = logits_of_top_k(torch.tensor([[0.6, 0.1]]), torch.tensor([[3, 0]]), 5).softmax(-1)
    torch.testing.assert_close(top, torch.tensor([[0.1, 0.1, 0.1, 0.6, 0.1]]))
    for labels, smoothing in ((torch.tensor([3]), 0.1), (torch.tensor([-1]), 0.1), (torch.tensor([0.5]), 0.1),
                              (torch.tensor([0]), 0.0)):  # fmt: skip
        with pytest.raises(InputError):
            logits_of_labels(labels, 3, smoothing)
    with pytest.raises(InputError, match="k below 2"):
        logits_of_top_k(torch.ones(1, 2), torch.zeros(1, 2).long(), 2)


# ---- the student's average


@pytest.mark.parametrize("points", [(), ("body",)])
def test_without_momentum_the_average_is_the_student(points: Sequence[str]) -> None:
    student = Net()
    teacher = EMATeacher(student, points, momentum=0.0)
    for step in range(3):
        student.train()(BATCH.inputs[0] + step)
        with torch.no_grad():
            student.head.weight.add_(step)
        teacher.begin(0.0)
        answer, features = teacher(BATCH)
        assert torch.equal(answer, student.eval()(*BATCH.inputs)) and set(features) == set(points)


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_has_a_known_answer(warmup: bool) -> None:
    student = Net()
    teacher = EMATeacher(student, momentum=0.6, warmup=warmup)
    mean = 0.0
    start = float(student.head.bias[0].detach())
    for step, value in enumerate([1.0, 3.0, 5.0, 11.0]):
        with torch.no_grad():
            student.head.bias[0] = value
        teacher.begin(step / 4)
        m = min(0.6, 1 - 1 / (step + 1)) if warmup else 0.6
        mean = m * (mean if step else start) + (1 - m) * value
        assert teacher.module is not None
        assert float(teacher.module.head.bias[0]) == pytest.approx(mean, rel=1e-6)  # type: ignore[union-attr]
    with pytest.raises(InputError, match="momentum=1"):
        EMATeacher(student, momentum=1)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def test_a_resumed_training_has_the_same_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student, average and its step count, bit for bit, wherever it was killed; alone, and in an ensemble."""
    monkeypatch.setattr(os, "fsync", lambda f: None)
    training = Training(epochs=2, learning_rate=0.05, checkpoint_seconds=1e-9)

    def train(folder: Path | None, ensemble: bool, kill: int | None = None) -> dict[str, Tensor]:
        student = Net()
        teacher: Teacher = EMATeacher(student, momentum=0.7)
        if ensemble:
            teacher = UncertaintyTeacher([teacher, FrozenTeacher(net(1))])

        def on_progress(progress: float) -> None:
            if kill is not None and progress >= kill / 6:
                raise Killed

        objective = Distillation(TERMS, TASK, student, teacher, on_progress=on_progress, balance="learned")
        fit(RunContext(3, folder).enter("00-distill"), student, data(), objective, training)
        return {**student.state_dict(), **{f"objective.{k}": v for k, v in objective.state_dict().items()}}

    for ensemble, kill in ((False, 4), (True, 1)):
        whole = train(None, ensemble)
        assert any(k.endswith("average.head.weight") for k in whole)
        folder = tmp_path / str(ensemble)
        with pytest.raises(Killed):
            train(folder, ensemble, kill)
        rest = train(folder, ensemble)
        assert rest.keys() == whole.keys() and not [k for k in whole if not torch.equal(whole[k], rest[k])]


# ---- in a recipe


def program(folder: Path | None = None) -> Program:
    teacher = net(1).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1, folder).enter("00-distill"))


ENSEMBLE = FromEnsemble(members=(FromModule(), FromSnapshot()), by="label_confidence")


@pytest.mark.parametrize(
    ("source", "terms", "said"),
    [
        (FromModule(), TERMS, "cached"),
        (FromSnapshot(), TERMS, "cached"),
        (ENSEMBLE, TERMS, "cached"),
        (FromEMA(momentum=0.9), TERMS, "live: the teacher is the student's moving average"),
        (replace(ENSEMBLE, uncertainty=True), (KLDivergence(gate="teacher_agreement"),), "live: how far the members"),
        (FromEMA(), (CrossEntropy(), Hint(point="head", projector_kind="slice")), "live: the terms compare features"),
        (FromModule(), (CrossEntropy(gate="teacher_right"),), "cached"),
        (FromModule(), (CrossEntropy(),), "live: the terms need no teacher"),
    ],
)
def test_a_recipe_says_who_teaches(source: Any, terms: tuple[Term, ...], said: str, tmp_path: Path) -> None:
    distill = Distill(epochs=1, learning_rate=0.01, terms=terms, teacher=source, balance="gradient_norm")
    done = distill.apply(program(tmp_path), TASK)
    assert str(done.details["teacher"]).startswith(said) and math.isfinite(done.details["losses"][0])
    recipe = Recipe(passes=(distill,))
    assert Recipe.loads(recipe.dumps()) == recipe


@pytest.mark.slow
def test_every_source_teaches_a_quantized_student(tmp_path: Path) -> None:
    whole = program(tmp_path)
    onnx_of(1, tmp_path)
    for number, step in enumerate((Capture(), Quantize(samples=8))):
        whole = replace(step.apply(whole, TASK), stage=Stage(number + 1))
    members = (FromModule(), FromEMA(momentum=0.9), FromSnapshot(), FromOnnx(path=str(tmp_path / "teacher.onnx")))
    source = FromEnsemble(members=members, weights=(1, 1, 1, 2))
    before = copy.deepcopy(whole.student.state_dict())
    done = Distill(epochs=1, learning_rate=0.01, teacher=source).apply(whole, TASK)
    after = done.student.state_dict()
    assert before.keys() == after.keys() and [k for k in before if not torch.equal(before[k], after[k])]


def test_the_next_generation_begins_anew(tmp_path: Path) -> None:
    """It is taught by the student that it replaces, and learns what that one knows without a label."""
    first = program()
    with torch.no_grad():
        first.student.head.weight.mul_(4)  # type: ignore[union-attr]
    parent = copy.deepcopy(first.student).eval()
    distill = Distill(
        epochs=20, learning_rate=0.1, terms=(KLDivergence(temperature=1),), teacher=FromSnapshot(restart=True)
    )
    child = distill.apply(first, TASK)
    losses = child.details["losses"]
    assert losses[0] > 0.02 and losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        view = View(child.student(*BATCH.inputs), parent(*BATCH.inputs), None, {}, {}, TASK)
        assert float(KLDivergence(temperature=1)(view, None).mean()) < losses[0]
    assert not torch.equal(child.student.head.weight, parent.head.weight)  # type: ignore[union-attr,arg-type]
    captured = Capture().apply(program(), TASK)
    with pytest.raises(InputError, match="restart a plain module, before it is captured"):
        restart(captured.student)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('teacher = { source = "emma" }', r'teacher: unknown source "emma" \(did you mean "ema"\?\)'),
        ("teacher = { momentum = 0.9 }", r'it needs a key "source" \(known: artifact, assistant, context, ema'),
        ('teacher = { source = "ema", momentm = 0.9 }', r'unknown key .*momentm" .*"momentum"'),
        ('teacher = { source = "ema", momentum = 1.0 }', "momentum: .*less than 1"),
        ('teacher = { source = "onnx" }', "path"),
        ('teacher = { source = "ensemble", members = [] }', "members"),
        ('teacher = { source = "ensemble", members = [{ source = "module" }], weights = [0.0] }', "not all 0"),
        ('teacher = { source = "ensemble", members = [{ source = "ensemble", members = [] }] }', "unknown source"),
        ('balance = "fair"', "balance"),
        ('terms = [{ term = "sorted_uld" }]', "SortedULD must not be the only term"),
    ],
)
def test_teachers_that_no_recipe_may_ask_for(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.loads(f'[[pass]]\nname = "distill"\n{line}\n')


def test_what_is_blind_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match="SortedULD must not be the only term"):
        Distillation([SortedULD()], TASK, Net(), FrozenTeacher(net(1)))
    assert Distill(terms=(SortedULD(), CrossEntropy())).balance == "static"
    with pytest.raises(ValueError, match="SortedULD must not be the only term"):
        Distill(terms=(SortedULD(), CrossEntropy(weight=0)))
