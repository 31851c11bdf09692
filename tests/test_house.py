"""The rules of this repository, read off the source: which way imports go, what is never used, what is listed where."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from graphlib import TopologicalSorter
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
FOLDERS = {"pqk": "pqk", "passes": "pqk.passes", "kernels": "pqk.kernels", "models": "pqk.models"}
ORDER = (
    ("cli",), ("strangers",), ("compiler",), ("job",), ("gpu", "evaluation", "comparison", "check"), ("search",),
    ("rehearsal",), ("bench", "verify", "generation"), ("deploy",),
    ("recipe",), ("passes",), ("knowledge", "models"), ("training",), ("core",), ("kernels", "task", "target"),
    ("report", "quant", "data", "files"), ("copies", "documents", "scratch", "settings"), ("errors", "quiet"),
)  # fmt: skip
"""what a person meets first, down to the arithmetic: a package imports from those behind it only"""
NARROWER = {
    "kernels": {"quant", "errors"},
    "models": {
        "task", "data", "errors", "quiet", "files", "training",
        "core.aten", "core.attention", "core.graph", "core.onnxruntime_session", "core.run_context",
    },
}  # fmt: skip
"""what a package may import, where that is less than `ORDER` allows"""
SOURCES = {path: ast.parse(path.read_text()) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
DOORS = ("pqk", "pqk.__main__")


def module_of(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


NAMES = {module_of(path): path for path in SOURCES}


def package_of(module: str) -> str:
    """`cli` of `pqk.cli.app`."""
    return module.split(".")[1]


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


def own_imports(path: Path) -> set[str]:
    """The modules of pqk that a file imports, the package's own door aside."""
    return {name for name in imports(SOURCES[path]) if within(name, "pqk") and name not in DOORS}


def allowed(importer: str, imported: str) -> bool:
    """Whether the order of the packages lets one module of pqk import another."""
    here, there = package_of(importer), package_of(imported)
    if here == there:
        return True
    if here in NARROWER:
        return any(within(imported, f"pqk.{each}") for each in NARROWER[here])
    if here == "passes" and imported == "pqk.core.pipeline":
        return False  # the pipeline runs passes
    floors = {package: floor for floor, packages in enumerate(ORDER) for package in packages}
    return floors[here] < floors[there]


def offenders(law: Callable[[Path], Iterable[object]]) -> list[str]:
    """`file: what` for everything that a law finds wrong in any file."""
    return [f"{path.relative_to(ROOT)}: {what}" for path in SOURCES for what in law(path)]


def test_imports_go_one_way() -> None:
    def against(path: Path) -> Iterable[str]:
        name = module_of(path)
        return [] if name in DOORS else sorted(m for m in own_imports(path) if not allowed(name, m))

    assert not offenders(against)


def test_every_package_has_its_place_in_the_order() -> None:
    placed = [package for packages in ORDER for package in packages]
    assert sorted(placed) == sorted({package_of(name) for name in NAMES if name not in DOORS})


def test_the_order_refuses_what_it_should() -> None:
    assert not allowed("pqk.training.trainer", "pqk.passes.prune")
    assert not allowed("pqk.knowledge.terms.base", "pqk.cli.app")
    assert not allowed("pqk.passes.prune.prune", "pqk.bench.measure")
    assert not allowed("pqk.passes.prune.prune", "pqk.core.pipeline")
    assert not allowed("pqk.kernels.int8_linear", "pqk.core.graph")
    assert not allowed("pqk.models.resnet", "pqk.passes.prune")
    assert allowed("pqk.passes.fuse.fuse", "pqk.kernels.int8_linear") and allowed("pqk.cli.app", "pqk.passes")


def test_no_modules_import_each_other() -> None:
    """No circle between modules, imports for types included; a package's door imports its own files."""
    graph = {module_of(path): {m for m in own_imports(path) if m in NAMES} for path in SOURCES}
    tuple(TopologicalSorter(graph).static_order())


