"""A comparison: a recipe and named variants of it, on several seeds, under one budget. TOML in, strict.

It is a recipe (without `seed`) that goes on with

baseline = "plain"                      # the variant that the others are paired with
[screen]
seeds = [0, 1]                          # every variant is trained on these
[confirm]
best = 3                                # the best on validation data, and the baseline, again
seeds = [2, 3, 4, 5, 6]                 # on these
[[variant]]
name = "plain"                          # the recipe as it stands
[[variant]]
name = "hotter"
set = { "distill@1.teacher" = { source = "ema" } }
[[variant]]
name = "another order"
[[variant.pass]]                        # instead of the recipe's passes
name = "prune"
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from pqk.core.pipeline import check_order
from pqk.core.program import Stage
from pqk.errors import InputError, nearest
from pqk.recipe.recipe import TABLES, Recipe, parse_passes
from pqk.recipe.schema import json_schema
from pqk.recipe.strict import documentation, parse, parse_toml, read_text
from pqk.settings import CONFIG, in_words, settings

NAME = r"^[^\s|][^\n|]*$"


@settings
class Screen:
    """What every variant is trained on."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """one training for each"""


@settings
class Confirm:
    """A second round, of the variants that did best in the first."""

    best: int = Field(default=3, ge=1)
    """how many go on, chosen by the metric on validation data; the baseline goes with them"""
    seeds: tuple[int, ...] = Field(min_length=2)
    """fresh seeds, so that the selection in the first round does not bias the second"""


@settings
class _Entry:
    """A `[[variant]]` table without its passes."""

    name: str = Field(pattern=NAME)
    """what it is called in the table"""
    set: dict[str, Any] = Field(default_factory=dict)
    """fields of passes that change: `"distill.terms" = […]`; `"distill@2.epochs"` names the second of several"""
    declined: str | None = Field(default=None, min_length=1)
    """why it is not run, for something that belongs into the table and does not apply"""


@in_words
@dataclass(frozen=True, config={**CONFIG, "arbitrary_types_allowed": True})
class RecipeVariant:
    """One recipe of a comparison."""

    name: str
    recipe: Recipe
    changes: Mapping[str, Any]
    """what differs from the comparison's recipe: fields of passes by place, or `pass`, a list of whole passes"""
    declined: str | None = None
    """why it is not run"""

    @property
    def stem(self) -> str:
        """Its name as a file's."""
        return "".join(c if c.isalnum() or c in "+-." else "_" for c in self.name)


