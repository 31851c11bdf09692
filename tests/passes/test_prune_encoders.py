"""Pruning and quantizing encoders: heads, width under layer norms, layers, tables. Laws and known answers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Family
from onnx import numpy_helper
from torch import Tensor, nn

from pqk.core.aten import aten
from pqk.core.graph import calls
from pqk.core.program import Program, Stage, replay
from pqk.core.run_context import RunContext
from pqk.passes import Capture, Convert, Prune, Quantize
from pqk.passes.convert.convert import convert
from pqk.passes.prune.blocks import find_blocks
from pqk.passes.prune.channel_group import ChannelGroup
from pqk.passes.prune.cuts import Cut, Skip, cut_channels, drop_block
from pqk.passes.prune.depth_search import alternation
from pqk.passes.prune.groups import find_groups
from pqk.passes.prune.heads import FewerHeads, Regrouped, find_attention
from pqk.passes.prune.law import masked, why_not_cut, why_not_exact
from pqk.passes.quantize.embeddings import LEAST, TableFakeQuant
from pqk.target.target import Target

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")


def built(name: str) -> tuple[Family, nn.Module, tuple[Tensor, ...]]:
    family = FAMILIES[name]
    return family, family.teacher(), family.sample(2)


def heads_of(model: nn.Module, example: tuple[Tensor, ...]) -> list[ChannelGroup]:
    return [g for g in find_groups(model, example) if any(m.dim == "heads" and any(m.places) for m in g.members)]


# ---- heads


def test_attention_is_found_by_what_a_pass_does() -> None:
    _, model, example = built("bert")
    attention = find_attention(model, example)
    assert list(attention) == [f"model.bert.encoder.layer.{i}.attention.self" for i in range(3)]
    first = attention["model.bert.encoder.layer.0.attention.self"]
    assert (first.heads, first.size) == (4, 8)
    assert [m.rpartition(".")[2] for m in first.makers] == ["query", "key", "value"]
    assert first.readers == ["model.bert.encoder.layer.0.attention.output.dense"]


@pytest.mark.parametrize("name", ["bert", "clip-text", pytest.param("deberta-v2", marks=pytest.mark.full)])
def test_a_head_that_is_zero_and_a_head_that_is_gone_are_the_same(name: str) -> None:
    _, model, example = built(name)
    groups = heads_of(model, example)
    assert len(groups) == 3
    for group in groups:
        assert group.reason is None and group.unit == 8 and len(group.units) == 4
    cuts = groups[1].cuts(c for h in (0, 2) for c in groups[1].units[h])
    with torch.no_grad():
        whole = model(*example)
        with masked(model, cuts):
            want = model(*example)
        student = cut_channels(copy.deepcopy(model), example, cuts=cuts)
        got = student(*example)
    assert not torch.allclose(whole, want, atol=1e-5), "the heads said nothing"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    module = student.get_submodule(next(c["module"] for c in cuts if c["dim"] == "heads"))
    assert (
        isinstance(module, FewerHeads)
        and type(module).__name__
        == type(model.get_submodule(next(c["module"] for c in cuts if c["dim"] == "heads"))).__name__
    )
    again = copy.deepcopy(student)  # what was cut is copied with its module
    with torch.no_grad():
        torch.testing.assert_close(again(*example), got)


def test_heads_go_twice() -> None:
    _, model, example = built("bert")
    for left in (3, 2):
        group = heads_of(model, example)[0]
        assert group.channels == 8 * (left + 1)
        model = cut_channels(model, example, cuts=group.cuts(group.units[1]))
    with torch.no_grad():
        assert model(*example).isfinite().all()
    module = model.get_submodule("model.bert.encoder.layer.0.attention.self")
    assert module.num_attention_heads == 2 and module.all_head_size == 16


def test_views_are_read_as_the_heads_that_are_left() -> None:
    mode = Regrouped(4, (0, 1, 3), 8)
    x = torch.zeros(2, 5, 24)
    assert mode.sizes(x, [2, 5, 4, 8]) == [2, 5, 3, 8] == mode.sizes(x, [2, 5, -1, 8])
    assert mode.sizes(x.view(2, 5, 3, 8), [2, 5, 32]) == [2, 5, 24]
    assert mode.sizes(x, [10, 24]) == [10, 24] and mode.sizes(x, [2, 5, 6, 4]) == [2, 5, 6, 4]


def test_what_is_added_for_all_heads_counts_for_those_that_are_left() -> None:
    scores, bias, mask = torch.zeros(2, 3, 5, 5), torch.randn(1, 4, 5, 5), torch.randn(2, 1, 1, 5)
    with Regrouped(4, (0, 1, 3), 8):
        first, second, third = scores + bias, bias + scores, torch.zeros(2, 3, 5, 5)
        third += bias
        assert torch.equal(scores + mask, mask.expand(2, 3, 5, 5))
    assert torch.equal(first, bias[:, [0, 1, 3]].expand(2, 3, 5, 5)) and torch.equal(first, second)
    assert torch.equal(third, first)


def test_heads_go_from_layers_that_share_a_table_of_positions() -> None:
    """MPNet's bias [1, heads, T, T] is computed once, for every layer."""
    _, model, example = built("mpnet")
    groups = heads_of(model, example)
    assert [why_not_cut(model, example, g) for g in groups] == [None] * 3
    student = copy.deepcopy(model)
    for _ in range(2):
        group = heads_of(student, example)[1]
        cuts = group.cuts(group.units[0])
        with torch.no_grad(), masked(student, cuts):
            want = student(*example)
        student = cut_channels(student, example, cuts=cuts)
        with torch.no_grad():
            torch.testing.assert_close(student(*example), want, rtol=1e-4, atol=1e-5)


