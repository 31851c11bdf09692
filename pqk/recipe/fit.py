"""Fits the default recipe to a task: terms that its outputs and labels allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pqk.core.program import Pass
from pqk.data.structures import first_tensor
from pqk.knowledge import LogitMSE
from pqk.passes import Distill
from pqk.recipe.recipe import Recipe
from pqk.task.metrics import argmax
from pqk.task.task import Task


def fit_recipe(recipe: Recipe, teacher: nn.Module, task: Task) -> Recipe:
    """The default recipe, with terms that this task can have.

    No labels where there are none; and half the squared distance to the teacher's first output instead of a divergence,
    where that is a single score, or an answer without labels that is no class, such as an embedding.
    """
    if task.train is None:
        return recipe
    labelled = task.train.labelled
    with torch.no_grad():
        outputs = teacher(*task.example)
    width = first_tensor(outputs).shape[-1]
    first = next(iter(outputs)) if isinstance(outputs, Mapping) else None if isinstance(outputs, Tensor) else 0
    distance = task.decision is not argmax and (width == 1 or not labelled)

    def fit(p: Pass) -> Pass:
        if not isinstance(p, Distill):
            return p
        terms = (*p.terms[:1], LogitMSE(output=first, weight=width / 2)) if distance else p.terms
        return dataclasses.replace(p, terms=tuple(t for t in terms if labelled or t.needs_teacher))

    return dataclasses.replace(recipe, passes=tuple(map(fit, recipe.passes)))
