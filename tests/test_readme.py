"""The READMEs quote committed results and recipes, name only what exists, and show only what runs."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import nn

from pqk import Artifact, Evaluation, Target, Task, compress
from pqk.cli.app import app
from pqk.core.program import Program, Stage, replay
from pqk.core.run_context import RunContext

ROOT = Path(__file__).parent.parent
LONGEST = 200
"""lines of the repository's README; what does not fit belongs to a package"""


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tests" / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = _tool()
READMES: dict[Path, str] = {path: path.read_text() for path in TOOL.readmes()}
QUICKLY: dict[str, Any] = {"evaluation": Evaluation.quick()}
CHANGELOG = ROOT / "pqk" / "CHANGELOG.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def offenders(law: Callable[[Path, str], Iterable[object]], *more: Path) -> list[str]:
    """`file: what` for everything that a law finds wrong in any README."""
    texts = READMES | {path: path.read_text() for path in more}
    return [f"{path.relative_to(ROOT)}: {what}" for path, text in texts.items() for what in law(path, text)]


def code_spans(text: str) -> Iterator[str]:
    """Words in backticks, outside of code blocks."""
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def shown_commands(text: str) -> Iterator[list[str]]:
    """The words of every command: lines of code blocks in no language, and words in backticks."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "sh")]
    for line in [*(line for block in blocks for line in block.splitlines()), *code_spans(text)]:
        if re.match(r" *(pqk|make|python|pip|torchrun) ", line):
            yield shlex.split(line.partition("  #")[0], comments=True)


def test_the_readmes_are_what_their_sources_say() -> None:
    assert not offenders(lambda path, text: [] if TOOL.filled(text) == text else ["python tests/tools/readme.py"])


def test_a_block_that_nothing_makes_is_an_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        TOOL.filled("<!-- nothing -->\n<!-- end -->")


def test_the_front_page_is_short() -> None:
    assert len(READMES[ROOT / "README.md"].splitlines()) <= LONGEST


def test_every_package_has_a_readme_that_the_front_page_leads_to() -> None:
    """By links from README.md, of any length."""
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        path = queue.pop()
        if path not in reached and path in READMES:
            reached.add(path)
            queue += [(path.parent / link).resolve() for link, _ in links(READMES[path]) if link]
    assert reached == set(READMES)
    packages = {path.parent for path in ROOT.glob("pqk/*/__init__.py")} | {ROOT / name for name in TOOL.FOLDERS[:-1]}
    assert {path.parent for path in READMES} >= packages


def links(text: str) -> Iterator[tuple[str, str]]:
    """`(path, anchor)` of every relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    def broken(path: Path, text: str) -> Iterable[str]:
        for link, anchor in links(text):
            target = (path.parent / link).resolve() if link else path
            if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
                yield f"{link}#{anchor}"

    assert not offenders(broken, CHANGELOG)


def test_every_file_that_is_named_exists() -> None:
    """Python files and paths into the repository's folders, from its root or from the README's own folder."""

    def missing(path: Path, text: str) -> Iterable[str]:
        for name in code_spans(text):
            ours = re.fullmatch(rf"(?:{'|'.join(TOOL.FOLDERS)})/[\w./-]*", name) or re.fullmatch(r"[\w/]+\.py", name)
            if ours and not any((folder / name).exists() for folder in (ROOT, path.parent)):
                yield name

    assert not offenders(missing)


def test_every_name_of_pqk_is_there() -> None:
    """Dotted names in backticks; those of the changelog that are in its column `now`."""

    def missing(names: Iterable[str]) -> Iterable[str]:
        for name in names:
            for dotted in re.findall(r"(?<![\w./])pqk(?:\.\w+)+(?![\w/*])", name):
                try:
                    pkgutil.resolve_name(dotted)
                except (ImportError, AttributeError):
                    yield dotted

    assert not offenders(lambda _, text: missing(code_spans(text)))
    rows = re.findall(r"^\|.*\|([^|]*)\|$", CHANGELOG.read_text(), re.MULTILINE)
    assert not [*missing(code for row in rows for code in code_spans(row))]


def test_every_command_can_be_given() -> None:
    """The command, its options and the files that it names: of pqk, of make, and Python's."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    def wrong(path: Path, text: str) -> Iterable[str]:
        for program, *words in shown_commands(text):
            if program == "pqk" and words[0] in commands:
                known = {"--help"} | {
                    option for p in commands[words[0]].params for option in (*p.opts, *p.secondary_opts)
                }
                yield from (f"pqk {words[0]} {w}" for w in words[1:] if w.startswith("--") and w not in known)
            elif program == "pqk" and words[0] not in ("--help", "--version"):
                yield f"pqk {words[0]}"
            elif program == "make":
                yield from (f"make {w}" for w in words if w not in targets)
            elif program == "python":
                known_module = words[0] != "-m" or importlib.util.find_spec(words[1]) is not None
                if not known_module or (words[0].endswith(".py") and not (ROOT / words[0]).exists()):
                    yield f"python {words[0]} {words[1]}"
            files = [w for w in words if re.match(rf"(?:{'|'.join(TOOL.FOLDERS)})/[\w/.-]+$", w)]
            yield from (w for w in files if not (ROOT / w).exists())

    assert not offenders(wrong)


def test_every_command_of_pqk_is_shown() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for path in (ROOT / "README.md", ROOT / "pqk" / "cli" / "README.md"):
        shown = {words[1] for words in shown_commands(READMES[path]) if words[0] == "pqk"}
        assert shown >= set(commands), path


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """README.md's Python, as it stands there, with next to no budget."""
    (code,) = [body for language, body in FENCE.findall(READMES[ROOT / "README.md"]) if language == "python"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pqk.compress", functools.partial(compress, **QUICKLY))
    names: dict[str, Any] = {}
    exec(compile(code.replace('budget="2m"', 'budget="0.1 epochs"'), "README.md", "exec"), names)
    assert Artifact.load(tmp_path / "out" / "mine").report.parity.passed
    assert names["logits"].shape == (1, 3)
    assert "accuracy" in capsys.readouterr().out


def test_the_pass_that_is_shown_is_one() -> None:
    """passes/README.md's Python: it declines, rewrites, and its plan gives the student back."""
    (code,) = [body for language, body in FENCE.findall(READMES[ROOT / "passes" / "README.md"]) if language == "python"]
    names: dict[str, Any] = {}
    exec(compile(code, "passes/README.md", "exec"), names)
    teacher = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 2)).eval()
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    batches = [(inputs, torch.zeros(4, dtype=torch.int64))]
    task = Task(None, batches, batches)
    run = names["DropBiases"](layers=("0", "1"))
    program = run.apply(
        Program(teacher, copy.deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext()), task
    )
    assert [(d.layer, d.reason) for d in program.declined] == [("1", "it has no bias")]
    assert not program.student[0].bias.any() and torch.equal(program.student[2].bias, teacher[2].bias)
    again = replay(copy.deepcopy(teacher), task.example, program.plan, {"drop_biases": names["drop_biases"]})
    assert torch.equal(again(inputs), program.student(inputs)) and not torch.equal(again(inputs), teacher(inputs))
