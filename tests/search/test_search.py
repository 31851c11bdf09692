"""The search itself, on a small trained network: what it ends in, that a killed one goes on, and that it says no."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from evaluations import UNTIMED
from fitting import fitted
from torch import Tensor, nn

from pqk import ArrayData, Artifact, Contract, ContractError, Evaluation, Recipe, Task, compress
from pqk.bench.measure import QUICK
from pqk.bench.statistics import Ratio
from pqk.check import check
from pqk.errors import InputError
from pqk.passes import Capture, Convert, Quantize
from pqk.report.schema import AttributionRow, Report
from pqk.search.judge import Judge

pytestmark = pytest.mark.slow

ELSEWHERE = "arm-dotprod"
"""a target that this machine is not: nothing is timed, so that what is found does not depend on the machine"""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width)
        self.body = nn.Sequential(*(Block(width) for _ in range(3)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(x)).relu()).mean((2, 3)))


def inputs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four patterns in noise."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    patterns = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(99))
    return patterns[labels] + 0.7 * torch.randn(count, 2, 8, 8, generator=g), labels


def task(train: int = 256) -> Task:
    data = {
        name: ArrayData(*inputs(count, seed), 32)
        for name, count, seed in (("train", train or 1, 1), ("validation", 400, 2), ("evaluation", 200, 3))
    }
    return Task(data["train"] if train else None, data["evaluation"], validation=data["validation"])


def trained_teacher() -> nn.Module:
    return fitted(Net(), *inputs(512, 0), epochs=40)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return trained_teacher()


def search(teacher: nn.Module, out: Path, contract: Contract | None = None, **options: Any) -> Artifact:
    contract = contract or Contract(max_drop=2, budget="8 epochs")
    options = {"target": ELSEWHERE, "evaluation": UNTIMED, **options}
    return compress(teacher, options.pop("task", None) or task(), out=out, contract=contract, **options)


@pytest.fixture(scope="module")
def found(teacher: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("found") / "out"
    search(teacher, out)
    return out


def test_a_smaller_student_that_keeps_the_contract_ships_with_its_recipe(found: Path) -> None:
    artifact = Artifact.load(found)
    promise = artifact.report.promise
    assert promise is not None and promise.kept and promise.free == "speed"
    rows = {t.name: t for t in promise.tried}
    chosen = rows[promise.chosen]
    assert chosen.fate == "chosen" and chosen.epochs > 0 and chosen.on_front
    assert chosen.macs is not None and rows["static"].macs is not None and chosen.macs < 0.8 * rows["static"].macs
    assert [c.name for c in promise.clauses] == ["max_drop"] and promise.clauses[0].held
    assert promise.clauses[0].evaluation is not None
    assert 0 < sum(r.training_epochs for r in Recipe.load(found / "recipe.toml").passes) <= 8
    assert Recipe.load(found / "recipe.toml").contract is None
    assert "## The contract" in (found / "report.md").read_text()


def test_its_recipe_alone_makes_the_same_student(found: Path, teacher: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe.load(found / "recipe.toml")
    again = compress(teacher, task(), recipe, out=tmp_path / "again", evaluation=UNTIMED)
    assert (again.folder / "model.onnx").read_bytes() == (found / "model.onnx").read_bytes()
    assert again.report.promise is None


@pytest.mark.full  # tests/faults/ kills a compile in every run
def test_a_search_that_was_killed_goes_on_and_ends_in_the_same(
    found: Path, teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    class Stopping:
        """An observer that ends the process's work once a rung is judged."""

        def task(self, description: str, total: int) -> Any:
            from contextlib import nullcontext

            def advance(steps: int, text: str = "") -> None:
                if description == "searching" and text.startswith("width"):
                    raise Stop

            return nullcontext(advance)

    with pytest.raises(Stop):
        search(teacher, tmp_path / "out", observer=Stopping())
    ended = search(teacher, tmp_path / "out", resume=True)
    assert (ended.folder / "model.onnx").read_bytes() == (found / "model.onnx").read_bytes()
    names = [[t.name for t in Artifact.load(out).report.promise.tried] for out in (found, ended.folder)]  # type: ignore[union-attr]
    assert names[0] == names[1]
    with pytest.raises(InputError, match="another recipe"):
        search(teacher, tmp_path / "out", Contract(max_drop=3, budget="8 epochs"), resume=True)


TWO = """
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path({support!r})))
spec = importlib.util.spec_from_file_location("test_search", {this!r})
module = importlib.util.module_from_spec(spec)
sys.modules["test_search"] = module
spec.loader.exec_module(module)

if __name__ == "__main__":
    module.search(module.trained_teacher(), Path({out!r}))
"""


