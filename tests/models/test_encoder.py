"""Encoders: a directory in, the same numbers under every padding and length, and a directory out that others load."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import text_models as tiny
import torch
from evaluations import TABLE

from pqk import compress
from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.deploy.artifact import Artifact
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.models.encoder import Encoder, HubFiles, encoder, load, positions
from pqk.models.hub import find_directory, load_tokenizer
from pqk.models.text import text_task
from pqk.models.text_data import TextData, padded
from pqk.passes.capture.capture import capture
from pqk.passes.prune.survivors import surviving_channels
from pqk.recipe.fit import fit_recipe
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

AXES = (("batch", "sequence"), ("batch", "sequence"))
PTQ = Recipe.loads('[[pass]]\nname = "capture"\n[[pass]]\nname = "quantize"\n[[pass]]\nname = "convert"\n')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "classifier")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.directory(tmp_path_factory.mktemp("model") / "base", "Model")


def inputs(*lengths: int, to: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts of these lengths, padded to the longest or to `to`."""
    g = torch.Generator().manual_seed(1)
    return padded([torch.randint(5, len(tiny.WORDS), (n,), generator=g) for n in lengths], 0, to)


# ---- in


@torch.no_grad()
def test_padding_does_not_change_an_answer(folder: Path) -> None:
    """Neither in the module, nor in its graph, nor in the file: alone, among longer ones, and padded to the end."""
    model = encoder(folder)
    graph = capture(encoder(folder), inputs(4, 9), input_names=("input_ids", "attention_mask"), axes=AXES)
    for answer in (model, graph):
        together = answer(*inputs(5, 2, 11))
        torch.testing.assert_close(answer(*inputs(5, 2, 11, to=24)), together, atol=1e-5, rtol=0)
        torch.testing.assert_close(answer(*inputs(5)), together[:1], atol=1e-5, rtol=0)
    assert together.std(0).min() > 0.01  # which says something only if texts differ


@torch.no_grad()
def test_the_file_takes_any_batch_and_any_length(folder: Path, tmp_path: Path) -> None:
    model, example = encoder(folder), inputs(4, 9)
    graph = capture(encoder(folder), example, axes=AXES)
    emit_onnx(graph, example, tmp_path / "model.onnx", ("input_ids", "attention_mask"), ("logits",), AXES)
    file = onnx.load(tmp_path / "model.onnx").graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*file.input, *file.output)]
    assert dims == [["batch", "sequence"], ["batch", "sequence"], ["batch", 3]]
    run = OnnxModel(tmp_path / "model.onnx", model(*example))
    for batch in (inputs(3), inputs(2, 7, 24), inputs(5, 6, 4, 12, 3, to=15)):
        torch.testing.assert_close(graph(*batch), model(*batch), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run(*batch), model(*batch), atol=1e-5, rtol=1e-5)


