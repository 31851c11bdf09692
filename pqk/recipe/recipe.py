"""A recipe: the passes in order, with everything that a run needs to be repeated. TOML in, TOML out, strict.

seed = 0

[teacher]
factory = "pqk.models.resnet:resnet20"
weights = "resnet20_cifar10.safetensors"

[student]                                    # only where the student is not cut out of its teacher
factory = "pqk.models.plain:plain"

[task]
factory = "pqk.models.cifar:cifar10"

[target]
name = "x86-avx2"

[[pass]]
name = "quantize"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field
from pydantic.dataclasses import dataclass

from pqk.core.pipeline import check_order
from pqk.core.program import Pass, Stage
from pqk.errors import InputError, Reason, nearest
from pqk.passes import PASSES, Fuse
from pqk.recipe.contract import Contract
from pqk.recipe.defaults import DEFAULT, DEFAULT_PTQ, FUSE
from pqk.recipe.specs import StudentSpec, TargetSpec, TaskSpec, TeacherSpec
from pqk.recipe.strict import parse, parse_toml, plain, read_text, toml_value
from pqk.settings import CONFIG, in_words
from pqk.target.target import Target

TABLES: dict[str, type[Any]] = {
    "teacher": TeacherSpec, "student": StudentSpec, "task": TaskSpec, "target": TargetSpec,
    "contract": Contract,
}  # fmt: skip
"""the tables of a recipe beside its passes"""


@in_words
@dataclass(frozen=True, kw_only=True, config={**CONFIG, "arbitrary_types_allowed": True})
class Recipe:
    """Passes in order, and what they are applied to. `Recipe.loads(r.dumps()) == r`.

    Raises:
        InputError: there is no pass, no student can take them in this order, or the target is unknown.
    """

    passes: tuple[Pass, ...]
    """what is done to the student, in order"""
    teacher: TeacherSpec | None = None
    """the factory of the trained network; None where it is given in Python"""
    student: StudentSpec | None = None
    """the factory of a student of another shape; None: it is cut out of the teacher, or given in Python"""
    task: TaskSpec | None = None
    """the factory of the data; None where it is given in Python"""
    target: TargetSpec | None = None
    """what will run the student; this machine where None"""
    seed: int = Field(default=0, ge=0, strict=True)
    """of everything that is drawn"""
    contract: Contract | None = None
    """what must hold of the student, which is then searched for; passes that are given compete with what is found"""

    def __post_init__(self) -> None:
        if not self.passes and self.contract is None:
            raise InputError("recipe: it has no [[pass]] and no [contract]")
        check_order(self.passes)
        if self.target is not None:
            Target.named(self.target.name)

    @staticmethod
    def loads(text: str, where: str = "recipe") -> Recipe:
        """Parse TOML.

        Raises:
            InputError: something is unknown, ill-typed, impossible or out of order.
        """
        table = parse_toml(text, where)
        known = {"seed", *TABLES, "pass"}
        for key in table:
            if key not in known:
                raise InputError(f'{where}: unknown table "{key}"{nearest(key, known)}')
        passes = parse_passes(table.pop("pass", []), where)
        for key, spec in TABLES.items():
            if key in table:
                table[key] = parse(spec, table[key], f"{where}: [{key}]")
        try:
            return Recipe(passes=passes, **table)
        except InputError as error:
            raise InputError(f"{where}: {str(error).removeprefix('recipe: ')}") from error

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a TOML file.

        Raises:
            InputError: it cannot be read or is no recipe.
        """
        return Recipe.loads(read_text(path, "recipe"), str(path))

    def dumps(self) -> str:
        """As TOML, without the values that are defaults."""
        table: dict[str, Any] = {"seed": self.seed} if self.seed else {}
        for key in TABLES:
            spec = getattr(self, key)
            if spec is not None:
                table[key] = plain(spec)
        if self.passes:
            table["pass"] = [{"name": p.name, **plain(p)} for p in self.passes]
        return tomli_w.dumps(table)

    def override(self, settings: Sequence[str]) -> Recipe:
        """With `pass.key=value` settings applied; `distill@2.epochs=3` names the second of several.

        The value is TOML (a bare word is a string). Raises `InputError` for a setting that names nothing.
        """
        recipe = self
        for setting in settings:
            recipe = recipe._override(setting)
        return recipe

    def _override(self, setting: str) -> Recipe:
        place, equals, text = setting.partition("=")
        return self.change(place if equals else "", toml_value(text), f'--set "{setting}"')

    def change(self, place: str, value: Any, where: str) -> Recipe:
        """With the field at `place` changed: `pass.key`, or `pass@2.key` for the second pass of that name.

        Raises:
            InputError: the place is nowhere, or the value does not fit; the message begins with `where`.
        """
        match = re.fullmatch(r"([\w-]+)(?:@(\d+))?\.(\w+)", place)
        if match is None:
            raise InputError(f"{where}: write pass.key=value, such as distill.epochs=3")
        name, number, key = match.groups()
        if name == "task" and self.task is not None:
            return replace(self, task=replace(self.task, arguments={**self.task.arguments, key: value}))
        if name == "student" and self.student is not None:
            return replace(self, student=replace(self.student, arguments={**self.student.arguments, key: value}))
        places = [i for i, p in enumerate(self.passes) if p.name == name]
        if not places:
            raise InputError(f'{where}: the recipe has no pass "{name}"{nearest(name, {p.name for p in self.passes})}')
        if number is not None:
            if not 1 <= int(number) <= len(places):
                raise InputError(f'{where}: the recipe has {len(places)} of "{name}", numbered from 1')
            places = [places[int(number) - 1]]
        passes = list(self.passes)
        for i in places:
            passes[i] = _parse_pass({"name": name, **plain(passes[i]), key: value}, where)
        return replace(self, passes=tuple(passes))

    @staticmethod
    def default(trains: bool = True, runtime: str = "onnxruntime") -> Recipe:
        """One without a search: prune to a third of the teacher's latency, recover, quantize.

        Without training data: post-training quantization alone. For Triton, whose latency no compile measures: a third
        of the MACs, and the fused kernels.
        """
        text = DEFAULT if trains else DEFAULT_PTQ
        if runtime == "triton":
            text = text.replace("latency_ratio", "macs_ratio") + FUSE
        return Recipe.loads(text)

    def stages(self) -> list[Stage]:
        """The student's stage before each pass."""
        stages = [Stage.MODULE]
        for p in self.passes:
            stages.append(p.result_stage(stages[-1]))
        return stages[:-1]


