"""Every family of encoders: prune, distill, capture, quantize, distill, convert, fuse; ONNX, parity, coverage.

What applies to which family is held against models/results/encoder_families.json, from which the README's table is
made.
`PQK_FAMILIES_OUT=models/results/encoder_families.json pytest -m "full or not full" tests/end_to_end/test_families.py`
writes the rows anew instead.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_rows import hold
from families import COLUMNS, FAMILIES, RESULTS, Family, decision, table
from torch import nn

from pqk.core.aten import quantized_tensors
from pqk.core.costs import count_parameters
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.files import read_json
from pqk.passes import Capture, Convert, Distill, Fuse, Prune, Quantize
from pqk.passes.prune.blocks import find_blocks
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.groups import find_groups
from pqk.passes.prune.law import why_not_cut
from pqk.target.target import Target
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_layers

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
DEFAULT = ("bert", "vit")
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
    row = prunable(family, teacher)
    row["integer"] = f"{sum(la.integer for la in coverage.layers)}/{len(coverage.layers)}"
    row["parity"] = f"{sum(la.passed for la in layers)}/{len(layers)}"
    row |= {kind: f"{done.count(kind)}/{[p.name for p in PASSES].count(kind)}" for kind in ("distill", "fuse")}
    row["reasons"] |= broken
    hold(name, row, RESULTS, FAMILIES)


def prunable(family: Family, teacher: nn.Module) -> dict[str, Any]:
    """Of the heads' groups, FFN units, widths of residual streams, and layers: how many may go, of how many; reasons.

    Groups that end in the model's output are nobody's to cut and are left out.
    """
    example = family.sample(2)
    found: dict[str, list[str | None]] = {kind: [] for kind in ("heads", "units", "width", "layers")}
    for group in find_groups(teacher, example):
        reason = why_not_cut(teacher, example, group)
        if reason is None or "channels of the model's output" not in reason:
            found[kind_of(group, teacher)].append(reason)
    blocks, declined = find_blocks(teacher, family.sample(8))
    found["layers"] = [None for _ in blocks] + list(declined.values())
    row: dict[str, Any] = {kind: f"{reasons.count(None)}/{len(reasons)}" for kind, reasons in found.items()}
    said = {kind: list(dict.fromkeys(plain(r) for r in reasons if r is not None)) for kind, reasons in found.items()}
    return row | {"reasons": {kind: reasons for kind, reasons in said.items() if reasons}}


def plain(reason: str) -> str:
    """Without the sizes of errors, which the last digits of a machine's arithmetic are in."""
    return re.sub(r" by [\d.e+-]+ \(largest output [\d.e+-]+\)", "", reason)


def kind_of(group: ChannelGroup, teacher: nn.Module) -> str:
    """Where several layers' outputs are added it is a residual stream; what one layer makes are units."""
    if any(m.dim == "heads" and any(m.places) for m in group.members):
        return "heads"
    makers = [m for m in group.members if m.dim == "out" and isinstance(teacher.get_submodule(m.path), MAKERS)]
    dense = [m for m in makers if getattr(teacher.get_submodule(m.path), "groups", 1) == 1]
    return "width" if len(dense) > 1 else "units"


MAKERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def test_the_table_has_every_family_and_every_reason() -> None:
    committed = read_json(RESULTS)
    assert list(committed) == list(FAMILIES)
    text = table()
    assert all(f"\n| {name} | " in text for name in FAMILIES)
    for row in committed.values():
        assert {*row} == {*COLUMNS, "reasons"}
        for kind, reasons in row["reasons"].items():
            assert len(set(row[kind].split("/"))) == 2 and all(f"] {reason}." in text for reason in reasons)
