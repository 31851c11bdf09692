"""Forms of a decoder's file: the same answers by another operator of attention, and those of the last token alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from small_decoder import VOCABULARY, sequence_task, small_decoder
from torch import Tensor, fx

from pqk.copies import copy_of
from pqk.core.aten import aten
from pqk.core.every_token import with_every_token
from pqk.core.graph import operand
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.decoder import deployed_decoder, why_not_grouped
from pqk.deploy.decoder_operators import GROUPED, LAST, last_token_op
from pqk.deploy.generation import Cache, CacheEntry, places, with_past
from pqk.errors import InputError
from pqk.models.decoder import Decoder
from pqk.passes import Convert, Quantize
from pqk.passes.capture.capture import capture
from pqk.passes.quantize.placement import Activations
from pqk.quant.fake_quant import CacheFakeQuant
from pqk.target.target import Target
from pqk.task.decoder_form import DecoderForm
from pqk.task.task import Task

FORMS = [DecoderForm(logits="last"), DecoderForm(attention="grouped"), DecoderForm(attention="grouped", logits="last")]
IN_FRONT, BEHIND, NONE = ([[0, 0, 0, 1, 1, 1, 1, 1]], [[1, 1, 1, 1, 1, 0, 0, 0]], [[1] * 8])
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def decoder() -> tuple[Decoder, fx.GraphModule]:
    pytest.importorskip("transformers")
    model, task = small_decoder(), sequence_task()
    graph = capture(model, task.example, axes=task.axes)
    assert isinstance(graph, fx.GraphModule)
    return model, graph


def text(seen: list[list[int]]) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([*seen, [1] * len(seen[0])])
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(1))
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seen", [NONE, IN_FRONT, BEHIND], ids=["whole", "padding in front", "padding behind"])
def test_a_form_answers_as_the_model_and_reads_on(
    decoder: tuple[Decoder, fx.GraphModule], form: DecoderForm, seen: list[list[int]]
) -> None:
    """Whichever side padding stands on, the first tokens and those after them."""
    model, graph = decoder
    found, cache = deployed_decoder(graph, form)
    ids, mask = text(seen)
    expected = model(ids, mask)
    scores, *kept = found(ids, mask, places(mask), *cache.empty(2))
    if form.logits == "last":
        last = [max(i for i, there in enumerate(row) if there) for row in mask.tolist()]
        torch.testing.assert_close(scores, expected[[0, 1], last].unsqueeze(1), **CLOSE)
    else:
        torch.testing.assert_close(scores[mask > 0], expected[mask > 0], **CLOSE)
    new, longer = torch.tensor([[5], [9]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    following, *_ = found(new, longer, places(longer)[:, -1:], *kept)
    want, *_ = with_past(graph)[0](new, longer, places(longer)[:, -1:], *kept)
    torch.testing.assert_close(following, want, **CLOSE)


def test_the_last_token_is_picked_before_the_product_with_the_vocabulary(
    decoder: tuple[Decoder, fx.GraphModule],
) -> None:
    nodes = [n.target for n in deployed_decoder(decoder[1], FORMS[0])[0].graph.nodes if n.op == "call_function"]
    assert nodes.count(LAST) == 1
    assert nodes.index(LAST) > max(i for i, n in enumerate(nodes) if "rms_norm" in str(n))
    plain = [n.target for n in deployed_decoder(decoder[1], DecoderForm())[0].graph.nodes]
    assert LAST not in plain and GROUPED not in plain


@torch.no_grad()
@pytest.mark.parametrize("activations", ["static", "dynamic", "blockwise"])
def test_integers_are_made_of_the_last_token_alone(
    decoder: tuple[Decoder, fx.GraphModule], activations: Activations
) -> None:
    """Its quantizer, too, stands behind the node that picks it."""
    model, task = decoder[0], sequence_task()
    graph = copy_of(decoder[1], "student")
    start = Program(model, graph, Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    int8 = Convert().apply(Quantize(activations=activations).apply(start, task), task).student
    assert isinstance(int8, fx.GraphModule)
    attention: Any = "standard" if activations == "static" else "grouped"
    found, cache = deployed_decoder(int8, DecoderForm(attention=attention, logits="last"))
    ids, mask = text(NONE)
    scores, *_ = found(ids, mask, places(mask), *cache.empty(2))
    whole = deployed_decoder(int8, DecoderForm())[0](ids, mask, places(mask), *cache.empty(2))[0]
    assert scores.shape == (2, 1, VOCABULARY)
    assert (scores[:, 0] - whole[:, -1]).abs().max() < 0.05 * whole.abs().max()
    picked = next(n for n in found.graph.nodes if n.target is LAST)
    assert operand(picked).target is aten.rms_norm.default
    if activations == "static":
        with pytest.raises(InputError, match="in 2 of 2 layers a quantizer stands inside"):
            deployed_decoder(int8, FORMS[1])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["standard", "grouped"])
def test_keys_and_values_in_8_bits_read_on_as_the_graph_that_was_trained(
    decoder: tuple[Decoder, fx.GraphModule], attention: Any
) -> None:
    """The graph rounds every key and value, those of the token itself, too; so does either operator."""
    model, task = decoder[0], sequence_task()
    start = Program(model, copy_of(decoder[1], "student"), Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    quantize = Quantize(activations="blockwise", kv_cache="int8")
    trained = quantize.apply(start, task)
    plain = Quantize(activations="blockwise").apply(
        dataclasses.replace(start, student=copy_of(decoder[1], "student")), task
    )
    kept = [m for m in trained.student.modules() if isinstance(m, CacheFakeQuant)]
    assert len(kept) == 4 and not any(isinstance(m, CacheFakeQuant) for m in plain.student.modules())
    ids, mask = task.example
    expected = trained.student.eval()(ids, mask)
    assert 1e-4 < (expected - plain.student.eval()(ids, mask)).abs().max() < 0.2 * expected.abs().max()
    int8 = Convert().apply(trained, task).student
    assert isinstance(int8, fx.GraphModule)
    form, cache = deployed_decoder(int8, DecoderForm(attention=attention))
    where, half = places(mask), ids.shape[1] // 2
    first, *past = form(ids[:, :half], mask[:, :half], where[:, :half], *cache.empty(2))
    rest, *whole = form(ids[:, half:], mask, where[:, half:], *past)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, **CLOSE)
    assert {t.dtype for t in whole} == {torch.int8} and whole[0].shape[2] == ids.shape[1]
    spread = max(int(t.abs().max()) for t in whole)
    assert spread > 90, "the grid is used"


def test_only_causal_models_for_onnx_runtime_keep_8_bits(decoder: tuple[Decoder, fx.GraphModule]) -> None:
    task = sequence_task()
    start = Program(decoder[0], decoder[1], Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    quantize = Quantize(activations="dynamic", kv_cache="int8")
    data = task.evaluation
    other = Task(None, data, validation=data, class_axis=2)
    with pytest.raises(InputError, match='kv_cache = "int8" is for causal models'):
        quantize.apply(start, other)
    assert "keeps nothing" in str(quantize.why_not_for(Target.named("cuda-sm80")))
    assert quantize.why_not_for(Target.named("x86-avx2")) is None
    static = Quantize(kv_cache="int8")  # of which ONNX Runtime refuses the file, as it makes uint8 of int8 on x86
    for name in ("x86-avx2", "x86-vnni"):
        assert 'use activations = "dynamic"' in str(static.why_not_for(Target.named(name)))
    with pytest.raises(InputError, match="refuses the file"):
        static.apply(start, task)
    assert static.why_not_for(Target.named("arm-dotprod")) is None


# ---- in ONNX


def small_file() -> onnx.ModelProto:
    """`last_token` as the emitter writes it, behind it a product: x [B, S, 2] and a mask to logits [B, 1, 3]."""
    nodes = [
        helper.make_node("ArgMax", ["attention_mask"], ["place"], axis=1, keepdims=1, select_last_index=1),
        helper.make_node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        helper.make_node("Sub", ["place", "total"], ["last"]),
        helper.make_node("Unsqueeze", ["last", "two"], ["index"]),
        helper.make_node("GatherND", ["x", "index"], ["last_token"], batch_dims=1),
        helper.make_node("MatMul", ["last_token", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", 2]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 1, 3])],
        [
            helper.make_tensor("two", TensorProto.INT64, [1], [2]),
            helper.make_tensor("weight", TensorProto.FLOAT, [2, 3], [1, 2, 3, 4, 5, 6]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def answer(model: bytes, x: Tensor, mask: Tensor) -> Tensor:
    run = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(run.run(["logits"], {"x": x.numpy(), "attention_mask": mask.numpy()})[0])


@pytest.mark.parametrize("seen", [NONE, IN_FRONT, BEHIND])
@pytest.mark.parametrize("before", [0, 3])
def test_a_file_of_the_last_token_is_one_of_every_token_without_its_node(seen: list[list[int]], before: int) -> None:
    mask = torch.tensor([*seen, [1] * 8])
    x = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.ones(2, before, dtype=torch.int64), mask], 1)
    weight = torch.arange(1.0, 7.0).reshape(2, 3)
    file = small_file().SerializeToString()
    torch.testing.assert_close(answer(file, x, whole), last_token_op(x, whole) @ weight)
    torch.testing.assert_close(answer(with_every_token(file), x, whole), x @ weight)


def test_the_file_of_another_tool_has_no_every_token(tmp_path: Path) -> None:
    model = small_file()
    model.graph.node[-2].output[0] = model.graph.node[-1].input[0] = "hidden"
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(InputError, match="has no node last_token that picks it"):
        with_every_token(path)


# ---- what is refused


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (CacheEntry(2, 8, 16), r"keys and values of one width, and those of layer 1 are 8 and 16 wide"),
        (CacheEntry(2, 12, 12), r"a multiple of 8, and those of layer 1 are 12 wide"),
        (CacheEntry(3, 64, 64), None),
    ],
)
def test_sizes_that_the_operator_does_not_take_are_said(entry: CacheEntry, words: str | None) -> None:
    reason = why_not_grouped(Cache((CacheEntry(1, 8, 8), entry)))
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention": "flash"}, "attention: Input should be 'standard' or 'grouped'"),
        ({"logit": "last"}, 'unknown key "logit"'),
        ("last", "decoder_form is a str and must be a table"),
    ],
)
def test_a_form_that_there_is_not_is_refused(given: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sequence_task(decoder_form=given)


def test_other_tasks_have_no_form_of_a_decoder() -> None:
    data = sequence_task().evaluation
    with pytest.raises(InputError, match="decoder_form is of causal models"):
        Task(None, data, validation=data, class_axis=2, decoder_form={"logits": "last"})


def test_a_form_is_noted_for_the_report() -> None:
    notes = sequence_task(decoder_form={"logits": "last", "attention": "grouped"}).notes
    assert sum("model.onnx" in note for note in notes) == 2 and not sequence_task().notes
