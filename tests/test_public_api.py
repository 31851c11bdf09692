"""What a user's script imports: every name is there, and its docstring says what goes in, comes out and is raised.

The form is Google's: `Args:`, `Returns:`, `Raises:`. A field of a dataclass may have a docstring under it instead. The
class's docstring is about building it; methods have their own, or inherit one.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pqk import knowledge
from pqk.errors import InputError

PACKAGES = ("pqk", "pqk.data", "pqk.task", "pqk.target", "pqk.knowledge")
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]
BUILDING = ("__init__", "__post_init__")
DOCUMENTED = [
    pytest.param(value, id=f"{package}.{name}")
    for package, name in NAMES
    if inspect.isclass(value := getattr(importlib.import_module(package), name)) or inspect.isfunction(value)
]


def section(docstring: str, title: str) -> str | None:
    """The indented text under `title:`, None where there is no such section."""
    match = re.search(rf"^{title}:\n((?:[ ]+\S.*\n?|\n)+)", docstring, re.MULTILINE)
    return None if match is None else textwrap.dedent(match[1])


def entries(docstring: str, title: str) -> set[str]:
    """The names that a section explains: `data:`, or two in one line, `limit, evaluation_limit:`."""
    lines = (section(docstring, title) or "").splitlines()
    heads = [m[1] for line in lines if (m := re.match(r"(\w+(?:, \w+)*): \S", line))]
    return {name for head in heads for name in head.split(", ")}


def documented_fields(cls: type) -> set[str]:
    """The fields with a docstring under them, in the class or a base."""
    fields = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] != "pqk":
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                fields.add(ast.unparse(field.target))
    return fields


def own_arguments(value: Any) -> set[str]:
    """What it is called or built with, that no docstring of a field explains."""
    if not inspect.isclass(value):
        return set(inspect.signature(value).parameters)
    if dataclasses.is_dataclass(value):
        tags = {"term", "source", "by"}  # the class's own name in recipes
        return {f.name for f in dataclasses.fields(value)} - tags - documented_fields(value)
    if hasattr(value, "_fields"):
        return set(value._fields) - documented_fields(value)
    if "__init__" not in vars(value) or getattr(value, "_is_protocol", False):
        return set()
    return {*inspect.signature(vars(value)["__init__"]).parameters} - {"self"}


def raises_directly(function: Callable[..., Any]) -> bool:
    """Whether a `raise InputError` stands in its body, not in a function inside it."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    queue: list[ast.AST] = [*tree.body]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and ast.unparse(node.exc).startswith("InputError("):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            queue += ast.iter_child_nodes(node)
    return False


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods that the class itself defines, and those that build and call it."""
    for name, member in vars(cls).items():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        public = not name.startswith("_") or name in (*BUILDING, "__call__")
        # What pydantic and dataclasses add stands in another file.
        if public and inspect.isfunction(function) and inspect.getsourcefile(function) == inspect.getsourcefile(cls):
            yield name, function


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_there_once(package: str) -> None:
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("value", DOCUMENTED)
def test_every_argument_is_explained(value: Any) -> None:
    docstring = inspect.getdoc(value)
    assert docstring and not docstring.startswith(f"{value.__name__}("), "a docstring of its own"
    arguments = own_arguments(value)
    assert arguments <= entries(docstring, "Args"), arguments - entries(docstring, "Args")
    if inspect.isfunction(value) and inspect.signature(value).return_annotation != "None":
        assert section(docstring, "Returns")


@pytest.mark.parametrize("value", DOCUMENTED)
def test_every_error_is_explained(value: Any) -> None:
    docstring = inspect.getdoc(value) or ""
    if inspect.isfunction(value):
        assert not raises_directly(value) or InputError.__name__ in entries(docstring, "Raises")
        return
    for name, method in methods(value):
        if raises_directly(method):
            text = docstring if name in BUILDING else inspect.getdoc(getattr(value, name)) or ""
            assert InputError.__name__ in entries(text, "Raises"), name


@pytest.mark.parametrize("term", knowledge.TERMS, ids=lambda t: t.__name__)
def test_every_term_names_its_source(term: type) -> None:
    """The paper with its year, where the loss is not the task's own."""
    own = term is knowledge.CrossEntropy
    assert own or re.search(r"\b(19|20)\d\d\b|arXiv:\d{4}\.\d{4,5}", term.__doc__ or "")


def test_the_checks_above_can_fail() -> None:
    """On a function of which half is explained; what they find in a class is what stands there."""

    def half(first: int, second: int) -> int:
        """Adds.

        Args:
            first: a number.

        Returns:
            The sum.
        """
        if second < 0:
            raise InputError("negative")
        return first + second

    text = inspect.getdoc(half) or ""
    assert own_arguments(half) - entries(text, "Args") == {"second"}
    assert raises_directly(half) and not entries(text, "Raises") and section(text, "Returns") == "The sum."
    assert documented_fields(knowledge.FromPeer) == {
        "seed",
        "noise",
        "restart",
        "kd_weight",
        "temperature",
        "like_student",
    }
    assert [name for name, _ in methods(knowledge.FromPeer)] == ["__post_init__", "why_not_cached", "make"]
