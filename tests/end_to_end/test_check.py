"""`pqk check`: what a compile would stumble over is found before any training, and what it costs is estimated."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_recipe import PASSES

from pqk import check as module
from pqk import rehearsal
from pqk.bench.statistics import Ratio
from pqk.check import Findings, check
from pqk.cli import app as cli
from pqk.cli import views
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task

RECIPE = PASSES.replace("epochs = 1", "epochs = 5").replace("samples = 64", 'samples = 64\nfloat_layers = ["head"]')


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    try:
        import toy

        yield toy
    finally:
        sys.path.remove(str(Path(__file__).parents[1] / "support"))


@pytest.fixture(scope="module")
def sound(toy: Any) -> Findings:
    """The rehearsal of a recipe that works, timed for real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "THREADS", 1)
        return check(toy.teacher(), toy.task(), Recipe.loads(RECIPE))


@pytest.fixture
def untimed(sound: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies are measured once, in `sound`; everywhere else they are made up."""
    monkeypatch.setattr(module, "ratio_to", lambda *args, **kwargs: Ratio(2.0, 1.9, 2.1))
    monkeypatch.setattr(module.Oracle, "baseline", lambda oracle: 1.0)


@pytest.fixture
def undeployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is found before the student is exported, which takes most of a rehearsal of a toy."""
    monkeypatch.setattr(module.Rehearsal, "deploy", lambda rehearsal: None)


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("untimed")]


def rehearse(toy: Any, text: str, task: Task | None = None, **teacher: Any) -> Findings:
    return check(toy.teacher(**teacher), task or toy.task(), Recipe.loads(text))


def test_a_sound_recipe_has_no_problems(sound: Findings) -> None:
    assert sound.problems == [] and sound.warnings == []
    assert [p.name for p in sound.passes] == ["prune", "distill", "capture", "quantize", "convert"]
    assert [p.stage for p in sound.passes] == ["MODULE", "MODULE", "MODULE", "GRAPH", "FAKE_QUANT"]
    json.dumps(dataclasses.asdict(sound))


def test_what_cannot_be_pruned_has_a_reason(sound: Findings) -> None:
    reasons = {g["name"]: g["reason"] for g in sound.groups}
    assert reasons["first.0"] is None and reasons["second.0"] is None
    assert "output" in reasons["head"]


def test_what_cannot_be_quantized_has_a_reason(sound: Findings) -> None:
    declined = {d["layer"]: d["reason"] for d in sound.passes[3].declined}
    assert "by name" in declined["head"]


def test_costs_are_measured(sound: Findings) -> None:
    assert sound.latency is not None and sound.student is not None
    assert sound.latency["ratio_low"] <= sound.latency["ratio"] <= sound.latency["ratio_high"]
    assert sound.latency["teacher_ms"] / sound.latency["student_ms"] == pytest.approx(sound.latency["ratio"])
    assert 0 < (sound.integer_coverage or 0) < 1, "the head is left in float"
    assert sound.student["macs"] * 1.5 <= sound.teacher["macs"]
    assert sound.memory_bytes > 1e8
    assert sound.seconds == pytest.approx(sum(p.seconds or 0 for p in sound.passes))


def test_training_time_is_steps_times_the_time_of_one(sound: Findings) -> None:
    distill = sound.passes[1]
    assert distill.steps == 5 * 128 // 32 and distill.step_ms is not None
    assert distill.seconds is not None and distill.seconds < 60
    assert all(p.step_ms is None for p in sound.passes if p is not distill)


@pytest.mark.usefixtures("undeployed")
def test_more_epochs_take_longer_and_the_rehearsal_does_not(toy: Any) -> None:
    found = rehearse(toy, RECIPE.replace("epochs = 5", "epochs = 50000"))
    assert found.passes[1].steps == 200_000
    assert found.seconds > 60 and found.problems == []


@pytest.mark.usefixtures("undeployed")
def test_the_teacher_is_not_changed(toy: Any) -> None:
    teacher = toy.teacher()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    check(teacher, toy.task(), Recipe.loads(RECIPE))
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("macs_ratio = 1.5", "macs_ratio = 1000", ["pass 1", "cannot be met", "floor"]),
        ("epochs = 5", 'epochs = 5\nterms = [{ term = "hint", point = "thrid" }]', ["pass 2", "thrid"]),
        ('"head"', '"haed"', ["pass 4", "haed", "head"]),
    ],
)
@pytest.mark.usefixtures("undeployed")
def test_a_pass_that_cannot_work_is_a_problem(toy: Any, old: str, new: str, fragments: list[str]) -> None:
    found = rehearse(toy, RECIPE.replace(old, new))
    assert len(found.problems) == 1
    for fragment in fragments:
        assert fragment in found.problems[0], found.problems[0]


@pytest.mark.usefixtures("undeployed")
def test_a_model_that_cannot_be_captured_is_named_with_its_line(toy: Any) -> None:
    found = rehearse(toy, RECIPE, branch=True)
    assert len(found.problems) == 1 and "pass 3" in found.problems[0]
    assert "toy.py" in found.problems[0] and "x.sum() > 0" in found.problems[0]
    assert [p.name for p in found.passes] == ["prune", "distill", "capture"], "nothing after it can be rehearsed"


@pytest.mark.usefixtures("undeployed")
def test_a_group_that_breaks_the_law_is_refused(toy: Any) -> None:
    found = rehearse(toy, RECIPE.replace("macs_ratio = 1.5", "macs_ratio = 1.1"), weighed=True)
    assert "differ" in next(g["reason"] for g in found.groups if g["name"] == "second.0")
    assert found.problems == []


