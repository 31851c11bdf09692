"""A recipe: the passes in order, with everything that a run needs to be repeated. TOML in, TOML out, strict.

seed = 0

[teacher]
factory = "pqk.models.resnet:resnet20"
weights = "resnet20_cifar10.safetensors"

[task]
factory = "pqk.models.cifar:cifar10"

[target]
name = "x86-avx2"

[[pass]]
name = "quantize"
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pqk.core.pipeline import check_order
from pqk.core.program import CONFIG, Pass, Stage
from pqk.errors import InputError, nearest
from pqk.knowledge import SOURCES, TERMS
from pqk.passes import PASSES, Fuse, Quantize
from pqk.target.target import Target

FACTORY = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TeacherSpec:
    """Where the teacher comes from. Only compress, check and rebuild import the factory."""

    factory: str = Field(pattern=FACTORY)
    """`module:function` that returns the untrained module, such as "pqk.models.resnet:resnet56" """
    arguments: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the factory"""
    weights: str | None = None
    """a safetensors file, looked for beside the recipe and in the data folder"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TaskSpec:
    """Where data, metric and loss come from."""

    factory: str = Field(pattern=FACTORY)
    """`module:function(data_folder, **arguments)` that returns a `pqk.Task`; one with a parameter `teacher` gets it"""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """keyword arguments of the factory"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TargetSpec:
    """The machine that will run the student; this one where no table is given."""

    name: str
    """such as "x86-avx2"; `pqk doctor` lists them"""


@dataclass(frozen=True, kw_only=True, config={**CONFIG, "arbitrary_types_allowed": True})
class Recipe:
    """Passes in order, and what they are applied to. `Recipe.loads(r.dumps()) == r`."""

    passes: tuple[Pass, ...]
    teacher: TeacherSpec | None = None
    task: TaskSpec | None = None
    target: TargetSpec | None = None
    seed: int = Field(default=0, ge=0, strict=True)

    def __post_init__(self) -> None:
        if not self.passes:
            raise InputError("recipe: it has no [[pass]]")
        check_order(self.passes)
        if self.target is not None:
            Target.named(self.target.name)

    @staticmethod
    def loads(text: str, where: str = "recipe") -> Recipe:
        """Parse TOML. Raises `InputError` for anything unknown, ill-typed, impossible or out of order."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{where}: not readable as TOML: {error}") from error
        known = {"seed", "teacher", "task", "target", "pass"}
        for key in table:
            if key not in known:
                raise InputError(f'{where}: unknown table "{key}"{nearest(key, known)}')
        passes = parse_passes(table.pop("pass", []), where)
        for key, spec in (("teacher", TeacherSpec), ("task", TaskSpec), ("target", TargetSpec)):
            if key in table:
                table[key] = parse(spec, table[key], f"{where}: [{key}]")
        try:
            return Recipe(passes=passes, **table)
        except ValidationError as error:
            raise InputError(f"{where}: {explain(error, Recipe)}") from error
        except InputError as error:
            raise InputError(f"{where}: {error}" if where != "recipe" else str(error)) from error

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a TOML file. Raises `InputError` where it cannot be read or is no recipe."""
        return Recipe.loads(read_text(path, "recipe"), str(path))

    def dumps(self) -> str:
        """As TOML, without the values that are defaults."""
        table: dict[str, Any] = {"seed": self.seed} if self.seed else {}
        for key in ("teacher", "task", "target"):
            spec = getattr(self, key)
            if spec is not None:
                table[key] = plain(spec)
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
        return self.change(place if equals else "", _toml_value(text), f'--set "{setting}"')

    def change(self, place: str, value: Any, where: str) -> Recipe:
        """With the field at `place` changed: `pass.key`, or `pass@2.key` for the second pass of that name.

        Raises `InputError`, which begins with `where`, for a place that is nowhere and for a value that does not fit.
        """
        match = re.fullmatch(r"([\w-]+)(?:@(\d+))?\.(\w+)", place)
        if match is None:
            raise InputError(f"{where}: write pass.key=value, such as distill.epochs=3")
        name, number, key = match.groups()
        if name == "task" and self.task is not None:
            return replace(self, task=replace(self.task, arguments={**self.task.arguments, key: value}))
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
        """What `compress` does where no recipe is given: prune to a third of the teacher's latency, recover, quantize.

        Without training data: post-training quantization alone. For Triton, whose latency no compile measures: a third
        of the MACs, and the fused kernels.
        """
        text = _DEFAULT if trains else _DEFAULT_PTQ
        if runtime == "triton":
            text = text.replace("latency_ratio", "macs_ratio") + _FUSE
        return Recipe.loads(text)

    def stages(self) -> list[Stage]:
        """The student's stage before each pass."""
        stages = [Stage.MODULE]
        for p in self.passes:
            stages.append(p.result_stage(stages[-1]))
        return stages[:-1]