def with_clauses(recipe: Recipe, clauses: Mapping[str, Any]) -> Recipe:
    """A recipe whose contract has these clauses, beside those that it had. Raises `InputError` for one that no contract
    can have."""
    before = {} if recipe.contract is None else plain(recipe.contract)
    return replace(recipe, contract=parse(Contract, {**before, **clauses}, "contract"))


def why_not_for_target(passes: Sequence[Pass], target: Target) -> Reason | None:
    """Why these passes do not make what `target` runs, or cannot make it here, else None."""
    if target.runtime == "triton" and passes[-1].name != Fuse.name:
        return f'target {target.name} runs fused kernels: the last pass of the recipe must be "fuse"'
    return next((reason for p in passes if (reason := p.why_not_for(target)) is not None), None)


def pass_named(name: str, where: str) -> type[Pass]:
    """The pass class of that name. Raises `InputError` naming the nearest known one."""
    for p in PASSES:
        if p.name == name:
            return p
    raise InputError(f'{where}: unknown pass "{name}"{nearest(name, (p.name for p in PASSES))}')


def parse_passes(entries: Any, where: str) -> tuple[Pass, ...]:
    """The passes of `[[pass]]` tables, in order. Raises `InputError` that says which of them is wrong."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise InputError(f"{where}: passes are tables in double brackets: [[pass]]")
    return tuple(_parse_pass(e, f"{where}: pass {i + 1}") for i, e in enumerate(entries))


def _parse_pass(entry: Mapping[str, Any], where: str) -> Pass:
    if "name" not in entry:
        raise InputError(f"{where}: a [[pass]] needs a name{nearest('', (p.name for p in PASSES))}")
    kind = pass_named(str(entry["name"]), where)
    return parse(kind, {k: v for k, v in entry.items() if k != "name"}, f'{where} "{kind.name}"')
