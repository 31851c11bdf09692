"""The report's diagnostics: what is found of known answers, what has no place and says why, and real compiles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import TABLE
from torch import Tensor, nn

from pqk import Evaluation
from pqk.cli import app as cli
from pqk.compiler import compress
from pqk.data.data import ArrayData
from pqk.deploy.artifact import Artifact
from pqk.evaluation.controls import CONTROLS
from pqk.evaluation.diagnostics import Answers, Judged, answers, diagnose, robustness, sampled, spread
from pqk.knowledge import CrossEntropy, KLDivergence
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.recipe.recipe import Recipe
from pqk.report.diagnostics import Diagnostics, Robustness
from pqk.report.html.page import to_html
from pqk.report.markdown import to_markdown
from pqk.report.schema import AttributionRow, VariantName
from pqk.task.task import Task

pytestmark = pytest.mark.slow

CLASSES = 4


def mean_image(scale: float = 4.0) -> Callable[[Tensor], Tensor]:
    """A classifier that reads the class off the image's mean: 0, 1, 2 or 3."""
    return lambda x: -scale * (x.mean((1, 2, 3))[:, None] - torch.arange(CLASSES)).square()


def images(count: int = 64, batch: int = 16) -> ArrayData:
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return ArrayData(noise - noise.mean((1, 2, 3), keepdim=True) + labels.view(-1, 1, 1, 1), labels, batch)


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(None, images(), validation=images(32))


def judged(variant: VariantName, model: Callable[..., Any], task: Task, **numbers: Any) -> Judged:
    batches = list(task.evaluation.batches())
    outputs, targets = torch.cat([model(*b.inputs) for b in batches]), torch.cat([b.targets for b in batches])
    return Judged(AttributionRow(variant=variant, **numbers), model, answers(task, outputs, targets))


def absent(reason: str) -> Judged:
    return Judged(AttributionRow(variant="student_no_kd", reasons={"metric": reason}), None, reason)


