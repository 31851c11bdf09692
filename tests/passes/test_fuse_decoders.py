"""Causal language models as launches: gated units, rotary embeddings and attention, whole texts and behind a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lowered import int8_graph, operators
from small_decoder import sequence_task, small_decoder
from torch import Tensor, fx, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.passes import Capture, Convert, Quantize
from pqk.passes.fuse.fuse import fuse
from pqk.target.target import Target
from pqk.verify.fused_parity import check_launches


def lowered(model: nn.Module, target: str, **settings: Any) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The INT8 graph of a causal model, and texts."""
    task = sequence_task()
    program = Program(model, model, Stage.MODULE, Target.named(target), RunContext())
    for step in (Capture(), Quantize(samples=16, **settings), Convert()):
        program = step.apply(program, task)
        program = replace(program, stage=step.produces or program.stage)
    assert isinstance(program.student, fx.GraphModule)
    return program.student, next(iter(task.calibration(4)))


@pytest.fixture(scope="module", params=["cuda-sm80", "x86-avx2"])
def llama(request: Any) -> tuple[fx.GraphModule, fx.GraphModule, list[tuple[str, str]], tuple[Tensor, ...]]:
    """INT8 graph, fused student, what was left out, texts."""
    graph, texts = lowered(small_decoder(), request.param)
    return graph, *fuse(graph), texts


def test_every_launch_of_a_llama_gives_what_its_layers_give(llama: Any) -> None:
    graph, fused, _, texts = llama
    rows = check_launches(graph, fused, texts)
    assert rows and all(r.passed for r in rows), [r for r in rows if not r.passed]
    with torch.no_grad():
        want, got = graph(*texts), fused(*texts)
    seen = texts[1] > 0
    assert float((want - got)[seen].abs().max()) <= 0.05 * float(want[seen].abs().max())


class Gated(nn.Module):
    """A gated unit and, where `read`, another reader of what is gated."""

    def __init__(self, activation: Any, read: bool = False) -> None:
        super().__init__()
        self.inner, self.gate, self.up, self.down = (nn.Linear(i, o) for i, o in ((8, 16), (16, 24), (16, 24), (24, 4)))
        self.activation, self.read = activation, read

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        up = self.up(x)
        y = self.down(self.activation(self.gate(x)) * up)
        return y + up[..., :4] if self.read else y


ACTIVATIONS = {
    "silu": (nn.SiLU(), "table,requantize"),
    "gelu": (nn.GELU(), "gelu,requantize"),
    "nothing": (nn.Identity(), "requantize"),
}


@pytest.mark.parametrize("target", ["cuda-sm80", "x86-avx2"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_unit_is_one_launch(name: str, target: str) -> None:
    torch.manual_seed(0)
    x, (activation, gate) = torch.randn(64, 8), ACTIVATIONS[name]
    graph = int8_graph(Gated(activation), x, target=target)
    fused, declined = fuse(graph)
    assert operators(fused, (x,)) == ["quantize_static", "int8_linear", "int8_gated_linear", "int8_linear"]
    assert declined == []
    (unit,) = (n for n in fused.graph.nodes if n.target is torch.ops.pqk.int8_gated_linear.default)
    programs = [unit.kwargs[f"{k}steps"] for k in ("gate_", "up_", "")]  # the sibling that comes first is the gate
    assert sorted(programs[:2]) == sorted(["requantize", gate]) and programs[2] == "quantize"
    rows = check_launches(graph, fused, (x,))
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), graph(x), rtol=0, atol=0.02 * float(graph(x).abs().max()))


def test_what_others_read_too_is_not_gated_in_registers() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    graph = int8_graph(Gated(nn.SiLU(), read=True), x, target="cuda-sm80")
    fused, _ = fuse(graph)
    assert "int8_gated_linear" not in operators(fused, (x,))
    rows = check_launches(graph, fused, (x,))
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
