"""The journal and the seeds of a run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pqk.core.decisions import Journal
from pqk.core.distributed import from_main, is_main_process
from pqk.core.run_context import RunContext
from pqk.errors import InputError


def test_a_decision_is_measured_once_and_replayed(tmp_path: Path) -> None:
    path, calls = tmp_path / "journal.jsonl", []

    def measure() -> Any:
        calls.append(1)
        return {"ms": 0.1 + 0.2, "order": (3, 1)}

    run = RunContext(journal=Journal(path)).enter("00-prune")
    first = run.decide("rank", measure)
    again = RunContext(journal=Journal(path)).enter("00-prune").decide("rank", measure)
    assert first == again == run.decide("rank", measure) == {"ms": 0.1 + 0.2, "order": [3, 1]}  # as JSON from the first
    assert len(calls) == 1
    run.enter("01-prune").decide("rank", measure)
    assert len(calls) == 2 and [json.loads(line)["key"] for line in path.read_text().splitlines()] == [
        "00-prune/rank",
        "01-prune/rank",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 5, 20])
def test_half_a_line_is_dropped_and_measured_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.decide("a", lambda: 1)
    journal.decide("b", lambda: 2)
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert again.decisions == {"a": 1} and again.decide("b", lambda: 3) == 3
    assert Journal(path).decisions == {"a": 1, "b": 3}


@pytest.mark.parametrize("line", ['{"key": "a"}', "[]", '{"key": 1, "value": 2}', '{"key": "a", "value": 1, "x": 2}'])
def test_a_changed_journal_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "j").write_text(f"{line}\n")
    with pytest.raises(InputError, match="line 1 was changed: it is not a decision; start anew"):
        Journal(tmp_path / "j")


def test_a_changed_number_and_another_run_s_line_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path, "one").decide("a", lambda: 1.25)
    assert Journal(path, "one").decisions == {"a": 1.25}
    with pytest.raises(InputError, match="line 1 was changed, or is a decision of another run"):
        Journal(path, "other")
    path.write_text(path.read_text().replace("1.25", "1.75"))
    with pytest.raises(InputError, match="line 1 was changed, or is a decision of another run"):
        Journal(path, "one")


def test_a_line_of_before_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"key": "a", "value": 1}\n')
    assert Journal(tmp_path / "j", "any").decisions == {"a": 1}


def test_a_journal_is_no_link(tmp_path: Path) -> None:
    """Reading one cuts off half a line, which would be another file's."""
    (tmp_path / "mine").write_text("half a line")
    (tmp_path / "j").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="j is a link"):
        Journal(tmp_path / "j")
    assert (tmp_path / "mine").read_text() == "half a line"


def test_a_full_disk_leaves_the_journal_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.decide("a", lambda: 1)

    def full(f: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr(os, "fsync", full)
        journal.decide("b", lambda: 2)
    assert Journal(tmp_path / "j").decisions == {"a": 1}


def test_seeds_are_functions_of_seed_pass_and_key() -> None:
    """And never change: a run that was begun by another version goes on with the same numbers."""
    run = RunContext(seed=3).enter("01-distill")
    seeds = [run.seed_for("epoch", e) for e in range(3)] + [RunContext(seed=4).enter("01-distill").seed_for("epoch", 0)]
    seeds += [run.enter("02-distill").seed_for("epoch", 0), run.seed_for("pass")]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert seeds[0] == RunContext(seed=3).enter("01-distill").seed_for("epoch", 0) == 9155522378125969867


def test_without_the_target_a_latency_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^prune: a latency budget needs the target's runtime.*macs, parameters"):
        RunContext().latency(nn.Identity(), "prune")
    with pytest.raises(InputError, match="compile on the target"):
        RunContext().baseline_latency("prune")
    assert RunContext(oracle=SimpleNamespace(latency=lambda m: 2.0)).latency(nn.Identity(), "prune") == 2.0


def test_one_process_decides_for_itself() -> None:
    assert is_main_process() and from_main(lambda: 3) == 3 and not torch.distributed.is_initialized()


def test_scratch_is_made_on_demand(tmp_path: Path) -> None:
    assert RunContext().scratch is None
    scratch = RunContext(folder=tmp_path / "w").enter("00-prune").scratch
    assert scratch == tmp_path / "w" / "00-prune.partial" and scratch.is_dir()