def wrong_on(count: int, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Gives the next class for the darkest `count` images of each batch."""

    def answer(x: Tensor) -> Tensor:
        z = model(x)
        dark = x.std((1, 2, 3)).argsort()[:count]
        return z.index_copy(0, dark, z[dark].roll(1, 1))

    return answer


def of(task: Task, **networks: Judged) -> Diagnostics:
    there: dict[Any, Judged] = {
        "teacher_fp32": judged("teacher_fp32", mean_image(), task, latency_ms=2.0, parameters=100),
        "student": judged(
            "student", mean_image(1.0), task, latency_ms=0.5, ratio=4.0, ratio_low=3.9, ratio_high=4.1, parameters=10
        ),
        "student_no_kd": absent("it was not asked for"),
    }
    return diagnose(task, there | networks, seconds=30.0)


def test_a_student_that_says_the_same(task: Task) -> None:
    found = of(task)
    assert found.samples == 64 and found.fidelity is not None and found.fidelity.agreement == 1
    assert (
        found.teacher is not None and found.teacher.calibration is not None and found.teacher.calibration.accuracy == 1
    )
    assert found.calibration is not None and found.calibration.temperature is None
    assert "all 32 validation samples are right" in str(found.calibration.reason)
    assert found.negative_transfer is not None and found.negative_transfer.samples == 0
    assert found.break_even is not None and found.break_even.queries == 20_000
    assert found.reasons == {"capacity_gap": "it was not asked for"} and found.controls == ()
    assert Diagnostics.model_validate_json(found.model_dump_json()) == found


def test_the_temperature_is_that_of_validation_data(task: Task) -> None:
    """A network that is right on three in four images and sure of all should be less so."""
    sure = wrong_on(4, mean_image(40.0))
    found = of(task, student=judged("student", sure, task)).calibration
    assert found is not None and found.temperature is not None and found.temperature > 5
    assert found.accuracy == 0.75 and found.nll_after is not None and found.nll_after < found.nll / 2


def test_copied_mistakes_and_controls(task: Task) -> None:
    """A parrot of a wrong teacher beside a control that knows better: the report warns of both."""
    wrong, right = wrong_on(8, mean_image()), mean_image()
    found = of(
        task,
        teacher_fp32=judged("teacher_fp32", wrong, task, parameters=100),
        student=judged("student", wrong, task, parameters=10),
        student_no_kd=judged("student_no_kd", right, task),
        student_label_smoothing=judged("student_label_smoothing", right, task),
    )
    n = found.negative_transfer
    assert n is not None and (n.samples, n.copied, n.control) == (32, 1, 0) and n.warning in found.warnings
    assert [row.variant for row in found.controls] == ["student_no_kd", "student_label_smoothing"]
    assert all(row.accuracy == 1 and row.difference.mean == -0.5 and row.warning for row in found.controls)
    assert found.capacity_gap is not None and found.capacity_gap.gain == found.controls[0].difference
    assert (found.capacity_gap.teacher_parameters, found.capacity_gap.student_parameters) == (100, 10)
    assert sum("worse than its control" in text for text in found.warnings) == 2
    assert found.reasons["break_even"] == "latencies were not measured"


def test_what_a_corruption_costs(task: Task) -> None:
    """The mean image survives noise and shifts; one that reads a corner pixel does not survive the noise."""

    def corner(x: Tensor) -> Tensor:
        return -(x[:, 0, -1:, -1] - torch.arange(CLASSES)).square()

    pixels = torch.arange(64.0).view(-1, 1, 1, 1) % CLASSES
    data = ArrayData(pixels + torch.linspace(-0.4, 0.4, 8).view(1, 1, 1, 8).expand(64, 1, 8, 8), torch.arange(64) % 4)
    still = Task(None, data, validation=data)
    found = robustness(still, mean_image(), corner)
    assert isinstance(found, Robustness) and found.samples == 64 and found.teacher == found.student == 1
    rows = {row.corruption: row for row in found.rows}
    assert set(rows) == {"noise", "blur", "contrast", "shift"}
    assert rows["noise"].teacher == 1 and rows["noise"].student < 1
    drop = rows["noise"].student_drop
    assert (
        drop is not None
        and drop.low <= drop.mean <= drop.high
        and drop.mean == pytest.approx(1 - rows["noise"].student)
    )
    assert rows["contrast"].teacher == 1 and rows["shift"].student == 1
    assert set(found.left_out) == {"word drop", "word swap"}
    assert robustness(still, mean_image(), corner) == found


def test_samples_are_spread_over_sorted_data() -> None:
    assert spread(10, 20).tolist() == list(range(10)) and spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    data = ArrayData(torch.arange(100.0).view(-1, 1), torch.arange(100), 7)
    batches = list(sampled(data, 10))
    assert torch.cat([b.targets for b in batches]).tolist() == list(range(0, 100, 10))
    assert all(torch.equal(b.inputs[0][:, 0], b.targets.float()) and len(b.inputs[0]) for b in batches)


@pytest.mark.parametrize(
    ("outputs", "targets", "options", "reason"),
    [
        ((torch.zeros(4, 3), torch.zeros(4, 2)), None, {}, r"outputs are [B, 3], [B, 2]"),
        (torch.zeros(4, 5, 3), None, {}, "outputs are [B, 5, 3]"),
        (torch.zeros(4, 1), torch.zeros(4), {}, "outputs are [B, 1]"),
        (torch.zeros(4, 2), torch.zeros(4, 2), {}, "not one class label a sample"),
        (torch.zeros(4, 2), torch.arange(4), {}, "run from 0 to 3, of 2 classes"),
        (torch.full((4, 2), float("nan")), torch.zeros(4, dtype=torch.long), {}, "NaN or infinite"),
        (torch.zeros(4, 2), None, {"decision": torch.sign, "loss": lambda o, t: o.mean(1)}, "no classification"),
    ],
)
def test_what_is_no_classification_says_so(outputs: Any, targets: Any, options: Any, reason: str) -> None:
    found = answers(Task(None, images(), validation=images(), **options), outputs, targets)
    assert isinstance(found, str) and reason in found


def test_without_logits_or_labels_parts_are_null_with_their_reasons(task: Task) -> None:
    outputs = mean_image()(torch.cat([b.inputs[0] for b in task.evaluation.batches()]))
    unlabelled = Judged(AttributionRow(variant="teacher_fp32"), mean_image(), Answers(outputs, None))
    found = of(task, teacher_fp32=unlabelled, student=unlabelled)
    assert found.teacher is not None and found.teacher.calibration is None and found.fidelity is not None
    assert {k for k, why in found.reasons.items() if why == "the evaluation data has no labels"} == {
        "accuracy_by_class", "calibration", "negative_transfer", "robustness", "capacity_gap",
    }  # fmt: skip
    none = of(task, student=Judged(AttributionRow(variant="student"), None, "no logits"))
    parts = {"teacher", "fidelity", "calibration", "negative_transfer", "robustness", "capacity_gap"}
    assert {k for k, why in none.reasons.items() if why == "no logits"} == {*parts, "accuracy_by_class"}
    assert none.accuracy_by_class == ()
    assert all(getattr(none, name) is None for name in parts)


# Real compiles


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


RECIPE = Recipe(
    passes=(
        Prune(macs_ratio=1.3, multiple=4),
        Distill(epochs=1),
        Capture(),
        Quantize(samples=16, faster_float=False),
        Distill(epochs=1, learning_rate=1e-3),
        Convert(),
    ),
    seed=5,
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A compile with all controls."""
    task = Task(images(32), images(64), validation=images(16))
    out = tmp_path_factory.mktemp("full") / "out"
    return compress(
        Net(),
        task,
        RECIPE,
        "x86-avx2",
        out,
        evaluation=replace(TABLE, layer_times=True, controls=Evaluation.full().controls, baselines=()),
    )


def test_a_full_compile_trains_every_control(full: Artifact) -> None:
    found, rows = full.report.diagnostics, {row.variant: row for row in full.report.attribution}
    assert found is not None
    assert [row.variant for row in found.controls] == [c.variant for c in CONTROLS]
    for row in found.controls:
        assert rows[row.variant].metric == pytest.approx(row.accuracy)
        assert rows[row.variant].parameters == rows["student"].parameters and rows[row.variant].size_bytes
        assert row.difference.mean == pytest.approx(rows["student"].metric - rows[row.variant].metric)
        assert row.difference.low <= row.difference.mean <= row.difference.high
    assert rows["student_from_scratch"].reasons["latency_ms"].startswith("it is the student's network")
    assert found.capacity_gap is not None and found.robustness is not None and len(found.robustness.rows) == 4
    assert found.negative_transfer is not None and found.negative_transfer.control is not None
    assert found.fidelity is not None and found.fidelity.agreement_per_class is not None


def test_a_full_compile_says_which_classes_and_layers(full: Artifact) -> None:
    report = full.report
    assert report.diagnostics is not None and report.metric is not None and report.layer_times is not None
    classes = report.diagnostics.accuracy_by_class
    assert [c.label for c in classes] == list(range(CLASSES))
    whole = sum(c.samples * c.student for c in classes) / sum(c.samples for c in classes)
    assert whole == pytest.approx(report.metric.student)
    times = report.layer_times
    assert [n.variant for n in times.networks] == ["teacher_fp32", "pruned_distilled", "student"] and not times.reasons
    for network in times.networks:
        layers = {la.layer: la for la in network.layers}
        assert {"body.0", "body.3", "head"} <= layers.keys(), network
        assert layers["body.3"].integer is (network.variant == "student")
        assert network.total_ms > 0 and all(la.operators for la in network.layers)
    page = (full.folder / "report.html").read_text(encoding="utf-8")
    assert page == to_html(report) and "report.html" in full.manifest["files"]


def test_controls_train_what_they_say(full: Artifact) -> None:
    def losses(folder: str, name: str) -> Any:
        program = json.loads((full.folder / ".work" / folder / name / "program.json").read_text())
        return program["records"][-1]["details"]["losses"]

    student = losses(".", "04-distill")
    others = [losses(c.folder, "04-distill") for c in CONTROLS]
    assert len({tuple(x) for x in (student, *others)}) == 5
    trained = sorted(p.name for p in (full.folder / ".work" / "from-scratch").iterdir() if p.is_dir())
    assert trained == ["01-distill", "02-capture", "03-quantize", "04-distill", "05-convert"]
    assert not (full.folder / ".work" / "label-smoothing" / "01-distill").exists()


def test_the_page_tells_the_diagnostics(full: Artifact) -> None:
    page = to_markdown(full.report)
    assert (full.folder / "report.md").read_text() == page
    for text in ("## Diagnostics", "- Teacher: mean top", "| teacher |", "| contrast |", "| control |", "decided alike",
                 "| the same size from scratch, INT8 |", "Gain of distillation"):  # fmt: skip
        assert text in page, text
    assert all(line.endswith("|") for line in page.splitlines() if line.startswith("|"))


def test_controls_that_do_not_apply_say_why() -> None:
    reasons = {c.variant: [] for c in CONTROLS}  # type: ignore[var-annotated]
    task = Task(images(32), images(), validation=images(16))
    ema = Distill(epochs=1, teacher={"source": "ema"})  # type: ignore[arg-type]
    for passes in (
        (Capture(), Quantize(), Convert()),
        (Prune(macs_ratio=2.0), Distill(epochs=1), Prune(macs_ratio=2.0), Capture(), ema),
    ):
        for control in CONTROLS:
            program: Any = type("Finished", (), {"records": (), "teacher": Net().eval(), "run": None})
            reasons[control.variant].append(control.run(program, task, passes))
    assert reasons["student_no_kd"][0] == "the recipe trains nothing under quantization"
    assert reasons["student_random_teacher"][1] == "its teacher is not the recipe's"
    assert reasons["student_from_scratch"][0] == "the recipe trains nothing in float after its last pruning"


def test_the_command_warns_in_words(
    full: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What `pqk compress` and `pqk inspect` show of a report whose student is worse than its control."""
    from pqk.cli import commands

    said = "the student is worse than its control"
    report = full.report
    assert report.diagnostics is not None
    worse = report.model_copy(update={"diagnostics": report.diagnostics.model_copy(update={"warnings": (said,)})})
    monkeypatch.setattr(Artifact, "report", property(lambda self: worse))
    monkeypatch.setattr(commands, "compile_student", lambda *a, **k: full)
    monkeypatch.setattr(commands, "load_sources", lambda *a, **k: (None, None))
    recipe = tmp_path / "recipe.toml"
    head = '[teacher]\nfactory = "a:b"\n[task]\nfactory = "a:c"\n'
    recipe.write_text(replace(RECIPE, teacher=None).dumps() + head)
    for command in (["compress", str(recipe), "--out", str(tmp_path / "out")], ["inspect", str(full.folder)]):
        assert cli.run(command) == 0
        assert f"warning: {said}" in " ".join(capsys.readouterr().out.split())


def test_the_defaults_are_the_terms_that_controls_take_away() -> None:
    assert [type(t) for t in Distill().terms] == [CrossEntropy, KLDivergence]
