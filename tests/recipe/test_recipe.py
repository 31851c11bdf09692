"""Recipes: TOML in and out, strict, and refused before anything runs."""

from __future__ import annotations

import functools
import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqk.errors import InputError
from pqk.knowledge import AttentionTransfer, CrossEntropy, Hint, KLDivergence, LogitMSE
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.recipe.recipe import Recipe, parse_passes
from pqk.recipe.schema import json_schema
from pqk.recipe.specs import StudentSpec, TargetSpec, TaskSpec, TeacherSpec

MODELS_FOLDER = Path(__file__).parents[2] / "models"
FILES = sorted(MODELS_FOLDER.glob("*.toml"))
MODELS = [p for p in FILES if "[[variant]]" not in p.read_text()]  # the others are comparisons

positive = st.floats(1e-6, 1e6)
terms = st.one_of(
    st.builds(CrossEntropy, weight=positive),
    st.builds(KLDivergence, weight=positive, temperature=positive),
    st.builds(LogitMSE, weight=positive, centred=st.booleans()),
    st.builds(AttentionTransfer, weight=positive, point=st.text("abc.", min_size=1)),
    st.builds(Hint, point=st.text(min_size=1), teacher_point=st.none() | st.text(min_size=1)),
)
distills = st.builds(
    Distill,
    epochs=positive,
    learning_rate=positive,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    clip=st.none() | positive,
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "one_cycle", "constant"]),
    terms=st.lists(terms, min_size=1, max_size=3).map(tuple),
)
values: st.SearchStrategy[Any] = st.one_of(
    st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text()
)
names = st.text("abcdefgh_", min_size=1)
recipes = st.builds(
    Recipe,
    passes=st.lists(distills, max_size=2).map(lambda d: (*d, Capture(), Quantize(), Convert())),
    teacher=st.none() | st.builds(TeacherSpec, factory=st.just("a.b:c"), arguments=st.dictionaries(names, values)),
    student=st.none() | st.builds(StudentSpec, factory=st.just("a.b:c"), arguments=st.dictionaries(names, values)),
    task=st.none() | st.builds(TaskSpec, factory=st.just("a:c"), arguments=st.dictionaries(names, values)),
    target=st.none() | st.builds(TargetSpec, name=st.just("x86-avx2")),
    seed=st.integers(0, 2**40),
)


@functools.cache
def schema() -> Any:
    return jsonschema.validators.validator_for(found := json_schema())(found)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(recipes)
