"""Ways of cutting beside each other: `python tests/tools/allocation.py [--network 56] [--goals 2.5 4] [--seeds 0 1 2]`.

A CIFAR ResNet is cut by width, by depth and by the table to the same latency in its INT8 form, measured; each student
is then distilled briefly and equally, on one thread. Its speed is that of its INT8 form beside the teacher in FP32.
With several seeds: how many points of all test images each way is better by than the first, with a 95 % interval over
seeds (Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from pqk.bench.measure import ratio_to
from pqk.bench.oracle import Oracle
from pqk.core.costs import count_macs
from pqk.core.onnxruntime_session import session
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.data.folders import data_folder
from pqk.errors import InputError, first_line
from pqk.files import write_json
from pqk.models.cifar import cifar10
from pqk.models.resnet import resnet20, resnet56
from pqk.passes import Prune
from pqk.recipe.factories import find_weights, load_weights
from pqk.search.candidates import TrainingChoice, distillation
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.metrics import predict
from pqk.task.task import Task

WAYS: dict[str, dict[str, Any]] = {
    "width": {"width": True, "depth": False},
    "depth": {"width": False, "depth": True},
    "width and depth, greedy": {"width": True, "depth": True},
    "table": {"width": True, "depth": True, "allocation": "table"},
}


def measure(
    network: str,
    goals: Sequence[float],
    data: Path,
    images: int,
    epochs: float,
    ways: Sequence[str],
    seeds: Sequence[int] = (0,),
) -> dict[str, Any]:
    """A row for each seed, goal and way."""
    task = cifar10(data, limit=images + 2000, validation=2000, views=1)
    teacher = {"20": resnet20, "56": resnet56}[network]().eval().requires_grad_(False)
    load_weights(teacher, find_weights(f"resnet{network}_cifar10.safetensors", data, None))
    rows = []
    for seed, goal, way in itertools.product(seeds, goals, ways):
        rows.append({"seed": seed, "goal": goal, "way": way, **_row(teacher, task, goal, WAYS[way], epochs, seed)})
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    conditions = {"network": f"ResNet-{network}", "images": images, "epochs": epochs, "threads": 1}
    better = [_better(rows, goal, way, ways[0]) for goal in goals for way in ways[1:] if len(seeds) > 1]
    return {"better": better, "rows": rows, "conditions": conditions, "machine": machine_fingerprint()}


def _better(rows: Sequence[dict[str, Any]], goal: float, way: str, than: str) -> dict[str, Any]:
    """Points on the test images by which one way is better than another, seed by seed, and an interval."""
    here = [row for row in rows if row["goal"] == goal and "test" in row]
    both = [{row["seed"]: row["test"] for row in here if row["way"] == name} for name in (way, than)]
    points = [100 * (both[0][seed] - both[1][seed]) for seed in sorted(both[0].keys() & both[1].keys())]
    if len(points) < 2:
        return {"goal": goal, "way": way, "than": than, "points": points}
    spread = statistics.stdev(points) / math.sqrt(len(points)) * float(stats.t.ppf(0.975, len(points) - 1))
    mean = statistics.mean(points)
    return {
        "goal": goal, "way": way, "than": than, "points": points, "mean": mean, "low": mean - spread,
        "high": mean + spread,
    }  # fmt: skip


def _row(
    teacher: torch.nn.Module, task: Task, goal: float, way: dict[str, Any], epochs: float, seed: int
) -> dict[str, Any]:
    oracle = Oracle(teacher, task, Target.detect(), (), RunContext(seed))
    program = Program.begin(teacher, Target.detect(), RunContext(seed, oracle=oracle))
    began = time.perf_counter()
    try:
        program = Prune(latency_ratio=goal, best_effort=True, **way).apply(program, task)
    except InputError as error:
        return {"failed": first_line(error)}
    seconds = time.perf_counter() - began
    emitted = session(oracle.emit(program.student), threads=2)
    oracle.baseline()
    ratio, low, high = ratio_to(session(oracle.teacher_path, threads=2), emitted, task.feeds(1), rounds=15)
    row = {
        "seconds": seconds, "reached": program.details["budget"]["reached"], "ratio": ratio, "low": low, "high": high,
        "macs_ratio": count_macs(teacher, task.example) / count_macs(program.student, task.example),
        "blocks_removed": len(program.details["blocks_removed"]), "cut": accuracy(program.student, task),
    }  # fmt: skip
    oracle.folder.cleanup()
    distill = distillation(TrainingChoice("sgd", 0.02, 1.0), epochs)
    trained = distill.apply(program, task)
    return {**row, "trained": accuracy(trained.student, task), "test": accuracy(trained.student, task, test=True)}


def accuracy(student: torch.nn.Module, task: Task, test: bool = False) -> float:
    outputs, targets = predict(student, task.evaluation if test else task.validation)
    return float((outputs.argmax(1) == targets).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--network", choices=("20", "56"), default="20")
    parser.add_argument("--goals", type=float, nargs="+", default=[2.5, 3.5], help="FP32 teacher over INT8 student")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--images", type=int, default=20000, help="training images")
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with the CIFAR-10 files and the checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = data_folder(options.data)
    result = measure(
        options.network, options.goals, folder, options.images, options.epochs, options.ways, options.seeds
    )
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
