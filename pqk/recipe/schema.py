"""The JSON schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from pqk.passes import PASSES
from pqk.recipe.recipe import TABLES
from pqk.recipe.strict import documentation


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
        "anyOf": [{"required": ["pass"]}, {"required": ["contract"]}],
        "properties": {
            "seed": {"type": "integer", "minimum": 0, "default": 0},
            **{name: of(spec) for name, spec in TABLES.items()},
            "pass": {"type": "array", "minItems": 1, "items": {"oneOf": passes}},
        },
        "$defs": definitions,
    }