class Nine(torch.nn.Module):
    """Takes 9 tokens only."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (input_ids * attention_mask).view(-1, 9).float().mean(1, keepdim=True)


def test_a_fixed_length_is_found() -> None:
    with pytest.raises(InputError, match=r"the sequence size is fixed to 9 somewhere; use x.shape\[1\].*view\(-1, 9\)"):
        capture(Nine(), inputs(4, 9), axes=AXES)


@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_tokens_at_length_one(base: Path) -> None:
    model = encoder(base, "embedding")
    ids, mask = inputs(6, 3)
    said = model(ids, mask)
    assert isinstance(said, dict) and list(said) == ["sentence_embedding", "last_hidden_state"]
    short = model.model(input_ids=ids[1:, :3]).last_hidden_state.mean(1)
    torch.testing.assert_close(said["sentence_embedding"][1:], short / short.norm(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_encoder_is_the_model_of_transformers(folder: Path) -> None:
    """Its eager attention and constant segments compute what the model computes as users load it."""
    ids, mask = inputs(6, 3)
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    truth = whole(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(encoder(folder, labels=tiny.LABELS)(ids, mask), truth, atol=1e-5, rtol=1e-5)


def test_a_folder_of_a_package_is_found() -> None:
    with pytest.raises(InputError, match="no package nowhere"):
        find_directory("package:nowhere/model")
    with pytest.raises(InputError, match="no config.json in"):
        find_directory("nowhere")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pools(mode: str, other: str, folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    said = {f"pooling_mode_{mode}": True, f"pooling_mode_{other}": False, "word_embedding_dimension": 16}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("kind", "spoil", "arguments", "message"),
    [
        ("SequenceClassification", pickled, {}, "pytorch_model.bin only, which can run code"),
        ("SequenceClassification", gone, {}, r"no \*.safetensors"),
        ("SequenceClassification", None, {"labels": 4}, "has 3 labels, and 4 are wanted"),
        ("SequenceClassification", None, {"labels": ["bad", "card", "good"]}, '"card" is called "good"'),
        ("SequenceClassification", None, {"task": "regression"}, "has 3 labels, and 1 are wanted"),
        ("SequenceClassification", None, {"task": "clasification"}, 'did you mean "classification"'),
        ("Model", None, {}, r"BertModel\) has no trained head for classification: classifier.bias"),
        ("TokenClassification", None, {}, "BertForTokenClassification|no trained head"),
        ("SequenceClassification", {"is_decoder": True}, {}, "not a bidirectional text encoder"),
        ("SequenceClassification", {"model_type": "gpt2"}, {}, "a gpt2 .*text encoder .*models.decoder takes"),
        ("SequenceClassification", {"model_type": "t5"}, {}, "a decoder; .*encoder_decoder takes"),
        ("SequenceClassification", {"model_type": "nothing"}, {}, "no readable config.json"),
        ("SequenceClassification", {"hidden_size": 32}, {}, r"is \[16\] in the file, and \[32\] after its config.json"),
        ("SequenceClassification", {"problem_type": "multi_label_classification"}, {}, "several labels to a text"),
        (
            "Model",
            partial(pools, "cls_token", "mean_tokens"),
            {"task": "embedding"},
            "says pooling_mode_cls_token; only",
        ),
    ],
)
def test_what_is_no_trained_encoder_is_refused(
    tmp_path: Path, kind: str, spoil: Any, arguments: dict[str, Any], message: str
) -> None:
    folder = tiny.directory(tmp_path / "model", kind)
    if callable(spoil):
        spoil(folder)
    elif spoil:
        tiny.change_config(folder, **spoil)
    with pytest.raises(InputError, match=message):
        encoder(folder, **arguments)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    _, config = load(folder, "classification")
    assert positions(config) == 24
    assert len(load_tokenizer(folder, config)) == config.vocab_size
    for other in (12, 18):
        config.vocab_size = other
        with pytest.raises(InputError, match=f"has 17 tokens and the model {other}"):
            load_tokenizer(folder, config)
    config.vocab_size, config.pad_token_id = 17, 3
    with pytest.raises(InputError, match="pads with token 0 and the model with 3"):
        load_tokenizer(folder, config)
    with pytest.raises(InputError, match="no readable tokenizer"):
        load_tokenizer(tmp_path, config)


def test_an_embedding_that_says_it_is_the_mean_is_one(tmp_path: Path) -> None:
    folder = tiny.directory(tmp_path / "model", "Model")
    pools("mean_tokens", "cls_token", folder)
    said = encoder(folder, "embedding")(*inputs(5, 3))
    assert isinstance(said, dict) and said["sentence_embedding"].shape == (2, 16)


# ---- knowledge

TAUGHT = """
[[pass]]
name = "prune"
macs_ratio = 1.8
scope = "per_layer"
floor = 0.4
multiple = 4
ignore = ["model.embeddings"]
[[pass]]
name = "distill"
epochs = 2
learning_rate = 0.01
optimizer = "adamw"
terms = [
    { term = "hidden_cosine", point = "pooling" },
    { term = "similarity_preserving", point = "pooling" },
    { term = "rkd_distance", point = "pooling" },
    { term = "attention_maps", point = "model.encoder.layer.0.attention.self.dropout", mask = "attention_mask" },
    { term = "hidden_cosine", point = "model.encoder.layer.1", mask = "attention_mask" },
]
"""


def test_an_embedding_learns_by_cosines_relations_and_attention(base: Path) -> None:
    """No labels; the heads that are left learn the maps of the teacher's same heads."""
    teacher = encoder(base, "embedding")
    task = text_task(
        directory=base, train={"text": tiny.texts(64)}, evaluation={"text": tiny.texts(16, 1)}, task="embedding",
        batch_size=8,
    )  # fmt: skip
    start = Program(teacher, copy.deepcopy(teacher), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    prune, distill = Recipe.loads(TAUGHT + '[[pass]]\nname = "capture"\n').passes[:2]
    pruned = prune.apply(start, task)
    heads = surviving_channels(pruned, task.example, "model.encoder.layer.0.attention.self.dropout")
    assert heads is not None and len(heads) == 1

    def far(student: torch.nn.Module) -> float:
        with torch.no_grad():
            return float(task.loss(student(*task.example), teacher(*task.example)["sentence_embedding"]).mean())

    before = far(pruned.student)
    assert far(distill.apply(pruned, task).student) < 0.7 * before


def test_the_default_recipe_asks_for_what_a_task_has(base: Path, folder: Path) -> None:
    rows = {"text": tiny.texts(20), "label": [i % 3 for i in range(20)]}
    made = partial(text_task, train=rows, evaluation=rows, batch_size=4)

    def terms(teacher: Encoder, task: Task) -> list[tuple[str, float]]:
        return [(t.term, t.weight) for t in fit_recipe(Recipe.default(), teacher, task).passes[1].terms]  # type: ignore

    usual = [("cross_entropy", 0.1), ("kl", 0.9)]
    labelled = made(directory=folder)
    assert terms(encoder(folder), labelled) == usual
    assert isinstance(labelled.train, TextData)
    labelled.train._targets = None
    assert terms(encoder(folder), labelled) == usual[1:]
    assert terms(encoder(base, "embedding"), made(directory=base, task="embedding")) == [("logit_mse", 8.0)]


# ---- out


def test_the_configuration_says_the_students_sizes(folder: Path) -> None:
    """One layer less, and units less than before: as `transformers` reads them."""
    student = encoder(folder)
    assert json.loads(HubFiles(folder, "classification")(student)["config.json"])["num_hidden_layers"] == 2
    inner: Any = student.model
    inner.bert.encoder.layer = inner.bert.encoder.layer[1:]
    layer = inner.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
    for name in ("query", "key", "value"):
        setattr(layer.attention.self, name, torch.nn.Linear(16, 8))
    files = HubFiles(folder, "classification")(student)
    said = json.loads(files["config.json"])
    assert (said["num_hidden_layers"], said["num_attention_heads"], said["intermediate_size"]) == (1, 1, 24)
    assert said["id2label"] == {"0": "bad", "1": "good", "2": "card"} and "pqk" not in said
    assert {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"} <= files.keys()
    assert files["vocab.txt"] == (folder / "vocab.txt").read_bytes()


def test_layers_of_several_widths_are_all_said(folder: Path) -> None:
    student = encoder(folder)
    inner: Any = student.model
    inner.bert.encoder.layer[1].intermediate.dense = torch.nn.Linear(16, 8)
    said = json.loads(HubFiles(folder, "classification")(student)["config.json"])
    assert said["intermediate_size"] == 32
    assert said["pqk"]["layers"] == [{"heads": 2, "intermediate": 32}, {"heads": 2, "intermediate": 8}]


def compiled(folder: Path, kind: str, out: Path) -> tuple[Encoder, Artifact]:
    rows = tiny.texts(48)
    teacher = encoder(folder, kind)
    label = [i % 3 for i in range(48)]
    table = {"text": rows, "label": label}
    task = text_task(directory=folder, train=None, validation=table, evaluation=table, task=kind, batch_size=8)
    return teacher, compress(teacher, task, PTQ, "x86-avx2", out, evaluation=replace(TABLE, baselines=()))


@pytest.fixture
def optimum() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("optimum.onnxruntime")


def quietly(call: Callable[[], Any]) -> Any:
    """Third parties deprecate themselves when they are called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def test_an_artifact_is_a_directory_that_optimum_loads(folder: Path, tmp_path: Path, optimum: Any) -> None:
    teacher, artifact = compiled(folder, "classification", tmp_path / "out")
    assert artifact.manifest["inputs"][0]["shape"] == ["batch", "sequence"]
    assert artifact.manifest["outputs"] == [{"name": "logits", "shape": ["batch", 3], "dtype": "float32"}]
    assert {"config.json", "tokenizer.json", "vocab.txt"} <= artifact.manifest["files"].keys()
    assert [p.name for p in artifact.folder.glob("*.onnx")] == ["model.onnx"]
    model = quietly(lambda: optimum.ORTModelForSequenceClassification.from_pretrained(artifact.folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.folder)
    rows = tiny.texts(12, seed=5)
    pipe = quietly(lambda: transformers.pipeline("text-classification", model=model, tokenizer=tokenizer))
    said = quietly(lambda: pipe(rows, batch_size=4))
    with torch.no_grad():
        truth = teacher(
            *(tokenizer(rows, padding=True, return_tensors="pt")[n] for n in ("input_ids", "attention_mask"))
        )
    agree = [s["label"] == tiny.LABELS[i] for s, i in zip(said, truth.argmax(1).tolist(), strict=True)]
    assert sum(agree) >= 10
    (artifact.folder / "vocab.txt").write_text("other")
    with pytest.raises(InputError, match=r"vocab.txt was changed"):
        Artifact.load(artifact.folder)


@pytest.mark.full  # a classifier goes the same way in every run
def test_an_embedding_artifact_serves_feature_extraction(base: Path, tmp_path: Path, optimum: Any) -> None:
    _, artifact = compiled(base, "embedding", tmp_path / "out")
    shapes = {o["name"]: o["shape"] for o in artifact.manifest["outputs"]}
    assert shapes == {"sentence_embedding": ["batch", 16], "last_hidden_state": ["batch", "sequence", 16]}
    model = quietly(lambda: optimum.ORTModelForFeatureExtraction.from_pretrained(artifact.folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(artifact.folder)
    pipe = quietly(lambda: transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer))
    (states,) = quietly(lambda: pipe("good film", return_tensors=True))
    assert states.shape == (4, 16)
    ours = artifact.run(*(tokenizer(["good film"], return_tensors="pt")[n] for n in ("input_ids", "attention_mask")))
    mean = states.mean(0) / states.mean(0).norm()
    torch.testing.assert_close(mean, torch.from_numpy(ours["sentence_embedding"])[0], atol=1e-4, rtol=0)
