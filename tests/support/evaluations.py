"""How compiles in tests are measured: in times that are too short to mean anything, or not at all."""

from __future__ import annotations

from dataclasses import replace

from pqk import Evaluation
from pqk.bench.measure import QUICK

TABLE = Evaluation(runtimes=(), layer_times=False, timing=QUICK, rehearsal=False)
"""every row of the table, in ONNX Runtime alone"""
UNTIMED = replace(Evaluation.quick(), latency=False, rehearsal=False)
"""teacher and student, no time, and no rehearsal"""
