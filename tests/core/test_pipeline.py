"""The pipeline: what it verifies, and that a run killed anywhere ends in the same student, bit for bit."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk import files
from pqk.core import pipeline
from pqk.core.decisions import Journal
from pqk.core.pipeline import check_order, load, run_passes, verify
from pqk.core.program import Pass, Program, Stage
from pqk.core.progress import Advance, Observer, Silent
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.errors import InputError, PqkError
from pqk.knowledge import CrossEntropy, Hint, KLDivergence
from pqk.models.images import CropFlip
from pqk.passes import REWRITES, Capture, Convert, Distill, Prune, Quantize
from pqk.target.target import Target
from pqk.task.task import Task

TERMS = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9, temperature=2))
QAT = Distill(epochs=1.5, learning_rate=0.01, terms=TERMS, average=0.5, checkpoint_seconds=1e-9)
PASSES: tuple[Pass, ...] = (
    Prune(macs_ratio=1.3, multiple=1, recovery_epochs=0.5),
    Distill(epochs=1, learning_rate=0.05, terms=(*TERMS, Hint(point="body")), checkpoint_seconds=1e-9),
    Capture(),
    Quantize(samples=16),
    QAT,
    QAT,  # what the first froze, the second learns: in a resumed run too
    Convert(),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.Dropout(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(self.drop(F.relu(self.deep(x)).mean((2, 3))))


def task() -> Task:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(28, 3, 6, 6, generator=g), torch.arange(28) % 4
    whole = ArrayData(x, y, 4, augment=CropFlip(28, pad=1), views=2)
    return Task(
        whole.subset(torch.arange(12), augmented=True),
        whole.subset(torch.arange(12, 20), augmented=False),
        whole.subset(torch.arange(20, 28), augmented=False),
    )


def program(folder: Path | None = None, observer: Observer | None = None) -> Program:
    teacher = Net().eval().requires_grad_(False)
    journal = Journal(None if folder is None else folder / "journal.jsonl")
    run = RunContext(3, folder, journal, observer or Silent())
    return Program(teacher, copy.deepcopy(teacher).requires_grad_(True), Stage.MODULE, Target.named("x86-avx2"), run)


def resumed(folder: Path, passes: tuple[Pass, ...] = PASSES, observer: Observer | None = None) -> Program:
    folder.mkdir(exist_ok=True)
    return run_passes(program(folder, observer), task(), passes)


def assert_same(a: Program, b: Program) -> None:
    """All that a student is, but for what it cost to make."""
    states = a.student.state_dict(), b.student.state_dict()
    assert states[0].keys() == states[1].keys()
    assert not [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert (a.stage, a.plan, a.declined) == (b.stage, b.plan, b.declined)
    measured = {"seconds": 0.0, "peak_memory_bytes": 0}
    assert [r.model_copy(update=measured) for r in a.records] == [r.model_copy(update=measured) for r in b.records]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda f: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, resumed(folder)


def test_a_run_records_every_pass(whole: tuple[Path, Program]) -> None:
    folder, done = whole
    assert [r.pass_name for r in done.records] == [p.name for p in PASSES] and done.stage == Stage.INT8
    assert [r.stage for r in done.records] == ["MODULE", "MODULE", "GRAPH", *["FAKE_QUANT"] * 3, "INT8"]
    for r in done.records:
        assert r.seconds > 0 and r.macs > 0 and r.size_bytes > 0 and r.metric is not None
    assert done.records[1].details["steps"] == 3 and done.records[1].details["teacher"].startswith("live: the terms")
    assert done.records[4].details["teacher"] == "cached"
    assert done.records[-1].size_bytes < done.records[0].size_bytes
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(f"{i:02d}-{p.name}" for i, p in enumerate(PASSES)),
        "cache",
        "journal.jsonl",
    }  # no checkpoint is left


@pytest.mark.parametrize("index", [1, 2, 5, 6])
def test_a_run_killed_between_passes_is_the_same(whole: tuple[Path, Program], tmp_path: Path, index: int) -> None:
    """From what the first `index` passes saved: the rest is done again and ends in the same student."""
    for i in range(index):
        name = f"{i:02d}-{PASSES[i].name}"
        shutil.copytree(whole[0] / name, tmp_path / name)
    assert_same(resumed(tmp_path), whole[1])


def test_a_pass_that_was_changed_or_is_of_another_run_is_refused(whole: tuple[Path, Program], tmp_path: Path) -> None:
    """Each would be another student, without a word."""
    names = [f"{i:02d}-{p.name}" for i, p in enumerate(PASSES)]
    shutil.copytree(whole[0] / names[0], tmp_path / names[0])
    bare = replace(program(tmp_path), run=replace(program(tmp_path).run, identity="another run"))
    with pytest.raises(InputError, match="00-prune is of another run or pass .*delete it, and it is made anew"):
        load(bare, task(), tmp_path / names[0], REWRITES)
    shutil.copytree(whole[0] / names[4], tmp_path / names[5])
    with pytest.raises(InputError, match="05-distill is of another run or pass .04-distill"):
        load(program(tmp_path), task(), tmp_path / names[5], REWRITES)
    content = bytearray((tmp_path / names[0] / "student.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / names[0] / "student.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"student\.safetensors was changed after it was written; delete .*00-prune"):
        resumed(tmp_path)
    shutil.rmtree(tmp_path / names[0])
    shutil.copytree(whole[0] / names[0], tmp_path / names[0])
    path = tmp_path / names[0] / "program.json"
    path.write_text(path.read_text().replace('"metric": 0', '"metric": 1'))
    with pytest.raises(InputError, match=r"program\.json was changed after it was written"):
        resumed(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 6, 10])
def test_a_run_killed_in_training_is_the_same(whole: tuple[Path, Program], tmp_path: Path, steps: int) -> None:
    """In recovery, distillation and quantization-aware training (2, 3, 4, 4 steps), at the ends of epochs and amid."""

    class Killer:
        """Kills in the step after so many: it is done, and nothing of it was saved."""

        done = 0

        @contextmanager
        def task(self, description: str, total: int) -> Iterator[Advance]:
            def advance(count: int, text: str = "") -> None:
                self.done += count if text.startswith("loss") else 0
                if self.done > steps:
                    raise Killed

            yield advance

    with pytest.raises(Killed):
        resumed(tmp_path, observer=Killer())
    assert_same(resumed(tmp_path), whole[1])


@pytest.mark.slow
def test_a_run_killed_while_saving_is_the_same(
    whole: tuple[Path, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = pipeline.write_sealed, 0

    def write(path: Path, value: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise Killed
        original(path, value)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "write_sealed", write)
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)
        resumed(tmp_path)
    assert (tmp_path / ".02-capture.saving" / "student.safetensors").exists() and not (tmp_path / "02-capture").exists()
    assert_same(resumed(tmp_path), whole[1])


SCRIPT = """
import sys, importlib.util
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("law", {this!r})
law = importlib.util.module_from_spec(spec); sys.modules["law"] = law; spec.loader.exec_module(law)
law.resumed(Path({folder!r}), law.SLOW)
"""
SLOW: tuple[Pass, ...] = (replace(QAT, epochs=10.0),)


@pytest.mark.slow
def test_kill_9_in_training(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    script = SCRIPT.format(this=__file__, folder=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial, began = tmp_path / "killed" / "00-distill.partial" / "checkpoint.safetensors", time.monotonic()
    while not partial.exists() and process.poll() is None and time.monotonic() - began < 300:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and partial.exists() and not (tmp_path / "killed" / "00-distill").exists()
    assert_same(resumed(tmp_path / "killed", SLOW), resumed(tmp_path / "whole", SLOW))


def test_the_saved_student_is_the_one_in_memory(whole: tuple[Path, Program]) -> None:
    folder, done = whole
    saved = load(program(folder), task(), folder / "06-convert", REWRITES)
    x = task().example
    assert torch.equal(saved.student(*x), done.student(*x)) and saved.plan == done.plan


def test_a_student_of_a_frozen_teacher_trains_after_loading(whole: tuple[Path, Program]) -> None:
    saved = load(program(), task(), whole[0] / "00-prune", REWRITES)
    assert all(p.requires_grad for p in saved.student.parameters())


def test_a_plan_of_another_teacher_is_refused(whole: tuple[Path, Program], tmp_path: Path) -> None:
    other = replace(program(), teacher=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="does not fit this teacher"):
        load(other, task(), whole[0] / "00-prune", REWRITES)
    with pytest.raises(InputError, match=r"unknown rewrites \['cut_channels'\].*another version"):
        load(program(), task(), whole[0] / "00-prune", {})


class Break(Pass):
    """A pass with a bug."""

    name: ClassVar[str] = "break"
    consumes: ClassVar[frozenset[Stage]] = frozenset(Stage)

    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        self.change = change

    def apply(self, program: Program, task: Task) -> Program:
        return replace(program, student=self.change(copy.deepcopy(program.student)))


def poison(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.head.bias[1] = float("nan")  # type: ignore[union-attr,index]
    return module


def hidden(module: nn.Module) -> nn.Module:
    module.register_buffer("unused", torch.tensor(float("nan")))
    return module


def infinite(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.spare = nn.Parameter(torch.tensor(float("inf")))
    return module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: nn.Sequential(m, nn.Linear(4, 3)),
            r"00-break: the student's outputs are \[\(\(2, 3\).*teacher's \[\(\(2, 4\)",
        ),
        (lambda m: m.double() and nn.Sequential(Cast(), m), r"outputs are .*float64"),
        (poison, "00-break: output 0 of the student is not finite"),
        (hidden, "00-break: unused of the student is not finite"),
        (infinite, "00-break: spare of the student is not finite"),
    ],
)
def test_a_wrong_pass_is_found(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(PqkError, match=message):
        run_passes(program(tmp_path), task(), [Break(change)])
    assert not [*tmp_path.glob("00*")]  # nothing wrong is saved


def test_a_buffer_may_hold_infinities(tmp_path: Path) -> None:
    """Masks and open bounds do."""

    def masked(module: nn.Module) -> nn.Module:
        module.register_buffer("mask", torch.full((3,), float("-inf")))
        return module

    assert run_passes(program(tmp_path), task(), [Break(masked)]).student.mask[2] == float("-inf")  # type: ignore[index]


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_graph_that_does_not_lint_is_found() -> None:
    graph = torch.fx.symbolic_trace(Net().eval())
    graph.graph.output_node().append(next(iter(graph.graph.nodes)))  # an input after its use
    with pytest.raises(RuntimeError):
        verify(replace(program(), student=graph), task(), "x")


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Convert()], 'pass 1 "convert" consumes FAKE_QUANT, but the student is in stage MODULE there$'),
        ([Capture(), Capture()], 'pass 2 "capture" consumes MODULE.*stage GRAPH there, after "capture"'),
        ([Capture(), Quantize(), Convert(), QAT], 'pass 4 "distill" consumes MODULE or GRAPH or FAKE_QUANT.*INT8'),
    ],
)
def test_an_order_that_no_student_can_take_is_refused(passes: list[Pass], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_order(passes)


def test_a_legal_order_says_where_it_ends() -> None:
    assert check_order(PASSES) == Stage.INT8 and check_order([]) == Stage.MODULE


@pytest.mark.slow
@pytest.mark.parametrize("what", ["save_file", "mkdir"])
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    start = program(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot write .*No space left"):
        patch.setattr(*((files, "save_file", full) if what == "save_file" else (Path, "mkdir", full)))
        run_passes(start, task(), [Capture()])
    assert not [*tmp_path.iterdir()]
    assert run_passes(start, task(), [Capture()]).stage == Stage.GRAPH


def test_decisions_are_measured_once(tmp_path: Path) -> None:
    """A latency that changes from run to run is that of the first, and so is the student."""
    asked: list[float] = []

    def run(folder: Path, jitter: float) -> Program:
        def latency(module: nn.Module) -> float:
            asked.append(jitter)
            return jitter * sum(p.numel() for p in module.parameters())

        start = program(folder)
        oracle = SimpleNamespace(latency=latency, baseline=lambda: 800.0)
        start = replace(start, run=replace(start.run, oracle=oracle))
        return run_passes(start, task(), [Prune(latency_ratio=1.5, multiple=2, candidates=4)])

    first = run(tmp_path, 1.0)
    count = len(asked)
    shutil.rmtree(tmp_path / "00-prune")
    assert_same(run(tmp_path, 0.9), first)
    assert len(asked) == count > 0