def test_a_recipe_survives_toml(recipe: Recipe) -> None:
    assert Recipe.loads(recipe.dumps()) == recipe
    schema().validate(tomllib.loads(recipe.dumps()))


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_the_recipes_here_survive_toml_and_fit_the_schema(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.loads(recipe.dumps()) == recipe
    schema().validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize("runtime", ["onnxruntime", "triton"])
@pytest.mark.parametrize("trains", [True, False])
def test_the_default_recipe_survives_toml(trains: bool, runtime: str) -> None:
    recipe = Recipe.default(trains, runtime)
    assert recipe.passes[-1].name == ("fuse" if runtime == "triton" else "convert")
    assert Recipe.loads(recipe.dumps()) == recipe
    assert any(isinstance(p, Distill) for p in recipe.passes) == trains


DISTILL = '[[pass]]\nname = "distill"\n'
REFUSED = [
    ("", r"it has no \[\[pass\]\]"),
    ("[[pass]", "not readable as TOML"),
    ("sed = 3\n" + DISTILL, 'unknown table "sed" .*"seed"'),
    ('[[passes]]\nname = "prune"', 'unknown table "passes" .*"pass"'),
    ('[pass]\nname = "prune"', "double brackets"),
    ("[[pass]]\nepochs = 3", "pass 1: a .* needs a name .*distill"),
    ('[[pass]]\nname = "distil"', 'pass 1: unknown pass "distil" .*"distill"'),
    (DISTILL + "epochz = 3", 'pass 1 "distill": unknown key "epochz" .*"epochs"'),
    (DISTILL + 'epochs = "3"', "epochs: .*valid number .*'3'"),
    (DISTILL + "epochs = true", "epochs: .*valid number"),
    (DISTILL + "epochs = 2026-01-01", "epochs: .*valid number"),
    (DISTILL + "epochs = 0", "epochs: .*greater than 0"),
    (DISTILL + "epochs = inf", "epochs: .*finite"),
    (DISTILL + "epochs = nan", "epochs: .*"),
    (DISTILL + "warmup = 1.5", "warmup: .*less than 1"),
    (DISTILL + 'optimizer = "sgdd"', "optimizer: .*'sgd' or 'adamw'"),
    (DISTILL + "terms = []", "no term has a weight above 0"),
    (DISTILL + 'terms = [{ term = "kl", weight = 0 }]', "no term has a weight above 0"),
    (DISTILL + 'terms = [{ term = "kl", weight = -1 }]', "weight: .*greater than or equal to 0"),
    (DISTILL + 'terms = [{ term = "kl", temperature = 0 }]', "temperature: .*greater than 0"),
    (DISTILL + 'terms = [{ term = "kll" }]', 'unknown term "kll" .*"kl"'),
    (DISTILL + "terms = [{ weight = 1 }]", 'terms.0: it needs a key "term"'),
    (DISTILL + 'terms = [{ term = "kl", temprature = 2 }]', 'unknown key .*temprature" .*"temperature"'),
    (DISTILL + 'terms = [{ term = "hint" }]', "point: Field required|point.*[Mm]issing"),
    ('[[pass]]\nname = "convert"', r'pass 1 "convert" consumes FAKE_QUANT.*stage MODULE'),
    (
        '[[pass]]\nname = "capture"\n[[pass]]\nname = "prune"\nmacs_ratio = 2.0',
        r'pass 2 "prune" consumes MODULE.*stage GRAPH there, after "capture"',
    ),
    ("seed = -1\n" + DISTILL, "seed: .*greater than or equal to 0"),
    ('seed = "3"\n' + DISTILL, "seed: .*valid integer"),
    ("seed = 1.5\n" + DISTILL, "seed: .*valid integer"),
    ("teacher = 3\n" + DISTILL, r"\[teacher\]"),
    ('[teacher]\nfactory = "resnet"\n' + DISTILL, r"\[teacher\]: factory: .*pattern"),
    ('[teacher]\nfactory = "a:b"\nweight = "w"\n' + DISTILL, 'unknown key "weight" .*"weights"'),
    ('[target]\nname = "x86-avx3"\n' + DISTILL, 'unknown target "x86-avx3" .*"x86-avx2"'),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_is_wrong_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^recipe: .*{message}|^recipe: {message}") as caught:
        Recipe.loads(text)
    assert "recipe: recipe" not in str(caught.value) and "\n" not in str(caught.value)


def test_old_names_of_keys_go_on_working() -> None:
    """In recipes and in settings; what is written has the present names."""
    old, new = (
        Recipe.loads(DISTILL + f'terms = [{{ term = "kl", {up} = 0.3, {down} = 0.1 }}, {{ term = "cross_entropy" }}]')
        for up, down in (("rise", "fall"), ("ramp_up", "ramp_down"))
    )
    assert old == new and isinstance(old.passes[0], Distill)
    assert (old.passes[0].terms[0].ramp_up, old.passes[0].terms[0].ramp_down) == (0.3, 0.1)
    assert "ramp_up = 0.3" in old.dumps() and "rise" not in old.dumps()
    changed = Recipe.loads(DISTILL).override(['distill.terms=[{ term = "kl", rise = 0.3 }]'])
    assert isinstance(changed.passes[0], Distill) and changed.passes[0].terms == (KLDivergence(ramp_up=0.3),)
    with pytest.raises(InputError, match='pass 1 "distill": terms: "rise" is "ramp_up" now, and both are given'):
        Recipe.loads(DISTILL + 'terms = [{ term = "kl", rise = 0.3, ramp_up = 0.2 }]')


def test_recipes_in_committed_results_are_readable() -> None:
    """Under whatever names their keys had when they were written."""
    texts = [json.loads(path.read_text()) for path in sorted((MODELS_FOLDER / "results").glob("*.json"))]
    recipes = [t["recipe"] for t in texts if isinstance(t, dict) and isinstance(t.get("recipe"), str)]
    assert recipes and all(Recipe.loads(text).passes for text in recipes)
    compared = [t for t in texts if isinstance(t, dict) and "variants" in t and "recipe" in t]
    assert compared
    for document in compared:
        recipe = Recipe.loads(document["recipe"])
        for changes in document["variants"].values():
            for place, value in changes.items():
                if place == "pass":
                    assert parse_passes(value, "pass")
                else:
                    recipe.change(place, value, place)


def test_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the recipe .*none\.toml"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"cannot read the recipe .*r\.toml"):
        Recipe.load(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "convert"')
    with pytest.raises(InputError, match=r'^/.*r\.toml: pass 1 "convert"'):
        Recipe.load(tmp_path / "r.toml")


def test_settings_override() -> None:
    recipe = Recipe.default()

    def epochs(*texts: str) -> list[float]:
        return [p.epochs for p in recipe.override(texts).passes if isinstance(p, Distill)]

    assert epochs("distill.epochs=3") == [3, 3]
    assert epochs("distill@2.epochs=3") == [10, 3]
    assert epochs("distill.epochs=3", "distill@1.epochs=7") == [7, 3]
    changed = recipe.override(
        ['distill@2.terms=[{term = "logit_mse"}]', "distill.optimizer=adamw", "prune.latency_ratio=2"]
    )
    last = changed.passes[4]
    assert isinstance(last, Distill) and last.terms == (LogitMSE(),) and last.optimizer == "adamw"
    assert isinstance(changed.passes[0], Prune) and changed.passes[0].latency_ratio == 2
    assert recipe == Recipe.default()
    tasked = Recipe(passes=recipe.passes, task=TaskSpec(factory="a:b", arguments={"x": 1})).override(["task.limit=5"])
    assert tasked.task is not None and tasked.task.arguments == {"x": 1, "limit": 5}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=3", "write pass.key=value"),
        ("distill.epochs", "write pass.key=value"),
        ("distil.epochs=3", 'no pass "distil" .*"distill"'),
        ("distill@3.epochs=3", 'has 2 of "distill"'),
        ("distill@0.epochs=3", 'has 2 of "distill"'),
        ("distill.epoch=3", 'unknown key "epoch" .*"epochs"'),
        ("distill.epochs=many", "valid number .*many"),
        ("distill.epochs=-1", "greater than 0"),
    ],
)
def test_a_setting_that_fits_nothing_is_refused(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=f"--set .*{message}"):
        Recipe.default().override([setting])


@pytest.mark.parametrize(
    "text", ["sed = 3", "pass = []", '[[pass]]\nname = "nothing"', DISTILL + "epochs = 0", "seed = -1\n" + DISTILL]
)
def test_the_schema_refuses_what_the_parser_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        schema().validate(tomllib.loads(text))
