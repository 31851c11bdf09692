"""TOML in and out, strictly: an unknown key names the nearest known one."""

from __future__ import annotations

import json
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pqk.documents import check_depth, read_bytes
from pqk.errors import InputError, first_line
from pqk.settings import explain

RENAMED = {"terms": {"rise": "ramp_up", "fall": "ramp_down"}}
"""field of a pass with a list of tables -> their keys that had another name once: recipes that say it go on working"""

LARGEST_RECIPE = 1 << 22
"""bytes that a recipe may have"""


def read_text(path: str | Path, what: str) -> str:
    """A file in UTF-8. Raises `InputError`, naming it as `what`, where it cannot be read."""
    try:
        return read_bytes(Path(path), LARGEST_RECIPE).decode()
    except (InputError, UnicodeDecodeError) as error:
        reason = str(error).removeprefix(f"cannot read {path}: ")
        raise InputError(f"cannot read the {what} {path}: {reason}") from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML document. Raises `InputError` where it is none, or is nested too deeply."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not readable as TOML: {error}") from error
    except (RecursionError, ValueError, OverflowError) as error:  # of numbers, dates and brackets that Python has not
        raise InputError(f"{where}: not readable as TOML: {first_line(error)}") from error
    check_depth(table, where)
    return table


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


def toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError, OverflowError):  # whatever is no value is a text
        return text


def parse(kind: type[Any], values: Any, where: str) -> Any:
    """`kind(**values)`, strictly: no "3" for 3. Raises `InputError` that says where and what."""
    values = _renamed(values, where)
    try:
        # As JSON, where strictness is about values: lists and tables may fill tuples and dataclasses.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, kind)}") from error


def _renamed(values: Any, where: str) -> Any:
    """`values` with the present names of keys. Raises `InputError` where a table has a key under both names."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for field, names in RENAMED.items():
        entries = values.get(field)
        if isinstance(entries, list):
            for entry in (e for e in entries if isinstance(e, dict)):
                for old, new in names.items():
                    if old in entry and new in entry:
                        raise InputError(f'{where}: {field}: "{old}" is "{new}" now, and both are given; keep one')
            values[field] = [{names.get(k, k): v for k, v in e.items()} if isinstance(e, dict) else e for e in entries]
    return values


def documentation(kind: type[Any]) -> dict[str, str]:
    """The docstring of each field, also of those that it inherits (pydantic reads only the class's own)."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for name, info in getattr(base, "__pydantic_fields__", {}).items():
            if info.description:
                found[name] = " ".join(info.description.split())
    return found
