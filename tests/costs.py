"""What distillation and quantization-aware training cost: `python tests/costs.py [--data DIR] [--out FILE]`.

The CIFAR ResNet-20 is trained a few steps at a time on a fixed part of CIFAR-10, each way in turn, A B C A B C:
labels alone, with the teacher's cached logits, with the live teacher; then a float step of the captured graph against
a fake-quantized one. Medians of per-round ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.data import ArrayData, Batch
from pqk.factories import find_weights, load_weights
from pqk.files import write_json
from pqk.knowledge import CrossEntropy, KLDivergence
from pqk.knowledge.objective import Distillation
from pqk.knowledge.teacher import FrozenTeacher, LogitCache, cache_for
from pqk.machine import fingerprint
from pqk.models.cifar import cifar10, data_folder
from pqk.models.resnet import resnet20, resnet56
from pqk.passes import Capture, Quantize
from pqk.program import Program, Stage
from pqk.run import Run
from pqk.target import Target
from pqk.task import Task
from pqk.train import Objective, Training, optimizer_for

IMAGES, ROUNDS = 1280, 7
"""an "epoch" here; rounds of it"""


def measure(data: Path) -> dict[str, Any]:
    """Seconds of an epoch in each way, and of a step in each form, with the ratios that matter."""
    task = cifar10(data, limit=IMAGES + 256, validation=256, evaluation_limit=256, views=1)
    teacher, student = resnet56().eval().requires_grad_(False), resnet20()
    load_weights(teacher, find_weights("resnet56_cifar10.safetensors", data, None))
    load_weights(student, find_weights("resnet20_cifar10.safetensors", data, None))
    assert isinstance(task.train, ArrayData)
    labels, both = (CrossEntropy(),), (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_for(Path(folder), teacher, task.train, "fp32", task.example)
        assert isinstance(cache, LogitCache)
        cached, live = FrozenTeacher(teacher, cache=cache), FrozenTeacher(teacher)
        epochs = [
            epoch(student, task, Distillation(labels, task, student, live)),
            epoch(student, task, Distillation(both, task, student, cached)),
            epoch(student, task, Distillation(both, task, student, live)),
        ]
        without, with_cache, with_teacher = in_turn(epochs)
    floating, quantized = forms(student, task, teacher)
    objective = Distillation(labels, task, student, live)
    float_step, fake_step = in_turn([epoch(floating, task, objective), epoch(quantized, task, objective)])
    return {
        "epoch_without_teacher_s": statistics.median(without),
        "cached_over_without": ratio(with_cache, without),
        "live_over_without": ratio(with_teacher, without),
        "float_graph_epoch_s": statistics.median(float_step),
        "fake_quantized_over_float": ratio(fake_step, float_step),
        "conditions": {
            "network": "ResNet-20, batch 128, fp32, channels-last; teacher ResNet-56",
            "images": IMAGES,
            "rounds": ROUNDS,
            "threads": torch.get_num_threads(),
            "protocol": "in turn; the first round (which fills the cache) is not counted; median of per-round ratios",
        },
        "machine": fingerprint(),
    }


def forms(student: nn.Module, task: Task, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`student` as a captured float graph, and the same graph with fake-quantizers."""
    program = Program(teacher, copy.deepcopy(student), Stage.MODULE, Target.named("x86-avx2"), Run())
    captured = Capture().apply(program, task)
    floating = copy.deepcopy(captured.student)
    return floating, Quantize(samples=128).apply(captured, task).student


def epoch(student: nn.Module, task: Task, objective: Objective) -> Callable[[], None]:
    """A function that trains a copy of `student` on all batches of an epoch."""
    student = copy.deepcopy(student).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = objective.wrap(student)
    optimizer = optimizer_for(Training(learning_rate=1e-4), student)
    assert task.train is not None
    batches = [
        Batch(tuple(t.contiguous(memory_format=torch.channels_last) for t in b.inputs), b.targets, b.keys)
        for b in task.train.batches(0)
    ]

    def run() -> None:
        model.train()
        for batch in batches:
            loss = objective(model, batch).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def in_turn(runs: list[Callable[[], None]]) -> list[list[float]]:
    """Seconds of each run in each round but the first."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS + 1):
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


if __name__ == "__main__":
    main()
