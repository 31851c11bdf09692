"""Takes every network of the zoo through a compile and writes what became of it into results.json.

    python tests/zoo/run_zoo.py [--only NAME …] [--jobs N] [--again] [--out FILE]

A network is pruned to 1.4 times fewer MACs as far as it goes, captured, quantized, distilled for two steps, converted
and deployed by `pqk.compress`, in a process of its own with a limit on its time and memory. The rows of finished
networks are kept: a run that is stopped goes on where it was, `--again` begins anew. `--only` takes shell patterns.

Outcomes:

    compiled  the artifact is there and keeps the parity contract
    refused   an error of pqk's own, in words, before anything was trained
    failed    everything else: another exception, a refusal after training, parity not kept, a limit
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
from specimens import CLASSES, SEED, ZOO, Specimen, packages

RESULTS = Path(__file__).with_name("results.json")
MEGABYTES = 6144
"""of memory that a network may take"""
UNSURE = 0.02
"""of the pixels of a map, whose margin says how sure a network is of it"""
PATIENCE = 10
"""a network that waits or shares its core is given so many times its seconds"""
TARGET = "x86-avx2"
MACS_RATIO = 1.4
BATCH, TRAIN, HELD_OUT = 8, 16, 16
RECIPE = f"""
seed = {SEED}
[target]
name = "{TARGET}"
[[pass]]
name = "prune"
macs_ratio = {MACS_RATIO}
best_effort = true
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
samples = {HELD_OUT}
[[pass]]
name = "distill"
epochs = 1
learning_rate = 0.001
terms = [{{ term = "cross_entropy", weight = 0.1 }}, {{ term = "kl", weight = 0.9 }}]
[[pass]]
name = "convert"
"""
STEPS = {"_job": "arguments", "_rehearse": "rehearsal", "_write": "emit", "_judge": "evaluation", "_ship": "parity"}
"""functions of the compile -> where in a compile they are"""


def task_of(specimen: Specimen, teacher: Any = None) -> Any:
    """Random inputs with random labels: two batches to train on, and as many to choose ranges and to judge by."""
    import torch

    from pqk import Task
    from pqk.data.data import ArrayData

    def data(count: int, seed: int) -> ArrayData:
        pixels = [size // specimen.strides for size in specimen.shape[1:]]
        shape = (count, *pixels) if specimen.kind == "map" else (count,)
        labels = torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(seed))
        return ArrayData(specimen.inputs(count, seed), labels, BATCH)

    judged = data(HELD_OUT, 13)
    if specimen.candidates and teacher is not None:
        inputs = specimen.inputs(specimen.candidates, 13)
        with torch.no_grad():
            first, second = teacher(*inputs).topk(2, 1).values.unbind(1)
        sureness = (first - second).flatten(1).quantile(UNSURE, dim=1)
        surest = sureness.argsort(descending=True)[:HELD_OUT]
        judged = ArrayData(tuple(t[surest] for t in inputs), judged.targets, BATCH)
    names = ("input_ids", "attention_mask") if specimen.kind == "text" else ("input",)
    return Task(
        data(TRAIN, 11), data(HELD_OUT, 12), judged, input_names=names,
        class_axis=1 if specimen.kind == "map" else None,
    )  # fmt: skip


class Watch:
    """An observer that knows whether training has begun."""

    def __init__(self) -> None:
        self.trained = False

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Any]:
        self.trained = self.trained or description.endswith("distill")
        yield lambda steps, text="": None


def compile_one(specimen: Specimen) -> dict[str, Any]:
    """The row of one network, made in this process."""
    import torch

    from pqk import Evaluation, Recipe, compress
    from pqk.core.costs import count_macs
    from pqk.errors import PqkError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    watch = Watch()
    try:
        teacher = specimen.build()
        row: dict[str, Any] = {"parameters": sum(p.numel() for p in teacher.parameters())}
    except Exception as error:
        return {"outcome": "failed", "stage": "build", "reason": words(error)}
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        try:
            task = task_of(specimen, teacher)
            row["macs"] = [count_macs(teacher, task.example)]
            artifact = compress(
                teacher, task, Recipe.loads(RECIPE), out=Path(folder) / "out", observer=watch,
                evaluation=Evaluation(
                    baselines=(), runtimes=(), steps_between=False, latency=False, batches=(1,), threads=1
                ),
            )  # fmt: skip
            return row | {"outcome": "compiled"} | worth(artifact.report)
        except Exception as error:
            refused = isinstance(error, PqkError) and not watch.trained
            finished = [p.name for p in sorted((Path(folder) / "out" / ".work").glob("0*")) if p.is_dir()]
            row |= {"outcome": "refused" if refused else "failed", "stage": stage_of(error, finished)}
            return row | {"reason": words(error)}


def worth(report: Any) -> dict[str, Any]:
    """What the report says of a finished student."""
    parity, pruned = report.parity, report.passes[0].details
    integers = [layer for layer in parity.layers if layer.max_lsb is not None]
    floats = [layer.max_relative for layer in parity.layers if layer.max_relative is not None]
    left = [d for d in report.declined if d.pass_name == "prune"]
    return {
        "macs": [pruned["before"]["macs"], pruned["after"]["macs"]] if "before" in pruned else [report.macs] * 2,
        "layers_cut": len(pruned.get("widths", ())),
        "not_cut": {"layers": sum(d.layer != "*" for d in left), "reasons": sorted({d.reason for d in left})[:4]},
        "coverage": report.integer_coverage,
        "coverage_reason": report.integer_coverage_reason,
        "parity": {
            "layers": len(parity.layers),
            "max_lsb": max((layer.max_lsb for layer in integers), default=0),
            "least_exact": min((layer.exact for layer in integers if layer.accumulators is not None), default=1.0),
            "max_relative": max(floats, default=0.0),
            "agreement": parity.agreement,
        },
    }


def words(error: BaseException) -> str:
    """The error as a user reads it; of one that is not pqk's own, where it was raised."""
    from pqk.errors import PqkError

    text = " ".join(str(error).split())[:600]
    if isinstance(error, PqkError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


def stage_of(error: BaseException, finished: list[str]) -> str:
    """Where in the compile an error was raised: a step of it, or the pass that was not finished."""
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    step = next((STEPS[name] for name in names if name in STEPS), None)
    passes = ("prune", "capture", "quantize", "distill", "convert")
    done = sum(not name.endswith(".partial") for name in finished)
    return step or passes[min(done, len(passes) - 1)]


# ---- processes


def check_one(specimen: Specimen) -> dict[str, Any]:
    """How long `pqk check` of one network takes, in seconds on the clock, in this process."""
    import torch

    from pqk import Recipe
    from pqk.check import check

    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    teacher = specimen.build()
    task = task_of(specimen, teacher)
    began = time.monotonic()
    check(teacher, task, Recipe.loads(RECIPE))
    return {"check_seconds": round(time.monotonic() - began, 1)}


def child(specimen: Specimen, answer: Connection, log: Path, work: Callable[[Specimen], dict[str, Any]]) -> None:
    """One network in a process of its own, silent, whose processor time is limited by the system."""
    resource.setrlimit(resource.RLIMIT_CPU, (specimen.seconds, specimen.seconds + 5))
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    answer.send(work(specimen))


def run_one(name: str, work: Callable[[Specimen], dict[str, Any]] = compile_one) -> dict[str, Any]:
    """The row of one network. Packages that this process has imported need not be imported again."""
    import psutil

    context, limit = multiprocessing.get_context("fork"), ZOO[name].seconds
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="zoo-log-") as folder:
        process = context.Process(target=child, args=(ZOO[name], theirs, Path(folder) / "log", work))
        began, peak, row = time.monotonic(), 0.0, None
        process.start()
        theirs.close()
        watched = psutil.Process(process.pid)
        seconds = 0.0
        while row is None and process.is_alive():
            try:
                peak = max(peak, watched.memory_info().rss / 2**20)
                times = watched.cpu_times()
                seconds = times.user + times.system
                if ours.poll(0.2):
                    row = ours.recv()
            except (psutil.NoSuchProcess, EOFError):
                break
            if peak > MEGABYTES or time.monotonic() - began > limit * PATIENCE:
                what = f"{MEGABYTES} MB" if peak > MEGABYTES else f"{limit * PATIENCE} s on the clock"
                process.kill()
                row = {"outcome": "failed", "stage": "limit", "reason": f"more than {what}"}
        process.join(30)
        if row is None and ours.poll(0.1):
            try:
                row = ours.recv()
            except EOFError:
                row = None
        if row is None:
            late = process.exitcode in (-24, -9)  # SIGXCPU
            reason = f"more than {limit} s of a core" if late else f"the process ended with {process.exitcode}"
            row = {"outcome": "failed", "stage": "limit" if late else "process", "reason": reason}
    return row | {"seconds": round(seconds, 1), "peak_mb": round(peak)}


