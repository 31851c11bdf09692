"""Every family of encoders: prune, distill, capture, quantize, distill, convert, fuse; ONNX, parity, coverage.

What applies to which family is held against models/results/encoder_families.json, from which the README's table is
made.
`PQK_FAMILIES_OUT=models/results/encoder_families.json pytest -m "full or not full" tests/end_to_end/test_families.py`
writes the rows anew instead.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from committed_rows import hold
from families import COLUMNS, FAMILIES, RESULTS, decision, table
from prunable_parts import prunable

from pqk.core.aten import quantized_tensors
from pqk.core.costs import count_parameters
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.files import read_json
from pqk.passes import Capture, Convert, Distill, Fuse, Prune, Quantize
from pqk.target.target import Target
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_layers

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
DEFAULT = ("bert",)
"""families of the default run; the others take their minutes in `make test-full`"""


PASSES = (
    Prune(parameters_ratio=1.1, multiple=4),
    Distill(epochs=1, learning_rate=1e-3),
    Capture(),
    Quantize(samples=16),
    Distill(epochs=1, learning_rate=1e-3),
    Convert(),
    Fuse(),
)


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.full) for n in FAMILIES])
def test_a_family_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    teacher = family.teacher()
    task = family.task(teacher)
    program = Program(teacher, copy.deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    done: list[str] = []
    broken: dict[str, list[str]] = {}
    for index, step in enumerate(PASSES):
        program = dataclasses.replace(program, run=program.run.enter(f"{index}-{step.name}"), details={})
        try:
            program = dataclasses.replace(step.apply(program, task), stage=step.result_stage(program.stage))
            done.append(step.name)
        except RuntimeError as error:  # the one pass that a student can do without; the row then says why
            assert step.name == "distill", error
            broken.setdefault("distill", []).append(f"{program.stage}: {str(error).splitlines()[0]}")
        if step.name == "prune":
            assert count_parameters(program.student) * 1.1 <= count_parameters(teacher)
    graph, path = program.student, tmp_path / "model.onnx"
    assert isinstance(graph, torch.fx.GraphModule)
    emit_onnx(graph, task.example, path, task.input_names)
    layers = check_layers(graph, quantized_tensors(graph), path, task.sized(16))
    assert layers and [layer for layer in layers if not layer.passed] == []
    coverage = integer_coverage(path, task.feeds(2))
    assert coverage.share == 1
    with torch.no_grad():
        want = graph(*task.sized(16))
    got = OnnxModel(path, want)(*task.sized(16))
    assert (decision(got) == decision(want)).double().mean() > 0.9
    assert program.fused is not None and program.details["launches_after"] < program.details["launches_before"]
    with torch.no_grad():
        torch.testing.assert_close(program.fused(*task.sized(16)), want, rtol=0, atol=0.02 * float(want.abs().max()))
    row = prunable(teacher, family.sample)
    row["integer"] = f"{sum(la.integer for la in coverage.layers)}/{len(coverage.layers)}"
    row["parity"] = f"{sum(la.passed for la in layers)}/{len(layers)}"
    row |= {kind: f"{done.count(kind)}/{[p.name for p in PASSES].count(kind)}" for kind in ("distill", "fuse")}
    row["reasons"] |= broken
    hold(name, row, RESULTS, FAMILIES)


def test_the_table_has_every_family_and_every_reason() -> None:
    committed = read_json(RESULTS)
    assert list(committed) == list(FAMILIES)
    text = table()
    assert all(f"\n| {name} | " in text for name in FAMILIES)
    for row in committed.values():
        assert {*row} == {*COLUMNS, "reasons"}
        for kind, reasons in row["reasons"].items():
            assert len(set(row[kind].split("/"))) == 2 and all(f"] {reason}." in text for reason in reasons)
