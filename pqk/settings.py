"""Dataclasses that check their fields, and say what is wrong with one in words."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast, dataclass_transform, get_args

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from pqk.errors import InputError, nearest

T = TypeVar("T")

CONFIG = ConfigDict(
    extra="forbid",
    use_attribute_docstrings=True,
    arbitrary_types_allowed=False,
    allow_inf_nan=False,
    ser_json_inf_nan="constants",
)
"""of settings: unknown keys are refused, docstrings under fields are their documentation"""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def settings(kind: type[T]) -> type[T]:
    """A decorator: a frozen dataclass whose fields are given by name and checked; see `in_words`."""
    checked = dataclass(frozen=True, kw_only=True, config=CONFIG)(kind)
    return in_words(cast("type[T]", checked))


def in_words(kind: type[T]) -> type[T]:
    """A decorator of classes whose constructor then raises `InputError` in words for arguments that it cannot take.

    Neither pydantic's error, which shows its own insides, nor a `TypeError`, which the command line would take for a
    fault of pqk.
    """
    construct = kind.__init__
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def constructed(self: T, *args: Any, **values: Any) -> None:
        called = getattr(type(self), "name", None) if is_dataclass(self) else None
        own = type(self).__name__
        what = called if isinstance(called, str) else own.lower() if own.istitle() else own  # as in all other errors
        try:
            signature.bind(self, *args, **values)
        except TypeError as error:
            unknown = next((key for key in values if key not in signature.parameters), None)
            known = [name for name in signature.parameters if name != "self"]
            said = str(error) if unknown is None else f'unknown key "{unknown}"{nearest(unknown, known)}'
            raise InputError(f"{what}: {said}") from error
        try:
            construct(self, *args, **values)
        except ValidationError as error:
            raise InputError(f"{what}: {explain(error, kind)}") from error

    setattr(kind, "__init__", constructed)  # noqa: B010 (mypy knows no other way)
    return kind


def explain(error: ValidationError, kind: type[Any]) -> str:
    """A pydantic error in one line, naming the nearest known key for an unknown one."""
    lines = []
    for e in error.errors():
        place = ".".join(str(part) for part in _named(e["loc"], kind))
        if e["type"] == "unexpected_keyword_argument":
            key, owner = str(e["loc"][-1]), kind if len(e["loc"]) == 1 else _tagged(kind, e["loc"][-2])
            lines.append(f'unknown key "{place}"' + (nearest(key, [f.name for f in fields(owner)]) if owner else ""))
        elif e["type"] == "union_tag_invalid":
            key, tag = e["ctx"]["discriminator"].strip("'"), e["ctx"]["tag"]
            lines.append(f'{place}: unknown {key} "{tag}"{nearest(tag, _tags(kind, key))}')
        elif e["type"] == "union_tag_not_found":
            key = e["ctx"]["discriminator"].strip("'")
            lines.append(f'{place}: it needs a key "{key}"{nearest("", _tags(kind, key))} (got {e["input"]!r})')
        else:
            shown = "" if e["type"] in ("missing", "value_error") else f" (got {e['input']!r})"
            text = e["msg"].removeprefix("Value error, ").removeprefix(f"{kind.__name__.lower()}: ")
            lines.append((f"{place}: " if place else "") + text + shown)
    return "; ".join(lines)


def _named(place: tuple[int | str, ...], kind: type[Any]) -> tuple[int | str, ...]:
    """The place of an error with the name of a field that was given by its position."""
    names = [f.name for f in fields(kind)]
    return (names[place[0]], *place[1:]) if place and isinstance(place[0], int) and place[0] < len(names) else place


def _parts(kind: Any, seen: set[Any]) -> Iterator[type[Any]]:
    """The dataclasses that fields of a dataclass may hold, and theirs."""
    for annotation in (f.annotation for f in getattr(kind, "__pydantic_fields__", {}).values()):
        yield from _within(annotation, seen)


def _within(annotation: Any, seen: set[Any]) -> Iterator[type[Any]]:
    if isinstance(annotation, type) and is_dataclass(annotation):
        if annotation not in seen:
            seen.add(annotation)
            yield annotation
            yield from _parts(annotation, seen)
    else:
        for part in get_args(annotation):
            yield from _within(part, seen)


def _tags(kind: type[Any], key: str) -> dict[str, type[Any]]:
    """What a table's `key` (`term`, `source`) may be in fields of `kind`, and the dataclass that each is of."""
    defaults = ((part, f.default) for part in _parts(kind, set()) for f in fields(part) if f.name == key)
    return {str(default): part for part, default in defaults if default is not MISSING}


def _tagged(kind: type[Any], name: object) -> type[Any] | None:
    """The dataclass that `name`, of a term, source or author, stands for in fields of `kind`."""
    return {**_tags(kind, "term"), **_tags(kind, "source"), **_tags(kind, "by")}.get(str(name))
