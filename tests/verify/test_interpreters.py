"""Where an output may be rounded either way: exact halves, and what sums of floats cannot tell from them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from pqk.core.aten import quantized_tensors
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.passes import Capture, Convert, Quantize
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.interpreters import Recorder, Ties
from pqk.verify.parity import check_layers

pytestmark = pytest.mark.slow

TERMS, OUTPUTS = 4096, 48


class Cancelling(nn.Module):
    """Sums of terms that are far from 0 and nearly cancel, so that a sum is as fine as its terms' rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.head = nn.Linear(TERMS, OUTPUTS), nn.Linear(OUTPUTS, 4)
        with torch.no_grad():
            self.sums.weight.copy_(torch.randn(OUTPUTS, TERMS).sign())
            self.sums.weight[:, TERMS // 2 :] = -self.sums.weight[:, : TERMS // 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.sums(x)))


def inputs(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.004 * torch.randn(count, TERMS, generator=generator)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[fx.GraphModule, Path, Tensor]:
    torch.manual_seed(0)
    teacher = Cancelling().eval()
    data = ArrayData((inputs(64, 0),), torch.arange(64) % 4, 16)
    task = Task(None, data, data)
    program = Program(teacher, deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    for step in (Capture(), Quantize(), Convert()):
        program = replace(step.apply(program, task), stage=step.result_stage(program.stage))
    assert isinstance(program.student, fx.GraphModule)
    path = tmp_path_factory.mktemp("converted") / "model.onnx"
    emit_onnx(program.student, task.example, path, task.input_names)
    return program.student, path, inputs(64, 1)


def test_an_output_is_right_where_exact_arithmetic_has_it(converted: tuple[fx.GraphModule, Path, Tensor]) -> None:
    """The graph's float sum is on the other side of some halves; the file's integers are exact everywhere."""
    graph, path, x = converted
    activations = quantized_tensors(graph)
    rows = {row.name: row for row in check_layers(graph, activations, path, (x,))}
    assert rows["sums"].passed and rows["sums"].exact == 1.0 and rows["sums"].accumulators
    recorder = Recorder(graph)
    recorder.run(x)
    ties = Ties(graph, recorder.integers)
    ties.run(x)
    node = next(n for name, n in activations if name == "sums")
    off = (recorder.integers[node][0].int() - ties.exact[node].int()).abs()
    assert off.max() == 1 and off.double().mean() > 0.001, "a share of equal outputs alone refuses it"
    assert ties.masks[node].double().mean() < 0.001, "and halves do not explain it"


def test_a_weight_that_is_off_by_one_step_is_found(
    converted: tuple[fx.GraphModule, Path, Tensor], tmp_path: Path
) -> None:
    graph, path, x = converted
    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if list(i.dims) in ([OUTPUTS, TERMS], [TERMS, OUTPUTS]))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 1 if values.flat[0] < 0 else -1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "m.onnx")
    rows = check_layers(graph, quantized_tensors(graph), tmp_path / "m.onnx", (x,))
    assert [row.name for row in rows if not row.passed] == ["sums"]
