"""A compile that begins with a student of another shape: the same passes, and nothing says that it was cut."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import TABLE, UNTIMED
from torch import Tensor, nn

from pqk import check as rehearsal
from pqk import compress
from pqk.check import check
from pqk.cli import app as cli
from pqk.cli import views
from pqk.comparison.config import Comparison
from pqk.comparison.runner import compare
from pqk.copies import copy_of
from pqk.core.costs import count_macs, count_parameters
from pqk.core.pipeline import rebuild
from pqk.core.program import Program, replay
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.artifact import Artifact
from pqk.errors import InputError
from pqk.knowledge import CrossEntropy, Hint, KLDivergence
from pqk.knowledge.pairs import suggest_pairs
from pqk.models.plain import branched, plain
from pqk.passes import REWRITES, Capture, Convert, Distill, JointSearch, Prune, Quantize
from pqk.recipe.recipe import Recipe, TargetSpec
from pqk.rehearsal import rehearse
from pqk.target.target import Target
from pqk.task.task import Task

pytestmark = pytest.mark.slow

TERMS = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
POINTS = Hint(point="stage2", teacher_point="body.3", projector_kind="conv1x1")
TARGET = Target.named("x86-avx2")
RECIPE = Recipe(
    passes=(
        Prune(macs_ratio=1.2, multiple=4),
        Distill(epochs=1, terms=(*TERMS, POINTS), checkpoint_seconds=1e-9),
        Capture(),
        Quantize(samples=16),
        Distill(epochs=1, learning_rate=1e-3, checkpoint_seconds=1e-9),
        Convert(),
    ),
    seed=5,
    target=TargetSpec(name="x86-avx2"),
)
WHOLE = dataclasses.replace(RECIPE, passes=RECIPE.passes[1:])
"""without a pruning"""


class Net(nn.Module):
    """A teacher that has nothing in common with its students but inputs and outputs: [B, 3, 8, 8] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def student(seed: int = 0, width: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return plain(width, (2, 1), classes=4, **options)


def task(**options: Any) -> Task:
    x = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = ArrayData(x, torch.arange(48) % 4, 8)
    parts = [whole.subset(torch.arange(i, i + 16), augmented=False) for i in (0, 16, 32)]
    return Task(*parts[:2], validation=parts[2], **options)


def compiled(out: Path, recipe: Recipe = RECIPE, evaluation: Any = UNTIMED, **given: Any) -> Artifact:
    return compress(Net(), task(), recipe, out=out, evaluation=evaluation, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished compile of a student that is pruned, too."""
    out = tmp_path_factory.mktemp("given") / "out"
    compiled(out, student=student())
    return out


def test_it_is_the_student_and_the_report_says_so(whole: Path) -> None:
    artifact = Artifact.load(whole)
    assert artifact.given and artifact.manifest["student"] != artifact.manifest["teacher"]
    report, given = artifact.report, student()
    (note,) = (n for n in report.notes if "of another shape" in n)
    example = task().example
    for model in (given, Net()):
        assert f"{count_parameters(model):,} parameters" in note
        assert f"{count_macs(model, example) / 1e6:.1f} million MACs" in note
    pruning = report.passes[0].details
    assert pruning["budget"]["teacher"] == count_macs(Net(), example)
    assert pruning["before"]["parameters"] == count_parameters(given)
    assert pruning["after"]["macs"] * 1.2 <= count_macs(Net(), example)


def test_the_student_is_rebuilt_from_what_was_given(whole: Path) -> None:
    artifact = Artifact.load(whole)
    x = task().example[0]
    again = artifact.rebuild(student=student(seed=9))(x)  # its weights do not matter
    torch.testing.assert_close(again, torch.from_numpy(artifact.run(x)), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="not cut out of it.*pass the module that it was given as student"):
        artifact.rebuild(Net())
    with pytest.raises(InputError, match="given as a module in Python"):
        artifact.rebuild()
    with pytest.raises(InputError, match="does not fit this student"):
        artifact.rebuild(student=plain(8, (2,), classes=4))


def test_a_resume_needs_the_same_student(whole: Path, tmp_path: Path) -> None:
    """Its architecture and its weights are part of what the run is a run of; so is that there was none."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for given in ({"student": student(seed=1)}, {"student": student(width=16)}, {}):
        with pytest.raises(InputError, match="a run with another student; it cannot be continued"):
            compiled(out, resume=True, **given)
    compiled(out, resume=True, student=student())  # which is finished


def test_the_passes_of_a_killed_run_are_loaded_again(whole: Path, tmp_path: Path) -> None:
    """They begin with a copy of what was given: the student is the same bit for bit, from any pass on."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in [*Artifact.load(whole).manifest["files"], "manifest.json"]:
        (out / name).unlink()
    shutil.rmtree(out / ".work" / "04-distill")
    shutil.rmtree(out / ".work" / "05-convert")
    again = compiled(out, resume=True, student=student())
    assert (out / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    assert again.plan == Artifact.load(whole).plan


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile of a recipe that names its student and does not prune, with every row."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "shapes_of_a_test.py").write_text(
        "from pqk.models.plain import branched\n\n\ndef shape(width):\n    return branched(width, (2, 1), classes=4)\n"
    )
    recipe = WHOLE.dumps() + '[student]\nfactory = "shapes_of_a_test:shape"\narguments = { width = 8 }\n'
    (folder / "recipe.toml").write_text(recipe)
    evaluation = dataclasses.replace(TABLE, controls=("student_from_scratch",))
    compress(Net(), task(), folder / "recipe.toml", out=folder / "out", evaluation=evaluation)
    return folder


def test_the_table_has_rows_of_its_own(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was given, and what distillation made of it; nothing is called pruned, and nothing was."""
    report = Artifact.load(table / "out").report
    rows = {row.variant: row for row in report.attribution}
    assert {"given", "given_distilled"} <= rows.keys()
    assert not {"pruned", "pruned_distilled"} & rows.keys()
    for name in ("given", "given_distilled"):
        assert rows[name].latency_ms and rows[name].metric is not None and rows[name].macs
    assert rows["student"].macs and rows["given"].macs and rows["student"].macs < rows["given"].macs  # one branch
    scratch = rows["student_from_scratch"]  # a control: the same shape again, not the teacher's
    assert scratch.metric is not None and scratch.macs == rows["student"].macs
    for text in ((table / "out" / "report.md").read_text(), *report.notes):
        assert "pruned" not in text and "survive" not in text
    assert "student of another shape, distilled, float" in (table / "out" / "report.md").read_text()
    assert cli.run(["inspect", str(table / "out")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of a student of another shape, which was given and not cut out of its teacher" in shown


def test_a_recipe_s_student_is_made_alike_in_every_run(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random weights are drawn from the recipe's seed, so a run goes on; and a rebuild asks the factory."""
    artifact = compress(Net(), task(), table / "recipe.toml", out=table / "out", evaluation=TABLE, resume=True)
    monkeypatch.syspath_prepend(str(table))
    x = task().example[0]
    torch.testing.assert_close(artifact.rebuild()(x), torch.from_numpy(artifact.run(x)), atol=1e-5, rtol=0)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).double() @ torch.ones(3, 4, dtype=torch.float64)


class Named(nn.Module):
    def __init__(self, **outputs: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(3, size) for name, size in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(x.mean((2, 3))) for name, head in self.heads.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (plain(8, (1,), classes=5), r"its output logits is \[2, 5\] float32 and the teacher's \[2, 4\] float32"),
        (Double(), r"its output logits is \[2, 4\] float64 and the teacher's \[2, 4\] float32"),
        (Named(logits=4), r"its outputs are dict of logits \[2, 4\] float32 and the teacher's logits \[2, 4\] float32"),
        (plain(8, (1,), channels=1), "student: the example inputs .* do not fit it"),
        (plain(8, (1,), classes=4).half(), "student: stem.0.weight is in half precision"),
        ("plain", "student: a str is no torch module"),
    ],
    ids=["classes", "dtype", "structure", "inputs", "half", "no module"],
)
def test_a_student_that_does_not_fit_is_refused_before_anything_runs(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        compiled(tmp_path / "out", student=given)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=message):
        check(Net(), task(), RECIPE, student=given)


class AtOneSize(nn.Module):
    """Right on the example, and at no other size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((1, 2)))


def test_a_student_must_fit_inputs_of_other_sizes_too(tmp_path: Path) -> None:
    wide = {"wide": (torch.randn(2, 3, 8, 16),)}
    with pytest.raises(InputError, match="student: the wide inputs .* do not fit it"):
        compress(
            Net(),
            task(dynamic_axes={"input": {3: "width"}}, timed=wide),
            RECIPE,
            out=tmp_path / "out",
            student=AtOneSize(),
        )


def test_channels_of_such_a_student_were_never_the_teacher_s(tmp_path: Path) -> None:
    """A term that selects surviving channels is refused in words that do not speak of survivors."""
    terms = (*TERMS, Hint(point="stage2", teacher_point="body.3"))
    recipe = dataclasses.replace(WHOLE, passes=(Distill(epochs=1, terms=terms), *WHOLE.passes[1:]))
    with pytest.raises(InputError, match="not known which teacher channels the student has there.*conv1x1"):
        compiled(tmp_path / "out", recipe, student=student())


def test_pairs_are_suggested_and_hold(tmp_path: Path) -> None:
    """The points that `suggest_pairs` proposes for two architectures are points of a recipe's terms."""
    given = student()
    pairs = suggest_pairs(Net(), given, task().example)
    assert pairs and all(p.projector_kind == "conv1x1" for p in pairs)
    hints = [Hint(point=p.point, teacher_point=p.teacher_point, projector_kind="conv1x1") for p in pairs]
    program = Program.begin(Net().eval().requires_grad_(False), TARGET, RunContext(), given.eval())
    after = Distill(epochs=0.5, terms=(*TERMS, *hints)).apply(program, task())
    assert after.details["losses"] and after.origin is given


@pytest.mark.parametrize("depth", [False, True], ids=["width", "depth"])
def test_such_a_student_is_pruned_towards_the_teacher_s_budget(depth: bool) -> None:
    """Widths and the floor are counted in the student that was given, the budget in the teacher."""
    teacher = Net().eval().requires_grad_(False)
    given = branched(16, (2, 1), classes=4).eval().requires_grad_(False)
    assert count_macs(given, task().example) > 2 * count_macs(teacher, task().example)
    program = Program.begin(teacher, TARGET, RunContext(), given)
    after = Prune(macs_ratio=1.03, multiple=4, floor=0.5, depth=depth).apply(program, task())
    assert after.details["budget"]["reached"] >= 1.03
    widths = after.details["widths"]
    assert widths and all(student < uncut and student >= uncut / 2 for uncut, student in widths.values())
    assert all(uncut == given.get_submodule(path).weight.shape[0] for path, (uncut, _) in widths.items())
    branching = count_macs(after.student, task().example)
    captured = Capture().apply(after, task())  # its branches, which were cut alike, are one convolution
    state, x = captured.student.state_dict(), task().example[0]
    again = rebuild(given, task().example, captured.plan, REWRITES, state, "student")
    torch.testing.assert_close(again(x), captured.student(x))
    assert count_macs(captured.student, (x,)) < branching


def test_a_joint_search_trains_what_is_deployed() -> None:
    """Branches are one convolution before it, or what it learns would have no module to go back to."""
    given = branched(8, (2, 1), classes=4).eval().requires_grad_(False)
    program = Program.begin(Net().eval().requires_grad_(False), TARGET, RunContext(), given)
    joint = JointSearch(macs_ratio=1.1, multiple=4, epochs=2, samples=16, rounds=1)
    after = joint.apply(program, task())
    assert after.plan[0].function == "take_deployed_forms"
    again = rebuild(given, task().example, after.plan, REWRITES, after.student.state_dict(), "student")
    x = task().example[0]
    torch.testing.assert_close(again(x), after.student.eval()(x))
    untrained = replay(copy_of(given, "student"), task().example, after.plan, REWRITES).state_dict()
    weights = {n: p for n, p in after.student.named_parameters() if p.dim() == 4}
    assert len(weights) == 4 and not any(torch.equal(p, untrained[name]) for name, p in weights.items())


def test_the_rehearsal_is_of_the_student_that_was_given() -> None:
    program = rehearse(Net().eval(), task(), WHOLE.passes, TARGET, student=student().eval())
    assert "stage2.0.0.weight_int8" in program.student.state_dict()


def test_check_says_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "THREADS", 1)
    given = student()
    found = check(Net(), task(), RECIPE, student=given)
    assert found.problems == [] and found.given is not None
    assert found.given["parameters"] == count_parameters(given)
    assert {g["name"].partition(".")[0] for g in found.groups} <= {"stem", "stage1", "stage2", "linear"}
    text = " ".join(map(str, views.findings({"recipe": "r", **dataclasses.asdict(found)})))
    assert f"student of another shape, not cut out of its teacher: {count_parameters(given)} parameters" in text
    json.dumps(dataclasses.asdict(found))


def test_a_comparison_begins_with_it(tmp_path: Path) -> None:
    variants = '[[variant]]\nname = "plain"\n[[variant]]\nname = "hot"\nset = { "distill@1.learning_rate" = 0.02 }\n'
    comparison = Comparison.loads(
        "".join(line for line in WHOLE.dumps().splitlines(True) if not line.startswith("seed")).join(
            ["[screen]\nseeds = [0]\n", variants]
        )
    )
    document = compare(Net(), task(), comparison, tmp_path / "out", student=student())
    assert not document["failed"]
    assert all(cell["macs"] < count_macs(student(), task().example) * 1.01 for cell in document["cells"])
    with pytest.raises(InputError, match="another teacher, student or target"):
        compare(Net(), task(), comparison, tmp_path / "out", student=student(seed=3), resume=True)
