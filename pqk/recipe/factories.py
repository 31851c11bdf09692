"""Import what a recipe names: the factories of teacher, student and task. Nothing else in pqk imports a user's code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.data.folders import data_folders
from pqk.errors import InputError, nearest
from pqk.files import read_tensors
from pqk.recipe.recipe import Recipe
from pqk.recipe.specs import StudentSpec, TaskSpec, TeacherSpec
from pqk.task.given import frozen_student
from pqk.task.task import Task


def load_teacher(spec: TeacherSpec, data: Path | None = None, beside: Path | None = None) -> nn.Module:
    """The teacher in eval mode, with its weights. A factory with a parameter `data` gets the data folder.

    Raises `InputError` for a factory or weights that do not fit.
    """
    return _load("[teacher]", spec, data, beside, {})


def load_student(
    spec: StudentSpec, teacher: nn.Module | None, seed: int, data: Path | None = None, beside: Path | None = None
) -> nn.Module:
    """The student of another shape, in eval mode, with weights from a file, or as its factory draws them from `seed`.

    A factory with a parameter `data` gets the data folder, and one with a parameter `teacher` the teacher. What is
    drawn elsewhere is not touched.

    Raises `InputError` for a factory or weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a resumed run begins with the same student
        return _load("[student]", spec, data, beside, {} if teacher is None else {"teacher": teacher})


def student_of(recipe: Recipe, teacher: nn.Module, path: str | Path | None = None) -> nn.Module | None:
    """The student that a recipe's [student] names, or None where there is none; `path` is where the recipe lies.

    Raises `InputError` as `load_student` does.
    """
    if recipe.student is None:
        return None
    beside = None if path is None else Path(path).resolve().parent
    return load_student(recipe.student, teacher, recipe.seed, beside=beside)


@dataclass(frozen=True)
class GivenStudent:
    """A student of another shape, as a compile begins with it."""

    name: str
    """such as "plain(width=16)", or the name of its class where it was given in Python"""
    module: nn.Module
    """a frozen copy, in eval mode"""
    spec: StudentSpec | None
    """its factory; None: it was given in Python"""


def students_of(
    student: nn.Module | Sequence[nn.Module] | None,
    recipe: Recipe,
    teacher: nn.Module,
    task: Task,
    path: str | Path | None = None,
) -> list[GivenStudent]:
    """The students of another shape that a compile begins with: those given, else what the recipe's [student] names.

    Of a contract those of its `shapes`, too. Raises `InputError` as `student_of` and `frozen_student` do, and for
    several without a contract, which has nothing to choose by.
    """
    if student is not None and not isinstance(student, nn.Module | list | tuple):
        raise InputError(f"student: a {type(student).__name__} is no torch module, and no list of them")
    modules = [student] if isinstance(student, nn.Module) else list(student or [])
    found: list[tuple[str, nn.Module, StudentSpec | None]] = [(type(m).__name__, m, None) for m in modules]
    specs = [recipe.student] if recipe.student is not None and not modules else []
    specs += () if recipe.contract is None else recipe.contract.shapes
    beside = None if path is None else Path(path).resolve().parent
    found += [(_name(spec), load_student(spec, teacher, recipe.seed, beside=beside), spec) for spec in specs]
    if len(found) > 1 and recipe.contract is None:
        raise InputError(
            f"student: {len(found)} networks were given, and without a contract nothing chooses one; give one, or a "
            "contract for which they compete"
        )
    names: list[str] = []
    for name, _, _ in found:
        count = sum(n.partition(" #")[0] == name for n in names)
        names.append(name if not count else f"{name} #{count + 1}")
    return [
        GivenStudent(name, frozen_student(module, teacher, task), spec)
        for name, (_, module, spec) in zip(names, found, strict=True)
    ]


def _name(spec: StudentSpec) -> str:
    """`plain(width=16)`."""
    arguments = ", ".join(f"{k}={v}" for k, v in spec.arguments.items())
    return f"{spec.factory.partition(':')[2]}({arguments})"


