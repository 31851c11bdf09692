"""Texts as tokens: what a tokenizer puts around them, and what of a text the tokens of its prompt are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any


def appended(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts behind a text, such as the one that ends texts."""
    for probe in ("a", *tokenizer.get_vocab()):  # a tokenizer of few letters may have no token for "a"
        special = tokenizer(probe, return_special_tokens_mask=True, verbose=False)["special_tokens_mask"]
        if 0 in special:
            return int(special[::-1].index(0))
    return 0


def open_tokens(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The tokens of texts that go on: with the special tokens that stand before a text, and none behind it.

    Args:
        tokenizer: one of `transformers`.
        texts: what is tokenized.
        special: False: the texts have all special tokens in themselves, as those of chat templates have.
    """
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    behind = appended(tokenizer) if special else 0
    return [list(tokens[: len(tokens) - behind]) for tokens in found]


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many tokens, or characters, two texts begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