# ---- the width of the residual stream


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


def test_the_reference_of_a_norm_takes_its_statistics_over_the_kept() -> None:
    torch.manual_seed(0)
    model, x, kept = Normed(), torch.randn(5, 3), [0, 2, 3, 5, 6]
    nn.init.normal_(model.norm.weight)
    pruned = [1, 4, 7]
    cuts = [
        Cut(module="embed", dim="out", indices=pruned, of=8),
        Cut(module="norm", dim="out", indices=pruned, of=8),
        Cut(module="head", dim="in", indices=pruned, of=8),
    ]
    with torch.no_grad():
        h = F.layer_norm(model.embed(x)[:, kept], (5,), model.norm.weight[kept], model.norm.bias[kept])
        want = h @ model.head.weight[:, kept].T + model.head.bias
        with masked(model, cuts):
            torch.testing.assert_close(model(x), want)
        assert why_not_exact(model, (x,), cuts) is None
        assert why_not_exact(model, (x,), cuts[:1] + cuts[2:]) is not None, "a norm that keeps all channels is no cut"
        torch.testing.assert_close(cut_channels(model, (x,), cuts=cuts)(x), want)


@pytest.mark.parametrize("name", ["bert", "vit", "deberta-v2"])
def test_the_residual_stream_narrows(name: str) -> None:
    """Embeddings, norms, every layer around them, a ViT's bare parameters and DeBERTa's positions; heads stay."""
    _, model, example = built(name)
    groups = find_groups(model, example)
    stream = max(groups, key=lambda g: len(g.members))
    assert stream.reason is None and stream.channels == 32 and why_not_cut(model, example, stream) is None
    student = cut_channels(copy.deepcopy(model), example, cuts=stream.cuts(range(1, 32, 4)))
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all(n.normalized_shape == (24,) for n in norms)
    if name == "deberta-v2":  # a table that no one looks rows up in
        assert student.get_parameter("model.deberta.encoder.rel_embeddings.weight").shape == (16, 24)
    if name == "vit":
        assert student.get_parameter("model.vit.embeddings.position_embeddings").shape[-1] == 24
    with torch.no_grad():
        assert student(*example).shape == model(*example).shape


# ---- layers


def test_layers_of_a_post_norm_encoder_are_blocks() -> None:
    family, model, _ = built("bert")
    blocks, _ = find_blocks(model, family.sample(8))
    assert [b.path for b in blocks] == [f"model.bert.encoder.layer.{i}" for i in range(3)]
    assert len({b.signature for b in blocks}) == 1
    inputs = family.sample(3)
    with torch.no_grad():
        shorter = drop_block(copy.deepcopy(model), inputs, block=blocks[1].path, returns=blocks[1].returns)
        assert isinstance(shorter.get_submodule(blocks[1].path), Skip)
        encoder = model.get_submodule("model.bert.encoder")
        del encoder.layer[1]  # type: ignore[union-attr]
        torch.testing.assert_close(shorter(*inputs), model(*inputs))


@pytest.mark.parametrize(("name", "part"), [("electra", ""), ("mobilebert", ".ffn.0"), ("mpnet", "")])
def test_layers_of_other_makes_are_blocks_too(name: str, part: str) -> None:
    """ELECTRA's return their attention maps, which nobody reads; MobileBERT's norms are a gain and an offset, and of
    its layers and their feed-forward networks the latter go; MPNet's see padding of nearly no variance."""
    family, model, _ = built(name)
    blocks, declined = find_blocks(model, family.sample(8))
    path = f"model.{name}.encoder.layer"
    assert [b.path for b in blocks] == [f"{path}.{i}{part}" for i in range(3)] and not declined
    inputs = family.sample(3)
    with torch.no_grad():
        shorter = drop_block(copy.deepcopy(model), inputs, block=blocks[1].path, returns=blocks[1].returns)
        assert shorter(*inputs).isfinite().all() and not torch.allclose(shorter(*inputs), model(*inputs), atol=1e-3)


