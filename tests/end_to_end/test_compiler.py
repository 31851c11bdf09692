"""`pqk.compress`: what is refused before anything runs, what a resume accepts, and when files appear."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import TABLE
from torch import Tensor, nn

from pqk import Evaluation, compiler, files
from pqk.bench.artifact import benchmark
from pqk.compiler import compress
from pqk.data.data import ArrayData
from pqk.deploy import artifact
from pqk.deploy.artifact import Artifact
from pqk.errors import InputError, ParityError
from pqk.evaluation import evaluate as proof
from pqk.knowledge import CrossEntropy, Retention
from pqk.passes import Capture, Convert, Distill, Fuse, Prune, Quantize
from pqk.recipe.recipe import Recipe
from pqk.task.task import Task

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    passes=(
        Prune(macs_ratio=1.3, multiple=4),
        Distill(epochs=1, checkpoint_seconds=1e-9),
        Capture(),
        Quantize(samples=16),
        Distill(epochs=1, learning_rate=1e-3, checkpoint_seconds=1e-9),
        Convert(),
    ),
    seed=5,
)
SHIPPED = {
    "model.onnx",
    "student.safetensors",
    "student.json",
    "recipe.toml",
    "report.json",
    "report.md",
    "report.html",
    "manifest.json",
}


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def task(shift: float = 0.0, scale: float = 1.0, **options: Any) -> Task:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(48, 3, 6, 6, generator=g) + shift
    whole = ArrayData(x, torch.arange(48) % 4, 8, prepare=lambda inputs: tuple(t * scale for t in inputs))
    parts = [whole.subset(torch.arange(i, i + 16), augmented=False) for i in (0, 16, 32)]
    return Task(*parts[:2], validation=parts[2], **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(Net(), task(), RECIPE, "x86-avx2", out, evaluation=TABLE)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A finished compile that a test may spoil."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def proven(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof, which takes most of the time here, is that of the whole run."""
    report = Artifact.load(whole).report
    monkeypatch.setattr(compiler, "evaluate", lambda *a, **k: report)


def unfinished(out: Path) -> Path:
    """As a kill just before the files were renamed into place leaves it."""
    for name in SHIPPED:
        (out / name).unlink()
    return out


def test_it_ships_what_it_says(whole: Path) -> None:
    assert {p.name for p in whole.iterdir()} == SHIPPED | {".work"}
    assert {p.name for p in (whole / ".work").iterdir()} >= {"run.json", "proof", "00-prune", "05-convert", "cache"}
    artifact = Artifact.load(whole)
    assert artifact.recipe == replace(RECIPE, target=artifact.recipe.target) and artifact.target.name == "x86-avx2"
    assert artifact.manifest["seed"] == 5 and artifact.manifest["data"] and artifact.manifest["teacher"]
    assert artifact.manifest["inputs"] == [{"name": "input", "shape": ["batch", 3, 6, 6], "dtype": "float32"}]
    assert artifact.report.parity is not None and artifact.report.parity.passed
    assert set(artifact.report.seconds) == {f"{i:02d}-{p.name}" for i, p in enumerate(RECIPE.passes)}


def old_data(scale: float = 1.0) -> ArrayData:
    return ArrayData(torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(9)) * scale, None, 5)


def test_what_must_not_be_forgotten_is_in_the_report_and_part_of_the_run(tmp_path: Path) -> None:
    """Held in training, measured on what is deployed; and a resume is of a run with the same such data."""
    recipe = Recipe(passes=(Capture(), Quantize(samples=8), Distill(epochs=1, retain=Retention()), Convert()))
    done = compress(Net(), task(retained=old_data()), recipe, "x86-avx2", tmp_path / "out", evaluation=TABLE)
    (note,) = (n for n in done.report.notes if "must not be forgotten" in n)
    assert note.startswith("what must not be forgotten, 2 samples: how far the student is from its teacher: ")
    said = done.report.passes[2].details["retained"]
    assert said["samples"] == 2 and float(note.rpartition(" ")[2]) == pytest.approx(said["divergence_after"], rel=0.2)
    for other in (task(), task(retained=old_data(2.0))):
        with pytest.raises(InputError, match="data"):
            compress(Net(), other, recipe, "x86-avx2", tmp_path / "out", resume=True, evaluation=TABLE)


