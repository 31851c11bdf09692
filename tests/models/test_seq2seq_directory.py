"""An artifact of an encoder-decoder is a directory that generates: by pqk and by optimum, one source and several."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import translating_models as tiny

from pqk import compress
from pqk.bench.baselines import why_not_quantized
from pqk.cli import app as cli
from pqk.core.onnxruntime_session import EncoderDecoderSession, session
from pqk.deploy.artifact import Artifact
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError
from pqk.evaluation.settings import Evaluation
from pqk.evaluation.texts import continued_texts
from pqk.generation.continuation import Continuation, Sampling
from pqk.models.encoder_decoder import encoder_decoder
from pqk.models.seq2seq import seq2seq_task
from pqk.passes.prune.blocks import find_blocks, without_block
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.classes import IGNORED
from pqk.verify.own_agreement import own_agreement

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

PRUNED = """
[[pass]]
name = "prune"
macs_ratio = 1.1
ignore = ["*attn*"]
[[pass]]
name = "capture"
[[pass]]
name = "quantize"
activations = "dynamic"
[[pass]]
name = "distill"
epochs = 1
terms = [{ term = "kl" }]
[[pass]]
name = "convert"
"""
CONVERTED = '[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n'
RECIPE = Recipe.loads(CONVERTED)
FORCED, FORBIDDEN = 50, range(60, 160)
"""tokens"""
SOURCES = ("a dog sat", "by a tree to me")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose targets begin with a token that is given, and never have some others."""
    folder = tiny.directory(tmp_path_factory.mktemp("model") / "t5", "flan")
    path = folder / "generation_config.json"
    said = {"forced_bos_token_id": FORCED, "bad_words_ids": [[t] for t in FORBIDDEN], "suppress_tokens": [70]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    return folder


@pytest.fixture(scope="module")
def artifact(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    texts = tiny.pairs(24)
    task = seq2seq_task(directory=teacher, train=None, evaluation=texts, validation=texts, context=8)
    out = tmp_path_factory.mktemp("student") / "out"
    return compress(
        encoder_decoder(teacher), task, RECIPE, out=out, evaluation=replace(Evaluation.quick(), rehearsal=False)
    )


def test_its_files_are_called_and_take_what_the_tools_expect(artifact: Artifact) -> None:
    assert {"encoder_model.onnx", "decoder_model_merged.onnx"} <= {*artifact.manifest["files"]}
    assert "model.onnx" not in artifact.manifest["files"]
    runs = [ort.InferenceSession(str(artifact.folder / f"{n}.onnx")) for n in ("encoder_model", "decoder_model_merged")]
    reads, answers = ([i.name for i in run.get_inputs()] for run in runs)
    assert (reads, [o.name for o in runs[0].get_outputs()]) == (["input_ids", "attention_mask"], ["last_hidden_state"])
    kinds = [f"{kind}.{part}" for kind in ("decoder", "encoder") for part in ("key", "value")]
    kept = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in kinds]
    assert answers == ["encoder_attention_mask", "input_ids", "encoder_hidden_states", *kept]
    presents = [name.replace("past_key_values", "present") for name in kept]
    assert [o.name for o in runs[1].get_outputs()] == ["logits", *presents]


def test_its_files_compute_what_the_graph_does(artifact: Artifact) -> None:
    """As the artifact's own `run` takes them, and as its report says."""
    feeds = artifact.example(2)
    logits = artifact.run(*feeds.values())
    assert logits.shape == (*feeds["decoder_input_ids"].shape, 260)
    report = artifact.report
    assert report.parity.passed and report.size_bytes == sum(
        artifact.manifest["files"][f"{n}.onnx"]["bytes"] for n in ("encoder_model", "decoder_model_merged")
    )


def test_the_report_says_where_targets_part(artifact: Artifact, teacher: Path) -> None:
    """As a causal model's does, with diagnostics of the targets' tokens; a file beside itself is alike."""
    made, page = artifact.report.texts, (artifact.folder / "report.md").read_text()
    assert made is not None and made.sources and made.prompt_tokens == 2  # the one that begins, and the forced one
    assert made.as_whole > 0.97 and made.student_kept_bytes == 2 * 2 * 32 * 4  # layers, keys and values, width, bytes
    assert f"{made.texts} sources of evaluation data, answered by at most" in page
    found = artifact.report.diagnostics
    assert found is not None and found.tokens is not None
    task = seq2seq_task(directory=teacher, train=None, evaluation=tiny.pairs(3), validation=tiny.pairs(3))
    path = artifact.folder / "decoder_model_merged.onnx"
    same = continued_texts(path, path, task, 2, threads=1, timed=False)
    assert same is not None and same.texts == 2 and same.equal == 1.0 and same.ratio is None


def test_a_runtime_agrees_with_itself_on_targets(artifact: Artifact, teacher: Path) -> None:
    task = seq2seq_task(directory=teacher, train=None, evaluation=tiny.pairs(3), validation=tiny.pairs(3))
    found = own_agreement(artifact.folder / "decoder_model_merged.onnx", task)
    assert found is not None and found > 0.9


def test_keys_and_values_of_the_source_are_computed_once(artifact: Artifact) -> None:
    """With those given, what the encoder found is read no more."""
    run = ort.InferenceSession(str(artifact.folder / "decoder_model_merged.onnx"))
    inputs, outputs = run.get_inputs(), [o.name for o in run.get_outputs()]
    width = next(i.shape[2] for i in inputs if i.name == "encoder_hidden_states")
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs if "past" in i.name}
    feeds = {"encoder_attention_mask": np.ones((1, 5), np.int64), "input_ids": np.zeros((1, 1), np.int64), **past}
    hidden = np.random.default_rng(0).standard_normal((1, 5, width)).astype(np.float32)
    first = dict(zip(outputs, run.run(None, {**feeds, "encoder_hidden_states": hidden}), strict=True))
    assert first["present.0.encoder.key"].shape[2] == 5
    feeds |= {name: first[name.replace("past_key_values", "present")] for name in past}
    ways = [run.run(None, {**feeds, "encoder_hidden_states": x})[0] for x in (hidden, hidden * np.nan)]
    np.testing.assert_array_equal(*ways)