def _load(
    where: str, spec: TeacherSpec | StudentSpec, data: Path | None, beside: Path | None, given: dict[str, Any]
) -> nn.Module:
    """A module from its factory, which gets of `given` and the data folder what it has parameters for."""
    arguments, taken = dict(spec.arguments), _parameters(spec.factory, where, beside)
    if data is not None and "data" in taken:
        arguments = {"data": data, **arguments}
    arguments |= {name: value for name, value in given.items() if name in taken}
    model = _call(spec.factory, arguments, where, beside)
    if not isinstance(model, nn.Module):
        raise InputError(f"{where} {spec.factory} returned a {type(model).__name__}, not a torch module")
    if spec.weights is not None:
        load_weights(model, find_weights(spec.weights, data, beside, where))
    return model.eval()


def find_weights(name: str, data: Path | None, beside: Path | None, where: str = "[teacher]") -> Path:
    """The file `name` beside the recipe, in the data folder, or as a path. Raises `InputError` where it is nowhere."""
    places = [folder / name for folder in (beside, *data_folders(data)) if folder is not None]
    for path in [*places, Path(name)]:
        if path.is_file():
            return path
    raise InputError(
        f"{where} weights: no file {name} (looked in {', '.join(sorted({str(p.parent) for p in places}))}); "
        "point --data or PQK_DATA at the folder that has it"
    )


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a safetensors file. Raises `InputError` naming the keys or shapes that differ."""
    weights, _ = read_tensors(path)
    want = model.state_dict()
    missing = sorted(k for k in set(want) - set(weights) if not k.endswith("num_batches_tracked"))
    extra = sorted(set(weights) - set(want))
    if missing or extra:
        raise InputError(
            f"{path}: its keys are not the model's: {len(missing)} missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}; check the factory and its arguments"
        )
    for key, tensor in weights.items():
        if tensor.shape != want[key].shape:
            raise InputError(f"{path}: {key} is {tuple(tensor.shape)} and the model's is {tuple(want[key].shape)}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {key} has NaN or infinite values")
    model.load_state_dict(weights, strict=False)


def load_task(
    spec: TaskSpec, data: Path | None = None, beside: Path | None = None, teacher: nn.Module | None = None
) -> Task:
    """The task. A factory with a parameter `data` gets the data folder, and one with a parameter `teacher` the teacher,
    for data that only a teacher can make.

    Raises `InputError` for a factory that does not fit.
    """
    arguments, taken = dict(spec.arguments), _parameters(spec.factory, "[task]", beside)
    if "data" in taken:
        arguments = {"data": data, **arguments}
    if teacher is not None and "teacher" in taken:
        arguments["teacher"] = teacher
    task = _call(spec.factory, arguments, "[task]", beside)
    if not isinstance(task, Task):
        raise InputError(f"[task] {spec.factory} returned a {type(task).__name__}, not a pqk.Task")
    return task


def _parameters(factory: str, where: str, beside: Path | None) -> Collection[str]:
    return inspect.signature(_find(factory, where, beside)).parameters.keys()


def _call(factory: str, arguments: dict[str, Any], where: str, beside: Path | None) -> Any:
    function = _find(factory, where, beside)
    try:
        return function(**arguments)
    except InputError:
        raise
    except Exception as error:  # whatever the user's code does
        called = f"{factory}({', '.join(f'{k}=…' for k in arguments)})"
        raise InputError(f"{where} {called}: {type(error).__name__}: {error}") from error


def _find(factory: str, where: str, beside: Path | None) -> Callable[..., Any]:
    module_name, _, name = factory.partition(":")
    places = [str(p) for p in (beside, Path.cwd()) if p is not None]
    sys.path[:0] = places  # a user's factory stands beside the recipe or where the command was given
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's file does when it is imported
        raise InputError(
            f"{where} factory: cannot import {module_name}: {type(error).__name__}: {error}; it must be installed, "
            "beside the recipe or in the current folder"
        ) from error
    finally:
        for place in places:
            sys.path.remove(place)
    if not callable(getattr(module, name, None)):
        known = [n for n in dir(module) if not n.startswith("_") and callable(getattr(module, n))]
        raise InputError(f'{where} factory: {module_name} has no function "{name}"{nearest(name, known)}')
    return getattr(module, name)