class Read(nn.Module):
    """Two layers that return a tensor beside the hidden one, which the network adds."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.inner(x)
            return x + y, y

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x: Tensor) -> Tensor:
        x, beside = self.layers[0](x)
        return self.layers[1](x)[0] + beside


def test_a_layer_whose_second_result_is_read_is_no_block() -> None:
    blocks, declined = find_blocks(Read().eval(), (torch.randn(3, 4),))
    assert [b.path for b in blocks] == ["layers.1"]
    assert declined == {"layers.0": "it does not take and return one tensor"}


def test_layers_that_cannot_go_say_why() -> None:
    family, model, _ = built("albert")
    blocks, declined = find_blocks(model, family.sample(8))
    assert blocks == [] and "it is called 3 times in one forward pass" in declined.values()


def test_prune_heads_units_width_and_layers_and_replay() -> None:
    family, model, _ = built("bert")
    task = family.task(model)
    program = Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    program = Prune(parameters_ratio=2.0, multiple=8, depth=True, importance="taylor", samples=16).apply(program, task)
    assert program.details["budget"]["reached"] >= 2
    rewrites = {f.__name__: f for f in Prune.rewrites}
    again = replay(copy.deepcopy(model), task.example, program.plan, rewrites)
    again.load_state_dict(program.student.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(*task.example), program.student(*task.example))


def test_every_other_layer_goes_and_then_every_other_of_the_rest() -> None:
    blocks = nn.Sequential(*(nn.Identity() for _ in range(12)))
    turns = sorted((str(i) for i in range(12)), key=lambda block: alternation(blocks, block))
    assert turns == ["1", "3", "5", "7", "9", "11", "2", "6", "10", "4", "8", "0"]
    family, model, _ = built("bert")
    task = family.task(model)
    program = Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    config = Prune(depth=True, width=False, blocks="every_other", macs_ratio=1.4)
    assert config.apply(program, task).details["blocks_removed"] == ["model.bert.encoder.layer.1"]
    program = Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    both = replace(config, macs_ratio=2.5).apply(program, task)
    assert both.details["blocks_removed"] == ["model.bert.encoder.layer.1", "model.bert.encoder.layer.2"]
    with pytest.raises(ValueError, match="set depth = true and width = false"):
        Prune(depth=True, blocks="every_other", macs_ratio=2.0)


# ---- tables


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.small, self.head = nn.Embedding(64, 32), nn.Embedding(4, 32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids) + self.small(ids % 4))


def test_a_table_is_stored_and_looked_up_as_integers(tmp_path: Path) -> None:
    from pqk.core.aten import quantized_tensors
    from pqk.core.onnxruntime_session import session
    from pqk.data.data import ArrayData
    from pqk.deploy.onnx_emitter import emit_onnx
    from pqk.task.task import Task
    from pqk.verify.parity import check_layers

    torch.manual_seed(0)
    model = Looked().eval()
    ids = torch.randint(0, 64, (16, 7))
    data = ArrayData((ids,), torch.zeros(16, 7, dtype=torch.long), 8)
    task = Task(None, data, data, loss=lambda o, t: o.sum((1, 2)), input_names=("ids",))
    program = Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    program = Quantize(samples=16).apply(Capture().apply(program, task), task)
    assert ("small", f"embedding: its table is computed, or has fewer than {LEAST} values") in [
        (d.layer, d.reason) for d in program.declined
    ]
    (quantizer,) = (m for m in program.student.modules() if isinstance(m, TableFakeQuant))
    rows, table = quantizer(model.table(ids)), model.table.weight
    assert (
        (rows - model.table(ids))
        .abs()
        .le(quantizer.scale / 2 + (model.table(ids).abs() - 127 * quantizer.scale).clamp_min(0) + 1e-7)
        .all()
    )
    rows.sum().backward()
    assert table.grad is not None and table.grad[ids].abs().sum() > 0, "the table trains through the look-up"
    with torch.no_grad():
        want = program.student.eval()(ids)
        graph = convert(copy.deepcopy(program.student), (ids,))
        torch.testing.assert_close(graph(ids), want)
    (looked, _) = calls(graph.graph, aten.embedding.default)
    assert looked.meta["dtype"] == torch.int8
    path = tmp_path / "model.onnx"
    emit_onnx(graph, (ids[:2],), path, ("ids",))
    stored = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    assert [t.dtype for t in stored if t.shape == (64, 32)] == [np.int8]
    assert all(layer.passed for layer in check_layers(graph, quantized_tensors(graph), path, (ids,)))
    np.testing.assert_allclose(session(path).run(None, {"ids": ids.numpy()})[0], want.numpy(), rtol=1e-4, atol=1e-5)


# ---- a free length


@pytest.mark.full
def test_an_encoder_of_any_length(tmp_path: Path) -> None:
    """Captured at one length, its INT8 file runs at another, with every linear layer in integers."""
    from pqk.core.onnxruntime_session import OnnxModel
    from pqk.deploy.onnx_emitter import emit_onnx
    from pqk.verify.coverage import integer_coverage

    family, model, _ = built("bert")
    task = family.task(model, axes={n: {0: "batch", 1: "sequence"} for n in family.names})
    program = Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    for step in (Capture(), Quantize(samples=16), Convert()):
        program = step.apply(program, task)
    path = tmp_path / "model.onnx"
    emit_onnx(program.student, task.example, path, family.names, axes=task.axes)
    short = tuple(t[:3, :5] for t in family.sample(4))
    assert integer_coverage(path, {n: t.numpy() for n, t in zip(family.names, short, strict=True)}).share == 1
    with torch.no_grad():
        want = program.student(*short)
    got = OnnxModel(path, want)(*short)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