def test_the_teacher_is_never_changed(tmp_path: Path, proven: None) -> None:
    teacher = Net().train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    compress(
        teacher,
        task(),
        Recipe(passes=(Capture(), Quantize(samples=8), Convert())),
        "x86-avx2",
        tmp_path / "out",
        evaluation=TABLE,
    )
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_finished_run_is_resumed_by_loading_it(copied: Path) -> None:
    sealed = (copied / "manifest.json").read_bytes()
    assert compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE).folder == copied
    assert (copied / "manifest.json").read_bytes() == sealed


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("where", ["write_student", "seal"])
def test_killed_while_finishing_is_the_same(
    whole: Path, copied: Path, where: str, monkeypatch: pytest.MonkeyPatch, proven: None
) -> None:
    def killed(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compiler, where, killed)
        compress(Net(), task(), RECIPE, "x86-avx2", unfinished(copied), resume=True, evaluation=TABLE)
    with pytest.raises(InputError, match="did not finish; go on with --resume"):
        Artifact.load(copied)
    compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE)
    for name in ("student.safetensors", "student.json", "recipe.toml", "model.onnx"):
        assert (copied / name).read_bytes() == (whole / name).read_bytes(), name


def test_it_is_deterministic(whole: Path, tmp_path: Path, proven: None) -> None:
    compress(Net(), task(), RECIPE, "x86-avx2", tmp_path / "again", evaluation=TABLE)
    for name in ("student.safetensors", "model.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"recipe": replace(RECIPE, seed=6)}, "recipe"),
        ({"recipe": RECIPE.override(["distill@2.epochs=2"])}, "recipe"),
        ({"teacher": Net(1)}, "teacher"),
        ({"task": task(shift=1.0)}, "data and example"),
        ({"task": task(scale=2.0)}, "example"),
        ({"teacher": Net(1), "seed": 9}, "recipe and teacher"),
    ],
)
def test_a_resume_of_another_run_is_refused(copied: Path, change: dict[str, Any], what: str) -> None:
    call: dict[str, Any] = {"teacher": Net(), "task": task(), "recipe": RECIPE, "target": "x86-avx2", **change}
    before = sorted(copied.rglob("*"))
    with pytest.raises(InputError, match=f"holds a run with another {what}; it cannot be continued"):
        compress(**call, out=copied, resume=True, evaluation=TABLE)
    assert sorted(copied.rglob("*")) == before


def test_a_run_of_before_the_example_was_noted_goes_on(copied: Path, proven: None) -> None:
    noted = json.loads((copied / ".work" / "run.json").read_text())
    del noted["example"], noted["sha256"]
    (copied / ".work" / "run.json").write_text(json.dumps(noted))
    compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE)


def test_an_out_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    for resume, message in ((False, r"not empty \(mine\.txt"), (True, "holds no run to continue")):
        with pytest.raises(InputError, match=message):
            compress(Net(), task(), RECIPE, "x86-avx2", tmp_path, resume=resume, evaluation=TABLE)
    with pytest.raises(InputError, match=r"mine\.txt is a file"):
        compress(Net(), task(), RECIPE, "x86-avx2", tmp_path / "mine.txt", evaluation=TABLE)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_saved_passes_without_their_run_are_not_continued(copied: Path) -> None:
    """Whose they are is not known any more."""
    (unfinished(copied) / ".work" / "run.json").unlink()
    with pytest.raises(InputError, match="holds no run to continue"):
        compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE)


def test_killed_before_its_first_file_can_go_on(tmp_path: Path, proven: None) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / ".run.json.partial").write_text("{")
    recipe = Recipe(passes=(Capture(), Quantize(samples=8), Convert()))
    assert compress(Net(), task(), recipe, "x86-avx2", tmp_path / "out", resume=True, evaluation=TABLE).report


