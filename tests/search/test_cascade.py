"""Cascades: the threshold on known answers, routing sample by sample, and an artifact that routes as it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import UNTIMED
from fitting import fitted
from torch import Tensor, nn

from pqk import ArrayData, Artifact, Contract, Recipe, Task, compress
from pqk.core.onnxruntime_session import OnnxModel, session
from pqk.deploy.artifact import write_manifest
from pqk.deploy.cascade import CASCADE_TEACHER, Cascade, Routing
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.evaluation.cascade import measure_cascade
from pqk.files import read_json
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.report.text import cascade_text
from pqk.search.cascade import RoutingChoice, choose_routing, why_not_cascaded, worth_of
from pqk.search.judge import Judge, Worth

COUNT = 800
LABELS = torch.arange(COUNT) % 4


def logits_of(classes: Tensor, strength: Tensor | float) -> Tensor:
    """Logits [N, 4] that decide for these classes, by so much."""
    return nn.functional.one_hot(classes, 4).float() * torch.as_tensor(strength).reshape(-1, 1)


def judge_of(teacher: Tensor, targets: Tensor, folder: Path) -> Judge:
    """A judge whose teacher answers by these logits."""
    rows = ArrayData(torch.arange(len(targets), dtype=torch.float32)[:, None], targets, 64)
    table = nn.Embedding.from_pretrained(teacher)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x[:, 0].long())

    task = Task(None, rows, validation=rows)
    return Judge(Teacher().eval(), task, task.validation, folder, timed=False, seed=0)


def chosen(student: Tensor, teacher: Tensor, allowed: float, folder: Path) -> RoutingChoice | str:
    return choose_routing(student, teacher, LABELS, allowed, judge_of(teacher, LABELS, folder).drop)


def test_a_student_that_is_right_answers_everything(tmp_path: Path) -> None:
    found = chosen(logits_of(LABELS, 9.0), logits_of(LABELS, 5.0), 0.01, tmp_path)
    assert isinstance(found, RoutingChoice)
    assert found.routed == 0 and found.drop == 0 and 0 < found.routed_high < 0.01
    assert found.drop_high == pytest.approx(3 / COUNT), "none of n differs, and 3 / n may"


def test_a_student_that_guesses_has_no_threshold(tmp_path: Path) -> None:
    """Sure or not, it is right as often."""
    g = torch.Generator().manual_seed(0)
    guess = logits_of(torch.randint(0, 4, (COUNT,), generator=g), torch.rand(COUNT, generator=g) * 6)
    found = chosen(guess, logits_of(LABELS, 5.0), 0.01, tmp_path)
    assert isinstance(found, str) and "surest of" in found and "0.01 are allowed" in found


def test_the_teacher_gets_what_the_student_is_unsure_of_and_no_more_than_is_needed(tmp_path: Path) -> None:
    """It is right on the 70 % that it is sure of, and wrong on the rest."""
    unsure = torch.arange(COUNT) % 10 < 3
    g = torch.Generator().manual_seed(1)
    strength = torch.where(unsure, torch.rand(COUNT, generator=g) + 0.5, torch.rand(COUNT, generator=g) + 4)
    student = logits_of(torch.where(unsure, (LABELS + 1) % 4, LABELS), strength)
    found = chosen(student, logits_of(LABELS, 5.0), 0.01, tmp_path)
    assert isinstance(found, RoutingChoice)
    assert found.routed == pytest.approx(0.3) and found.drop == 0 and found.drop_high <= 0.01 < found.routed_high
    sure = found.routing.sure(student.numpy())
    assert (sure == ~unsure.numpy()).all()
    more = chosen(student, logits_of(LABELS, 5.0), 0.2, tmp_path)
    assert isinstance(more, RoutingChoice) and 0.1 < more.routed < 0.3 and more.drop_high <= 0.2


def test_the_upper_end_keeps_the_bound_on_other_samples(tmp_path: Path) -> None:
    """A student whose mistakes are the likelier the less sure it is: what it loses elsewhere is what was allowed."""
    lost = []
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        strength = torch.rand(2 * COUNT, generator=g) * 5
        wrong = torch.rand(2 * COUNT, generator=g) < 1 - logits_of(LABELS.repeat(2), strength).softmax(1).amax(1)
        labels = LABELS.repeat(2)
        student = logits_of(torch.where(wrong, (labels + 1) % 4, labels), strength)
        found = chosen(student[:COUNT], logits_of(LABELS, 5.0), 0.04, tmp_path)
        assert isinstance(found, RoutingChoice) and 0 < found.routed < 1
        own = torch.from_numpy(found.routing.sure(student[COUNT:].numpy()))
        lost.append(float((own & wrong[COUNT:]).double().mean()))
    assert sum(x > 0.04 for x in lost) <= 2 and max(lost) > 0.01


def test_a_cascade_answers_each_sample_as_whoever_it_is_routed_to() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g).numpy()
    routing, asked = Routing(0.8, 0.6), list[int]()

    def student(feeds: dict[str, Any]) -> list[Any]:
        return [np.stack([2 * feeds["x"][:, 0], -feeds["x"][:, 1]], 1)]

    def teacher(feeds: dict[str, Any]) -> list[Any]:
        asked.append(len(feeds["x"]))
        return [feeds["x"][:, 1:] * 10]

    cascade = Cascade(student, teacher, routing)
    (whole,) = cascade({"x": x})
    sure = routing.sure(student({"x": x})[0])
    assert 5 < sure.sum() < 45 and asked == [int((~sure).sum())]
    for i in range(50):
        (own,) = cascade({"x": x[i : i + 1]})
        want = student({"x": x[i : i + 1]}) if sure[i] else teacher({"x": x[i : i + 1]})
        assert (own == want[0]).all() and (own == whole[i : i + 1]).all()
    asked.clear()
    assert Cascade(student, teacher, Routing(1.0, 0.0))({"x": x})[0].shape == (50, 2) and not asked
    assert Cascade(student, teacher, routing)({"x": x[:0]})[0].shape == (0, 2) and not asked
    nan = Cascade(lambda feeds: [np.full((50, 2), np.nan)], teacher, Routing(1.0, 0.0))({"x": x})
    assert (nan[0] == teacher({"x": x})[0]).all(), "what is no number is no answer"


@pytest.mark.parametrize(("temperature", "threshold"), [(0.0, 0.5), (float("nan"), 0.5), (1.0, 1.5), (1.0, -0.1)])
def test_a_routing_that_means_nothing_is_refused(temperature: float, threshold: float) -> None:
    with pytest.raises(InputError, match="the first is above 0"):
        Routing(temperature, threshold)


def test_the_mean_latency_is_the_students_and_the_teachers_for_its_share() -> None:
    student = Worth(0.9, 0.05, 0.07, 8.0, 7.5, 8.5, 0.2, 1000, 50)
    choice = RoutingChoice(Routing(1.0, 0.9), 0.1, 0.12, 0.002, 0.008)
    worth = worth_of(student, choice, 9000, 400)
    teacher_ms = 0.2 * 7.5
    assert worth.ratio == pytest.approx(1 / (1 / 8 + 0.1)) and worth.ratio_low == pytest.approx(1 / (1 / 7.5 + 0.12))
    assert worth.milliseconds_high == pytest.approx(0.2 + 0.12 * teacher_ms)
    assert (worth.drop, worth.drop_high, worth.size_bytes, worth.macs) == (0.002, 0.008, 10000, 90)
    assert worth.metric == pytest.approx(0.95 - 0.002)
    untimed = worth_of(
        replace(student, ratio=None, ratio_low=None, ratio_high=None, milliseconds_high=None), choice, 1, 1
    )
    assert untimed.ratio is None and untimed.milliseconds_high is None


def test_only_classes_by_argmax_are_cascaded() -> None:
    x = torch.randn(8, 3)

    def reason(model: nn.Module, **options: Any) -> str:
        part = ArrayData(x, torch.arange(8) % 3, 4)
        return why_not_cascaded(Task(None, part, validation=part, **options), model) or ""

    assert reason(nn.Linear(3, 3)) == ""
    assert "one output of logits [B, C], not [B, 1]" in reason(nn.Linear(3, 1))
    assert "its own decision" in reason(nn.Linear(3, 3), decision=lambda outputs: outputs[:, 0] > 0)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    assert "not [B, 3], [B, 3]" in reason(Two())


class Net(nn.Module):
    """[B, 2, 8, 8] -> logits [B, 4]."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four patterns, in noise that hides some of them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    clean = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(99))
    noise = torch.rand(count, 1, 1, 1, generator=g) * 1.5
    return clean[labels] + noise * torch.randn(count, 2, 8, 8, generator=g), labels


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return fitted(Net(), *patterns(1024, 0), epochs=12)


