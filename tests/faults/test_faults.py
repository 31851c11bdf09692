"""A few of each of the campaigns' faults; the whole campaigns, whose results are in `results.json`, are full tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mutations import Campaign

HERE = Path(__file__).parent
# A script's own folder is where its modules are, which a safe path leaves out.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_three_hundred_mutations_end_in_words_or_are_right(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    campaign = Campaign(tmp_path, seed=0)
    outcomes = campaign.run(300)
    assert campaign.problems == []
    assert sum(sum(row.values()) for row in outcomes.values()) == 300
    assert all(row.get("refused") for name, row in outcomes.items() if sum(row.values()) > 3), "nothing was tried"


@pytest.mark.slow
def test_a_kill_a_full_disk_and_a_second_process(tmp_path: Path) -> None:
    """Each in a process of its own, which is killed, finds the disk full, is refused, or may not write."""
    interrupted(tmp_path, kills=1, whole=0, onnx=0, sizes=131072, twice=1, closed=1, clocks=0)


@pytest.mark.full
def test_a_language_model_killed_in_every_part_of_its_compile(tmp_path: Path) -> None:
    """And in the asking of the black box that wrote its texts."""
    part = run("tellings.py", tmp_path, "--chains=2")["interruptions"]["tellings"]
    assert part["problems"] == [] and sum(part["kills"].values()) >= 18


@pytest.mark.full
def test_the_campaign_of_interruptions(tmp_path: Path) -> None:
    interrupted(tmp_path)


@pytest.mark.full
def test_the_campaign_of_mutations(tmp_path: Path) -> None:
    assert run("mutations.py", tmp_path)["mutations"]["problems"] == []


def interrupted(folder: Path, **counts: int) -> None:
    results = run("interruptions.py", folder, *(f"--{name}={count}" for name, count in counts.items()))
    assert [part["problems"] for part in results["interruptions"].values() if part["problems"]] == []


def run(script: str, folder: Path, *options: str) -> Any:
    into = folder / "results.json"
    command = [sys.executable, str(HERE / script), "--into", str(into), *options]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(into.read_text())


def test_the_committed_results_are_of_whole_campaigns_without_a_fault() -> None:
    results = json.loads((HERE / "results.json").read_text())
    interruptions, mutations = results["interruptions"], results["mutations"]
    assert interruptions.keys() == {"kills", "disk", "twice", "closed", "clocks"}
    assert [part["problems"] for part in (*interruptions.values(), mutations)] == [[]] * 6
    assert interruptions["kills"]["kills"] >= 100
    assert sum(mutations["outcomes"].values()) >= 10_000 and "wrong" not in mutations["outcomes"]
