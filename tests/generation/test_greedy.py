"""What a directory's configuration says of texts: where they end, what is not in them, and what is not done of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pqk.generation.greedy import Limits, likeliest

CONFIG = {"max_position_embeddings": 9, "eos_token_id": 5}


def limits(folder: Path, **said: Any) -> Limits:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(said))
    return Limits.of(folder)


def counting(new: Sequence[int], kept: Any, total: int) -> tuple[Any, Any]:
    """Scores of ten tokens, of which the one after the last is the likeliest, and the next one follows it."""
    scores = np.zeros((len(new), 10), np.float32)
    scores[-1, [(new[-1] + 1) % 10, (new[-1] + 2) % 10]] = (2, 1)
    return scores, kept


def test_what_is_forbidden_is_not_in_a_text(tmp_path: Path) -> None:
    """A token that the model does not have is forbidden in vain, as in transformers."""
    said = limits(tmp_path, bad_words_ids=[[3]], suppress_tokens=[4, 1000, -1])
    assert likeliest(counting, {}, [0], 20, Limits())[0] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    tokens, scores = likeliest(counting, {}, [1], 20, said)
    assert tokens == [2, 0, 1, 2, 0, 1, 2, 0] and said.ends == {5}  # up to the last of nine positions
    assert scores.max() == 2 and np.isfinite(scores).all()  # those of the model


@pytest.mark.parametrize(
    ("said", "left_out"),
    [
        ({}, ()),
        ({"num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "forced_eos_token_id": None}, ()),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, ("no_repeat_ngram_size = 3", "num_beams = 4")),
        ({"begin_suppress_tokens": [220]}, ("begin_suppress_tokens = [220]",)),
        ({"forced_eos_token_id": 2}, ("forced_eos_token_id = 2",)),
        ({"bad_words_ids": [[3], [4, 5]]}, ("bad_words_ids = [[4, 5]]",)),
    ],
)  # fmt: skip
def test_what_is_not_done_is_said(tmp_path: Path, said: dict[str, Any], left_out: tuple[str, ...]) -> None:
    assert limits(tmp_path, **said).left_out == left_out