@in_words
@dataclass(frozen=True, config={**CONFIG, "arbitrary_types_allowed": True})
class Comparison:
    """Variants of one recipe, and the seeds that they are run on.

    Raises:
        InputError: variants cannot be compared, naming both; or seeds are given twice.
    """

    recipe: Recipe
    """what the variants are changes of"""
    variants: tuple[RecipeVariant, ...]
    """at least two that are run"""
    baseline: str
    """the name of the variant that the others are paired with"""
    screen: Screen = field(default_factory=Screen)
    """the first round, of all variants"""
    confirm: Confirm | None = None
    """the second, of the best"""
    budget: str | None = None
    """why the variants may train for different numbers of epochs"""

    def __post_init__(self) -> None:
        stems = [v.stem for v in self.variants]
        twice = next((v.name for v in self.variants if stems.count(v.stem) > 1), None)
        if twice is not None:
            raise InputError(f'two variants are called "{twice}"')
        names = [v.name for v in self.variants]
        if self.baseline not in names:
            raise InputError(f'baseline: there is no variant "{self.baseline}"{nearest(self.baseline, names)}')
        if self.named(self.baseline).declined is not None:
            raise InputError(f'baseline: the variant "{self.baseline}" is declined, so nothing can be paired with it')
        if len(self.trained) < 2:
            raise InputError(
                f"a comparison needs at least two variants that are run; it has {[v.name for v in self.trained]}"
            )
        for seeds in (self.screen.seeds, *([] if self.confirm is None else [self.confirm.seeds])):
            if min(seeds) < 0 or len(set(seeds)) < len(seeds):
                raise InputError(f"seeds: {list(seeds)} must be different numbers from 0 on")
        if self.confirm is not None:
            again = sorted({*self.screen.seeds} & {*self.confirm.seeds})
            if again:
                raise InputError(f"[confirm] seeds: {again} are also [screen]'s; a confirmation needs fresh ones")
            if self.confirm.best >= len(self.trained):
                raise InputError(f"[confirm] best = {self.confirm.best} of {len(self.trained) - 1} beside the baseline")
        for variant in self.trained:
            self._check(variant)

    def _check(self, variant: RecipeVariant) -> None:
        where, ours = f'variant "{variant.name}"', epochs(variant.recipe)
        last = check_order(variant.recipe.passes)
        if last != Stage.INT8:
            raise InputError(f"{where}: it leaves the student in stage {last}; compared are INT8 students: convert it")
        if variant.recipe.task != self.recipe.task:
            raise InputError(f"{where}: it changes the task, and results on other data cannot be compared")
        theirs = epochs(self.named(self.baseline).recipe)
        if self.budget is None and not math.isclose(ours, theirs):
            raise InputError(
                f'{where} trains for {ours:g} epochs and the baseline "{self.baseline}" for {theirs:g}; make them '
                'equal, or say why they differ: budget = "…"'
            )

    @property
    def trained(self) -> list[RecipeVariant]:
        """The variants that are not declined."""
        return [v for v in self.variants if v.declined is None]

    def named(self, name: str) -> RecipeVariant:
        return next(v for v in self.variants if v.name == name)

    def seeded(self, seeds: tuple[int, ...]) -> Comparison:
        """Screened on other seeds.

        Raises:
            InputError: they do not fit.
        """
        return replace(self, screen=Screen(seeds=seeds))

    @staticmethod
    def loads(text: str, where: str = "comparison") -> Comparison:
        """Parse TOML.

        Raises:
            InputError: something is unknown, ill-typed or not comparable.
        """
        table = parse_toml(text, where)
        if "seed" in table:
            raise InputError(f"{where}: seed: the seeds of a comparison are those of [screen] and [confirm]")
        own: dict[str, Any] = {
            k: table.pop(k) for k in ("baseline", "budget", "screen", "confirm", "variant") if k in table
        }
        known = {*RECIPE_KEYS, "baseline", "budget", "screen", "confirm", "variant"}
        for key in table:
            if key not in known:
                raise InputError(f'{where}: unknown table "{key}"{nearest(key, known)}')
        for key in ("baseline", "budget"):
            if not isinstance(own.get(key, ""), str):
                raise InputError(f"{where}: {key} is a text (got {own[key]!r})")
        recipe = Recipe.loads(tomli_w.dumps(table), where)
        entries = own.get("variant", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{where}: variants are tables in double brackets: [[variant]]")
        variants = tuple(_variant(recipe, e, f"{where}: variant {i + 1}") for i, e in enumerate(entries))
        screen, confirm = (
            parse(kind, own[key], f"{where}: [{key}]") if key in own else None
            for key, kind in (("screen", Screen), ("confirm", Confirm))
        )
        try:
            first = variants[0].name if variants else ""
            return Comparison(
                recipe, variants, own.get("baseline", first), screen or Screen(), confirm, own.get("budget")
            )
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> Comparison:
        """Read a TOML file.

        Raises:
            InputError: it cannot be read or is no comparison.
        """
        return Comparison.loads(read_text(path, "comparison"), str(path))


RECIPE_KEYS = (*(name for name in TABLES if name != "contract"), "pass")


def epochs(recipe: Recipe) -> float:
    """How many epochs a recipe trains for, in all of its passes."""
    return sum(p.training_epochs for p in recipe.passes)


def _variant(base: Recipe, entry: Mapping[str, Any], where: str) -> RecipeVariant:
    entry = dict(entry)
    passes = entry.pop("pass", None)
    made: _Entry = parse(_Entry, entry, where)
    where = f'{where} "{made.name}"'
    recipe = base
    try:
        if passes is not None:
            recipe = replace(base, passes=parse_passes(passes, where))
        for place, value in made.set.items():
            recipe = recipe.change(place, value, f'{where}: "{place}"')
    except InputError as error:
        raise InputError(str(error) if where in str(error) else f"{where}: {error}") from error
    changes = made.set if passes is None else {"pass": passes, **made.set}
    return RecipeVariant(made.name, recipe, changes, made.declined)


def comparison_schema() -> dict[str, Any]:
    """A JSON Schema of comparison files, for editors."""
    schema = json_schema()
    passes = schema["properties"]["pass"]
    del schema["properties"]["seed"]
    texts = {
        "baseline": "the variant that the others are paired with; the first by default",
        "budget": "why the variants may train for different numbers of epochs",
    }
    schema["properties"] |= {name: {"type": "string", "description": text} for name, text in texts.items()}
    schema["properties"] |= {"screen": _table(Screen), "confirm": _table(Confirm)}
    variant = _table(_Entry)
    variant["properties"]["pass"] = passes
    schema["properties"]["variant"] = {"type": "array", "minItems": 2, "items": variant}
    return {**schema, "title": "pqk comparison", "required": ["pass", "variant"]}


def _table(kind: type[Any]) -> dict[str, Any]:
    schema = TypeAdapter(kind).json_schema()
    for name, text in documentation(kind).items():
        schema["properties"][name].setdefault("description", text)
    return schema
