"""The rules of the house, read off the source: which way imports go, what is never used, what is listed where."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from pqk import knowledge, passes
from pqk.cli.views import reference
from pqk.comparison.config import Comparison
from pqk.core.program import Pass
from pqk.knowledge.terms.base import Term
from pqk.recipe.recipe import Recipe
from pqk.target import target

ROOT = Path(__file__).parents[1]
ROOMS = {"pqk": "pqk", "passes": "pqk.passes", "kernels": "pqk.kernels", "models": "pqk.models"}
GROUND = {
    "pqk.data", "pqk.errors", "pqk.files", "pqk.core", "pqk.knowledge", "pqk.target", "pqk.quant", "pqk.task",
    "pqk.training",
}  # fmt: skip
"""the ground floor; every other package in pqk/ is on the top floor"""
SOURCES = {path: ast.parse(path.read_text()) for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
FILES = pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


def module_of(path: Path) -> str:
    room, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([ROOMS[room], *(part for part in rest if part != "__init__")])


NAMES = {module_of(path) for path in SOURCES}


def floor_of(name: str) -> str:
    for room in ("passes", "kernels", "models"):
        if within(name, f"pqk.{room}"):
            return room
    return "ground" if any(within(name, g) for g in GROUND) else "top"


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it out"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in NAMES else str(node.module)


def allowed(importer: str, imported: str) -> bool:
    """Whether the plan of the house lets one module of pqk import another."""
    here, there = floor_of(importer), floor_of(imported)
    match here:
        case "top":
            return there != "models"
        case "passes":
            return there in ("ground", "passes", "kernels") and imported != "pqk.core.pipeline"
        case "kernels":
            return there == "kernels" or imported in ("pqk.quant.qparams", "pqk.errors")
        case "models":
            few = ("pqk.task", "pqk.data", "pqk.errors", "pqk.core.run_context", "pqk.training")  # one loop trains all
            return there == "models" or any(within(imported, each) for each in few)
    return there == "ground"


@FILES
def test_imports_go_one_way(path: Path) -> None:
    name = module_of(path)
    if name in ("pqk", "pqk.__main__"):
        return  # the doors
    own = {module for module in imports(SOURCES[path]) if within(module, "pqk")}
    against = sorted(m for m in own if not allowed(name, m))
    assert not against, f"{name}, {floor_of(name)}, imports {against}"


def test_the_plan_refuses_what_it_should() -> None:
    assert not allowed("pqk.training.trainer", "pqk.passes.prune")
    assert not allowed("pqk.knowledge.terms.base", "pqk.cli.app")
    assert not allowed("pqk.passes.prune.prune", "pqk.bench.protocol")
    assert not allowed("pqk.kernels.matmul", "pqk.quant.fake_quant")
    assert not allowed("pqk.models.resnet", "pqk.passes.prune")
    assert not allowed("pqk.cli", "pqk.models.resnet")
    assert allowed("pqk.passes.fuse", "pqk.kernels.matmul") and allowed("pqk.cli", "pqk.passes")


@FILES
def test_kernels_and_models_need_little(path: Path) -> None:
    """Third-party packages: kernels stand on torch and Triton, models on torch, numpy and where their data is."""
    room = path.relative_to(ROOT).parts[0]
    data = {"numpy", "safetensors", "sklearn", "transformers"}
    few = {"kernels": {"torch", "triton"}, "models": {"torch", *data}}.get(room)
    if few is not None:
        packages = {name.partition(".")[0] for name in imports(SOURCES[path])}
        assert packages - sys.stdlib_module_names - {"pqk"} <= few


PICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__"}


@FILES
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not {name.partition(".")[0] for name in imports(SOURCES[path])} & PICKLERS
    for call in calls(SOURCES[path]):
        name = ast.unparse(call.func)
        assert name not in FORBIDDEN_CALLS, f"line {call.lineno}: {name}"
        if name in ("np.load", "numpy.load"):
            words = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert words.get("allow_pickle") == "False", f"line {call.lineno}: say allow_pickle=False"


@FILES
def test_the_library_never_prints(path: Path) -> None:
    if path.parent.name == "cli" and path.stem in ("app", "console"):
        return  # whose work it is
    for call in calls(SOURCES[path]):
        name = ast.unparse(call.func)
        assert name not in ("print", "sys.stdout.write", "sys.stderr.write", "sys.exit"), f"line {call.lineno}: {name}"


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@FILES
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(SOURCES[path])


def concrete(base: type, package: object) -> set[type]:
    """The public concrete subclasses of `base` that are defined in `package`."""
    home = package.__name__  # type: ignore[attr-defined]
    for module in pkgutil.walk_packages(package.__path__, f"{home}."):  # type: ignore[attr-defined]
        importlib.import_module(module.name)
    found, queue = set(), [base]
    while queue:
        for cls in queue.pop().__subclasses__():
            queue.append(cls)
            if cls.__module__.startswith(f"{home}.") and not cls.__name__.startswith("_"):
                found.add(cls)
    return {cls for cls in found if not getattr(cls, "__abstractmethods__", None)}


def test_the_tuples_list_everything() -> None:
    assert concrete(Pass, passes) == set(passes.PASSES)
    assert concrete(Term, knowledge) == set(knowledge.TERMS)
    assert set(get_args(get_args(knowledge.AnyTerm)[0])) == set(knowledge.TERMS)
    for names in ([p.name for p in passes.PASSES], [t.name for t in target.TARGETS]):
        assert len(names) == len(set(names))


def test_passes_and_terms_are_documented() -> None:
    """What `pqk passes` shows: words on every pass, term and source of a teacher, and on every field of theirs."""
    shown = reference()
    for entry in [*shown["passes"], *shown["terms"], *shown["sources"]]:
        said = entry["documentation"]  # a dataclass without a docstring gets its signature as one
        assert said and not said.startswith(f"{entry['name'].title()}("), entry["name"]
        silent = [f["name"] for f in entry["fields"] if not f["documentation"]]
        assert not silent, f"{entry['name']}: {silent}"


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.toml")), ids=lambda p: p.stem)
def test_the_recipes_are_recipes(path: Path) -> None:
    compared = "variant" in tomllib.loads(path.read_text())
    recipe = Comparison.load(path).recipe if compared else Recipe.load(path)
    assert recipe.teacher is not None and recipe.task is not None
    assert Recipe.loads(recipe.dumps()) == recipe


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, away from the repository's folders of the same names."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def test_importing_pqk_is_free() -> None:
    """The package is lazy: nothing heavy is there until a name is used."""
    code = "import json, sys, pqk; dir(pqk); print(json.dumps(sorted(sys.modules)))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "onnxruntime", "pydantic"} & set(json.loads(done.stdout))


def test_every_public_name_is_there() -> None:
    import pqk

    for name in pqk.__all__:
        assert getattr(pqk, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        pqk.nothing  # noqa: B018


def test_kernels_import_without_triton() -> None:
    code = "\n".join(
        [
            "import sys",
            "sys.modules['triton'] = None  # importing it raises ImportError",
            "import importlib, pkgutil, pqk.kernels",
            "for module in pkgutil.walk_packages(pqk.kernels.__path__, 'pqk.kernels.'):",
            "    importlib.import_module(module.name)",
        ]
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_no_folder_is_left_out_of_the_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert {name for path in SOURCES if path.stem == "__init__" for name in [module_of(path)]} == listed


def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from a copy, as building leaves folders beside the sources."""
    source = tmp_path / "source"
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    arguments = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        there = set(archive.namelist())
    code = {f"{module_of(p).replace('.', '/')}{'/__init__' if p.stem == '__init__' else ''}.py" for p in SOURCES}
    data = {f"pqk/models/{p.name}" for p in (ROOT / "models").iterdir() if p.suffix in (".toml", ".safetensors")}
    assert code | data | {"pqk/report/report.schema.json"} <= there
    assert {name.partition("/")[0] for name in there} <= {"pqk", f"{wheel.name.partition('-py3')[0]}.dist-info"}
