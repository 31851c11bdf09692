"""How a run is written down: recipes, the factories that they name, their defaults and schema."""

from __future__ import annotations

from pqk.recipe.recipe import Recipe, parse_passes, pass_named, why_not_for_target
from pqk.recipe.schema import json_schema
from pqk.recipe.specs import FACTORY, TargetSpec, TaskSpec, TeacherSpec
from pqk.recipe.strict import documentation, parse, plain, read_text
from pqk.settings import explain

__all__ = [
    "FACTORY",
    "Recipe",
    "TargetSpec",
    "TaskSpec",
    "TeacherSpec",
    "documentation",
    "explain",
    "json_schema",
    "parse",
    "parse_passes",
    "pass_named",
    "plain",
    "read_text",
    "why_not_for_target",
]
