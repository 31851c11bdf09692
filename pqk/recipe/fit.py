"""Fits the default recipe to a task: terms that its outputs and labels allow."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pqk.recipe.recipe import Recipe
from pqk.task.task import Task


def fit_recipe(recipe: Recipe, teacher: nn.Module, task: Task) -> Recipe:
    """The default recipe with every pass as this task can have it. See `Pass.fitted`."""
    with torch.no_grad():
        outputs = teacher(*task.example)
    return dataclasses.replace(recipe, passes=tuple(p.fitted(task, outputs) for p in recipe.passes))
