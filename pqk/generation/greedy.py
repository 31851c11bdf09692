"""The likeliest continuation of a text, token by token, and where the texts of a model end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqk.core.steps import KeyValues
from pqk.files import read_json
from pqk.models.decoder_files import CONFIG, GENERATION, token_ids

Step = Callable[[Sequence[int], KeyValues, int], tuple[NDArray[np.float32], KeyValues]]
"""(new tokens, what is kept, how many tokens there are with the new ones) -> scores [S, V], and what is kept of all"""


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "begin_suppress_tokens": ([],),
    "forced_eos_token_id": (),
    "sequence_bias": ({},),
    "num_beams": (1,),
}
"""settings of generation_config.json that would change a text and are not applied here -> values that change nothing,
as null does"""


@dataclass(frozen=True)
class Limits:
    """Where the texts of a model begin and end, and what is not in them."""

    ends: frozenset[int] = frozenset()
    """the tokens that end them"""
    begin: int | None = None
    """the token that the targets of an encoder-decoder begin with"""
    forced: int | None = None
    """the one after it, such as a target's language"""
    forbidden: tuple[int, ...] = ()
    """tokens that are never chosen"""
    longest: int = 2**31
    """positions: prompt and continuation have so many tokens at most"""
    left_out: tuple[str, ...] = ()
    """what the configuration says besides of how tokens are chosen, such as "num_beams = 4", and nobody here does"""

    @staticmethod
    def of(folder: Path) -> Limits:
        """What the configuration of a directory says. Raises `InputError` where it is missing or not readable."""
        config = read_json(folder / CONFIG)
        said = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else config
        ends = said.get("eos_token_id", config.get("eos_token_id"))
        longest = config.get("max_position_embeddings") or config.get("n_positions") or Limits.longest
        banned = said.get("bad_words_ids") or ()
        one_token = [tokens[0] for tokens in banned if len(tokens) == 1]
        left_out = {k: said[k] for k, same in NEUTRAL.items() if said.get(k) is not None and said[k] not in same}
        if several := [tokens for tokens in banned if len(tokens) > 1]:
            left_out["bad_words_ids"] = several
        return Limits(
            ends=token_ids(ends),
            begin=said.get("decoder_start_token_id", config.get("decoder_start_token_id")),
            forced=said.get("forced_bos_token_id"),
            forbidden=(*one_token, *(said.get("suppress_tokens") or ())),
            longest=longest,
            left_out=tuple(f"{name} = {json.dumps(value)}" for name, value in left_out.items()),
        )

    def allowed(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores [V] without those of tokens that are never chosen."""
        if self.forbidden:
            scores = scores.copy()
            scores[[t for t in self.forbidden if 0 <= t < len(scores)]] = -np.inf
        return scores


def likeliest(
    step: Step, empty: KeyValues, prompt: Sequence[int], count: int, limits: Limits
) -> tuple[list[int], NDArray[np.float32]]:
    """The likeliest tokens after `prompt`, each after those before: up to `count`, or to the token that ends texts.

    With them their scores, float32 [T, V]. `step` is a `Steps`, or runs one, and `empty` what it begins with.
    """
    found: list[int] = []
    rows: list[NDArray[np.float32]] = []
    new, kept, total = list(prompt), empty, 0
    most = min(count, limits.longest - len(prompt))
    while len(found) < most and not (found and found[-1] in limits.ends):
        total += len(new)
        scores, kept = step(new, kept, total)
        rows.append(scores[-1])
        new = [int(limits.allowed(scores[-1]).argmax())]
        found += new
    return found, np.stack(rows)
