"""How fast students of another shape are before anything trains: `python tests/tools/shapes.py --data DATA`.

Each net with random weights is quantized, and its INT8 file timed in turn with ResNet-56 in FP32, the teacher of
`models/plain_cifar10.toml` and `models/residual_cifar10.toml`, in ONNX Runtime at batch 1. The teacher is timed in two
sessions: what they differ by widens the interval. A time does not depend on weights; what a net can learn does. Beside
them the students that are committed, cut out of ResNet-56 and ResNet-20.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from pqk.bench.baselines import float_files
from pqk.bench.measure import THREADS, twins_of, undisturbed_ratio
from pqk.core.costs import count_macs, count_parameters
from pqk.core.pipeline import run_passes
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.files import write_json
from pqk.models.cifar import cifar10
from pqk.models.plain import plain
from pqk.models.residual import residual
from pqk.models.resnet import resnet56
from pqk.passes import Capture, Convert, Quantize
from pqk.report.schema import Report
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target

TARGET = "x86-avx2"
"""the grid that is exact on every x86, as the recipes have it"""
ROUNDS = 15
SHAPES = {
    "plain(16)": lambda: plain(16),
    "plain(24)": lambda: plain(24),
    "plain(32)": lambda: plain(32),
    "residual(24)": lambda: residual(24),
    "residual(16)": lambda: residual(16),
    "residual(32, (1, 1, 1), (2, 2, 2))": lambda: residual(32, (1, 1, 1), (2, 2, 2)),
    "residual(32, (1, 2, 2), (2, 2, 2))": lambda: residual(32, (1, 2, 2), (2, 2, 2)),
}
COMMITTED = ("resnet56_cifar10", "resnet20_cifar10")
RESULTS = Path(__file__).parents[2] / "models" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10, from which ranges are taken")
    parser.add_argument("--out", type=Path, default=Path("models/results/student_shapes.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, passes = cifar10(arguments.data, limit=4000), (Capture(), Quantize(samples=128), Convert())
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        teacher = float_files(resnet56().eval(), task, place)[1]
        baseline = twins_of(teacher)
        for name, make in SHAPES.items():
            torch.manual_seed(0)
            net = make().eval()
            program = run_passes(Program.begin(net, Target.named(TARGET), RunContext(0)), task, passes)
            emit_onnx_for(program.student, task, place / "student.onnx")
            ratio = undisturbed_ratio(baseline, twins_of(place / "student.onnx"), task.feeds(1), rounds=ROUNDS)
            costs = {"parameters": count_parameters(net), "macs": count_macs(net, task.example)}
            rows.append({"shape": name, **costs, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high})
            print(f"{name}: {ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})", flush=True)
        for recipe in COMMITTED:
            student, report = twins_of(RESULTS / f"{recipe}.onnx"), Report.load(RESULTS / f"{recipe}.json")
            costs = {"parameters": report.parameters, "macs": report.macs}
            ratio = undisturbed_ratio(baseline, student, task.feeds(1), rounds=ROUNDS)
            row = {"shape": f"student of {recipe}.toml", **costs}
            rows.append({**row, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high})
            print(f"{recipe}: {ratio.ratio:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})", flush=True)
    conditions = {"teacher": "resnet56", "target": TARGET, "threads": THREADS, "rounds": ROUNDS}
    write_json(arguments.out, {"conditions": {**conditions, "machine": machine_fingerprint()}, "shapes": rows})


if __name__ == "__main__":
    main()
