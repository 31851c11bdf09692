"""An artifact of a causal model is a directory that generates: by pqk, onnxruntime-genai, optimum and transformers."""

from __future__ import annotations

import json
import re
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

from pqk import compress
from pqk.bench.baselines import Tool, why_not_quantized
from pqk.cli import app as cli
from pqk.core.onnxruntime_session import OnnxModel
from pqk.deploy.artifact import Artifact
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.evaluation.settings import Evaluation
from pqk.evaluation.texts import continued_texts
from pqk.generation.continuation import Continuation, Sampling, choose
from pqk.models.decoder import decoder
from pqk.models.language import language_task
from pqk.recipe.recipe import Recipe
from pqk.report.text import texts_text
from pqk.target.target import Target

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

RECIPE = Recipe.loads('[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n')
PROMPT = "a dog ran"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    texts = {"text": tiny.stories(24)}
    task = language_task(directory=teacher, train=None, evaluation=texts, validation=texts, context=16)
    out = tmp_path_factory.mktemp("student") / "out"
    return compress(decoder(teacher), task, RECIPE, out=out, evaluation=replace(Evaluation.quick(), rehearsal=False))


def test_the_file_takes_what_is_kept_and_gives_it_back(artifact: Artifact) -> None:
    run = ort.InferenceSession(str(artifact.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    pasts = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    assert [i.name for i in run.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *pasts]
    assert [o.name for o in run.get_outputs()] == ["logits", *(p.replace("past_key_values", "present") for p in pasts)]
    shapes = {i.name: i.shape for i in run.get_inputs()}
    assert shapes["attention_mask"] == ["batch_size", "total_sequence"]
    assert shapes[pasts[0]] == ["batch_size", 2, "past_sequence", 8]
    assert {o.domain for o in onnx.load(artifact.folder / "model.onnx").opset_import} == {""}


def test_its_graph_is_that_of_tokens(artifact: Artifact) -> None:
    kinds = {n.op_type for n in onnx.load(artifact.folder / "model.onnx").graph.node}
    assert {"RMSNormalization", "RotaryEmbedding", "QuantizeLinear"} <= kinds


def test_a_step_answers_as_the_whole_text(artifact: Artifact) -> None:
    """Prefill against decode, with an empty past first; the least difference may turn an integer, not a decision."""
    run = ort.InferenceSession(str(artifact.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([tiny.letters()(text)["input_ids"][:20] for text in tiny.stories(2)])
    whole, _ = _step(run, ids, {}, 0)
    kept: dict[str, Any] = {}
    for t in range(ids.shape[1]):
        scores, kept = _step(run, ids[:, t : t + 1], kept, t)
        np.testing.assert_allclose(scores[:, 0], whole[:, t], atol=0.05 * np.abs(whole).max())


def _step(run: Any, ids: Any, kept: dict[str, Any], before: int) -> tuple[Any, dict[str, Any]]:
    names = [i.name for i in run.get_inputs() if i.name.startswith("past")]
    kept = kept or {name: np.zeros((2, 2, 0, 8), np.float32) for name in names}
    total = before + ids.shape[1]
    where = np.tile(np.arange(before, total), (2, 1))
    feeds = {"input_ids": ids, "attention_mask": np.ones((2, total), np.int64), "position_ids": where, **kept}
    scores, *presents = run.run(None, feeds)
    return scores, dict(zip(names, presents, strict=True))


def test_configurations_say_what_the_student_is(artifact: Artifact, teacher: Path) -> None:
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (artifact.folder, teacher))
    assert {k: config[k] for k in was if k != "dtype"} == {k: v for k, v in was.items() if k != "dtype"}
    genai = json.loads((artifact.folder / "genai_config.json").read_text())["model"]
    assert (genai["bos_token_id"], genai["eos_token_id"], genai["vocab_size"]) == (1, 2, config["vocab_size"])
    decoding = genai["decoder"]
    assert (decoding["num_hidden_layers"], decoding["num_key_value_heads"], decoding["head_size"]) == (2, 2, 8)
    assert json.loads((artifact.folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_report_says_where_texts_part(artifact: Artifact) -> None:
    made = artifact.report.texts
    assert made is not None and made.texts == len(made.alike) == 4
    assert max(made.alike) <= made.tokens
    assert made.student_kept_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert made.teacher_per_second and made.student_per_second and made.ratio
    page = (artifact.folder / "report.md").read_text()
    assert "## Texts" in page and "256 B are kept of a token" in page.replace("0.256 kB", "256 B")
    assert made.as_whole > 0.97
    found = artifact.report.diagnostics
    assert found is not None and found.tokens is not None and found.fidelity is None
    assert f"Student and teacher, {found.tokens.tokens:,} next tokens: " in page and "No fidelity" not in page
    rows = {row.variant: row.metric for row in artifact.report.attribution}
    assert found.tokens.student.nats == pytest.approx(-float(rows["student"] or 0.0), abs=1e-5)
    assert found.tokens.teacher.nats == pytest.approx(-float(rows["teacher_fp32"] or 0.0), abs=1e-5)


def test_texts_of_one_file_are_the_same(artifact: Artifact, teacher: Path) -> None:
    """A file beside itself: every token alike, and the data's own prompts are what is continued."""
    rows = {"prompt": ["a dog", "the cat ran by"], "completion": ["ran", "too"]}
    task = language_task(directory=teacher, train=None, evaluation=rows, validation=rows)
    path = artifact.folder / "model.onnx"
    made = continued_texts(path, path, task, 8, threads=1, timed=False)
    assert made is not None and made.texts == 2 and made.equal == 1.0
    assert made.prompt_tokens == len("the cat ran by") + 1
    assert made.ratio is None and made.teacher_repeated == made.student_repeated
    assert texts_text(artifact.report.model_copy(update={"texts": made})).count("\n") == 3


@pytest.mark.parametrize(
    ("tool", "operator"), [("teacher_dynamic", "MatMulInteger"), ("teacher_blocks", "MatMulNBits")]
)
def test_stock_tools_quantize_the_teacher(teacher: Path, tmp_path: Path, tool: Tool, operator: str) -> None:
    """Every linear layer, the tied head included by the tool that folds it; ONNX's own attention stays what it is."""
    texts, path, out = {"text": tiny.stories(8)}, tmp_path / "teacher.onnx", tmp_path / "out.onnx"
    task, model = language_task(directory=teacher, train=None, evaluation=texts, validation=texts), decoder(teacher)
    emit_onnx_for(model, task, path)
    assert why_not_quantized(tool, path, out, task, Target.detect()) is None
    operators = [n.op_type for n in onnx.load(out).graph.node]
    assert operators.count(operator) >= 14 and operators.count("Attention") == 2
    scores = [task.score(OnnxModel(p, torch.zeros(1)), task.evaluation) for p in (path, out)]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_pqk_continues_a_text(artifact: Artifact) -> None:
    model = Continuation(artifact.folder)
    pieces = list(model.stream(PROMPT, Sampling(max_tokens=12)))
    assert pieces == list(model.stream(PROMPT, Sampling(max_tokens=12)))
    assert model.pace.prompt == len(PROMPT) + 1
    assert model.pace.tokens <= 12
    assert model.pace.first_ms > 0
    given = model.tokens_of(PROMPT)
    for most, stopped in ((1, {"max_tokens", "end"}), (900, {"positions", "end"})):
        list(model.tokens(given, Sampling(max_tokens=most)))
        assert model.pace.stopped in stopped
    drawn = {"".join(model.stream(PROMPT, Sampling(max_tokens=12, temperature=3.0, seed=s))) for s in range(3)}
    assert len(drawn) == 3


def test_a_text_is_not_continued_behind_its_end(artifact: Artifact) -> None:
    """A tokenizer that puts the token that ends texts behind each does so behind a prompt, too."""
    model = Continuation(artifact.folder)
    expected = [model.tokens_of(text) for text in (PROMPT, "")]
    model.tokenizer = tiny.byte_letters(
        tiny.SPECIAL, "<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    assert model.tokenizer(PROMPT)["input_ids"] == [*expected[0], 2]
    assert [model.tokens_of(text) for text in (PROMPT, "")] == expected


def test_optimum_and_transformers_continue_it_alike(artifact: Artifact) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = optimum.ORTModelForCausalLM.from_pretrained(artifact.folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.folder)
        pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        found = pipeline(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
        given = tokenizer([PROMPT, "by"], return_tensors="pt", padding=True, padding_side="left")
        together = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert found == PROMPT + "".join(Continuation(artifact.folder).stream(PROMPT, Sampling(max_tokens=12)))
    assert tokenizer.decode(together[0], skip_special_tokens=True) == found


def test_onnxruntime_genai_continues_it_alike(artifact: Artifact) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(artifact.folder))
    expected = list(
        Continuation(artifact.folder).tokens(tokens := tiny.letters()(PROMPT)["input_ids"], Sampling(max_tokens=12))
    )
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(tokens) + len(expected), do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(np.array(tokens, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == [*tokens, *expected]


def test_transformers_js_continues_it_alike(artifact: Artifact, tmp_path: Path) -> None:
    """It sizes the empty cache by the name of the axis, which is held in any case."""
    folder = artifact.folder
    free = {i.name: i.shape for i in ort.InferenceSession(folder / "model.onnx").get_inputs()}
    assert {shape[0] for shape in free.values()} == {"batch_size"}
    node, script = shutil.which("node"), tmp_path / "run.cjs"
    script.write_text(TRANSFORMERS_JS)
    asked = [node, "-e", "require('@huggingface/transformers')"]
    if node is None or subprocess.run(asked, capture_output=True).returncode:  # type: ignore[arg-type]
        pytest.skip("needs node, and NODE_PATH at a folder with @huggingface/transformers (npm, 4.3.2)")
    tokens = tiny.letters()(PROMPT)["input_ids"]
    expected = [*tokens, *Continuation(folder).tokens(tokens, Sampling(max_tokens=12))]
    command = [node, str(script), str(folder.parent), folder.name, "12", *map(str, tokens)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [int(n) for n in said.split()][: len(expected)] == expected


def test_the_command_shows_the_text_and_what_it_took(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(artifact.folder), PROMPT, "--max-tokens", "5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(PROMPT)
    assert "tokens after a prompt of 10" in shown.err
    assert cli.run(["generate", str(artifact.folder), PROMPT, "--max-tokens", "900"]) == 0
    assert re.search("; (the text ended|it stopped at the model's last\\s+position)$", capsys.readouterr().err.strip())
    assert cli.run(["inspect", str(artifact.folder)]) == 0
    assert "past_key_values.0.key to past_key_values.1.value float32" in capsys.readouterr().out
    assert cli.run(["generate", str(artifact.folder), PROMPT, "--max-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == 10
    assert PROMPT + answer["text"] == shown.out.rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": ""}, None),
        ({"prompt": "a" * 80}, "the prompt has 81 tokens and the model 64 positions"),
        ({"prompt": "a", "chat": True}, "has no chat template"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    artifact: Artifact, arguments: dict[str, Any], said: str | None
) -> None:
    model = Continuation(artifact.folder)
    if said is None:  # the token in front is a prompt
        assert list(model.stream(**arguments, sampling=Sampling(max_tokens=2)))
        return
    with pytest.raises(InputError, match=said):
        list(model.stream(**arguments))


def test_the_likeliest_have_the_probability_together_that_is_asked_for() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = np.random.default_rng(0)
    drawn = [choose(scores, Sampling(temperature=1.0, top_p=0.8), draws) for _ in range(2000)]
    assert {*drawn} == {0, 1}
    assert np.mean(np.array(drawn) == 0) == pytest.approx(0.5 / 0.8, abs=0.03)
    assert choose(scores, Sampling(), draws) == 0
    sharp = [choose(scores, Sampling(temperature=0.1), draws) for _ in range(200)]
    assert np.mean(np.array(sharp) == 0) > 0.98