@pytest.mark.usefixtures("undeployed")
def test_without_training_data_the_training_passes_are_the_problem(toy: Any) -> None:
    found = rehearse(toy, RECIPE, toy.task(train=False))
    assert len(found.problems) == 1 and "pass 2" in found.problems[0] and "no training data" in found.problems[0]
    assert found.passes[-1].name == "convert", "the rest is rehearsed all the same"


def test_a_recipe_that_stops_short_is_a_problem(toy: Any) -> None:
    found = rehearse(toy, RECIPE.replace('[[pass]]\nname = "convert"\n', ""))
    assert len(found.problems) == 1 and "FAKE_QUANT" in found.problems[0]


def test_another_machine_is_a_warning_and_gives_no_latency(toy: Any) -> None:
    found = rehearse(toy, RECIPE.replace("x86-avx2", "arm-dotprod"))
    assert "not this machine" in found.warnings[0] and found.problems == []
    assert found.latency is None and found.integer_coverage is None and found.latency_reason
    assert found.student is not None


def test_a_surprise_is_a_finding(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*args: Any, **kwargs: Any) -> nn.Module:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(rehearsal, "emit_onnx_for", surprise)
    found = rehearse(toy, RECIPE)
    said = "ZeroDivisionError: nobody thought of this"
    assert found.problems == [f"emit: {said}", f"teacher: {said}"]


def test_a_student_without_gain_is_not_called_fine(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ratio_to", lambda *args, **kwargs: Ratio(0.92, 0.9, 0.94))
    found = rehearse(toy, RECIPE)
    assert found.problems == [] and found.no_gain is not None
    for fragment in ("0.92x (0.90 to 0.94)", "of its MACs are integer", "% of the teacher's MACs;"):
        assert fragment in found.no_gain
    shown = str(views.findings(dataclasses.asdict(found))[-1])
    assert "gains nothing" in shown and "nothing stands in the way" not in shown


def test_a_student_that_was_timed_is_not_written_again(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the network that met the latency budget is that of the student; its teacher's is the only other."""
    written: list[str] = []
    inner = rehearsal.emit_onnx_for

    def emit(module: nn.Module, task: Task, path: Path) -> None:
        written.append(path.name)
        inner(module, task, path)

    monkeypatch.setattr(rehearsal, "emit_onnx_for", emit)
    monkeypatch.setattr(module.Oracle, "latency", lambda oracle, student: 0.1 if oracle.emit(student) else 0.0)
    found = rehearse(toy, RECIPE.replace("macs_ratio = 1.5", "latency_ratio = 1.5\nbest_effort = true"))
    assert found.problems == [] and found.student is not None and found.student["size_bytes"] > 0
    assert written == ["teacher.onnx"], "the student of the oracle was taken"


def test_an_estimate_is_what_a_training_takes(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that is most of a step, slower still on the samples that the data begins with, as on longer texts."""
    monkeypatch.delenv("PQK_CACHE", raising=False)
    recipe = Recipe.loads(RECIPE.replace("epochs = 5", "epochs = 40"))
    teacher, student, task = toy.teacher(), toy.teacher(), toy.task()
    first = next(task.train.batches()).inputs[0][0]
    teacher.register_forward_pre_hook(
        lambda module, inputs: time.sleep(0.0 if len(inputs[0]) < 32 else 0.2 if inputs[0][0].equal(first) else 0.05)
    )
    estimate = check(teacher, task, recipe, student=student).passes[1]
    run = RunContext(0, folder=tmp_path).enter("01-distill")
    program = Program.begin(teacher, Target.named("x86-avx2"), run, student)
    began = time.perf_counter()
    recipe.passes[1].apply(program, task)
    took = time.perf_counter() - began
    assert estimate.seconds is not None
    assert took / 3 < estimate.seconds < 2 * took, "of 160 steps 4 ask the teacher"  # all of them: four times as much


def test_the_command_says_it_in_words_and_exits_with_two(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = '[teacher]\nfactory = "toy:teacher"\n[task]\nfactory = "toy:task"\n'
    path = tmp_path / "recipe.toml"
    path.write_text(head + RECIPE)
    assert cli.run(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "expected latency" in shown and "nothing stands in the way" in shown and "GB at the highest" in shown
    path.write_text(head + RECIPE.replace("macs_ratio = 1.5", "macs_ratio = 1000"))
    assert cli.run(["check", str(path), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["passes"][0]["problem"] in document["problems"][0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.toml"]


def test_a_gpu_s_recipe_is_rehearsed_without_a_gpu(toy: Any) -> None:
    recipe = '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\nsamples = 64\n[[pass]]\nname = "convert"\n'
    target, fuse = '[target]\nname = "cuda-sm90"\n', '[[pass]]\nname = "fuse"\n'
    found = rehearse(toy, target + recipe + fuse)
    assert found.problems == [] and found.student is not None and found.student["size_bytes"] > 0
    assert found.latency is None and "--device cuda" in (found.latency_reason or "")
    assert any('must be "fuse"' in p for p in rehearse(toy, target + recipe).problems)


def test_a_student_that_is_fused_for_later_is_measured_where_it_runs(toy: Any) -> None:
    """A recipe for a CPU may end in `fuse`: what is timed and weighed there is model.onnx, not student.pt2."""
    recipe = '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\nsamples = 64\n[[pass]]\nname = "convert"\n'
    found = [rehearse(toy, f'[target]\nname = "x86-avx2"\n{recipe}{end}') for end in ("", '[[pass]]\nname = "fuse"\n')]
    assert [f.problems for f in found] == [[], []]
    assert found[0].student == found[1].student and found[1].latency is not None