SMALL = (
    Prune(macs_ratio=6, multiple=4), Distill(epochs=6, learning_rate=0.1), Capture(), Quantize(samples=64), Convert()
)  # fmt: skip


def task() -> Task:
    parts = [ArrayData(*patterns(count, seed), 64) for count, seed in ((2048, 1), (300, 3), (600, 2))]
    return Task(parts[0], parts[1], validation=parts[2])


@pytest.fixture(scope="module")
def found(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile of a contract that no student keeps alone: here none is faster but the recipe's, which loses much."""
    out, original = tmp_path_factory.mktemp("cascade") / "out", Judge.worth

    def worth(self: Judge, program: Any, file: Path | None = None) -> Worth:
        own = original(self, program, file)
        ratio = 12.0 if own.macs < 0.2 * self.teacher_macs else 1.0
        return replace(own, ratio=ratio, ratio_low=ratio, ratio_high=ratio, milliseconds_high=1 / ratio)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Judge, "worth", worth)
        contract = Contract(max_drop=1, min_speedup=1.05, budget="7 epochs", cascade=True)
        compress(teacher, task(), Recipe(passes=SMALL), out=out, contract=contract, evaluation=UNTIMED)
    return out


@pytest.mark.full
def test_a_contract_that_no_student_keeps_is_kept_by_a_cascade(found: Path) -> None:
    artifact = Artifact.load(found)
    promise, made = artifact.report.promise, artifact.report.cascade
    assert promise is not None and made is not None and promise.kept
    assert promise.chosen == "recipe, cascade" and [t.fate for t in promise.tried][-1] == "chosen"
    drop, speed = promise.clauses
    assert drop.certain <= 1 and speed.certain >= 1.05 and drop.evaluation is not None
    assert artifact.routing == Routing(made.temperature, made.threshold)
    assert 0.05 < made.routed < 0.95 and made.routed == pytest.approx(made.routed_validation, abs=0.1)
    assert made.size_bytes == sum((found / name).stat().st_size for name in ("model.onnx", CASCADE_TEACHER))
    assert "## The cascade" in (found / "report.md").read_text()
    assert "the student answers what it is sure of" in cascade_text(artifact.report)