def read_text(path: str | Path, what: str) -> str:
    """A file in UTF-8. Raises `InputError`, naming it as `what`, where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path}: {error}") from error


def unfit(passes: Sequence[Pass], target: Target) -> str | None:
    """Why these passes do not make what `target` runs, or cannot make it here, else None."""
    if target.runtime == "triton" and passes[-1].name != Fuse.name:
        return f'target {target.name} runs fused kernels: the last pass of the recipe must be "fuse"'
    if any(isinstance(p, Quantize) and p.faster_float for p in passes) and (reason := target.unmeasured()) is not None:
        return f"quantize.faster_float times layers, but {reason}; set it to false, or compile on the target"
    return None


_DEFAULT_PTQ = """
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
[[pass]]
name = "convert"
"""
_DEFAULT = """
[[pass]]
name = "prune"
latency_ratio = 3.0
best_effort = true
[[pass]]
name = "distill"
epochs = 10
clip = 1.0
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
[[pass]]
name = "distill"
epochs = 2
learning_rate = 0.001
clip = 1.0
teach_from = 0.1
terms = [{ term = "cross_entropy", weight = 0.1 }, { term = "kl", weight = 0.9, temperature = 2.0 }]
[[pass]]
name = "convert"
"""
_FUSE = """
[[pass]]
name = "fuse"
"""


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON values, without the fields that are at their defaults."""
    dumped = _without_none(TypeAdapter(type(value)).dump_python(value, mode="json"))
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(type(value))
    }
    return {k: v for k, v in dumped.items() if getattr(value, k) != _pydantic_default(defaults.get(k))}


def _pydantic_default(default: Any) -> Any:
    """The value behind a pydantic `Field(...)`."""
    if hasattr(default, "get_default"):
        return default.get_default(call_default_factory=True)
    return default


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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


def parse(kind: type[Any], values: Any, where: str) -> Any:
    """`kind(**values)`, strictly: no "3" for 3. Raises `InputError` that says where and what."""
    try:
        # As JSON, where strictness is about values: lists and tables may fill tuples and dataclasses.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, kind)}") from error


def explain(error: ValidationError, kind: type[Any]) -> str:
    """A pydantic error in one line, naming the nearest known key for an unknown one."""
    lines = []
    for e in error.errors():
        place = ".".join(str(part) for part in e["loc"])
        if e["type"] == "unexpected_keyword_argument":
            key, owner = str(e["loc"][-1]), kind if len(e["loc"]) == 1 else _tagged(e["loc"][-2])
            lines.append(f'unknown key "{place}"' + (nearest(key, [f.name for f in fields(owner)]) if owner else ""))
        elif e["type"] == "union_tag_invalid":
            key, tag = e["ctx"]["discriminator"].strip("'"), e["ctx"]["tag"]
            lines.append(f'{place}: unknown {key} "{tag}"{nearest(tag, _tags(key))}')
        elif e["type"] == "union_tag_not_found":
            key = e["ctx"]["discriminator"].strip("'")
            lines.append(f'{place}: it needs a key "{key}"{nearest("", _tags(key))} (got {e["input"]!r})')
        else:
            shown = "" if e["type"] in ("missing", "value_error") else f" (got {e['input']!r})"
            text = e["msg"].removeprefix("Value error, ").removeprefix("recipe: ")
            lines.append((f"{place}: " if place else "") + text + shown)
    return "; ".join(lines)


def _tags(key: str) -> dict[str, type[Any]]:
    """The terms by name, or the sources of teachers: what a table's `term` or `source` may be."""
    kinds: tuple[type[Any], ...] = SOURCES if key == "source" else TERMS
    return {str(next(f.default for f in fields(k) if f.name == key)): k for k in kinds}


def _tagged(name: object) -> type[Any] | None:
    """The term or source of that name."""
    return {**_tags("term"), **_tags("source")}.get(str(name))


def documentation(kind: type[Any]) -> dict[str, str]:
    """The docstring of each field, also of those that it inherits (pydantic reads only the class's own)."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for name, info in getattr(base, "__pydantic_fields__", {}).items():
            if info.description:
                found[name] = " ".join(info.description.split())
    return found


def json_schema() -> dict[str, Any]:
    """A JSON Schema of recipe files, for editors."""
    definitions: dict[str, Any] = {}

    def of(kind: type[Any]) -> dict[str, Any]:
        schema = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        for name, text in documentation(kind).items():
            schema["properties"][name].setdefault("description", text)
        definitions.update(schema.pop("$defs", {}))
        return schema

    passes = []
    for p in PASSES:
        schema = of(p)
        schema["properties"] = {"name": {"const": p.name}, **schema.get("properties", {})}
        schema["required"] = ["name", *schema.get("required", [])]
        passes.append(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pqk recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["pass"],
        "properties": {
            "seed": {"type": "integer", "minimum": 0, "default": 0},
            "teacher": of(TeacherSpec),
            "task": of(TaskSpec),
            "target": of(TargetSpec),
            "pass": {"type": "array", "minItems": 1, "items": {"oneOf": passes}},
        },
        "$defs": definitions,
    }
