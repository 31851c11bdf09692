"""Directories of other families than BERT, as `transformers` saves them: through `encoder`, tokenizer, and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, TEXT, Family

from pqk.models.encoder import SHIFTED, HubFiles, encoder, load, positions
from pqk.models.hub import load_tokenizer
from pqk.models.text import text_task

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

WORDS = ("<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(92)))
"""token 1 is padding in the configurations of the families"""
TEXTS = ("distilbert", "roberta", "electra", "albert", "mobilebert", "mpnet", "deberta-v2")
SIZES = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "n_layers", "n_heads", "hidden_dim")


def save(family: Family, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>",
    )  # fmt: skip
    fast.save_pretrained(folder)
    teacher: Any = family.teacher()
    teacher.model.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module", params=TEXTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, save(FAMILIES[request.param], tmp_path_factory.mktemp(request.param))


def test_an_encoder_answers_as_its_users_load_it(saved: tuple[str, Path]) -> None:
    name, folder = saved
    ids, mask = FAMILIES[name].sample(8)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    ours = encoder(folder)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, mask), want, rtol=1e-4, atol=1e-5)
        length = int(mask[0].sum())
        alone = ours(ids[:1, :length], mask[:1, :length])
    torch.testing.assert_close(alone, want[:1], rtol=1e-4, atol=1e-5)


def test_its_positions_are_those_that_it_has(saved: tuple[str, Path]) -> None:
    """One token more is an error of the model, where its positions are a table."""
    name, folder = saved
    model, config = load(folder, "classification")
    most = positions(config)
    ids = torch.full((1, most + 1), 5)
    with torch.no_grad():
        assert model(input_ids=ids[:, :most]).logits.isfinite().all()
        if name == "deberta-v2":  # counts distances, of any length
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids)


@pytest.mark.parametrize("kind", SHIFTED)
def test_positions_behind_the_padding_token_are_fewer(kind: str) -> None:
    more = {"languages": ["en_XX"], "default_language": "en_XX"} if kind == "xmod" else {}
    settings = TEXT | more | {"num_hidden_layers": 1}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **settings)).eval()
    most = positions(model.config)
    assert most == TEXT["max_position_embeddings"] - 2
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


def test_its_texts_are_cut_to_its_positions(saved: tuple[str, Path]) -> None:
    name, folder = saved
    _, config = load(folder, "classification")
    assert len(load_tokenizer(folder, config)) == config.vocab_size
    rows = {"text": ["w1 w2", " ".join(["w3"] * 60), "w4"] * 8, "label": [0, 1, 2] * 8}
    task = text_task(directory=folder, train=rows, evaluation=rows, batch_size=4)
    assert max(int(batch.inputs[1].sum(1).max()) for batch in task.evaluation.batches()) == positions(config), name


def test_its_configuration_keeps_its_own_words(saved: tuple[str, Path]) -> None:
    _, folder = saved
    files = HubFiles(folder, "classification")(encoder(folder))
    before, after = json.loads((folder / "config.json").read_text()), json.loads(files["config.json"])
    assert {k: after.get(k) for k in SIZES} == {k: before.get(k) for k in SIZES}
    assert after["architectures"] == before["architectures"] and "tokenizer.json" in files