def test_no_passes_import_each_other() -> None:
    """Seven packages of passes, one way."""
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if within(module := module_of(path), "pqk.passes") and module != "pqk.passes":
            others = {m.split(".")[2] for m in own_imports(path) if within(m, "pqk.passes") and m != "pqk.passes"}
            graph.setdefault(module.split(".")[2], set()).update(others - {module.split(".")[2]})
    tuple(TopologicalSorter(graph).static_order())


def test_modules_are_copied_by_one_function() -> None:
    """`copy.deepcopy` refuses modules that people have; `copy_of` knows them."""

    def copied(path: Path) -> Iterable[str]:
        calls = (node for node in ast.walk(SOURCES[path]) if isinstance(node, ast.Call))
        plain = [c for c in calls if ast.unparse(c.func) in ("copy.deepcopy", "deepcopy")]
        return [] if module_of(path) == "pqk.copies" else [f"line {c.lineno}: {ast.unparse(c)}" for c in plain]

    assert not offenders(copied)


def test_no_file_is_private() -> None:
    """What another file or a test needs has a name; what none needs is a private name in a file."""
    assert not offenders(lambda path: [path.name] if re.match("_[a-z]", path.name) else [])

    def taken(path: Path) -> Iterable[str]:
        for node in ast.walk(SOURCES[path]):
            if isinstance(node, ast.ImportFrom) and within(str(node.module), "pqk"):
                yield from (alias.name for alias in node.names if re.match("_[A-Za-z]", alias.name))

    assert not offenders(taken)


TEXT_OR_NOTHING = {
    "installed", "compiler", "function", "matches", "stands_for", "_layer_of",  # a name, where there is one
    "cached_output", "_recurrent_layer",
    "corruption_warning", "reason",  # a sentence for the report
    "onnxruntime_dynamic", "optimum_ptq", "ptq",
}  # fmt: skip
"""functions that return `str | None` and are no answer to "why not?\""""


def test_reasons_are_named_so() -> None:
    """ "Does not apply" is a value with a reason: `why_not_…() -> Reason | None`, or an iterator of reasons."""

    def misnamed(path: Path) -> Iterable[str]:
        for node in ast.walk(SOURCES[path]):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                returns, named = ast.unparse(node.returns), re.match("_?why_not_", node.name) is not None
                if (returns in ("Reason | None", "Iterator[Reason]")) != named or (
                    returns == "str | None" and node.name not in TEXT_OR_NOTHING
                ):
                    yield f"line {node.lineno}: {node.name} -> {returns}"

    assert not offenders(misnamed)


PASS_CLASSES = {p.__name__ for p in passes.PASSES} | {"PQK", "Training"}


def test_nobody_asks_a_pass_for_its_class() -> None:
    """A pass answers for itself (see `Pass`); only controls, whose subject is distillation, know classes."""

    def asked(path: Path) -> Iterable[str]:
        if path.parts[-2:] == ("evaluation", "controls.py") or within(module_of(path), "pqk.passes"):
            return
        for call in calls(SOURCES[path]):
            if ast.unparse(call.func) == "isinstance":
                names = {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)} & PASS_CLASSES
                yield from (f"line {call.lineno}: {name}" for name in names)

    assert not offenders(asked)


def test_docstrings_open_with_the_fact() -> None:
    def otherwise(path: Path) -> Iterable[str]:
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
        texts = (ast.get_docstring(node) for node in ast.walk(SOURCES[path]) if isinstance(node, kinds))
        return [text.partition("\n")[0] for text in texts if text and re.match("Of |That |Whether or not ", text)]

    assert not offenders(otherwise)


def test_tests_replace_nothing_private() -> None:
    """A test passes a smaller object instead: what is private may be renamed without breaking it."""
    patched = re.compile(r"""setattr\([^()]*?(?:["'](?:[\w.]*\.)?_(?!_)\w*["']|\b\w*\._\w+,)""")
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    found = [f"{path.relative_to(ROOT)}: {m.group(0)}" for path, text in texts.items() for m in patched.finditer(text)]
    assert not found


