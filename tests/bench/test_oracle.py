"""The latency oracle: what it emits to be timed. How it times is the benchmark's."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest
from zoo import NETWORKS

from pqk.bench import oracle as module
from pqk.bench.oracle import Oracle
from pqk.bench.statistics import Ratio
from pqk.core.run_context import RunContext
from pqk.passes import Capture, Convert, Quantize
from pqk.passes.capture.capture import capture
from pqk.target.target import Target

pytestmark = pytest.mark.slow

Operators = collections.Counter[str]


def test_a_layer_in_float_is_timed_beside_the_same_student_without(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["tokens"]
    teacher = network.teacher()
    task = network.task(teacher)
    opened: list[Operators] = []
    timed: list[tuple[Operators, Operators]] = []

    def session(path: Path, threads: int) -> Operators:
        opened.append(collections.Counter(n.op_type for n in onnx.load(path).graph.node))
        return opened[-1]

    def ratio_to(baseline: Operators, candidate: Operators, feeds: object) -> Ratio:
        timed.append((baseline, candidate))
        return Ratio(1.3, 1.2, 1.4)

    monkeypatch.setattr(module, "session", session)
    monkeypatch.setattr(module, "ratio_to", ratio_to)
    passes = (Capture(), Quantize(least_sqnr=90.0, faster_float=True), Convert())
    oracle = Oracle(teacher, task, Target.named("x86-avx2"), passes, RunContext())
    run = RunContext(oracle=oracle)
    try:
        graph = capture(teacher, task.example)
        assert run.float_gain(graph, (), "0", "test") == (1.3, 1.2, 1.4)
        assert run.float_gain(graph, (), "2", "test") == (1.3, 1.2, 1.4)
        assert run.float_gain(graph, ("2",), "4", "test") == (1.3, 1.2, 1.4)
    finally:
        oracle.folder.cleanup()
    integer, first, second, base, both = opened  # the first baseline served twice
    assert timed == [(integer, first), (integer, second), (base, both)]
    weights = [integer["DequantizeLinear"] - o["DequantizeLinear"] for o in (integer, first, base, both)]
    assert weights == sorted(weights) and weights[0] == 0 < weights[1] and weights[2] < weights[3], weights