def conditions() -> dict[str, Any]:
    """What the results hold for."""
    import importlib.metadata

    from pqk.target.machine import machine_fingerprint

    names = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "torch-pruning")
    return {
        "seed": SEED,
        "classes": CLASSES,
        "recipe": RECIPE.strip(),
        "samples": {"batch": BATCH, "train": TRAIN, "validation": HELD_OUT, "evaluation": HELD_OUT},
        "limits": {"seconds": Specimen.seconds, "megabytes": MEGABYTES},
        "versions": {name: importlib.metadata.version(name) for name in names},
        "machine": machine_fingerprint(),
    }


def preload() -> None:
    """Import what every network needs, once."""
    packages()
    import transformers  # noqa: F401

    import pqk.compiler  # noqa: F401


def describe(specimen: Specimen) -> dict[str, Any]:
    row: dict[str, Any] = {"package": specimen.package, "family": specimen.family, "shape": list(specimen.shape)}
    smaller = {
        "arguments": specimen.arguments if specimen.package != "transformers" else {},
        "keep": specimen.keep,
        "drop": list(specimen.drop),
        "candidates": specimen.candidates,
        "limit": specimen.seconds if specimen.seconds != Specimen.seconds else 0,
    }
    return row | {name: value for name, value in smaller.items() if value}