def test_a_name_has_one_meaning() -> None:
    """No two classes, and no class and type alias, share a name; `Case` is part of every kernel's fixed form."""
    where: dict[str, list[str]] = {}
    for path, tree in SOURCES.items():
        for node in tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [t.id for t in node.targets if isinstance(t, ast.Name) and re.fullmatch("[A-Z][a-z]\\w*", t.id)]
            for name in names:
                where.setdefault(name, []).append(str(path.relative_to(ROOT)))
    del where["Case"]
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}


def test_kernels_and_models_need_little() -> None:
    """Third-party packages: kernels stand on torch and Triton, models on torch, numpy and where their data is."""
    data = {"numpy", "safetensors", "sklearn", "tokenizers", "transformers"}

    def more(path: Path) -> Iterable[str]:
        few = {"kernels": {"torch", "triton"}, "models": {"torch", *data}}.get(path.relative_to(ROOT).parts[0])
        packages = {name.partition(".")[0] for name in imports(SOURCES[path])} - sys.stdlib_module_names - {"pqk"}
        return [] if few is None else packages - few

    assert not offenders(more)


PICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__"}


def test_nothing_is_unpickled_or_evaluated() -> None:
    def dangerous(path: Path) -> Iterable[str]:
        yield from {name.partition(".")[0] for name in imports(SOURCES[path])} & PICKLERS
        for call in calls(SOURCES[path]):
            name = ast.unparse(call.func)
            words = {k.arg: ast.unparse(k.value) for k in call.keywords}
            unsaid = name in ("np.load", "numpy.load") and words.get("allow_pickle") != "False"
            if name in FORBIDDEN_CALLS or unsaid:
                yield f"line {call.lineno}: {name}"

    assert not offenders(dangerous)


def test_no_code_comes_with_a_model() -> None:
    """What transformers loads is on this disk, and of classes that it has itself."""

    def trusting(path: Path) -> Iterable[str]:
        for call in calls(SOURCES[path]):
            words = {k.arg: ast.unparse(k.value) for k in call.keywords}
            said = words.get("local_files_only"), words.get("trust_remote_code")  # not said, the second asks the user
            if ast.unparse(call.func).endswith(".from_pretrained") and said != ("True", "False"):
                yield f"line {call.lineno}: {ast.unparse(call)}"

    assert not offenders(trusting)


def test_the_library_never_prints() -> None:
    def printed(path: Path) -> Iterable[str]:
        if path.parent.name == "cli" and path.stem in ("app", "console"):
            return  # whose work it is
        for call in calls(SOURCES[path]):
            name = ast.unparse(call.func)
            if name in ("print", "sys.stdout.write", "sys.stderr.write", "sys.exit"):
                yield f"line {call.lineno}: {name}"

    assert not offenders(printed)


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_every_module_says_what_it_is_for() -> None:
    assert not offenders(lambda path: [] if ast.get_docstring(SOURCES[path]) else ["no docstring"])


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
    """What `pqk passes` shows: words on every pass, term, source, author and table, and on every field of theirs."""
    shown = reference()
    for entry in [*shown["passes"], *shown["terms"], *shown["sources"], *shown["authors"], *shown["tables"]]:
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


@pytest.mark.slow
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


@pytest.mark.slow
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


DATA = {
    "pqk/report/report.schema.json", "pqk/report/html/page.html", "pqk/report/html/style.css", "pqk/py.typed",
}  # fmt: skip


@pytest.mark.slow
def test_a_wheel_holds_everything(tmp_path: Path) -> None:
    """Built from a copy, as building leaves folders beside the sources."""
    source = tmp_path / "source"
    for name in FOLDERS:
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
    # typed for whoever imports it
    assert code | data | DATA <= there
    assert not [name for name in there if name.endswith("README.md")], "documents are for those who have the repository"
    assert {name.partition("/")[0] for name in there} <= {"pqk", f"{wheel.name.partition('-py3')[0]}.dist-info"}
