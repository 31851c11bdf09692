"""How near `pqk check` comes to what the passes take: `python tests/tools/estimates.py [--data DIR] [--out FILE]`.

Three recipes of models/, two of them with less training, are rehearsed, compiled and rehearsed again, each in a process
of its own with one thread. The estimate is the mean of the two rehearsals; beside it stands the sum of what the passes
took, as the report has it. All seconds are those of a core (`time.process_time` stands for `time.perf_counter`): what
else a machine does between a rehearsal and a compile is then not taken for an error of the estimate. Exit code 1 where
the two are more than 1.5 times apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pqk import Evaluation, Recipe, compress
from pqk.check import check
from pqk.cli.commands import load_sources
from pqk.files import read_json, write_json
from pqk.target.machine import machine_fingerprint

ROOT = Path(__file__).parents[2]
RECIPES: dict[str, dict[int, float]] = {
    "digits": {},
    "speech_fsdd": {0: 3.0, 1: 1.0},
    "resnet20_cifar10": {0: 0.2, 1: 0.1},
}
"""recipe -> epochs of each of its trainings by number, where they are others than its own"""
ARGUMENTS = {"resnet20_cifar10": {"evaluation_limit": 500}}
"""recipe -> arguments of its task that it gets beside its own: what follows the passes is not looked at"""
APART = 1.5
"""times, at most"""


def recipe_named(name: str) -> Recipe:
    """A recipe of models/, with the epochs that this benchmark gives it."""
    recipe = Recipe.load(ROOT / "models" / f"{name}.toml")
    trainings = [i for i, p in enumerate(recipe.passes) if p.name == "distill"]
    epochs = {trainings[number]: value for number, value in RECIPES[name].items()}
    passes = [replace(p, epochs=epochs[i]) if i in epochs else p for i, p in enumerate(recipe.passes)]
    assert recipe.task is not None
    task = replace(recipe.task, arguments={**recipe.task.arguments, **ARGUMENTS.get(name, {})})
    return replace(recipe, passes=tuple(passes), task=task)


def alone(what: str, name: str, data: Path | None) -> dict[str, float]:
    """Seconds of each pass, in a process of its own: by a rehearsal ("check"), or as they were ("compile")."""
    time.perf_counter = time.process_time
    path = ROOT / "models" / f"{name}.toml"
    recipe = recipe_named(name)
    assert recipe.teacher is not None and recipe.task is not None
    teacher, task = load_sources(recipe.teacher, recipe.task, data, path)
    if what == "check":
        began = time.perf_counter()
        found = check(teacher, task, recipe)
        seconds = {f"{p.index} {p.name}": float(p.seconds or 0.0) for p in found.passes}
        return {**seconds, "rehearsal": time.perf_counter() - began}
    with tempfile.TemporaryDirectory() as out:
        # So short a training may leave decisions near to each other; only the passes' times count here.
        evaluation = Evaluation.quick()
        artifact = compress(
            teacher, task, recipe, out=Path(out) / "out", evaluation=evaluation, allow_parity_failure=True
        )
        return {f"{p.index} {p.pass_name}": p.seconds for p in artifact.report.passes}


def in_process(what: str, name: str, data: Path | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", what, name, *(["--data", str(data)] if data else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PQK_CACHE", None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(name: str, data: Path | None) -> dict[str, Any]:
    """The estimate for one recipe beside what its passes took."""
    before, took, after = (in_process(what, name, data) for what in ("check", "compile", "check"))
    rehearsals = [before.pop("rehearsal"), after.pop("rehearsal")]
    passes = {p: {"estimated_s": statistics.mean([before[p], after[p]]), "took_s": took[p]} for p in took}
    estimated, total = sum(p["estimated_s"] for p in passes.values()), sum(took.values())
    return {
        "epochs_of_trainings": RECIPES[name],
        "estimated_s": estimated,
        "estimates_s": [sum(before.values()), sum(after.values())],
        "took_s": total,
        "ratio": estimated / total,
        "rehearsals_s": rehearsals,
        "passes": passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="folder with the public data and checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    parser.add_argument("--only", nargs="*", default=list(RECIPES), help="recipes, beside those in --out")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(*options.alone, options.data)))
        return
    known = read_json(options.out) if options.out is not None and options.out.exists() else {"recipes": {}}
    document: dict[str, Any] = {
        "recipes": known["recipes"],
        "bound": APART,
        "clock": "seconds of a core, one thread",
        "machine": machine_fingerprint(),
    }
    for name in options.only:
        document["recipes"][name] = compared(name, options.data)
        print(name, json.dumps(document["recipes"][name]["ratio"]), flush=True)
        if options.out is not None:
            write_json(options.out, document)
    missed = [n for n, r in document["recipes"].items() if not 1 / APART <= r["ratio"] <= APART]
    if missed:
        sys.exit(f"more than {APART:g} times apart: {', '.join(missed)}")


if __name__ == "__main__":
    main()
