"""Fewer tokens of a tokenizer: the same splits of what uses kept ones, and every other text still has one."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from small_languages import KINDS, SENTENCES, directory

from pqk.errors import InputError
from pqk.models.decoder import decoder, decoder_config
from pqk.models.hub import load_tokenizer
from pqk.models.tokens import TokenizerDocument
from pqk.models.vocabulary import TokenChoice, trim_vocabulary

COUNTED = ["the cat sat on the mat", "once there was a garden", "the dog understands"]
OTHER = ["brightly understanding Zoë's café", "混ぜる 🙂\tand\nlines", "zzz QQQ ~ <call> x"]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_are_split_as_before_and_others_come_back_whole(kind: str, tmp_path: Path) -> None:
    whole, out = directory(tmp_path / "whole", kind), tmp_path / "small"
    kept = trim_vocabulary(whole, out, COUNTED)
    before, after = (load_tokenizer(f, decoder_config(f)) for f in (whole, out))
    assert kept == sorted(kept) and len(after) == len(kept) < 0.95 * len(before)
    counted = 0
    for text in (*COUNTED, *(word for s in SENTENCES[:7] for word in s.split())):
        ids = before(text)["input_ids"]
        if {*ids} <= {*kept}:
            counted += 1
            assert [kept[i] for i in after(text)["input_ids"]] == ids
    assert counted > len(COUNTED) + 3, "words of kept tokens, too"
    for text in (*OTHER, *SENTENCES[:7]):
        ids = after(text)["input_ids"]
        said = [t.decode(t(text)["input_ids"], skip_special_tokens=True) for t in (before, after)]
        assert said[0] == said[1] and (said[1] == text or "<call>" in text)
        assert after.pad_token_id not in ids, "nothing is unknown"
    assert after("<call>")["input_ids"][-1] == after.convert_tokens_to_ids("<call>") == len(kept) - 1
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_of_kept_tokens_are_those_of_the_whole_model(tied: bool, tmp_path: Path) -> None:
    whole, out = directory(tmp_path / "whole", tied=tied), tmp_path / "small"
    kept = trim_vocabulary(whole, out, COUNTED)
    models = [decoder(f) for f in (whole, out)]
    after = load_tokenizer(out, decoder_config(out))
    for text in COUNTED:
        ids = torch.tensor([after(text)["input_ids"]])
        with torch.no_grad():
            want = models[0](torch.tensor(kept)[ids], torch.ones_like(ids))[..., kept]
            assert torch.equal(models[1](ids, torch.ones_like(ids)), want)
    assert models[1].model.config.vocab_size == len(kept)


def test_a_token_is_kept_with_what_it_is_put_together_from() -> None:
    """By hand: "abc" is a, bc; bc is b, c; "ab" comes too late to be on the way."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "a", "b", "c", "bc", "abc", "ab", "d", "dd"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["b c", "a bc", "a b", "d d"], "byte_fallback": False}
    tokens = TokenizerDocument({"model": model | {"unk_token": "<unk>"}, "added_tokens": []}, "here")
    assert tokens.needed(vocabulary["abc"]) == {vocabulary[t] for t in ("a", "b", "c", "bc", "abc")}
    assert tokens.always == {vocabulary[t] for t in ("<unk>", "a", "b", "c", "d")}, "without bytes, all characters"
    kept = TokenChoice(min_count=2).of(tokens, {vocabulary["abc"]: 3, vocabulary["dd"]: 1})
    left = tokens.reduced(kept)["model"]
    assert left["merges"] == ["b c", "a bc"] and [*left["vocab"]] == ["<unk>", "a", "b", "c", "bc", "abc", "d"]
    assert [*left["vocab"].values()] == [*range(7)]


def test_how_many_are_kept_is_said_in_three_ways() -> None:
    vocabulary = {chr(97 + i): i for i in range(4)} | {"xx": 4, "yy": 5, "zz": 6, "x": 7, "y": 8, "z": 9}
    merges = [["x", "x"], ["y", "y"], ["z", "z"]]
    tokens = TokenizerDocument(
        {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}, "added_tokens": []}, "here"
    )
    counts = {4: 50, 5: 30, 6: 20}
    kept = [
        {*TokenChoice(**c).of(tokens, counts)} - tokens.always for c in ({"size": 8}, {"share": 0.6}, {"min_count": 30})
    ]
    assert kept == [{4}, {4, 5}, {4, 5}]
    with pytest.raises(InputError, match="size = 6: 7 tokens stay in any case"):
        TokenChoice(size=6).of(tokens, counts)
    with pytest.raises(InputError, match="one of size, share and min_count"):
        TokenChoice(size=6, share=0.5)


def test_ids_in_settings_are_the_new_ones(tmp_path: Path) -> None:
    whole, out = directory(tmp_path / "whole", "byte level"), tmp_path / "small"
    last = len(json.loads((whole / "tokenizer.json").read_text())["model"]["vocab"])
    generation = {"eos_token_id": [2, last], "suppress_tokens": [last, last - 1], "bos_token_id": 1, "top_k": last}
    (whole / "generation_config.json").write_text(json.dumps(generation))
    kept = trim_vocabulary(whole, out, ["cat"])
    new = len(kept) - 1
    said = json.loads((out / "generation_config.json").read_text())
    assert said == {"eos_token_id": [2, new], "suppress_tokens": [new], "bos_token_id": 1, "top_k": last}
    added = json.loads((out / "tokenizer.json").read_text())["added_tokens"]
    assert [t["id"] for t in added] == [0, 1, 2, new] and last - 1 not in kept


def test_splits_of_another_kind_are_refused() -> None:
    with pytest.raises(InputError, match="is WordLevel; WordPiece, BPE and Unigram"):
        TokenizerDocument({"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}, "here")
    with pytest.raises(InputError, match="BPE with a end_of_word_suffix"):
        TokenizerDocument(
            {"model": {"type": "BPE", "vocab": {}, "end_of_word_suffix": "</w>"}, "added_tokens": []}, "here"
        )


def test_every_token_stays_reachable() -> None:
    """Of each kept token of all kinds, what it is put together from is kept."""
    for kind in ("byte level", "with bytes"):
        document = json.loads(KINDS[kind]().to_str())
        tokens = TokenizerDocument(document, kind)
        kept = {*TokenChoice(size=len(tokens.always) + 40).of(tokens, dict.fromkeys(tokens.names, 1))}
        assert kept == {*chain.from_iterable(tokens.needed(i) for i in kept)}
