"""The grid of MatMulNBits from a recipe to the file: what is trained is what ONNX Runtime computes."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import causal_models
import numpy as np
import onnx
import pytest
import text_models
import torch
import torch.nn.functional as F
from evaluations import UNTIMED
from torch import Tensor, fx, nn

from pqk import Recipe, compress
from pqk.core.aten import GATHER_NBITS, NBITS
from pqk.core.costs import count_macs
from pqk.core.onnxruntime_session import session
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.generation import continued
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.deploy.token_operators import with_token_operators
from pqk.errors import InputError
from pqk.knowledge import KLDivergence
from pqk.models.decoder import Decoder
from pqk.models.decoder_files import sizes_of_decoder
from pqk.models.encoder import encoder
from pqk.models.text import text_task
from pqk.passes import Capture, Convert, Distill, Quantize
from pqk.passes.capture.capture import capture
from pqk.passes.quantize.embeddings import TableFakeQuant
from pqk.quant.block_fake_quant import BlockFakeQuant, BlockWeightFakeQuant
from pqk.quant.fake_quant import set_mode
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_layers_of, check_parity


class Speaker(nn.Module):
    """Tokens [B, T] to scores of tokens by the table itself: two readers of a value, inputs that fill no block."""

    def __init__(self, tied: bool = True, width: int = 64) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(90, width), nn.LayerNorm(width), nn.Linear(width, 90)
        self.left, self.right = nn.Linear(width, 70), nn.Linear(width, 70, bias=False)
        self.narrow, self.mix = nn.Linear(70, width), nn.Conv1d(width, width, 1)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        x = x + self.narrow(F.silu(self.left(x)) * self.right(x))
        return self.head(self.norm(x + self.mix(x.transpose(1, 2)).transpose(1, 2)))


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 90, (rows, 7), generator=torch.Generator().manual_seed(seed))


@functools.cache
def captured(tied: bool = True, width: int = 64) -> tuple[Program, Task]:
    """The GRAPH program of a `Speaker`, and its task."""
    torch.manual_seed(0)
    model, part = Speaker(tied, width).eval(), ArrayData(tokens(64), None, 16)
    task = Task(None, part, validation=part, example=tokens(2), class_axis=2, dynamic_axes={"input": {1: "length"}})
    start = Program(model, model, Stage.MODULE, Target.named("x86-avx2"), RunContext())
    return Capture().apply(start, task), task


def program(
    bits: Any = 8, target: str = "x86-avx2", tied: bool = True, width: int = 64, **settings: Any
) -> tuple[Program, Program, Task]:
    """The FAKE_QUANT and the INT8 program of a `Speaker`, and its task."""
    graph, task = captured(tied, width)
    start = replace(graph, student=copy.deepcopy(graph.student), target=Target.named(target))
    fake = Quantize(activations="blockwise", weight_bits=bits, **settings).apply(start, task)
    return fake, Convert().apply(replace(fake, student=copy.deepcopy(fake.student)), task), task


def quantizers(fake: Program) -> dict[str, Any]:
    kinds = BlockFakeQuant | BlockWeightFakeQuant | TableFakeQuant
    return {n.removeprefix("quantizers."): m for n, m in fake.student.named_modules() if isinstance(m, kinds)}


def test_linear_layers_have_quantizers_and_a_tied_table_one_of_eight_bits() -> None:
    fake, _, _ = program(4)
    found = quantizers(fake)
    bits = {n: m.bits for n, m in found.items() if isinstance(m, BlockWeightFakeQuant)}
    assert bits == {"left_weight": 4, "right_weight": 4, "narrow_weight": 4, "head_weight": 8}
    assert sum(type(m) is BlockFakeQuant for m in found.values()) == 3  # left and right share one
    assert fake.details == fake.details | {"activations": 3, "weights": 4}
    reasons = {d.layer: d.reason for d in fake.declined}
    assert "only linear layers are quantized in blocks" in reasons["mix"]
    untied = quantizers(program(4, tied=False)[0])
    assert untied["head_weight"].bits == 4 and isinstance(untied["table_rows"], TableFakeQuant)
    ragged = quantizers(program(4, width=40)[0])  # a table of 40 columns cannot be looked up in blocks of 32
    assert ragged["head_weight"].bits == 8 and isinstance(ragged["table_rows"], TableFakeQuant)


@pytest.mark.parametrize("bits", [8, 4])
def test_training_sees_what_is_deployed(bits: Any) -> None:
    fake, int8, task = program(bits)
    x = tokens(5, 3)
    with torch.no_grad():
        torch.testing.assert_close(int8.student(x), fake.student(x), atol=1e-4, rtol=1e-4)
        on = fake.student(x)
        set_mode(fake.student, "off")
        torch.testing.assert_close(fake.student(x), fake.teacher(x), atol=1e-5, rtol=1e-5)
        assert not torch.equal(fake.student(x), on)
        set_mode(fake.student, "on")
    fake.student(x).square().sum().backward()
    assert all(p.grad is not None for p in fake.student.parameters())
    graph = int8.student
    assert isinstance(graph, fx.GraphModule)
    targets = [n.target for n in graph.graph.nodes]
    assert targets.count(NBITS) == 4 and targets.count(GATHER_NBITS) == 1
    assert count_macs(graph, task.example) == count_macs(fake.teacher, task.example)


@pytest.mark.parametrize(
    ("target", "reason"),
    [("cuda-sm80", "whose fused kernels have one scale a tensor"), ("arm-dotprod", "halves away from zero")],
)
def test_other_targets_are_refused(target: str, reason: str) -> None:
    with pytest.raises(InputError, match=f'quantize: activations = "blockwise" is not for {target}: .*{reason}'):
        program(8, target)
    assert Quantize(activations="blockwise").why_not_for(Target.named("x86-vnni")) is None


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match='quantize: weight_bits = 4 is for activations = "blockwise"'):
        Quantize(weight_bits=4)
    with pytest.raises(InputError, match="quantize: smooth moves outliers"):
        Quantize(activations="blockwise", smooth=0.5)
    with pytest.raises(InputError, match="quantize: weight_bits"):
        Quantize(activations="blockwise", weight_bits=3)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Filed:
    """A student and its file."""

    fake: nn.Module
    graph: fx.GraphModule
    task: Task
    path: Path


@pytest.fixture(scope="module", params=[pytest.param(8, marks=pytest.mark.slow), 4])
def filed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Filed:
    fake, int8, task = program(request.param)
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    emit_onnx(int8.student, task.example, path, task.input_names, task.output_names, task.axes)
    assert isinstance(int8.student, fx.GraphModule)
    return Filed(fake.student, int8.student, task, path)


def test_the_file_multiplies_integers_on_any_shape_and_keeps_the_contract(filed: Filed) -> None:
    model, task = onnx.load(filed.path), filed.task
    assert [(s.domain, s.version) for s in model.opset_import if s.domain] == [("com.microsoft", 1)]
    (table,) = (i for i in model.graph.initializer if i.name.startswith(("table", "head")) and len(i.dims) == 3)
    assert [*table.dims] == [90, 2, 32]  # once, for look-ups and products
    coverage = integer_coverage(filed.path, task.feeds(2))
    assert {la.name for la in coverage.layers if la.integer} >= {"left", "right", "narrow"}
    assert coverage.integer_macs == 7 * (3 * 64 * 70 + 64 * 90)
    parity = check_parity(filed.fake, filed.graph, filed.path, task)
    assert parity.passed, parity.first_divergence
    assert sum("MatMulNBits" in la.op for la in parity.layers) == 3 and len(parity.layers) == 4
    x = tokens(3, 9)[:, :5]
    with torch.no_grad():
        want = filed.graph(x).numpy()
    np.testing.assert_allclose(session(filed.path).run(None, {task.input_names[0]: x.numpy()})[0], want, atol=2e-2)


@pytest.mark.parametrize("changed", ["left.weight_int", "right.weight_scale", "narrow.bias"])
def test_a_broken_constant_is_found_by_the_contract_of_layers(changed: str, filed: Filed, tmp_path: Path) -> None:
    model = onnx.load(filed.path)
    constant = next(i for i in model.graph.initializer if i.name.startswith(changed))
    values = onnx.numpy_helper.to_array(constant).copy()
    values.flat[3] = values.flat[3] ^ 0x80 if values.dtype == np.uint8 else 0
    constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
    onnx.save(model, tmp_path / "broken.onnx")
    rows = check_layers_of(filed.graph, tmp_path / "broken.onnx", filed.task, filed.task.example)
    broken = [row for row in rows if not row.passed]
    assert len(broken) == 1 and "MatMulNBits" in broken[0].op


@pytest.mark.slow
def test_layers_too_sensitive_stay_in_float() -> None:
    fake, _, _ = program(4, least_sqnr=200.0)
    assert {type(m) for m in quantizers(fake).values()} <= {TableFakeQuant}
    assert sum("too sensitive" in d.reason for d in fake.declined) == 4


@pytest.mark.full  # smaller ones are in every run
@pytest.mark.slow
def test_a_text_encoder_is_trained_compiled_and_rebuilt(tmp_path: Path) -> None:
    folder = text_models.directory(tmp_path / "model", hidden_size=64, intermediate_size=80, num_hidden_layers=1)
    texts = text_models.texts(40)
    table = {"text": texts, "label": [text_models.LABELS[i % 3] for i in range(40)]}
    model, task = encoder(folder), text_task(directory=folder, train=table, validation=table, evaluation=table)
    passes = (
        Capture(),
        Quantize(activations="blockwise", weight_bits=4),
        Distill(epochs=1.0, learning_rate=1e-3, terms=(KLDivergence(),)),
        Convert(),
    )
    artifact = compress(model, task, Recipe(passes=passes), "x86-avx2", tmp_path / "out", evaluation=UNTIMED)
    report = artifact.report
    assert report.parity is not None and report.parity.passed
    assert report.passes[1].details["weights"] == 6 + 2  # a pooler, a classifier
    with torch.no_grad():
        want = artifact.rebuild(model)(*task.example)
    torch.testing.assert_close(torch.from_numpy(artifact.run(*task.example)), want, atol=5e-2, rtol=0)


@pytest.mark.slow
def test_a_decoder_in_blocks_has_the_sizes_of_the_one_in_float() -> None:
    """Packed weights hide the length of what they read, and a tied table is looked up by another operator."""
    pytest.importorskip("transformers")
    model, ids = Decoder(causal_models.hub_model("llama")).eval(), torch.randint(3, 60, (2, 9))
    graph = capture(model, (ids, torch.ones_like(ids)), axes=(("batch", "sequence"),) * 2)
    assert isinstance(graph, fx.GraphModule)
    wide = frozenset(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    want, part = sizes_of_decoder(graph, wide), ArrayData((ids, torch.ones_like(ids)), None, 2)
    task = Task(None, part, validation=part, class_axis=2, generates=True)
    start = Program(model, graph, Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    int8 = Convert().apply(Quantize(activations="blockwise", weight_bits=4).apply(start, task), task).student
    assert isinstance(int8, fx.GraphModule)
    assert sizes_of_decoder(int8, wide) == want and want.hidden not in want.intermediate


@pytest.mark.slow
@torch.no_grad()
def test_products_that_read_the_same_are_one() -> None:
    """Queries, keys and values, and gate and up: one `MatMulNBits` each where tokens are made one by one."""
    pytest.importorskip("transformers")
    model, ids = Decoder(causal_models.hub_model("qwen2")).eval(), torch.randint(3, 60, (2, 9))  # with biases
    graph = capture(model, (ids, torch.ones_like(ids)), axes=(("batch", "sequence"),) * 2)
    assert isinstance(graph, fx.GraphModule)
    part = ArrayData((ids, torch.ones_like(ids)), None, 2)
    task = Task(None, part, validation=part, class_axis=2, generates=True)
    start = Program(model, graph, Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    int8 = Convert().apply(Quantize(activations="blockwise").apply(start, task), task).student
    assert isinstance(int8, fx.GraphModule)
    plain, inputs = continued(int8, (ids, torch.ones_like(ids)))
    joined = with_token_operators(plain)
    counts = [sum(n.target is NBITS for n in form.graph.nodes) for form in (plain, joined)]
    assert counts == [2 * 7 + 1, 2 * 4 + 1]
    difference = (joined(*inputs)[0] - plain(*inputs)[0]).abs().max() / plain(*inputs)[0].abs().max()
    assert difference < 0.05  # attention of another rounding may turn an integer behind it
