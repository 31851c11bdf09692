"""Every family of encoders: prune, capture, quantize, convert, ONNX, the parity of every layer, integer coverage."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from families import FAMILIES, decision

from pqk.coverage import integer_coverage
from pqk.emit_onnx import emit_onnx
from pqk.measure import count_parameters
from pqk.parity import OnnxModel, check_layers
from pqk.passes import Capture, Convert, Prune, Quantize
from pqk.passes.convert import quantized_tensors
from pqk.program import Program, Stage
from pqk.run import Run
from pqk.target import Target

pytest.importorskip("transformers")
DEFAULT = ("bert", "vit")
"""families of the default run; the others take their minutes in `make test-full`"""


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.full) for n in FAMILIES])
def test_a_family_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    teacher = family.teacher()
    task = family.task(teacher)
    program = Program(teacher, copy.deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), Run())
    for step in (Prune(parameters_ratio=1.1, multiple=4), Capture(), Quantize(samples=16), Convert()):
        program = dataclasses.replace(step.apply(program, task), stage=step.result_stage(program.stage))
        if step.name == "prune":
            assert count_parameters(program.student) * 1.1 <= count_parameters(teacher)
    graph, path = program.student, tmp_path / "model.onnx"
    assert isinstance(graph, torch.fx.GraphModule)
    emit_onnx(graph, task.example, path, task.input_names)
    layers = check_layers(graph, quantized_tensors(graph), path, task.sized(16))
    assert layers and [layer for layer in layers if not layer.passed] == []
    assert integer_coverage(path, task.feeds(2)).share == 1
    with torch.no_grad():
        want = graph(*task.sized(16))
    got = OnnxModel(path, want)(*task.sized(16))
    assert (decision(got) == decision(want)).double().mean() > 0.9
