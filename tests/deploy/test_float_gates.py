"""Gates that stayed in float are one operator in the file, and those in integers stay as they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

from pqk.core.onnxruntime_session import session
from pqk.deploy.float_gates import with_joined_gates
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.passes.capture.capture import capture
from pqk.passes.convert.convert import convert
from pqk.passes.quantize.placement import placement
from pqk.passes.quantize.quantize import calibrate, insert_fake_quant
from pqk.target.target import Target


class Gates(nn.Module):
    """Hard-swish, hard-sigmoid as a gate of something else, and a clamp that is no gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.squeeze, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.stem(x))
        y = y * nn.functional.hardsigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.head((torch.clamp(y + 2.0, 0, 6) * (1 / 6)).mean((2, 3)))


class Samples:
    def calibration(self, limit: int) -> list[tuple[Tensor, ...]]:
        return [(torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(1)),)]


def int8(floats: bool) -> fx.GraphModule:
    x = torch.randn(2, 3, 9, 9)
    graph = capture(Gates(), (x,))
    assert isinstance(graph, fx.GraphModule)
    if floats:
        converted = convert(graph, (x,))
    else:
        target = Target.named("x86-avx2")
        points = [point.to_json() for point in placement(graph)[0]]
        grids = {"activation": asdict(target.activation), "weight": asdict(target.weight)}
        fake = insert_fake_quant(graph, (x,), points=points, learned=True, **grids)
        calibrate(fake, Samples(), "mse", 99.99, 16)  # type: ignore[arg-type]
        converted = convert(fake, (x,))
    assert isinstance(converted, fx.GraphModule)
    return converted


@pytest.mark.parametrize("floats", [True, False])
def test_a_float_gate_is_one_operator_of_the_file_and_computes_the_same(floats: bool, tmp_path: Path) -> None:
    student, x = int8(floats), torch.randn(4, 3, 9, 9)
    before = str(student.graph)
    emit_onnx(student, (x[:2],), tmp_path / "m.onnx", ["x"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("HardSwish") == kinds.count("HardSigmoid") == int(floats)
    if floats:
        assert kinds.count("Clip") == 1  # that of `clamp(y + 2, 0, 6)`, which is no gate
    found = session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        want = student(x).numpy()
    scale = float(np.abs(want).max())
    assert np.abs(found - want).max() <= (1e-5 if floats else 0.05) * scale
    assert str(student.graph) == before


def test_a_graph_without_float_gates_is_itself() -> None:
    student = int8(floats=False)
    assert with_joined_gates(student) is student
