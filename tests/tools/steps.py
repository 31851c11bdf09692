"""What integer products save in a quantization-aware step: `python tests/tools/steps.py [--out FILE]`.

Networks of the sizes that the recipes train, with random weights and data: a step (forward, backward, SGD) of the same
fake-quantized graph with its products in floats and in integers (`pqk/training/integer_form.py`), in turn, one thread,
in seconds of a core. The median of per-round ratios, and that of the rounds' quarters as its spread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.files import write_json
from pqk.models.resnet import resnet20, resnet56
from pqk.passes import Capture, Quantize
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.integer_form import integer_form

ROUNDS = 25
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network and one batch for it."""

    what: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]


def encoder() -> nn.Module:
    """Three layers of MiniLM's width, over embedded tokens."""
    layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), Mean(), nn.Linear(384, CLASSES))


class Mean(nn.Module):
    """Over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


CASES = {
    "ResNet-20": Case("128 images of 32 x 32", resnet20, (128, 3, 32, 32)),
    "ResNet-56": Case("128 images of 32 x 32", resnet56, (128, 3, 32, 32)),
    "encoder": Case("three layers of MiniLM's width, 64 texts of 24 tokens", encoder, (64, 24, 384)),
}


def fake_quantized(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """The graph in training, and its batch."""
    torch.manual_seed(0)
    x, labels = torch.randn(case.shape), torch.randint(0, CLASSES, case.shape[:1])
    data = ArrayData(x, labels, case.shape[0])
    task, network = Task(data, data, validation=data), case.network()
    if x.dim() == 4:
        network.train()
        with torch.no_grad():
            network(x)  # batch norm's statistics
    teacher = network.eval().requires_grad_(False)
    start = Program(
        teacher, copy.deepcopy(teacher).requires_grad_(True), Stage.MODULE, Target.named("x86-avx2"), RunContext()
    )
    student = Quantize(calibration="minmax", samples=64).apply(Capture().apply(start, task), task).student
    if x.dim() == 4:
        student = student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return student, x, labels


def stepping(student: nn.Module, model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], float]:
    """A step of `model`, whose parameters are `student`'s: the seconds of a core that it takes."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def step() -> float:
        began = time.process_time()
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return time.process_time() - began

    return step


def compared(case: Case) -> dict[str, Any]:
    student, x, labels = fake_quantized(case)
    twin = copy.deepcopy(student)
    form = integer_form(twin, torch.device("cpu"))
    if form is twin:
        raise SystemExit("no integer kernel computes in training on this machine")
    steps = stepping(student, student, x, labels), stepping(twin, form, x, labels)
    times = [tuple(step() for step in steps) for _ in range(ROUNDS + 2)][2:]
    ratios = [integers / floats for floats, integers in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "what": case.what,
        "ratio": round(middle, 3),
        "quarters": [round(low, 3), round(high, 3)],
        "float_products_s": round(statistics.median(floats for floats, _ in times), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "steps": {name: compared(case) for name, case in CASES.items()},
        "conditions": {
            "rounds": ROUNDS,
            "threads": 1,
            "clock": "seconds of a core",
            "protocol": "float and integer products in turn; median of per-round ratios",
        },
        "machine": machine_fingerprint(),
    }
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