def save(path: Path, rows: Mapping[str, dict[str, Any]]) -> None:
    """Writes what is known so far, in the zoo's order."""
    document = {
        "conditions": conditions(),
        "goal": MACS_RATIO,
        "networks": {n: rows[n] for n in ZOO if n in rows},
        "not_run": [n for n in ZOO if n not in rows],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="shell patterns of names, such as timm/vit*")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--again", action="store_true", help="run networks again that have a row")
    parser.add_argument("--check", action="store_true", help="time `check` of what compiled, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results")
    options = parser.parse_args()
    preload()
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: dict[str, Any] = document.get("networks", {})
    chosen = [n for n in ZOO if any(fnmatch.fnmatchcase(n, p) or p == n.partition("/")[2] for p in options.only)]
    if options.check:
        wanted = [n for n in chosen if n in rows and rows[n]["outcome"] == "compiled"]
        wanted = [n for n in wanted if options.again or "check_seconds" not in rows[n]]
    else:
        wanted = [n for n in chosen if options.again or n not in rows]

    def finish(name: str) -> None:
        if options.check:
            row = run_one(name, check_one)
            rows[name]["check_seconds"] = row.get("check_seconds")
            what = f"check: {rows[name]['check_seconds']} s {row.get('reason', '')}"
        else:
            rows[name] = describe(ZOO[name]) | run_one(name)
            what = f"{rows[name]['seconds']} s  {rows[name].get('stage', '')} {rows[name].get('reason', '')}"
        save(options.out, rows)
        sys.stdout.write(f"{rows[name]['outcome']:9} {name:45} {what}"[:300] + "\n")
        sys.stdout.flush()

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(finish, wanted))
    count = {o: sum(rows[n]["outcome"] == o for n in chosen if n in rows) for o in ("compiled", "refused", "failed")}
    print(", ".join(f"{number} {outcome}" for outcome, number in count.items()))
    raise SystemExit(1 if count["failed"] else 0)


if __name__ == "__main__":
    main()
