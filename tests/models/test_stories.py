"""The Llama of 260 thousand parameters as a directory: the numbers and the tokens of its own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pqk.errors import InputError
from pqk.models.decoder import decoder
from pqk.models.language import language_task
from pqk.models.stories import halves, tokenizer, write_stories

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def merged(text: str, pieces: list[str], scores: list[float]) -> list[int]:
    """Tokens as llama2.c finds them: again and again the neighbours whose piece has the highest score are joined."""
    ids = {piece: i for i, piece in reversed([*enumerate(pieces)])}
    found = []
    for letter in f" {text}":
        known = ids.get(letter, 0) >= 259
        found += [ids[letter]] if known else [byte + 3 for byte in letter.encode()]
    while True:
        pairs = [
            (scores[i], -at)
            for at in range(len(found) - 1)
            if (i := ids.get(pieces[found[at]] + pieces[found[at + 1]], 0)) >= 259
        ]
        if not pairs:
            return found
        at = -max(pairs)[1]
        found[at : at + 2] = [ids[pieces[found[at]] + pieces[found[at + 1]]]]


@pytest.mark.parametrize("text", ["Once upon a time", "a  b", "it's 7 o'clock, Zoë — née 木", "\n\nx", ""])
def test_tokens_are_those_of_the_pieces_and_their_scores(data_file: Callable[[str], Path], text: str) -> None:
    said = json.loads(data_file("stories260k_tokenizer.json").read_text())
    found = tokenizer(said["pieces"], said["scores"]).encode(text)
    if text:
        assert found.ids == [1, *merged(text, said["pieces"], said["scores"])]
    assert tokenizer(said["pieces"], said["scores"]).decode(found.ids).removeprefix("<s>").removeprefix(" ") == text


def test_rotary_pairs_move_half_a_head_apart() -> None:
    weight = torch.arange(8.0)[:, None].expand(8, 3)
    assert halves(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@torch.no_grad()
def test_it_tells_stories(data_file: Callable[[str], Path], tmp_path: Path) -> None:
    """What it was trained for: 1.27 nats for each of its tokens on stories that it may not have seen."""
    folder = write_stories(tmp_path / "stories", data_file("stories260k.safetensors").parent)
    lines = data_file("tinystories.jsonl").read_text().splitlines()[-8:]
    texts = {"text": [json.loads(line)["text"] for line in lines]}
    task = language_task(directory=folder, train=None, evaluation=texts, validation=texts, max_length=128)
    assert -1.45 < task.score(decoder(folder), task.evaluation) < -1.15


def test_a_folder_without_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQK_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no stories260k\.safetensors beside stories260k_tokenizer\.json"):
        write_stories(tmp_path / "out", tmp_path)