@pytest.mark.full
def test_its_artifact_answers_as_it_says_and_the_reported_metric_is_what_comes_out(
    found: Path, teacher: nn.Module
) -> None:
    artifact, (x, y) = Artifact.load(found), patterns(300, 3)
    made = artifact.report.cascade
    assert made is not None
    whole = torch.from_numpy(artifact.run(x))
    assert float((whole.argmax(1) == y).double().mean()) == pytest.approx(made.metric)
    student = session(found / "model.onnx").run(None, {artifact.manifest["inputs"][0]["name"]: x.numpy()})[0]
    sure = torch.from_numpy(Routing(made.temperature, made.threshold).sure(student))
    with torch.no_grad():
        want = torch.where(sure[:, None], torch.from_numpy(student), teacher(x))
    torch.testing.assert_close(whole, want, rtol=1e-3, atol=1e-3)
    assert float((~sure).double().mean()) == pytest.approx(made.routed) and 0 < sure.sum() < 300
    singly = torch.cat([torch.from_numpy(artifact.run(x[i : i + 1])) for i in range(40)])
    torch.testing.assert_close(singly, whole[:40], rtol=1e-3, atol=1e-3)
    assert made.teacher_metric is not None and made.student_metric is not None
    assert made.student_metric < made.metric <= made.teacher_metric + 0.02  # type: ignore[operator]


