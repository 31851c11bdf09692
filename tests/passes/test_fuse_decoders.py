"""Causal language models as launches: gated units, rotary embeddings and attention, whole texts and behind a cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowered import int8_graph, operators
from small_decoder import sequence_task, small_decoder
from torch import Tensor, fx, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.generation import continued, places, with_past
from pqk.deploy.torch_emitter import emit_torch, load_student
from pqk.models.decoder import Positions, Sight, grouped_attention
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


PER_LAYER = (
    "rms_norm_quantize int8_linear rotary causal_attention int8_linear rms_norm_quantize int8_gated_linear int8_linear"
)


def behind_a_cache(
    graph: fx.GraphModule, texts: tuple[Tensor, ...]
) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    """The INT8 graph with a cache, its fused form, and the logits that the latter gives of texts, step by step."""
    continuing, cache = with_past(graph)
    fused, _ = fuse(continuing)
    ids, mask = texts
    where, past, logits = places(mask), list(cache.empty(len(ids))), []
    for begin, end in ((0, 4), (4, 5), (5, ids.shape[1])):
        with torch.no_grad():
            step, *past = fused(ids[:, begin:end], mask[:, :end], where[:, begin:end], *past)
        logits.append(step)
    return continuing, fused, logits


def launched(fused: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[str]:
    """What is launched of ours, without the quantizing of what torch gives."""
    return [op for op in operators(fused, inputs) if not op.startswith("aten::")]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-sm80", "x86-avx2"])
def test_a_llama_is_eight_launches_a_layer_in_whole_texts_and_behind_a_cache(target: str, tmp_path: Path) -> None:
    graph, texts = lowered(small_decoder(layers=2), target)
    fused, declined = fuse(graph)
    ours = [op for op in launched(fused, texts) if op != "dequantize"]
    assert ours == [*PER_LAYER.split(), *PER_LAYER.split(), "rms_norm_quantize", "int8_linear"]
    assert not any(".self_attn" in layer or ".mlp" in layer for layer, _ in declined), declined
    rows = check_launches(graph, fused, texts)
    assert rows and all(r.passed for r in rows), [r for r in rows if not r.passed]
    with torch.no_grad():
        want, got = graph(*texts), fused(*texts)
    seen, most = texts[1] > 0, 0.02 * float(want.abs().max())
    torch.testing.assert_close(got[seen], want[seen], rtol=0, atol=most)
    continuing, stepping, logits = behind_a_cache(graph, texts)
    torch.testing.assert_close(torch.cat(logits, 1)[seen], want[seen], rtol=0, atol=most)
    _, inputs = continued(graph, texts)
    assert [op for op in launched(stepping, inputs) if op != "dequantize"] == ours
    rows = check_launches(continuing, stepping, inputs)
    assert rows and all(r.passed for r in rows), [r for r in rows if not r.passed]
    emit_torch(fused, sequence_task().example, tmp_path / "student.pt2", sequence_task().axes)
    with torch.inference_mode():
        assert torch.equal(load_student(tmp_path / "student.pt2")(*texts), got)


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


# ---- attention and rotary embeddings


class Attending(nn.Module):
    """Attention of four heads over two groups, its queries and keys turned by their places; [B, S, 16] -> [B, S, 3]."""

    def __init__(
        self, window: int | None = None, part: int = 8, cap: float | None = None, normed: bool = False
    ) -> None:
        super().__init__()
        self.inner, self.q, self.out = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 3)
        self.k, self.v, self.o = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)
        self.sight, self.positions, self.part, self.cap = Sight(window), Positions(), part, cap
        self.frequencies = nn.Buffer(0.5 ** torch.arange(part // 2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        angles = self.positions(mask)[:, :, None] * self.frequencies
        cos, sin = (torch.cat([t, t], -1)[:, None] for t in (angles.cos(), angles.sin()))
        x = self.inner(x)
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (self.turned(t, cos, sin) for t in (q, k))
        mixed, _ = grouped_attention(self, q, k, v, self.sight(mask), softcap=self.cap)
        return self.out(x + self.o(mixed.reshape(batch, length, 32)))

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y, half = x[..., : self.part], self.part // 2
        y = y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin
        return y if self.part == 8 else torch.cat([y, x[..., self.part :]], -1)


ATTENTIONS: dict[str, dict[str, Any]] = {"whole": {}, "window": {"window": 3}, "partial": {"part": 4}}


def attending(**settings: Any) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The INT8 graph, its attention in float as in a decoder, and inputs: padding behind, and two texts in one."""
    torch.manual_seed(0)
    model = Attending(**settings)
    x, mask = torch.randn(32, 9, 16), torch.ones(32, 9, dtype=torch.int64)
    mask[0, 6:], mask[1, 5:] = 0, 2
    return int8_graph(model, x, mask, target="cuda-sm80", generates=True), (x, mask)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_one_launch_and_what_turns_its_operands_another(name: str) -> None:
    graph, inputs = attending(**ATTENTIONS[name])
    fused, _ = fuse(graph)
    ours = [op for op in operators(fused, inputs) if not op.startswith("aten::")]
    want = "quantize_static int8_linear int8_linear rotary causal_attention int8_linear int8_linear"
    assert ours == want.split()
    (attention,) = (n for n in fused.graph.nodes if n.target is torch.ops.pqk.causal_attention.default)
    assert (attention.kwargs["window"], attention.kwargs["texts"]) == (ATTENTIONS[name].get("window", 0), True)
    rows = check_launches(graph, fused, inputs)
    assert all(r.passed for r in rows), [r for r in rows if not r.passed]
    with torch.no_grad():
        want, got = graph(*inputs), fused(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_attention_of_another_form_says_why_it_is_not_launched() -> None:
    """Scores that are capped, and a sight that is not what a causal mask hides."""
    graph, inputs = attending(cap=5.0)
    fused, declined = fuse(graph)
    assert "causal_attention" not in operators(fused, inputs)
    assert any("tanh: no rule" in reason for _, reason in declined)
    graph, inputs = attending()
    (hides,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.where.Scalar)
    hides.args = (hides.args[0], 0.5, -1e9)
    graph.recompile()
    fused, declined = fuse(graph)
    assert "causal_attention" not in operators(fused, inputs)
    assert any("not what a causal mask hides: it hides others, or adds more than zeros" in r for _, r in declined)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activations", "operator", "reason"),
    [("dynamic", "matmul_integer_to_float", "a whole tensor"), ("blockwise", "matmul_nbits", "every block of 32")],
)
def test_grids_without_a_kernel_are_named(activations: str, operator: str, reason: str) -> None:
    """Attention is launched all the same, and the rest computes what it did."""
    graph, texts = lowered(small_decoder(layers=1), "x86-avx2", activations=activations)
    fused, declined = fuse(graph)
    assert {"rotary", "causal_attention", "rms_norm_quantize"} <= set(operators(fused, texts))
    said = {layer: why for layer, why in declined if why.startswith(f"{operator}: no kernel: ") and reason in why}
    assert {layer.rpartition(".")[2] for layer in said} >= {"gate_proj", "up_proj", "down_proj", "o_proj"}
    with torch.no_grad():
        want, got = graph(*texts), fused(*texts)
    seen = texts[1] > 0
    assert float((got - want)[seen].square().mean().sqrt()) < 0.05 * float(want[seen].std())
