"""Encoder-decoders of every family: the numbers of `transformers`, in a graph, in two halves, and in two files.

What comes of a family is held against models/results/encoder_decoder_families.json.
`PQK_FAMILIES_OUT=models/results/encoder_decoder_families.json pytest -m "full or not full" tests/models/test_encoder_decoder.py`
writes the rows anew instead.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import translating_models as tiny
from committed_rows import hold
from torch import Tensor, fx

from pqk.core.aten import quantized_tensors
from pqk.core.onnxruntime_session import TARGET, EncoderDecoderSession, encoder_of, session, size_of
from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.deploy.token_operators import with_token_operators
from pqk.deploy.two_files import SplitGraphs, split_graphs
from pqk.errors import InputError
from pqk.files import read_json
from pqk.models.encoder_decoder import AXES, SOUNDS, SOURCE, EncoderDecoder, encoder_decoder
from pqk.passes import Capture, Convert, Quantize
from pqk.passes.capture.capture import capture
from pqk.target.target import Target
from pqk.task.metrics import Metric
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_layers_of

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
FAMILIES = [name if name == "t5" else pytest.param(name, marks=pytest.mark.full) for name in tiny.FAMILIES]
ROWS = [f"{family} {activations}" for family in tiny.FAMILIES for activations in ("dynamic", "static")]
HALF = 3
RESULTS = Path(__file__).parents[2] / "models" / "results" / "encoder_decoder_families.json"


def names_of(family: str) -> tuple[str, ...]:
    return (*(SOUNDS if family == "whisper" else SOURCE), *TARGET)


def captured(family: str) -> tuple[EncoderDecoder, fx.GraphModule]:
    model, inputs, names = EncoderDecoder(tiny.hub_model(family)).eval(), tiny.inputs(family), names_of(family)
    axes = [tuple(AXES[name].get(i) for i in range(x.ndim)) for name, x in zip(names, inputs, strict=True)]
    graph = capture(model, inputs, input_names=names, axes=axes)
    assert isinstance(graph, fx.GraphModule)
    return model, graph


def task_of(family: str) -> Task:
    """Answers to random sources: only the shapes of their numbers matter."""
    inputs, names = tiny.inputs(family), names_of(family)
    data = ArrayData(inputs, torch.zeros(inputs[-1].shape, dtype=torch.int64), len(inputs[0]))
    return Task(
        None, data, data, metric=Metric("zero", "nothing", lambda outputs, targets: 0.0), class_axis=2, example=inputs,
        input_names=names, output_names=("logits",), dynamic_axes={name: AXES[name] for name in names}, seq2seq=True,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_does(family: str) -> None:
    """Whole answers, in graphs of another length too; token by token behind what is kept, spelled out and not."""
    inputs, hub = tiny.inputs(family), tiny.hub_model(family)
    named = dict(zip(names_of(family), inputs, strict=True))
    expected = hub(**named).logits
    model, graph = captured(family)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(model(*inputs), expected, **close)
    short = (*inputs[:-2], *(x[:, :HALF] for x in inputs[-2:]))
    torch.testing.assert_close(graph(*short), expected[:, :HALF], **close)
    parts = split_graphs(graph)
    for form in (parts.decoder, with_token_operators(parts.decoder)):
        torch.testing.assert_close(step_by_step(parts, form, inputs), expected, **close)


def step_by_step(parts: SplitGraphs, form: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Tensor:
    """The logits of an answer whose first tokens are given together and the others one by one."""
    *source, ids, _ = inputs
    given = (*source[1:],)
    hidden = parts.encoder(*source)
    scores, *kept = form(*given, ids[:, :HALF], hidden, *parts.empty(len(ids)))
    found = [scores]
    for t in range(HALF, ids.shape[1]):
        scores, *kept = form(*given, ids[:, t : t + 1], hidden, *kept)
        found.append(scores)
    return torch.cat(found, 1)


@pytest.mark.full  # of T5, test_seq2seq_directory.py goes the way in every run
@torch.no_grad()
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_the_whole_way(family: str, activations: str, tmp_path: Path) -> None:
    """In integers: parity of every layer of both files, and a step answers as the whole does."""
    task = task_of(family)
    teacher = EncoderDecoder(tiny.hub_model(family)).eval()
    program = Program.begin(teacher, Target.named("x86-avx2"), RunContext())
    for step in (Capture(), Quantize(activations=activations), Convert()):
        program = dataclasses.replace(step.apply(program, task), stage=step.result_stage(program.stage))
    graph, path = program.student, tmp_path / "model.onnx"
    assert isinstance(graph, fx.GraphModule)
    emit_onnx_for(graph, task, path)
    layers = check_layers_of(graph, path, task, task.example)
    assert layers and [layer for layer in layers if not layer.passed] == []
    assert len(layers) > len(quantized_tensors(graph))  # those of the decoder are compared twice
    run = session(path)
    assert (
        isinstance(run, EncoderDecoderSession)
        and size_of(path) == path.stat().st_size + encoder_of(path).stat().st_size
    )
    whole = run.run(None, {name: x.numpy() for name, x in zip(task.input_names, task.example, strict=True)})[0]
    np.testing.assert_allclose(whole, graph(*task.example).numpy(), atol=0.05 * np.abs(whole).max())
    stepped = steps_of_files(run, task)
    np.testing.assert_allclose(stepped, whole, atol=0.05 * np.abs(whole).max())
    assert {o.domain for o in onnx.load(path).opset_import} == {""}
    coverage = integer_coverage(path, task.feeds(2))
    if activations == "dynamic":  # attention alone is in floats, and how one that reads_sounds begins
        floats = {la.op for la in coverage.layers if not la.integer}
        assert floats <= {"MatMul", "FusedMatMul", "Attention", "Conv"}
        assert all("linear" not in la.name for la in coverage.layers if not la.integer)
    kinds = [n.op_type for part in (encoder_of(path), path) for n in onnx.load(part).graph.node]
    row = {
        "layers": f"{sum(la.passed for la in layers)}/{len(layers)}",
        "integer": f"{sum(la.integer for la in coverage.layers)}/{len(coverage.layers)}",
        "attention": f"{kinds.count('Attention')}/{kinds.count('Attention') + kinds.count('Softmax')}",
    }
    hold(f"{family} {activations}", row, RESULTS, ROWS)


def test_every_family_has_a_row_and_every_layer_its_parity() -> None:
    rows = read_json(RESULTS)
    assert list(rows) == ROWS
    assert all(len({*row["layers"].split("/")}) == 1 for row in rows.values())


def steps_of_files(run: EncoderDecoderSession, task: Task) -> Any:
    """Logits of the decoder's file, one token after the other."""
    given = {name: x.numpy() for name, x in zip(task.input_names, task.example, strict=True)}
    ids = given[TARGET[0]]
    feeds = run.feeds_of_decoder({**given, **{name: given[name][:, :1] for name in TARGET}})
    outputs, found = [o.name for o in run.decoder.get_outputs()], []
    for t in range(ids.shape[1]):
        made = dict(zip(outputs, run.decoder.run(None, {**feeds, "input_ids": ids[:, t : t + 1]}), strict=True))
        found.append(made["logits"])
        pasts = {n: made[n.replace("past_key_values", "present")] for n in feeds if n.startswith("past_key_values")}
        feeds = {**feeds, **pasts}
    return np.concatenate(found, 1)


def test_a_model_without_an_encoder_is_refused(tmp_path: Path) -> None:
    import causal_models

    folder = causal_models.directory(tmp_path / "model")
    with pytest.raises(InputError, match="has no encoder and decoder; pqk.models.decoder takes causal models"):
        encoder_decoder(folder)


def test_a_causal_graph_is_not_split() -> None:
    class Alone(torch.nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return (input_ids * attention_mask).sum() + ids * mask

    with pytest.raises(InputError, match="one to the source; here are 0 and 0"):
        split_graphs(capture(Alone(), tiny.inputs("t5"), axes=[("batch", "source")] * 2 + [("batch", "target")] * 2))
