"""One compile, checked before a pass runs: everything in it fits together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.core.pipeline import check_order, prepared
from pqk.core.program import Pass, Stage
from pqk.core.run_folder import RunFolder
from pqk.data.data import digest_of
from pqk.errors import InputError, Reason
from pqk.evaluation.settings import Evaluation
from pqk.gpu.autotune import read_tuning
from pqk.knowledge.teachers.base import network_fingerprint, weights_fingerprint
from pqk.recipe.contract import Contract
from pqk.recipe.factories import GivenStudent, students_of
from pqk.recipe.fit import fit_recipe
from pqk.recipe.recipe import Recipe, TargetSpec, why_not_for_target
from pqk.search.cascade import why_not_cascaded
from pqk.search.deciding import Deciding, deciding
from pqk.search.search import why_not_searched
from pqk.target.target import Target
from pqk.task.state import frozen_copy
from pqk.task.task import Task
from pqk.training.trainer import accelerator


@dataclass(frozen=True)
class Job:
    """One compile, checked: everything in it fits together."""

    teacher: nn.Module
    """a frozen copy, in eval mode"""
    students: tuple[GivenStudent, ...]
    """of another shape: with a contract those that compete, without one the one that the passes begin with, if any"""
    task: Task
    recipe: Recipe
    target: Target
    out: Path
    evaluation: Evaluation
    deciding: Deciding | None = None
    """what a contract is decided on; the task's evaluation data has none of it"""

    @property
    def student(self) -> nn.Module | None:
        """What the passes begin with in place of a copy of the teacher, where there is no contract."""
        return self.students[0].module if self.students and self.recipe.contract is None else None

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.out)

    def identity(self) -> dict[str, Any]:
        """What a run is a run of: a resume must be of the same."""
        data = {
            "train": None if self.task.train is None else self.task.train.fingerprint(),
            "validation": self.task.validation.fingerprint(),
            "evaluation": self.task.evaluation.fingerprint(),
        }
        for name in ("retained", "retained_evaluation"):
            if (more := getattr(self.task, name)) is not None:
                data[name] = more.fingerprint()
        if self.deciding is not None:
            data["deciding"] = self.deciding.data.fingerprint()
        competing = self.students if self.recipe.contract is not None else ()
        shapes = {student.name: network_fingerprint(student.module) for student in competing}
        return {
            "recipe": self.recipe.dumps(),
            "teacher": weights_fingerprint(self.teacher),
            # also where there is none: a run that was given a student is not continued without
            "student": None if self.student is None else network_fingerprint(self.student),
            "data": data,
            # made by the data's own preprocessing, which `data` does not show
            "example": digest_of("example", self.task.example),
            **({"shapes": shapes} if shapes else {}),
            "judgement": self.task.judgement,
        }


def job_of(
    teacher: nn.Module,
    student: nn.Module | Sequence[nn.Module] | None,
    task: Task,
    recipe: Recipe | str | Path | None,
    target: Target | str | None,
    out: Path,
    seed: int | None,
    evaluation: Evaluation,
    contract: Contract | None = None,
) -> Job:
    """Check everything that can be checked before a pass runs. Raises `InputError`."""
    if not isinstance(task, Task):
        raise InputError(
            f"task: a {type(task).__name__} is no pqk.Task; make one of your data: Task(train, evaluation)"
        )
    if not isinstance(evaluation, Evaluation):
        raise InputError(f"evaluation: a {type(evaluation).__name__} is no pqk.Evaluation; such as Evaluation.quick()")
    chosen = _recipe(recipe, target, seed, contract, task)
    assert chosen.target is not None
    machine = Target.named(chosen.target.name)
    if chosen.contract is not None and (reason := why_not_searched(chosen.contract, machine)) is not None:
        raise InputError(f"contract: {reason}")
    if chosen.passes and (reason := _why_not_deployed(chosen.passes, machine)) is not None:
        raise InputError(f"recipe: {reason}")
    read_tuning(chosen.passes)
    for p in chosen.passes:
        if p.training_epochs:
            task.need_train(p.name)
    if accelerator().num_processes > 1 and evaluation.controls:
        raise InputError("evaluation: its controls train in one process; compile with one, or without controls")
    teacher = frozen_copy(teacher, task.example)
    task.check(teacher)
    teacher, task = _prepared(chosen, teacher, task)
    cascaded = chosen.contract is not None and chosen.contract.cascade
    if cascaded and (reason := why_not_cascaded(task, teacher)) is not None:
        raise InputError(f"contract: cascade: {reason}")
    path = recipe if isinstance(recipe, str | Path) else None
    students = tuple(students_of(student, chosen, teacher, task, path))
    if recipe is None:
        chosen = fit_recipe(chosen, teacher, task)
    with torch.no_grad():
        outputs = teacher(*task.example)
    for number, p in enumerate(chosen.passes, 1):
        if (reason := p.why_not_applied(task, outputs)) is not None:
            raise InputError(f"recipe: pass {number} {reason}")
    found = None if chosen.contract is None else deciding(task, chosen.contract)
    return Job(
        teacher, students, task if found is None else found.task, chosen, machine, out, evaluation, deciding=found
    )


def _prepared(recipe: Recipe, teacher: nn.Module, task: Task) -> tuple[nn.Module, Task]:
    """Teacher and task as the recipe's passes need them."""
    found = prepared(recipe.passes, teacher, task)
    if recipe.contract is not None and found[0] is not teacher:
        raise InputError(
            f'recipe: pass 1 "{recipe.passes[0].name}" changes the task, on which a contract compares all students; '
            "make the smaller model first (python -m pqk.models.vocabulary), and search with that as the teacher"
        )
    return found


def _why_not_deployed(passes: Sequence[Pass], machine: Target) -> Reason | None:
    """Why passes do not end in what the target runs, else None."""
    last = check_order(passes)
    if last != Stage.INT8:
        return f'it leaves the student in stage {last}; the last pass must be "convert" or "fuse"'
    return why_not_for_target(passes, machine)


def _default(target: Target | str | None, contract: Contract | None, task: Task) -> Recipe:
    """A search for what keeps the contract; for a GPU, whose latency no compile measures, the default passes."""
    name = target.name if isinstance(target, Target) else target
    runtime = "onnxruntime" if name is None else Target.named(name).runtime
    if contract is None and runtime != "onnxruntime":
        return Recipe.default(task.train is not None, runtime)
    return Recipe(passes=(), contract=contract or Contract())


def _recipe(
    recipe: Recipe | str | Path | None,
    target: Target | str | None,
    seed: int | None,
    contract: Contract | None,
    task: Task,
) -> Recipe:
    if contract is not None and not isinstance(contract, Contract):
        raise InputError(f"contract: a {type(contract).__name__} is no pqk.Contract; such as Contract(max_drop=0.5)")
    if recipe is None:
        recipe = _default(target, contract, task)
    elif isinstance(recipe, str | Path):
        recipe = Recipe.load(recipe)
    elif not isinstance(recipe, Recipe):
        raise InputError(f"recipe: a {type(recipe).__name__} is neither a pqk.Recipe nor the path of one")
    if contract is not None:
        recipe = dataclasses.replace(recipe, contract=contract)
    if target is not None:
        name = target.name if isinstance(target, Target) else Target.named(target).name
        recipe = dataclasses.replace(recipe, target=TargetSpec(name=name))
    if recipe.target is None:
        recipe = dataclasses.replace(recipe, target=TargetSpec(name=Target.detect().name))
    if seed is not None and seed < 0:
        raise InputError(f"seed={seed} must not be negative")
    return recipe if seed is None else dataclasses.replace(recipe, seed=seed)