@pytest.mark.full
def test_two_workers_search_for_the_same_student(found: Path, tmp_path: Path) -> None:
    """Under `torchrun` candidates that do not depend on each other are trained by one process each."""
    script, out = tmp_path / "two.py", tmp_path / "out"
    support = Path(__file__).parents[1] / "support"
    script.write_text(TWO.format(this=__file__, support=str(support), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, one = Artifact.load(out).report.promise, Artifact.load(found).report.promise
    assert ours is not None and one is not None
    assert [(t.name, t.metric, t.size_bytes, t.epochs) for t in ours.tried] == [
        (t.name, t.metric, t.size_bytes, t.epochs) for t in one.tried
    ]
    assert (out / "model.onnx").read_bytes() == (found / "model.onnx").read_bytes()


@pytest.mark.full  # the command line ends so in every run
def test_where_none_keeps_it_the_nearest_is_kept_and_the_exit_code_is_4(
    teacher: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = Contract(max_drop=2, max_size_mb=0.001, budget="1 epochs")
    with pytest.raises(ContractError, match=r"no student keeps it: max_size_mb.*The front: ") as caught:
        search(teacher, tmp_path / "out", impossible)
    promise = Artifact.load(tmp_path / "out").report.promise
    assert promise is not None and not promise.kept and promise.obstacle is not None and promise.caution is None
    trained = [t.epochs for t in promise.tried if t.metric is not None and t.epochs]
    assert trained == [1.0], "the budget pays for one of the first three rungs"
    assert promise.ended is not None and promise.ended.startswith("pruning ended at width 1.4x: the 0 epochs that are")
    assert promise.ended in (tmp_path / "out" / "report.md").read_text()
    assert promise.chosen in str(caught.value)
    with pytest.raises(ContractError):
        search(teacher, tmp_path / "out", impossible, resume=True)


def test_without_training_data_integer_forms_are_what_there_is(teacher: nn.Module, tmp_path: Path) -> None:
    promise = search(teacher, tmp_path / "out", task=task(train=0)).report.promise
    assert promise is not None and promise.kept and promise.chosen == "static"
    labels = [row.label for row in Artifact.load(tmp_path / "out").report.attribution if row.variant == "student"]
    assert labels == ["student: INT8, not trained"]
    assert {t.name for t in promise.tried} == {"static", "dynamic", "float"}


@pytest.mark.full
def test_the_passes_of_a_recipe_compete(teacher: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Capture(), Quantize(samples=64), Convert()))
    promise = search(teacher, tmp_path / "out", task=task(train=0), recipe=recipe).report.promise
    assert promise is not None and "recipe" in [t.name for t in promise.tried]


@pytest.mark.full  # searches that are not timed run every time, and the demo is a timed one
def test_a_timed_search_on_this_machine_ships_what_no_form_of_the_teacher_beats(
    teacher: nn.Module, tmp_path: Path
) -> None:
    evaluation = replace(UNTIMED, latency=True)
    artifact = search(teacher, tmp_path / "out", target=None, task=task(train=0), evaluation=evaluation)
    promise = artifact.report.promise
    assert promise is not None and promise.kept
    speeds = {t.name: t.ratio for t in promise.tried if t.ratio is not None and t.fate != "breaks max_drop"}
    assert speeds[promise.chosen] >= 0.97 * max(speeds.values())


@pytest.mark.full
def test_a_budget_in_seconds_is_kept_or_said_to_be_overrun(teacher: nn.Module, tmp_path: Path) -> None:
    report = search(teacher, tmp_path / "out", Contract(max_drop=2, budget="20s")).report
    assert report.promise is not None and report.promise.ended is not None
    notes = [note for note in report.notes if "s more than its budget of 20s: " in note]
    assert len(notes) == (report.promise.seconds >= 21)


class Blind(nn.Module):
    """A student that sees the mean of every channel, which all four patterns may share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


@pytest.mark.full
def test_students_of_another_shape_compete_and_the_one_that_learns_ships(teacher: nn.Module, tmp_path: Path) -> None:
    shapes = [Blind(), Net(6), Net(7)]
    contract = Contract(max_drop=3, budget="60 epochs")
    artifact = search(teacher, tmp_path / "out", contract, student=shapes)
    promise = artifact.report.promise
    assert promise is not None and promise.kept
    rows = {t.name: t for t in promise.tried}
    assert {"Blind, static", "Net, static", "Net #2, static", "Blind, round 1", "Net, round 1"} <= rows.keys()
    assert "learned less than Net" in rows["Blind, round 1"].fate
    assert promise.chosen.startswith("Net"), {name: (t.drop, t.size_bytes, t.fate) for name, t in rows.items()}
    assert any("another shape" in note for note in artifact.report.notes)
    student = shapes[2 if promise.chosen.startswith("Net #2") else 1]
    recipe = Recipe.load(tmp_path / "out" / "recipe.toml")
    again = compress(teacher, task(), recipe, out=tmp_path / "again", evaluation=UNTIMED, student=student)
    assert (again.folder / "model.onnx").read_bytes() == (artifact.folder / "model.onnx").read_bytes()


def test_several_students_need_a_contract(teacher: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Capture(), Quantize(samples=64), Convert()))
    with pytest.raises(InputError, match="2 networks were given, and without a contract nothing chooses one"):
        compress(teacher, task(), recipe, out=tmp_path / "out", student=[Net(6), Net(7)])


@pytest.mark.full
def test_without_validation_data_half_of_the_evaluation_data_decides(teacher: nn.Module, tmp_path: Path) -> None:
    x, y = inputs(300, 3)
    given = Task(ArrayData(*inputs(256, 1), 32), ArrayData(x, y, 32))
    report = search(teacher, tmp_path / "out", Contract(max_drop=2.5, budget="2 epochs"), task=given).report
    assert report.promise is not None and report.promise.validation_samples == 150
    assert report.conditions.evaluation_samples == 150
    assert any("150 of the 300 evaluation samples" in note for note in report.notes)


BESIDE_A_TOOL = Evaluation(baselines=("onnxruntime",), runtimes=(), steps_between=False, timing=QUICK, batches=(1,))


@pytest.mark.full
def test_a_row_that_is_no_faster_when_it_is_timed_again_does_not_ship(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times in the table were those of a busy machine: the student stays, and the report says what was found."""

    def seeming(report: Report) -> list[AttributionRow]:
        return [row for row in report.attribution if row.variant == "teacher_ptq"]

    monkeypatch.setattr("pqk.compiler.dominating", seeming)
    monkeypatch.setattr("pqk.search.on_evaluation.dominating", seeming)
    monkeypatch.setattr(Judge, "faster", lambda *args, **options: Ratio(0.91, 0.85, 0.97))
    contract = Contract(max_drop=3, budget="1 epochs")
    artifact = search(teacher, tmp_path / "out", contract, target=None, task=task(train=0), evaluation=BESIDE_A_TOOL)
    promise = artifact.report.promise
    assert promise is not None and promise.chosen != "INT8 by PTQ alone" and promise.dominated_by is None
    assert "tool" not in artifact.manifest
    said = [note for note in artifact.report.notes if "timed again in turn" in note]
    assert len(said) == 1 and "INT8 by PTQ alone is 0.91x as fast as what ships (0.85 to 0.97)" in said[0]


@pytest.mark.full
def test_a_row_of_another_tool_that_beats_the_student_ships(
    teacher: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What beats it is told here, once: whether a tool is better depends on the machine."""
    told: list[str] = []

    def better(report: Report) -> list[AttributionRow]:
        rows = [row for row in report.attribution if row.variant == "teacher_ptq"]
        told.append(report.promise.chosen if report.promise is not None else "")
        return rows if len(told) == 1 else []

    monkeypatch.setattr("pqk.compiler.dominating", better)
    monkeypatch.setattr(Judge, "faster", lambda *args, **options: Ratio(1.5, 1.4, 1.6))
    out = tmp_path / "out"
    artifact = search(
        teacher, out, Contract(max_drop=3, budget="1 epochs"), target=None, task=task(train=0), evaluation=BESIDE_A_TOOL
    )
    promise, report = artifact.report.promise, artifact.report
    assert promise is not None and promise.chosen == told[1] == "INT8 by PTQ alone" != told[0]
    assert [t.fate for t in promise.tried if t.name == promise.chosen] == [
        f"ships: on evaluation data better in metric and speed than {told[0]}"
    ]
    kinds = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert "QuantizeLinear" in kinds and artifact.manifest["tool"] == "teacher_ptq"
    rows = {row.variant: row for row in report.attribution}
    assert (
        rows["student"].metric == rows["teacher_ptq"].metric and rows["student"].label == "student: INT8 by PTQ alone"
    )
    assert any("as that tool wrote it" in note for note in report.notes)
    x, y = inputs(200, 3)
    answers = torch.from_numpy(artifact.run(x))
    assert float((answers.argmax(1) == y).double().mean()) == pytest.approx(rows["student"].metric)
    floats = artifact.rebuild(teacher)
    with torch.no_grad():
        assert torch.allclose(floats(x), teacher(x), atol=1e-4)


@pytest.mark.parametrize(
    ("contract", "options", "message"),
    [
        (Contract(min_speedup=2), {}, "leave out min_speedup"),
        (Contract(max_drop=0.5), {}, "0.5 points cannot be told on 400 validation samples.*600 samples are needed"),
        (Contract(max_drop=150), {}, "which has 100"),
        (Contract(budget="0.001s"), {}, r"too small for one candidate.* would do for it, and "),
        (Contract(budget="0.5 epochs"), {}, r'too small for one candidate.*8 steps here.*give "1 epochs" or more'),
        (Contract(), {"target": "cuda-sm80"}, "for ONNX Runtime"),
        (Contract(min_speedup=3000), {"target": None}, "min_speedup = 3000 is out of reach.*computes nothing takes"),
        (Contract(max_drop=2), {"student": [Net(8), nn.Linear(2, 4)]}, "student: "),
    ],
)
def test_bad_contracts_are_refused_before_anything_is_trained(
    teacher: nn.Module, tmp_path: Path, contract: Contract, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        search(teacher, tmp_path / "out", contract, **options)
    assert not list((tmp_path / "out").rglob("*distill*"))


def test_check_of_a_contract_rehearses_a_first_student_and_leaves_the_teacher_as_it_was() -> None:
    net = Net().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found = check(net, task(), Recipe(passes=(), contract=Contract(max_drop=2)))
    assert [row.name for row in found.passes] == ["prune", "distill", "capture", "quantize", "convert"]
    assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