def test_optimum_generates_the_same(artifact: Artifact) -> None:
    """One source at a time, several of different lengths at once, and with beams."""
    optimum = pytest.importorskip("optimum.onnxruntime")
    own = Continuation(artifact.folder)
    expected = [list(own.tokens(own.tokens_of(source), Sampling(max_tokens=12))) for source in SOURCES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = optimum.ORTModelForSeq2SeqLM.from_pretrained(artifact.folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.folder)
        alone = [model.generate(**tokenizer(s, return_tensors="pt"), max_new_tokens=12)[0] for s in SOURCES]
        together = model.generate(**tokenizer(list(SOURCES), return_tensors="pt", padding=True), max_new_tokens=12)
        beams = model.generate(**tokenizer(SOURCES[0], return_tensors="pt"), max_new_tokens=12, num_beams=3)
    assert any(len({*tokens}) > 2 for tokens in expected)
    assert all(tokens[0] == FORCED and not {70, *FORBIDDEN} & {*tokens} for tokens in expected)
    for tokens, one, row in zip(expected, alone, together, strict=True):
        assert [t for t in one.tolist()[1:] if t != 2] == tokens
        assert row.tolist()[1 : len(tokens) + 1] == tokens
    assert beams.shape[0] == 1 and beams.shape[1] > 1


def test_the_command_shows_the_target_alone(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(artifact.folder), SOURCES[0], "--max-tokens", "5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == len(SOURCES[0]) + 1
    assert answer["text"] == "".join(Continuation(artifact.folder).stream(SOURCES[0], Sampling(max_tokens=5)))


def test_inspect_says_what_both_files_are_for(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(artifact.folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "encoder_model.onnx reads the source, and decoder_model_merged.onnx takes past_key_values.*, too" in said


def test_configurations_say_what_the_student_is(artifact: Artifact, teacher: Path) -> None:
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (artifact.folder, teacher))
    same = [k for k in was if k not in ("dtype", "num_hidden_layers")]
    assert {k: config[k] for k in same} == {k: was[k] for k in same}
    assert config["is_encoder_decoder"] and config["num_decoder_layers"] == 2


def test_the_decoder_reads_targets_behind_the_token_that_begins_them(teacher: Path) -> None:
    table = {"source": ["a dog", "me"], "target": ["ab", "abcd"]}
    task = seq2seq_task(directory=teacher, train=None, evaluation=table, validation=table)
    (batch,) = task.evaluation.batches()
    letters = tiny.letters()
    rows = dict(zip(batch.keys.tolist(), range(2), strict=True))  # type: ignore[union-attr]
    ids, mask, read, read_mask = batch.inputs
    wanted = letters("ab")["input_ids"]
    assert batch.targets[rows[0]].tolist() == [*wanted, IGNORED, IGNORED]
    assert read[rows[0]].tolist() == [0, *wanted[:-1], 0, 0]
    assert read_mask[rows[0]].tolist() == [1, 1, 1, 0, 0]
    assert int(mask[rows[1]].sum()) == len(letters("me")["input_ids"])
    assert ids.shape == mask.shape


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"source": ["a"], "target": [" "]}, "row 1 of the table has an empty target"),
        ({"source": ["a"], "answer": ["b"]}, 'has no column "target"'),
        ({"source": ["a"], "target": [3]}, "row 1 of the table has in target no text but int"),
    ],
)
def test_pairs_that_nothing_is_learned_of_are_refused(teacher: Path, table: dict[str, list[str]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        seq2seq_task(directory=teacher, train=None, evaluation=table, validation=table)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"), ({"context": -5}, "context=-5 must be"),
        ({"limit": 0}, "limit=0 must be a whole number, at least 1"), ({"max_length": 1}, "max_length=1 must be"),
        ({"train": {"source": ["a"], "target": []}}, "different lengths: source 1, target 0"),
    ],
)  # fmt: skip
def test_numbers_and_tables_are_checked(teacher: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        seq2seq_task(
            directory=teacher, **{"train": None, "evaluation": tiny.pairs(2), "validation": tiny.pairs(2)} | wrong
        )


def test_sources_of_one_token_are_timed_as_two(teacher: Path) -> None:
    """A tracer takes a size of 1 for one that never changes. The source here is the token that ends it."""
    table = {"source": ["", ""], "target": ["a", "b"]}
    task = seq2seq_task(directory=teacher, train=None, evaluation=table, validation=table, context=4)
    end = tiny.letters().eos_token_id
    assert task.example[0].tolist() == [[end, end], [end, end]] and task.example[1].all()
    assert next(task.evaluation.batches()).inputs[0].shape == (2, 1)


def test_padding_changes_no_logits(teacher: Path) -> None:
    model = encoder_decoder(teacher)
    ids, answer = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[0, 8, 9]])
    padded, mask = torch.cat([ids, ids * 0], 1), torch.tensor([[1] * 4 + [0] * 4])
    with torch.no_grad():
        alone = model(ids, torch.ones_like(ids), answer, torch.ones_like(answer))
        torch.testing.assert_close(model(padded, mask, answer, torch.ones_like(answer)), alone, atol=1e-5, rtol=1e-4)


