"""How far the latency table's predictions are off: `python tests/tools/latency.py [--threads 1 2] [--out FILE]`.

Whole networks with random weights, in FP32 and in their INT8 form, are predicted from the table of this machine, and
then measured. Exit code 1 where the mean of the errors is over 10 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.bench.latency.executed import executed_nodes
from pqk.bench.latency.prediction import predict
from pqk.bench.latency.table import LatencyTable
from pqk.bench.measure import fastest
from pqk.bench.oracle import Oracle
from pqk.core.onnxruntime_session import session
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.files import write_json
from pqk.models.plain import plain
from pqk.models.resnet import resnet20, resnet56
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.task.task import Task

BOUND = 0.10
"""the mean of the absolute errors, at most"""


class Inverted(nn.Module):
    """An inverted residual: 1x1 to four times the width, 3x3 depthwise, 1x1 back; [B, in, H, W] -> [B, out, …]."""

    def __init__(self, read: int, made: int, stride: int) -> None:
        super().__init__()
        wide = 4 * read
        self.body = nn.Sequential(
            nn.Conv2d(read, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, made, 1, bias=False), nn.BatchNorm2d(made),
        )  # fmt: skip
        self.residual = stride == 1 and read == made

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobile() -> nn.Module:
    """A net of inverted residuals for images of 64x64."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    )  # fmt: skip


class EncoderLayer(nn.Module):
    """A post-norm layer of an encoder; [B, S, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.first(x + self.o(y))
        return self.second(x + self.down(F.gelu(self.up(x))))


class SmallEncoder(nn.Module):
    """Two layers of width 128 over a table of 1,000 tokens: int64 [B, 32] -> logits [B, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(1000, 128), nn.LayerNorm(128)
        self.layers, self.head = nn.Sequential(*(EncoderLayer(128, 4) for _ in range(2))), nn.Linear(128, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.norm(self.table(tokens))).mean(1))


def _images(size: int) -> Tensor:
    return torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet20": (resnet20, lambda: _images(32)),
    "resnet56": (resnet56, lambda: _images(32)),
    "plain, width 16": (lambda: plain(16), lambda: _images(32)),
    "plain, width 24": (lambda: plain(24), lambda: _images(32)),
    "inverted residuals": (mobile, lambda: _images(64)),
    "small encoder": (
        SmallEncoder, lambda: torch.randint(1000, (64, 32), generator=torch.Generator().manual_seed(0)),
    ),
}  # fmt: skip


def measure(folder: Path, rounds: int, threads: Sequence[int]) -> dict[str, Any]:
    """Predicted and measured milliseconds of each network, and what the table took."""
    rows: list[dict[str, Any]] = []
    for count in threads:
        table = LatencyTable(count, folder)
        for name in NETWORKS:
            rows += _rows(table, name, rounds)
    errors = [abs(row["error"]) for row in rows]
    return {
        "networks": rows,
        "mean_absolute_error": statistics.fmean(errors),
        "largest_absolute_error": max(errors),
        "bound_of_the_mean": BOUND,
        "conditions": {
            "batch": 1,
            "protocol": f"the fastest of all calls in {rounds} bursts of 20, after warm calls; random weights",
            "table": "measured from nothing in this run",
        },
        "machine": machine_fingerprint(),
    }


def _rows(table: LatencyTable, name: str, rounds: int) -> Iterator[dict[str, Any]]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    teacher, x = make().eval().requires_grad_(False), inputs()
    with torch.no_grad():
        part = ArrayData((x,), teacher(x).argmax(1), 64)
    task = Task(part, part, validation=part)
    oracle = Oracle(teacher, task, Target.detect(), (), RunContext(), table.threads)
    oracle.baseline()
    for form, path in (("FP32", oracle.teacher_path), ("INT8", oracle.emit(teacher))):
        feeds, before, began = task.feeds(1), table.measured, time.perf_counter()
        predicted = predict(table, executed_nodes(path, feeds, threads=table.threads))
        spent, samples = time.perf_counter() - began, table.measured - before
        milliseconds = fastest([session(path, threads=table.threads)], feeds, rounds=rounds)[0]
        yield {
            "network": name, "form": form, "threads": table.threads, "predicted_ms": predicted,
            "measured_ms": milliseconds, "error": predicted / milliseconds - 1, "samples": samples, "seconds": spent,
        }  # fmt: skip
    oracle.folder.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="bursts in which whole networks are measured")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="of ONNX Runtime; a table for each")
    parser.add_argument("--out", type=Path, default=None, help="write the result there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pqk-latency-") as folder:
        result = measure(Path(folder), options.rounds, options.threads)
    if options.out is not None:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if result["mean_absolute_error"] > BOUND:
        sys.exit(f"the mean error is {result['mean_absolute_error']:.1%}, over {BOUND:.0%}")


if __name__ == "__main__":
    main()
