"""The recipe in an artifact: the same, with a word on where what it names lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pqk.deploy.artifact import shipped_recipe
from pqk.recipe.recipe import Recipe


def test_a_recipe_that_ships_says_from_where_its_paths_are() -> None:
    sources = '[teacher]\nfactory = "mine:net"\nweights = "net.safetensors"\n'
    recipe = Recipe.loads(sources + '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n')
    text = shipped_recipe(recipe)
    assert text.startswith("# Written by a compile.") and "this file beside the recipe that was compiled" in text
    assert Recipe.loads(text) == recipe and str(Path.cwd()) not in text
    assert shipped_recipe(replace(recipe, teacher=None)).startswith("pass = ["), "it names nothing but passes"
