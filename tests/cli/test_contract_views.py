"""What the command line shows of a contract: a search that was stopped, and a rehearsal of what it begins with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pqk.check import Findings, Rehearsed
from pqk.cli import app as cli
from pqk.cli import views as describe
from pqk.core.decisions import Journal
from pqk.core.run_context import RunContext
from pqk.core.run_folder import RunFolder
from pqk.files import write_sealed
from pqk.recipe.contract import Contract
from pqk.recipe.recipe import Recipe


def stopped(out: Path, budget: str) -> RunFolder:
    """The folder of a search that judged two candidates, of which one does not compile, and trained a third."""
    run = RunFolder.of(out)
    run.path.mkdir(parents=True)
    recipe = Recipe(passes=(), contract=Contract(budget=budget))
    write_sealed(run.identity, {"recipe": recipe.dumps(), "student": None})
    context = RunContext(0, run.path, Journal(run.journal, "a run"), identity="a run")
    for name, fate in (("static INT8", ""), ("dynamic INT8", "does not compile: no such operator")):
        context.decide(f"candidate/{name}", lambda fate=fate: {"worth": None, "fate": fate, "seconds": 60.0})
    context.decide("training", lambda: {"training": {}, "seconds": 30.0})
    (run.path / "search" / "0123456789abcdef" / "01-distill.partial").mkdir(parents=True)
    return run


def test_a_stopped_search_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped(tmp_path / "out", "10m")
    before = run.journal.read_bytes()
    run.journal.write_bytes(before + b'{"key": "half a li')
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "2 candidates are judged" in text and "0 of 0 passes" not in text
    assert "budget: 10m;" in text and "used, 25%" in text
    assert "judged: static INT8, dynamic INT8 (does not compile)" in text
    assert "in the making: distill, pass 2 of a candidate" in text and "--resume" in text
    assert run.journal.read_bytes() == before + b'{"key": "half a li', "inspecting writes nothing"


def test_its_document_has_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = stopped(tmp_path / "out", "40 epochs")
    run.unfinished_artifact.mkdir()
    assert cli.run(["inspect", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "unfinished search" and document["seconds"] == 150.0
    assert [c["name"] for c in document["judged"]] == ["static INT8", "dynamic INT8"]
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "budget: 40 epochs" in text and "%" not in text and "the search is over" in text


def test_the_rehearsal_of_a_contract_does_not_show_passes_as_if_the_user_had_written_them() -> None:
    rehearsed = Rehearsed(0, "prune", "MODULE", seconds=1.0)
    costs = {"parameters": 10, "macs": 10, "float_bytes": 40}
    found = Findings("x86-avx2", 0, costs, passes=[rehearsed], begins_search=True)
    shown = describe.findings(dataclasses.asdict(found))
    said = " ".join(str(part) for part in shown)
    assert "the contract names no passes: those below are the first student that the search cuts" in said
    (table,) = [part for part in shown if hasattr(part, "columns")]
    assert table.title == "What the search begins with"
    own = describe.findings(dataclasses.asdict(dataclasses.replace(found, begins_search=False)))
    assert "the search" not in " ".join(str(part) for part in own)
