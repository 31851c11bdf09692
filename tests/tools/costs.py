"""What distillation and quantization-aware training cost: `python tests/tools/costs.py [--data DIR] [--out FILE]`.

The CIFAR ResNet-20 is trained a few steps at a time on a fixed part of CIFAR-10, each way in turn, A B C A B C:
labels alone, with the teacher's cached logits, with the live teacher; every response term in the place of plain KD's,
and every relation term beside it; then a float step of the captured graph against a fake-quantized one. Medians of
per-round ratios. Exit code 1 where a bound is not kept.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.files import write_json
from pqk.knowledge import TERMS, CrossEntropy, KLDivergence, Term
from pqk.knowledge.objective import Distillation
from pqk.knowledge.teachers.base import FrozenTeacher, LogitCache, cache_for
from pqk.knowledge.terms.relation import RelationTerm
from pqk.knowledge.terms.response import ResponseTerm
from pqk.models.cifar import cifar10, data_folder
from pqk.models.resnet import resnet20, resnet56
from pqk.passes import Capture, Quantize
from pqk.recipe.factories import find_weights, load_weights
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, optimizer_for

IMAGES, ROUNDS = 1280, 7
"""an "epoch" here; rounds of it"""
STEPS = 21
"""rounds of one step with each term: a bound of 5 % needs more of them than a bound of 15 %"""
BOUNDS = {"cached_over_without": 1.15, "response_over_kl": 1.05, "relation_over_kl": 1.3}
"""at most so many times what it stands beside"""


def measure(data: Path) -> dict[str, Any]:
    """Seconds of an epoch in each way, and of a step in each form, with the ratios that matter."""
    task = cifar10(data, limit=IMAGES + 256, validation=256, evaluation_limit=256, views=1)
    teacher, student = resnet56().eval().requires_grad_(False), resnet20()
    load_weights(teacher, find_weights("resnet56_cifar10.safetensors", data, None))
    load_weights(student, find_weights("resnet20_cifar10.safetensors", data, None))
    assert isinstance(task.train, ArrayData)
    labels, both = (CrossEntropy(),), (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_for(Path(folder), teacher, task.train, "fp32")
        assert isinstance(cache, LogitCache)
        cached, live = FrozenTeacher(teacher, cache=cache), FrozenTeacher(teacher)
        epochs = [
            epoch(student, task, Distillation(labels, task, student, live)),
            epoch(student, task, Distillation(both, task, student, cached)),
            epoch(student, task, Distillation(both, task, student, live)),
        ]
        without, with_cache, with_teacher = in_turn(epochs)
        response, relation = terms(student, task, cached, teacher)
    floating, quantized = forms(student, task, teacher)
    objective = Distillation(labels, task, student, live)
    float_step, fake_step = in_turn([epoch(floating, task, objective), epoch(quantized, task, objective)])
    return {
        "epoch_without_teacher_s": statistics.median(without),
        "cached_over_without": ratio(with_cache, without),
        "live_over_without": ratio(with_teacher, without),
        "live_over_cached": ratio(with_teacher, with_cache),
        "float_graph_epoch_s": statistics.median(float_step),
        "fake_quantized_over_float": ratio(fake_step, float_step),
        "response_over_kl": response,
        "relation_over_kl": relation,
        "bounds": BOUNDS,
        "conditions": {
            "network": "ResNet-20, batch 128, fp32, channels-last; teacher ResNet-56",
            "images": IMAGES,
            "rounds": ROUNDS,
            "steps_per_term": STEPS,
            "threads": torch.get_num_threads(),
            "protocol": "in turn; the first round (which fills the cache) is not counted; median of per-round ratios",
            "terms": "response terms with cached logits, beside kl with cached logits; relation terms at layer3 beside "
            "kl, with the live teacher, beside kl with the live teacher",
        },
        "machine": machine_fingerprint(),
    }


def terms(
    student: nn.Module, task: Task, cached: FrozenTeacher, teacher: nn.Module
) -> tuple[dict[str, float], dict[str, float]]:
    """What a step with each response term and with each relation term costs, over one with plain KD.

    A response term takes the place of plain KD's and reads the same cached logits. A relation term stands beside plain
    KD and needs the teacher's features: compared with plain KD and the same live teacher, the ratio is the term's own.
    """
    label, plain = CrossEntropy(weight=0.1), KLDivergence(weight=0.9)
    live = FrozenTeacher(teacher, ["layer3"])
    responses = {name_of(k): k() for k in TERMS if issubclass(k, ResponseTerm) and k is not KLDivergence}
    relations = {name_of(k): k(point="layer3") for k in TERMS if issubclass(k, RelationTerm)}
    found = []
    for ours, source, beside in ((responses, cached, [label]), (relations, live, [label, plain])):
        sets: list[list[Term]] = [[label, plain], *([*beside, term] for term in ours.values())]
        runs = [epoch(student, task, Distillation(s, task, student, source), 1) for s in sets]
        base, *times = in_turn(runs, STEPS)
        found.append({name: ratio(t, base) for name, t in zip(ours, times, strict=True)})
    return found[0], found[1]


def name_of(kind: type[Any]) -> str:
    """A term's name in recipes."""
    return str(next(f.default for f in fields(kind) if f.name == "term"))


def broken(result: dict[str, Any]) -> list[str]:
    """The bounds that are not kept, in words."""
    said = []
    for key, most in BOUNDS.items():
        ratios = result[key] if isinstance(result[key], dict) else {"": result[key]}
        said += [f"{key} {name}: {r:.3f}, at most {most:g}" for name, r in ratios.items() if not r <= most]
    return said


def forms(student: nn.Module, task: Task, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`student` as a captured float graph, and the same graph with fake-quantizers."""
    program = Program(teacher, copy.deepcopy(student), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    captured = Capture().apply(program, task)
    floating = copy.deepcopy(captured.student)
    return floating, Quantize(samples=128).apply(captured, task).student


def epoch(student: nn.Module, task: Task, objective: Objective, most: int | None = None) -> Callable[[], None]:
    """A function that trains a copy of `student` on all batches of an epoch, or on the first `most`."""
    student = copy.deepcopy(student).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = objective.wrap(student)
    optimizer = optimizer_for(Training(learning_rate=1e-4), student, objective)
    assert task.train is not None
    batches = [
        Batch(tuple(t.contiguous(memory_format=torch.channels_last) for t in b.inputs), b.targets, b.keys)
        for b in itertools.islice(task.train.batches(0), most)
    ]

    def run() -> None:
        model.train()
        for batch in batches:
            loss = objective(model, batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def in_turn(runs: list[Callable[[], None]], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of each run in each round but the first."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, seconds in zip(runs, times, strict=True):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return [seconds[1:] for seconds in times]


def ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="folder with the CIFAR-10 files and the checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    result = measure(data_folder(options.data))
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if missed := broken(result):
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