def no_train() -> Task:
    full = task()
    return Task(None, full.evaluation, validation=full.validation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": Recipe(passes=(Capture(), Quantize()))}, r'stage FAKE_QUANT; the last pass must be "convert"'),
        ({"task": no_train()}, r"^distill: there is no training data"),
        ({"teacher": "resnet"}, "a str is no torch module"),
        ({"target": "x86-avx3"}, 'unknown target "x86-avx3"'),
        ({"target": "cuda-sm90"}, 'runs fused kernels: the last pass of the recipe must be "fuse"'),
        ({"seed": -1}, "must not be negative"),
        ({"recipe": "nowhere.toml"}, r"cannot read the recipe nowhere\.toml"),
        ({"task": task(example=torch.zeros(2, 5))}, r"example inputs \(\(2, 5\) float32\) do not fit"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    call: dict[str, Any] = {"teacher": Net(), "task": task(), "recipe": RECIPE, "target": "x86-avx2", **change}
    with pytest.raises(InputError, match=message):
        compress(**call, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_training_data_the_default_recipe_quantizes() -> None:
    assert [p.name for p in Recipe.default(trains=False).passes] == ["capture", "quantize", "convert"]
    fused = Recipe.default(trains=False, runtime="triton")
    assert [p.name for p in fused.passes] == ["capture", "quantize", "convert", "fuse"]


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        (files, "save_file"),
        pytest.param((compiler, "write_student"), marks=pytest.mark.full),
        (artifact, "write_sealed"),
        pytest.param((shutil, "rmtree"), marks=pytest.mark.full),
    ],
)
def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(
    whole: Path, copied: Path, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, proven: None
) -> None:
    unfinished(copied)
    shutil.rmtree(copied / ".work" / "05-convert")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left on device"):
        patch.setattr(*where, full)
        compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE)
    assert [p.name for p in copied.iterdir()] == [".work"]
    assert not [p for p in copied.rglob("*") if "partial" in p.name or "saving" in p.name]
    compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, evaluation=TABLE)
    assert (copied / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_a_parity_failure_ships_nothing_unless_it_is_allowed(
    copied: Path, monkeypatch: pytest.MonkeyPatch, proven: None
) -> None:
    original: Callable[..., Any] = compiler.evaluate

    def failed(*arguments: Any, **options: Any) -> Any:
        report = original(*arguments, **options)
        parity = report.parity.model_copy(update={"passed": False, "first_divergence": "body.0 differs"})
        return report.model_copy(update={"parity": parity})

    monkeypatch.setattr(compiler, "evaluate", failed)
    with pytest.raises(ParityError, match=r"parity: body\.0 differs.*--allow-parity-failure"):
        compress(Net(), task(), RECIPE, "x86-avx2", unfinished(copied), resume=True, evaluation=TABLE)
    assert [p.name for p in copied.iterdir()] == [".work"]
    done = compress(Net(), task(), RECIPE, "x86-avx2", copied, resume=True, allow_parity_failure=True, evaluation=TABLE)
    assert done.report.parity is not None and not done.report.parity.passed


@pytest.mark.full
def test_full_attribution_trains_the_student_on_labels_alone(copied: Path) -> None:
    out = unfinished(copied)
    done = compress(
        Net(),
        task(),
        RECIPE,
        "x86-avx2",
        out,
        resume=True,
        evaluation=replace(TABLE, controls=Evaluation.full().controls),
    )
    row = next(r for r in done.report.attribution if r.variant == "student_no_kd")
    assert row.metric is not None and row.parameters and row.size_bytes
    plain = json.loads((out / ".work" / "without-knowledge" / "04-distill" / "program.json").read_text())
    assert plain["records"][-1]["details"]["teacher"] == "live: the terms need no teacher"
    assert CrossEntropy().needs_teacher is False


TWO = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("law", {this!r}); law = importlib.util.module_from_spec(spec)
sys.modules["law"] = law; spec.loader.exec_module(law)
done = law.compress(law.Net(), law.task(), law.RECIPE, "x86-avx2", Path({out!r}), evaluation=law.TABLE)
assert done.report.parity.passed
"""


@pytest.mark.full
def test_two_processes_compile_one_student(tmp_path: Path, whole: Path) -> None:
    """The whole of it under `torchrun`: rank 0 decides, proves and writes, both train, and the same things are made."""
    script, out = tmp_path / "two.py", tmp_path / "out"
    script.write_text(TWO.format(this=__file__, out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[:3000]
    assert {p.name for p in out.iterdir()} == SHIPPED | {".work"}
    ours, alone = Artifact.load(out), Artifact.load(whole)
    assert ours.manifest["teacher"] == alone.manifest["teacher"] and ours.manifest["data"] == alone.manifest["data"]
    plans = [json.loads((p / "student.json").read_text())["plan"] for p in (out, whole)]
    assert [r["function"] for r in plans[0]] == [r["function"] for r in plans[1]]


FUSED = Recipe(passes=(Capture(), Quantize(samples=16), Convert(), Fuse()))


def test_a_gpu_s_student_is_student_pt2_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    artifact = compress(Net(), task(), FUSED, "cuda-sm80", out, evaluation=TABLE)
    assert {p.name for p in out.iterdir()} == (SHIPPED - {"model.onnx"}) | {"student.pt2", "tuning.json", ".work"}
    report = artifact.report
    assert report.latency == () and report.latency_reason is not None and "--device cuda" in report.latency_reason
    assert report.integer_coverage is None and report.integer_coverage_reason == report.latency_reason
    assert report.parity is not None and report.parity.passed and report.parity.mode == "reference"
    assert report.fusion is not None and report.fusion.parity == report.parity and report.fusion.left_out == ()
    assert report.fusion.launches_after == 5 < report.fusion.launches_before  # quantize, two layers, pool, linear
    assert report.fusion.bytes_after < report.fusion.bytes_before
    student = next(r for r in report.attribution if r.variant == "student")
    assert student.runtime == "triton" and student.metric is not None and student.latency_ms is None
    assert student.label == "student: INT8, not trained"
    assert report.size_bytes == student.size_bytes == (out / "student.pt2").stat().st_size
    page = (out / "report.md").read_text()
    assert "## Fusion" in page and "| launches |" in page and "fused student, reference bodies" in page


def test_a_gpu_s_artifact_runs_on_a_cpu_and_is_rebuilt(tmp_path: Path) -> None:
    teacher, data = Net(), task()
    artifact = compress(teacher, data, FUSED, "cuda-sm80", tmp_path / "out", evaluation=TABLE)
    x = next(data.evaluation.batches()).inputs[0]
    with torch.no_grad():
        want, unfused = artifact.student()(x), artifact.rebuild(teacher)(x)
    assert torch.equal(torch.from_numpy(artifact.run(x)), want)
    assert torch.equal(unfused.argmax(1), want.argmax(1))
    assert artifact.manifest["outputs"] == [{"name": "logits", "shape": ["batch", 4], "dtype": "float32"}]
    with pytest.raises(InputError, match=r"has no model\.onnx.*--device cuda"):
        benchmark(artifact)


def test_a_cpu_s_student_may_be_fused_beside_its_file(tmp_path: Path) -> None:
    artifact = compress(Net(), task(), FUSED, "x86-avx2", tmp_path / "out", evaluation=TABLE)
    assert {"model.onnx", "student.pt2"} <= set(artifact.manifest["files"])
    report = artifact.report
    assert report.parity is not None and report.parity.mode != "reference" and report.parity.passed
    assert report.fusion is not None and report.fusion.parity.passed and report.fusion.parity.mode == "reference"
    x = next(task().evaluation.batches()).inputs[0]
    with torch.no_grad():
        assert torch.equal(artifact.student()(x).argmax(1), torch.from_numpy(artifact.run(x)).argmax(1))


def test_without_fuse_there_is_no_student_pt2(whole: Path) -> None:
    artifact = Artifact.load(whole)
    assert artifact.report.fusion is None
    with pytest.raises(InputError, match='its recipe does not end in "fuse"'):
        artifact.student()


def test_a_broken_fused_student_ships_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = proof.check_fused_parity

    def failed(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **options).model_copy(update={"passed": False, "first_divergence": "head differs"})

    monkeypatch.setattr(proof, "check_fused_parity", failed)
    with pytest.raises(ParityError, match="parity: head differs"):
        compress(Net(), task(), FUSED, "x86-avx2", tmp_path / "out", evaluation=TABLE)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".work"]


def test_a_latency_budget_is_refused_for_a_gpu(tmp_path: Path) -> None:
    recipe = replace(FUSED, passes=(Prune(latency_ratio=2.0), *FUSED.passes))
    with pytest.raises(InputError, match="latency budget"):
        compress(Net(), task(), recipe, "cuda-sm80", tmp_path / "out", evaluation=TABLE)