def test_prompts_and_completions_are_known_by_their_columns(teacher: Path, tmp_path: Path) -> None:
    """As JSONL; where `source` and `target` are there, they are read."""
    rows = [{"prompt": "a dog", "completion": "ab", "note": ""}, {"prompt": "me", "completion": "abcd", "note": ""}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"source": ["a dog", "me"], "target": ["ab", "abcd"], "prompt": ["x", "y"], "completion": ["u", "v"]}
    tasks = [seq2seq_task(directory=teacher, train=None, evaluation=table, validation=table) for table in (path, named)]
    batches = [next(iter(task.evaluation.batches())) for task in tasks]
    for one, other in zip(batches[0].inputs, batches[1].inputs, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(batches[0].targets, batches[1].targets)


def test_targets_end_and_are_no_longer_than_positions(tmp_path: Path) -> None:
    folder = tiny.directory(tmp_path / "bart", "bart", max_position_embeddings=6)
    table = {"source": ["a long source", "b"], "target": ["abcdefgh", "a"]}
    task = seq2seq_task(directory=folder, train=None, evaluation=table, validation=table)
    (batch,) = task.evaluation.batches()
    assert [x.shape for x in batch.inputs] == [(2, 6)] * 4
    (short,) = (row for row in batch.targets.tolist() if IGNORED in row)
    assert short[1:] == [2, *[IGNORED] * 4]
    assert "1 of 2 evaluation targets end after 6 tokens" in task.notes


@pytest.mark.full
@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_pruned_and_distilled_student_opens_in_optimum(family: str, tmp_path: Path) -> None:
    """Of fewer hidden units; by the number of heads optimum divides the width, and does not open fewer of them."""
    optimum = pytest.importorskip("optimum.onnxruntime")
    folder, texts = tiny.directory(tmp_path / "model", family), tiny.pairs(16)
    task = seq2seq_task(directory=folder, train=texts, evaluation=texts, validation=texts, context=8)
    made = compress(
        encoder_decoder(folder), task, Recipe.loads(PRUNED), out=tmp_path / "out", evaluation=Evaluation.quick()
    )
    assert made.report.parity.passed
    config = json.loads((made.folder / "config.json").read_text())
    assert config["decoder_ffn_dim"] < 48 and config["decoder_attention_heads"] == 4
    own = Continuation(made.folder)
    expected = list(own.tokens(own.tokens_of(SOURCES[0]), Sampling(max_tokens=8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = optimum.ORTModelForSeq2SeqLM.from_pretrained(made.folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(made.folder)
        found = model.generate(**tokenizer(SOURCES[0], return_tensors="pt"), max_new_tokens=8)[0]
    assert [t for t in found.tolist()[1:] if t != 2] == expected


def test_layers_of_t5_go_whole(teacher: Path) -> None:
    """A cache has keys and values of both attentions of each layer, so neither goes alone."""
    texts = tiny.pairs(8)
    task = seq2seq_task(directory=teacher, train=None, evaluation=texts, validation=texts)
    blocks, declined = find_blocks(encoder_decoder(teacher), task.example)
    assert [block.path for block in blocks] == [f"model.{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)]
    assert declined == {}


@torch.no_grad()
def test_a_layer_that_is_left_out_takes_no_bias_from_the_others(teacher: Path) -> None:
    """The table of positions is its stack's, and not the first layer's."""
    model, bare = encoder_decoder(teacher), encoder_decoder(teacher)
    assert bare.decoder_bias is not None
    bare.decoder_bias.table.weight.zero_()
    sample = tiny.inputs("t5")
    with without_block(model, "model.decoder.block.0", 3), without_block(bare, "model.decoder.block.0", 3):
        assert not torch.allclose(model(*sample), bare(*sample), atol=1e-3)


def test_answers_of_a_student_are_for_causal_models(teacher: Path, tmp_path: Path) -> None:
    """Refused before anything is trained."""
    texts = tiny.pairs(8)
    task = seq2seq_task(directory=teacher, train=texts, evaluation=texts, validation=texts)
    said = (
        '[[pass]]\nname = "distill"\nepochs = 1\nterms = [{ term = "jsd" }]\nanswers = { by = "student" }\n' + CONVERTED
    )
    with pytest.raises(InputError, match="answers are written by causal models"):
        compress(encoder_decoder(teacher), task, Recipe.loads(said), out=tmp_path / "out")


@pytest.mark.full
def test_onnxruntime_quantizes_both_files_of_a_teacher(teacher: Path, tmp_path: Path) -> None:
    """ONNX's own attention, which has no weights, stays as it is."""
    texts = tiny.pairs(8)
    task = seq2seq_task(directory=teacher, train=None, evaluation=texts, validation=texts, context=4)
    emit_onnx_for(encoder_decoder(teacher), task, tmp_path / "teacher.onnx")
    made = (tmp_path / "teacher.onnx", tmp_path / "dynamic.onnx")
    assert why_not_quantized("teacher_dynamic", *made, task, Target.named("x86-avx2")) is None
    assert isinstance(session(made[1]), EncoderDecoderSession)
