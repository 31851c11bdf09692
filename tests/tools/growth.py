"""How time and memory of a compile grow: `python tests/tools/growth.py [--only AXIS …] [--out FILE] [--rounds N]`.

A small network is compiled whole (pruned, captured, quantized, distilled for one epoch, converted, deployed, evaluated)
at three sizes of one thing, while all others stay: samples of training data, width and depth of a network, pixels of an
image, tokens of a sequence. Every compile is in a process of its own with one thread. Counted are its time, its time of
a core, and the memory that it came to hold beyond what it held with data and teacher in it; what is committed are
ratios to the smallest size, the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk import Evaluation, Recipe, Task, compress
from pqk.data.data import ArrayData
from pqk.files import write_json
from pqk.target.machine import machine_fingerprint

TARGET = "x86-avx2"
CLASSES, BATCH, HELD_OUT = 5, 16, 64
RECIPE = f"""
seed = 1
[target]
name = "{TARGET}"
[[pass]]
name = "prune"
macs_ratio = 1.4
best_effort = true
recovery_epochs = 0.0
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
samples = {HELD_OUT}
[[pass]]
name = "distill"
epochs = 1
learning_rate = 0.01
terms = [{{ term = "cross_entropy", weight = 0.1 }}, {{ term = "kl", weight = 0.9 }}]
[[pass]]
name = "convert"
"""


class Convolutions(nn.Module):
    """[B, 3, H, W] -> logits: a stem and `depth` residual blocks of two convolutions, all of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """[B, L] token numbers -> logits: two layers of self-attention and an MLP, the mean over tokens."""

    def __init__(self, length: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.places = nn.Embedding(200, width), nn.Parameter(torch.randn(1, length, width) * 0.1)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width), "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width),
                }
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places
        for layer in self.layers:
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in layer["qkv"](layer["norm"](x)).chunk(3, -1)
            )
            x = x + layer["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        return self.head(x.mean(1))


@dataclass(frozen=True)
class Axis:
    """One thing that grows, at three sizes."""

    unit: str
    sizes: tuple[int, int, int]
    network: Callable[[int], nn.Module]
    inputs: Callable[[int, int], Tensor]
    """(size, samples) -> so many inputs"""
    samples: Callable[[int], int] = lambda size: 256
    """of the training data"""


def images(count: int, pixels: int = 16) -> Tensor:
    return torch.randn(count, 3, pixels, pixels)


AXES = {
    "samples": Axis(
        "samples of 3 x 16 x 16 floats", (1000, 4000, 16000), lambda size: Convolutions(16, 2),
        lambda size, count: images(count), lambda size: size,
    ),
    "width": Axis(
        "channels of every layer", (16, 32, 64), lambda size: Convolutions(size, 2), lambda size, count: images(count)
    ),
    "depth": Axis(
        "residual blocks", (2, 4, 8), lambda size: Convolutions(16, size), lambda size, count: images(count)
    ),
    "pixels": Axis(
        "pixels of an image's side", (16, 32, 64), lambda size: Convolutions(16, 2),
        lambda size, count: images(count, size),
    ),
    "length": Axis(
        "tokens of a sequence", (64, 128, 256), Tokens,
        lambda size, count: torch.randint(200, (count, size), generator=torch.Generator().manual_seed(3)),
    ),
}  # fmt: skip


def compile_one(name: str, size: int) -> dict[str, Any]:
    """What a compile at one size takes, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    axis = AXES[name]

    def data(count: int) -> ArrayData:
        return ArrayData(axis.inputs(size, count), torch.arange(count) % CLASSES, BATCH)

    teacher = axis.network(size).eval()
    task = Task(data(axis.samples(size)), data(HELD_OUT), data(HELD_OUT))
    with torch.no_grad():
        teacher(*task.example)
    before, began = memory("VmRSS"), (time.perf_counter(), core_seconds())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, at what is held now
    with tempfile.TemporaryDirectory() as folder:
        report = compress(
            teacher, task, Recipe.loads(RECIPE), out=Path(folder) / "out",
            evaluation=Evaluation(
                baselines=(), runtimes=(), steps_between=False, latency=False, batches=(1,), threads=1
            ),
        ).report  # fmt: skip
    return {
        "seconds": time.perf_counter() - began[0],
        "core_seconds": core_seconds() - began[1],
        "held_before_bytes": before,
        "more_bytes": memory("VmHWM") - before,
        "pass_seconds": {p.pass_name: p.seconds for p in report.passes},
        "macs": report.passes[-1].macs,
    }


def memory(of: str) -> int:
    """Bytes in memory now (`VmRSS`), or the most there ever were (`VmHWM`), as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{of}:")).split()[1])


def core_seconds() -> float:
    """The time that this process and those that it waited for had a core."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def in_own_process(name: str, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    if done.returncode:
        sys.exit(f"{name} at {size}: exit status {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(names: list[str], rounds: int) -> dict[str, Any]:
    """Every size of every axis, so many times."""
    return {"axes": {name: grown(name, rounds) for name in names}, "conditions": conditions(rounds)}


def grown(name: str, rounds: int) -> dict[str, Any]:
    axis = AXES[name]
    runs = [[in_own_process(name, size) for size in axis.sizes] for _ in range(rounds)]
    passes = runs[0][0]["pass_seconds"]

    def median(key: str) -> list[int]:
        return [int(statistics.median(run[i][key] for run in runs)) for i in range(len(axis.sizes))]

    return {
        "unit": axis.unit,
        "sizes": axis.sizes,
        "input_bytes": [axis.inputs(s, 1).nbytes * axis.samples(s) for s in axis.sizes],
        "macs": [one["macs"] for one in runs[0]],
        "seconds_at_smallest": round(statistics.median(run[0]["seconds"] for run in runs), 1),
        "time": ratios(runs, lambda one: one["seconds"]),
        "core_time": ratios(runs, lambda one: one["core_seconds"]),
        "pass_time": {p: ratios(runs, lambda one, p=p: one["pass_seconds"][p]) for p in passes},
        "held_before_bytes": median("held_before_bytes"),
        "more_bytes": median("more_bytes"),
    }


def ratios(runs: list[list[dict[str, Any]]], of: Callable[[dict[str, Any]], float]) -> list[float]:
    """Of each size to the smallest of its round: the median over rounds."""
    return [round(statistics.median(of(run[i]) / of(run[0]) for run in runs), 2) for i in range(len(runs[0]))]


def conditions(rounds: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "threads": 1,
        "target": TARGET,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "machine": machine_fingerprint(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), help="these axes")
    parser.add_argument("--rounds", type=int, default=1, help="times that everything is measured")
    parser.add_argument("--out", type=Path, help="write the result there too")
    parser.add_argument("--one", nargs=2, metavar=("AXIS", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        sys.stdout.write(json.dumps(compile_one(options.one[0], int(options.one[1]))) + "\n")
        return
    result = measure(options.only, options.rounds)
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
