"""An artifact whose file is of another form than the default one generates the same tokens, wherever it opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import causal_models as tiny
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from generating_tools import TRANSFORMERS_JS
from torch import fx

from pqk import compress
from pqk.core.onnxruntime_session import Continuing, OnnxModel, session
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.core.steps import Steps
from pqk.deploy.artifact import Artifact
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.evaluation.settings import Evaluation
from pqk.generation.continuation import Continuation, Sampling
from pqk.generation.greedy import Limits, likeliest
from pqk.models.decoder import decoder
from pqk.models.language import language_task
from pqk.passes import Convert, Quantize
from pqk.passes.capture.capture import capture
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.parity import check_layers_of

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

RECIPE = """
[target]
name = "x86-avx2"
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
activations = "blockwise"
[[pass]]
name = "convert"
"""
FORM = {"attention": "grouped", "logits": "last"}
PROMPT, MORE = "a dog ran", Sampling(max_tokens=12)


def task_of(teacher: Path, form: dict[str, str] | None) -> Task:
    texts = {"text": tiny.stories(24)}
    return language_task(
        directory=teacher, train=None, evaluation=texts, validation=texts, context=16, decoder_form=form
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("student") / "out"
    quick = replace(Evaluation.quick(), rehearsal=False)
    return compress(decoder(teacher), task_of(teacher, FORM), Recipe.loads(RECIPE), out=out, evaluation=quick)


@pytest.fixture(scope="module")
def expected(artifact: Artifact, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What the file in the default form makes of the same student."""
    path = tmp_path_factory.mktemp("standard") / "model.onnx"
    emit_onnx_for(artifact.rebuild(decoder(teacher)), task_of(teacher, None), path)
    run = session(path)
    assert isinstance(run, Continuing)
    steps = Steps(run)
    found, _ = likeliest(steps, steps.empty, prompt(), MORE.max_tokens, Limits.of(artifact.folder))
    return found


def prompt() -> list[int]:
    tokens: list[int] = tiny.letters()(PROMPT)["input_ids"]
    return tokens


def genai_tokens(genai: Any, folder: Path, count: int) -> list[int]:
    """What onnxruntime-genai continues the prompt by."""
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt()) + count, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(prompt(), np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))[len(prompt()) :]


def test_the_file_has_the_operators_and_the_shape_that_were_chosen(artifact: Artifact) -> None:
    model = onnx.load(artifact.folder / "model.onnx")
    kinds = [n.op_type for n in model.graph.node]
    assert kinds.count("GroupQueryAttention") == 2 and "Attention" not in kinds
    assert {o.domain for o in model.opset_import} == {"", "com.microsoft"}
    run = ort.InferenceSession(artifact.folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert next(o.shape for o in run.get_outputs() if o.name == "logits") == ["batch_size", 1, 259]
    assert artifact.manifest["outputs"][0]["shape"] == ["batch", 1, 259]
    assert artifact.manifest["decoder_form"] == FORM


def test_coverage_parity_and_texts_are_of_this_file(artifact: Artifact) -> None:
    report = artifact.report
    assert report.parity is not None and report.parity.passed and len(report.parity.layers) > 10
    assert report.integer_coverage is not None and 0.5 < report.integer_coverage < 1
    assert report.texts is not None and report.texts.as_whole > 0.97
    assert report.metric is not None and abs(report.metric.student - report.metric.teacher) < 0.05
    assert sum("model.onnx" in note for note in report.notes) >= 2


def test_pqk_generates_what_the_default_form_does(artifact: Artifact, expected: list[int]) -> None:
    model = Continuation(artifact.folder)
    assert list(model.tokens(model.tokens_of(PROMPT), MORE)) == expected


def test_optimum_generates_it_alone_and_beside_another(artifact: Artifact, expected: list[int]) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = optimum.ORTModelForCausalLM.from_pretrained(artifact.folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.folder)
        for asked in ([PROMPT], [PROMPT, "by"]):
            given = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left")
            found = model.generate(**given, max_new_tokens=12, do_sample=False)
            assert found[0, given["input_ids"].shape[1] :][: len(expected)].tolist() == expected


def test_onnxruntime_genai_generates_it_in_one_buffer(artifact: Artifact, expected: list[int]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    assert json.loads((artifact.folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    assert genai_tokens(genai, artifact.folder, len(expected)) == expected


@pytest.fixture(scope="module")
def student(teacher: Path) -> tuple[fx.GraphModule, Task]:
    """One that keeps keys and values in 8 bits."""
    task = task_of(teacher, None)
    model = decoder(teacher)
    graph = capture(model, task.example, axes=task.axes)
    start = Program(model, graph, Stage.GRAPH, Target.named("x86-avx2"), RunContext())
    quantized = Quantize(activations="blockwise", kv_cache="int8").apply(start, task)
    products = [d.reason for d in quantized.declined if d.reason.startswith("matmul: keys and values are kept")]
    assert products and all("in 8 bits" in reason and "in float" not in reason for reason in products)
    found = Convert().apply(quantized, task).student
    assert isinstance(found, fx.GraphModule)
    return found, task


@torch.no_grad()
@pytest.mark.parametrize("attention", ["standard", "grouped"])
def test_a_file_keeps_8_bits_by_either_operator(
    student: tuple[fx.GraphModule, Task], teacher: Path, tmp_path: Path, attention: str
) -> None:
    """The answers of the graph, every layer at parity, a quarter of the bytes; genai opens the directory."""
    graph, path = student[0], tmp_path / "model.onnx"
    task = task_of(teacher, {"attention": attention})
    emit_onnx_for(graph, task, path)
    inputs = next(task.calibration(8))
    expected = graph(*inputs)
    torch.testing.assert_close(OnnxModel(path, expected)(*inputs), expected, atol=1e-4, rtol=1e-3)
    layers = check_layers_of(graph, path, task, inputs)
    assert len(layers) > 15 and all(layer.passed for layer in layers)
    run = session(path)
    assert isinstance(run, Continuing)
    steps = Steps(run)
    assert steps.kept_bytes == 2 * 2 * 2 * 8  # layers, keys and values, groups, width
    found, _ = likeliest(steps, steps.empty, prompt(), 12, Limits.of(teacher))
    genai = pytest.importorskip("onnxruntime_genai")
    assert task.extra_files is not None
    for name, content in task.extra_files(graph).items():
        (tmp_path / name).write_bytes(content)
    assert genai_tokens(genai, tmp_path, len(found)) == found


def test_transformers_js_generates_it(artifact: Artifact, expected: list[int], tmp_path: Path) -> None:
    node, script, folder = shutil.which("node"), tmp_path / "run.cjs", artifact.folder
    script.write_text(TRANSFORMERS_JS)
    asked = [node, "-e", "require('@huggingface/transformers')"]
    if node is None or subprocess.run(asked, capture_output=True).returncode:  # type: ignore[arg-type]
        pytest.skip("needs node, and NODE_PATH at a folder with @huggingface/transformers (npm, 4.3.2)")
    command = [node, str(script), str(folder.parent), folder.name, "12", *map(str, prompt())]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(n) for n in said.split()][len(prompt()) :][: len(expected)] == expected