@pytest.mark.full
def test_what_was_changed_in_a_cascade_is_refused(found: Path, tmp_path: Path) -> None:
    manifest = read_json(found / "manifest.json")
    values = {k: v for k, v in manifest.items() if k not in ("files", "format", "sha256", "seal", "digest")}

    def changed(name: str, edit: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(found, folder, ignore=shutil.ignore_patterns(".work"))
        edit(folder)
        return folder

    def threshold(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        number = json.dumps(manifest["cascade"]["threshold"])
        assert number in text
        (folder / "manifest.json").write_text(text.replace(number, "0.0"))

    with pytest.raises(InputError, match="was changed"):
        Artifact.load(changed("threshold", threshold))
    teacher = changed("teacher", lambda folder: (folder / CASCADE_TEACHER).write_bytes(b"x"))
    with pytest.raises(InputError, match=f"{CASCADE_TEACHER} was changed"):
        Artifact.load(teacher)
    for cascade, why in (
        ({"temperature": 0.0, "threshold": 0.5}, "cascade.temperature"),
        ({"temperature": 1.0, "threshold": 1.5}, "cascade.threshold"),
    ):
        folder = changed(
            f"sealed{len(why)}", lambda folder, c=cascade: write_manifest(folder, {**values, "cascade": c})
        )
        with pytest.raises(InputError, match=why):
            Artifact.load(folder)
    bare = changed("bare", lambda folder: (folder / CASCADE_TEACHER).unlink())
    write_manifest(bare, values)
    with pytest.raises(InputError, match=f"does not list {CASCADE_TEACHER}"):
        Artifact.load(bare)


@pytest.mark.full
def test_a_cascade_is_timed_with_its_mix(found: Path) -> None:
    made = Artifact.load(found)
    assert made.routing is not None and made.report.cascade is not None
    timed = measure_cascade(found, "model.onnx", task(), made.routing, 0.5, timed=True)
    assert timed.mean_ms == pytest.approx(timed.student_ms + timed.routed * timed.teacher_ms)  # type: ignore[operator]
    assert timed.ratio == pytest.approx(timed.teacher_ms / timed.mean_ms)  # type: ignore[operator]
    assert 0 < timed.p95_ms <= timed.p99_ms and timed.timed_samples == 300  # type: ignore[operator]
    assert timed.metric == made.report.cascade.metric
    text = cascade_text(made.report.model_copy(update={"cascade": timed}))
    assert "p95" in text and "ms on average at batch 1" in text


@pytest.mark.parametrize("optimized", [True, False])
def test_a_cascade_for_another_machine_is_run_without_optimizations(
    optimized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, asked = torch.randn(40, 3), list[bool]()
    part = ArrayData(x, torch.arange(40) % 3, 8)
    given = Task(None, part, validation=part)
    for name in ("model.onnx", CASCADE_TEACHER):
        emit_onnx_for(nn.Linear(3, 3).eval(), given, tmp_path / name)

    class Asked(OnnxModel):
        def __init__(self, path: Path, like: Any, *, optimized: bool = True, threads: int | None = None) -> None:
            asked.append(optimized)
            super().__init__(path, like, optimized=optimized, threads=threads)

    monkeypatch.setattr("pqk.evaluation.cascade.OnnxModel", Asked)
    made = measure_cascade(tmp_path, "model.onnx", given, Routing(1.0, 0.5), 0.5, timed=False, optimized=optimized)
    assert asked == [optimized, optimized] and made.metric is not None and made.mean_ms is None


@pytest.mark.full
def test_a_cascade_for_what_is_no_class_is_refused_before_training(tmp_path: Path) -> None:
    part = ArrayData(torch.randn(40, 3), torch.arange(40) % 3, 8)
    own = Task(part, part, validation=part, decision=lambda outputs: outputs[:, 0] > 0)
    with pytest.raises(InputError, match="contract: cascade: .* the task has its own decision"):
        compress(nn.Linear(3, 3), own, out=tmp_path / "out", contract=Contract(cascade=True))
    assert not (tmp_path / "out" / "manifest.json").exists()
