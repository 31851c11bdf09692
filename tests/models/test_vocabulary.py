"""Fewer tokens: the same split and the same answers for the texts that were counted, a tokenizer that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_models as tiny
import torch

from pqk.errors import InputError
from pqk.models.encoder import encoder
from pqk.models.hub import load_tokenizer, quietly
from pqk.models.vocabulary import trim_vocabulary

pytest.importorskip("transformers")

SEEN = ["my card is lost", "a good film"]


def test_the_texts_that_were_counted_are_split_and_answered_as_before(tmp_path: Path) -> None:
    whole, out = tiny.directory(tmp_path / "whole"), tmp_path / "small"
    kept = trim_vocabulary(whole, out, SEEN)
    words = [tiny.WORDS[i] for i in kept]
    assert set(words) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(SEEN).split()}
    assert words == sorted(words, key=tiny.WORDS.index), "the order stays"
    with quietly() as transformers:
        config = transformers.AutoConfig.from_pretrained(out)
    before = load_tokenizer(whole, config_of(whole))
    after = load_tokenizer(out, config)
    assert config.vocab_size == len(kept) == len(after) and config.pad_token_id == after.pad_token_id == 0
    for text in SEEN:
        assert [kept[i] for i in after(text)["input_ids"]] == before(text)["input_ids"]
    assert after.tokenize("a bad film") == ["a", "[UNK]", "film"]
    given = [t(SEEN, padding=True, return_tensors="pt") for t in (before, after)]
    with torch.no_grad():
        said = [
            encoder(folder)(x["input_ids"], x["attention_mask"]) for folder, x in zip((whole, out), given, strict=True)
        ]
    assert torch.equal(said[0], said[1])


def config_of(folder: Path) -> object:
    with quietly() as transformers:
        return transformers.AutoConfig.from_pretrained(folder)


def test_ids_in_every_file_are_the_new_ones(tmp_path: Path) -> None:
    """[MASK] comes after a token that goes: its id changes wherever it stands."""
    whole, out = tiny.directory(tmp_path / "whole"), tmp_path / "small"
    path = whole / "tokenizer.json"
    said = json.loads(path.read_text())
    said["added_tokens"].append({**said["added_tokens"][-1], "id": 16, "content": "very"})
    path.write_text(json.dumps(said))
    kept = trim_vocabulary(whole, out, ["a"])
    new = json.loads((out / "tokenizer.json").read_text())
    assert {t["content"]: t["id"] for t in new["added_tokens"]}["very"] == kept.index(16) == len(kept) - 1
    assert new["model"]["vocab"]["very"] == len(kept) - 1
    assert (out / "vocab.txt").read_text().split("\n")[len(kept) - 1] == "very"


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    whole = tiny.directory(tmp_path / "whole")
    with pytest.raises(InputError, match="is there already"):
        trim_vocabulary(whole, whole, SEEN)
    path = whole / "tokenizer.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"model": {"type": "WordLevel"}}))
    with pytest.raises(InputError, match="is WordLevel; WordPiece, BPE and Unigram tokenizers can lose tokens"):
        trim_vocabulary(whole, tmp_path / "out", SEEN)
    path.unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        trim_vocabulary(whole, tmp_path / "out", SEEN)
    assert not (tmp_path / "out").exists()
