"""`pqk compare`: what is compared, that a cell is the compile it stands for, and what the table says of it."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import save_file
from toy_recipe import RECIPE

from pqk.cli import app as cli
from pqk.comparison import runner as module
from pqk.comparison.config import Comparison, Confirm, comparison_schema, epochs
from pqk.comparison.results import Result, best, rows_of, significance
from pqk.comparison.runner import compare
from pqk.comparison.statistics import spread, t_quantile, t_within
from pqk.core.pipeline import run_passes
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.errors import InputError
from pqk.files import read_json
from pqk.knowledge import TERMS
from pqk.passes import Distill
from pqk.recipe.factories import load_task, load_teacher
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target

pytestmark = pytest.mark.slow

TABLES = """
[screen]
seeds = [0, 1]
[[variant]]
name = "plain KD"
[[variant]]
name = "no KD"
set = { "distill.terms" = [{ term = "cross_entropy" }] }
"""
ONE = RECIPE + TABLES.replace("[0, 1]", "[0]")
ORDER = """
[[variant]]
name = "P, Q+K"
[[variant.pass]]
name = "prune"
macs_ratio = 1.5
multiple = 8
[[variant.pass]]
name = "capture"
[[variant.pass]]
name = "quantize"
samples = 64
[[variant.pass]]
name = "distill"
[[variant.pass]]
name = "convert"
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, and the current one, with a comparison, its factories and the teacher's weights."""
    shutil.copy(Path(__file__).parents[1] / "support" / "toy.py", tmp_path)
    (tmp_path / "toy.toml").write_text(RECIPE + TABLES + ORDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    import toy as factories  # type: ignore[import-not-found]

    save_file(factories.teacher().state_dict(), tmp_path / "toy.safetensors")
    return tmp_path


def load(folder: Path, text: str = RECIPE + TABLES) -> tuple[Any, Any, Comparison]:
    """(teacher, task, comparison)."""
    comparison = Comparison.loads(text)
    teacher, task = comparison.recipe.teacher, comparison.recipe.task
    assert teacher is not None and task is not None
    return load_teacher(teacher, None, folder), load_task(task, None, folder), comparison


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that are run from now on, as "seed number name"."""
    ran: list[str] = []
    original = module.run_passes

    def run(program: Any, task: Any, passes: Any, start: int = 0) -> Any:
        ran.append(f"{program.run.seed} {start} {passes[0].name}")
        return original(program, task, passes, start)

    monkeypatch.setattr(module, "run_passes", run)
    return ran


# The file


def test_a_comparison_is_a_recipe_with_variants() -> None:
    comparison = Comparison.loads(RECIPE + TABLES + ORDER)
    assert comparison.recipe == Recipe.loads(RECIPE)
    assert [v.name for v in comparison.trained] == ["plain KD", "no KD", "P, Q+K"]
    assert comparison.baseline == "plain KD" and comparison.screen.seeds == (0, 1)
    plain, without, order = comparison.variants
    assert plain.recipe == comparison.recipe
    assert without.recipe == comparison.recipe.override(['distill.terms=[{ term = "cross_entropy" }]'])
    assert [p.name for p in order.recipe.passes] == ["prune", "capture", "quantize", "distill", "convert"]
    jsonschema.validate(tomllib.loads(RECIPE + TABLES + ORDER), comparison_schema())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[screen]", "[scren]"), 'unknown table "scren" (did you mean "screen"?)'),
        (("seeds = [0, 1]", "seads = [0, 1]"), 'unknown key "seads" (did you mean "seeds"?)'),
        (("seeds = [0, 1]", "seeds = [0, 0]"), "must be different"),
        (("seeds = [0, 1]", 'seeds = ["0"]'), "valid integer"),
        (("seeds = [0, 1]", "seeds = []"), "at least 1"),
        (('"distill.terms"', '"distil.terms"'), 'no pass "distil" (did you mean "distill"?)'),
        (('"distill.terms"', '"distill.temrs"'), 'unknown key "temrs" (did you mean "terms"?)'),
        (('"distill.terms"', '"terms"'), "pass.key=value"),
        (('"distill.terms" = [{ term = "cross_entropy" }]', '"distill.epochs" = 2'), "for 2 epochs and the baseline"),
        (('"distill.terms" = [{ term = "cross_entropy" }]', '"task.size" = 9'), "changes the task"),
        (('name = "no KD"', 'name = "plain KD"'), 'two variants are called "plain KD"'),
        (('name = "no KD"', 'nome = "no KD"'), 'unknown key "nome" (did you mean "name"?)'),
        (('name = "no KD"', 'name = "no KD"\ndeclined = "it does not apply"'), "at least two variants"),
        (("[screen]", 'baseline = "plan KD"\n[screen]'), 'did you mean "plain KD"?'),
        (("[screen]", "seed = 1\n[screen]"), "those of [screen] and [confirm]"),
        (("[screen]", "[confirm]\nseeds = [1, 2]\n[screen]"), "[1] are also [screen]'s"),
        (("[screen]", "[confirm]\nseeds = [2, 3]\nbest = 2\n[screen]"), "best = 2 of 1"),
    ],
    ids=lambda v: v[1][:24] if isinstance(v, tuple) else "",
)
def test_what_cannot_be_compared_is_refused(change: tuple[str, str], said: str) -> None:
    top = "" if "seed = 1" not in change[1] and "baseline" not in change[1] else change[1].partition("\n")[0] + "\n"
    text = top + RECIPE + (TABLES if top else TABLES.replace(*change))
    with pytest.raises(InputError) as refused:
        Comparison.loads(text, "c.toml")
    assert said in str(refused.value) and str(refused.value).startswith("c.toml")
    assert "variant" not in said or "no KD" in str(refused.value) or "plain KD" in str(refused.value)


def test_a_budget_may_differ_where_the_file_says_why() -> None:
    longer = TABLES.replace('"distill.terms" = [{ term = "cross_entropy" }]', '"distill.epochs" = 2')
    comparison = Comparison.loads('budget = "as much time"\n' + RECIPE + longer)
    assert [epochs(v.recipe) for v in comparison.variants] == [1, 2]


def test_a_student_that_is_no_integer_one_is_refused() -> None:
    with pytest.raises(InputError, match='variant "plain KD": it leaves the student in stage FAKE_QUANT'):
        Comparison.loads(RECIPE.replace('[[pass]]\nname = "convert"\n', "") + TABLES)


def test_the_comparison_of_the_terms_leaves_none_out() -> None:
    """Every term of the catalogue is in a variant of the committed comparison, or declined there with a reason."""
    path = Path(__file__).parents[2] / "models" / "knowledge_cifar10.toml"
    jsonschema.validate(tomllib.loads(path.read_text()), comparison_schema())
    comparison = Comparison.load(path)
    used = {t.term for v in comparison.trained for p in v.recipe.passes if isinstance(p, Distill) for t in p.terms}
    declined = {v.name.replace(" ", "_") for v in comparison.variants if v.declined}
    assert used | declined == {str(next(f.default for f in fields(t) if f.name == "term")) for t in TERMS}
    assert {"no KD", "label smoothing", "random teacher", "PQK"} <= {v.name for v in comparison.trained}


# Statistics


def test_student_t() -> None:
    """The quantiles of every statistics table (two-sided, 95 %), and the normal distribution as the limit."""
    for freedom, known in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert t_quantile(freedom) == pytest.approx(known, abs=5e-5)
        assert t_within(t_quantile(freedom, 0.8), freedom) == pytest.approx(0.8, abs=1e-12)
    assert t_quantile(10_000) == pytest.approx(1.9602, abs=5e-5)


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Known answer: 1, 2, 3, 4, 5 have the mean 3 and the interval 3 ± 2.7764 √(2.5 / 5)."""
    found = spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.low is not None and found.high is not None
    assert (found.low, found.high) == pytest.approx((3 - 1.9633, 3 + 1.9633), abs=1e-4)
    assert spread([2.0]) == replace(found, mean=2.0, low=None, high=None)


def cell(variant: str, seed: int, evaluation: float, validation: float | None = 0.5) -> Result:
    return Result(variant, seed, validation, evaluation, 1.0, 4, 1.0, 10, 100, 1000, [])


def test_differences_are_paired_by_seed() -> None:
    """What all variants share on a seed, however large, is not in the difference."""
    comparison = Comparison.loads(RECIPE + TABLES)
    cells = [cell("plain KD", 0, 0.3), cell("plain KD", 1, 0.9), cell("no KD", 0, 0.4), cell("no KD", 1, 1.0)]
    plain, without = rows_of(comparison, cells, (0, 1))
    assert plain.difference is None and without.difference is not None
    assert without.difference.mean == pytest.approx(0.1) and significance(without.difference) == "helps"
    assert without.evaluation.high is not None and without.evaluation.high > 1.5
    assert (
        significance(spread([-0.2, -0.2])) == "hurts"
        and significance(spread([-0.2, 0.3])) == "no significant difference"
    )
    (alone,) = rows_of(comparison, [c for c in cells if c.variant == "no KD"], (0, 1))
    assert alone.difference is None and significance(None) == "not paired"


def test_the_choice_does_not_look_at_evaluation_data() -> None:
    comparison = Comparison.loads(RECIPE + TABLES + ORDER)
    cells = [cell("plain KD", 0, 0.5, 0.9), cell("no KD", 0, 0.9, 0.1), cell("P, Q+K", 0, 0.1, 0.8)]
    assert best(rows_of(comparison, cells, (0,)), "plain KD", Confirm(best=1, seeds=(2, 3))) == ["P, Q+K"]
    blind = rows_of(comparison, [replace(c, validation=None) for c in cells], (0,))
    with pytest.raises(InputError, match="no labels"):
        best(blind, "plain KD", Confirm(best=1, seeds=(2, 3)))


# Running


def test_a_cell_is_its_recipe_compiled(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared beginning is compiled once, and the cells are as if it were not shared."""
    ran = counted(monkeypatch)
    teacher, task, comparison = load(toy, ONE + ORDER)
    document = compare(teacher, task, comparison, toy / "out")
    assert sorted(ran)[:2] == ["0 0 prune", "0 1 capture"] and len(ran) == 5 + 4 + 4
    assert document["failed"] == [] and document == read_json(toy / "out" / "comparison.json")
    assert not list((toy / "out" / ".work").rglob("0[1-9]-*")), "only what variants share is kept"
    (cell,) = (c for c in document["cells"] if c["variant"] == "no KD")
    program = run_passes(
        Program(teacher, copy.deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext(0)),
        task,
        comparison.named("no KD").recipe.passes,
    )
    assert cell["losses"] == [r.details["losses"] for r in program.records if "losses" in r.details]
    assert cell["validation"] == task.score(program.student, task.validation)
    assert cell["evaluation"] == pytest.approx(task.score(program.student, task.evaluation), abs=0.02)


@pytest.mark.full
def test_a_stopped_comparison_goes_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, task, comparison = load(toy, ONE)
    whole = compare(teacher, task, comparison, toy / "whole")
    original, calls = module.run_passes, [0]

    def stops(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:  # the third one of the second cell, which begins with its second
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "run_passes", stops)
        compare(teacher, task, comparison, toy / "out")
    assert [p.name for p in (toy / "out" / "cells").iterdir()] == ["plain_KD-0.json"]
    with pytest.raises(InputError, match="--resume"):
        compare(teacher, task, comparison, toy / "out")
    ran = counted(monkeypatch)
    again = compare(teacher, task, comparison, toy / "out", resume=True)
    assert ran == ["0 3 quantize", "0 4 convert"]
    for one, other in zip(whole["cells"], again["cells"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_cells_of_something_else_are_refused(toy: Path) -> None:
    teacher, task, comparison = load(toy, ONE)
    compare(teacher, task, comparison, toy / "out")
    other = ONE.replace("samples = 64", "samples = 32")
    with pytest.raises(InputError, match="another recipe"):
        compare(teacher, task, Comparison.loads(other), toy / "out", resume=True)
    teacher.head.weight.data *= 2
    with pytest.raises(InputError, match="another teacher"):
        compare(teacher, task, comparison, toy / "out", resume=True)


def test_one_that_fails_does_not_take_the_others_along(toy: Path) -> None:
    broken = '{ term = "kl" }, { term = "hint", point = "third" }'
    teacher, task, comparison = load(toy, ONE.replace('{ term = "cross_entropy" }', broken))
    document = compare(teacher, task, comparison, toy / "out")
    assert [(f["variant"], f["seed"]) for f in document["failed"]] == [("no KD", 0)]
    assert 'no module "third"' in document["failed"][0]["reason"]
    assert [r["variant"] for r in document["screen"]["rows"]] == ["plain KD"]


@pytest.fixture
def json_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(code: int, *arguments: str | Path) -> Any:
        capsys.readouterr()
        assert cli.run([*map(str, arguments), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.full
def test_the_command(toy: Path, json_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Screened on one seed, confirmed on two fresh ones; the document and the tables."""
    text = "\n".join([RECIPE, "[confirm]\nbest = 1\nseeds = [5, 6]", TABLES, '[[variant]]\nname = "maps"'])
    (toy / "toy.toml").write_text(text + '\ndeclined = "it has no attention maps"\n')
    document = json_of(0, "compare", "toy.toml", "--out", "out", "--seeds", "3")
    assert document["command"] == "pqk compare toy.toml --out out --seeds 3"
    assert {(c["variant"], c["seed"]) for c in document["cells"]} == {
        (name, seed) for name in ("plain KD", "no KD") for seed in (3, 5, 6)
    }
    (row,) = (r for r in document["confirm"]["rows"] if r["variant"] == "no KD")
    assert row["seeds"] == [5, 6] and row["difference"]["low"] <= row["difference"]["high"]
    assert document["declined"] == {"maps": "it has no attention maps"}
    for c in document["cells"]:
        assert 0 <= c["evaluation"] <= 1 and c["steps"] == 4 and c["parameters"] > 0 and c["macs"] > 0
        assert all(math.isfinite(loss) for losses in c["losses"] for loss in losses)
        assert (toy / "out" / "students" / f"{c['variant'].replace(' ', '_')}-{c['seed']}.onnx").stat().st_size > 0
    capsys.readouterr()
    assert cli.run(["compare", "toy.toml", "--out", "out", "--seeds", "3", "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "Screened" in shown and "Confirmed" in shown and "not run: maps: it has no attention maps" in shown
    assert "plain KD" in (toy / "out" / "comparison.md").read_text()
    assert "numbers from 0 on" in json_of(2, "compare", "toy.toml", "--out", "o", "--seeds", "a")["error"]


def test_the_schema_is_that_of_the_file(json_of: Callable[..., Any]) -> None:
    schema = json_of(0, "schema", "--comparison")
    jsonschema.Draft202012Validator.check_schema(schema)
    bad = tomllib.loads(RECIPE + TABLES.replace("seeds", "seeks"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema)
