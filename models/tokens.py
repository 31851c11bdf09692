"""Which tokens of a tokenizer must stay for others to be found, and its document without the rest.

A tokenizer.json says how text is split: WordPiece takes the longest token that fits, Unigram the likeliest split, and
byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) puts two tokens together, the earliest merge first. What is
kept here is closed: a text whose tokens all stay is split into them again, and every other text into others of them,
down to characters or bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

from pqk.errors import InputError

CONTINUES = "##"
"""what WordPiece puts before a token that goes on with a word"""
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""tokens that stand for a byte of a character that is no token"""
SPACE = "▁"
"""what stands for a space, which decoders put back before they read bytes"""
SPLITS = ("continuing_subword_prefix", "end_of_word_suffix")
KINDS = "WordPiece, BPE and Unigram tokenizers can lose tokens"


class TokenizerDocument:
    """The tokens of a tokenizer.json.

    Raises `InputError` for one that splits in another way than those known here; `where` names it in messages.
    """

    def __init__(self, document: dict[str, Any], where: object) -> None:
        self.document, self.model = document, document["model"]
        self.kind = self.model.get("type")
        if self.kind not in ("WordPiece", "BPE", "Unigram"):
            raise InputError(f"vocabulary: the tokenizer in {where} is {self.kind}; {KINDS}")
        affixes = [name for name in SPLITS if self.kind == "BPE" and self.model.get(name)]
        if affixes:
            raise InputError(
                f"vocabulary: the tokenizer in {where} is BPE with a {affixes[0]}, whose merges are not followed here; "
                f"{KINDS}, BPE without it"
            )
        vocabulary = self.model["vocab"]
        if self.kind == "Unigram":
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        self.ids: dict[str, int] = dict(vocabulary)
        self.names = {i: token for token, i in self.ids.items()}
        merges = [m.split(" ") if isinstance(m, str) else m for m in self.model.get("merges", ())]
        self.ranks = {(one, other): rank for rank, (one, other) in enumerate(merges)}

    @property
    def always(self) -> set[int]:
        """The ids that every text needs: added tokens, the unknown one, and what any character is split into."""
        kept = {t["id"] for t in self.document["added_tokens"]}
        if self.model.get("unk_token") in self.ids:
            kept.add(self.ids[self.model["unk_token"]])
        if self.model.get("unk_id") is not None:
            kept.add(self.model["unk_id"])
        return kept | {i for token, i in self.ids.items() if self._is_basic(token)}

    def _is_basic(self, token: str) -> bool:
        if self.kind == "WordPiece":
            return len(token.removeprefix(CONTINUES)) <= 1
        if self.model.get("byte_fallback") and all(f"<0x{b:02X}>" in self.ids for b in range(256)):
            return token == SPACE or BYTE.fullmatch(token) is not None
        return len(token) == 1

    def needed(self, token: int) -> set[int]:
        """The ids that a token is put together from, itself among them; those of an added token are only its own."""
        if self.kind != "BPE" or token not in self.names:
            return {token}
        parts = [*self.names[token]]
        if any(part not in self.ids for part in parts):
            return {token}
        needed = {token, *(self.ids[part] for part in parts)}
        while pairs := [(self.ranks[p], i) for i, p in enumerate(pairwise(parts)) if p in self.ranks]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            needed.add(self.ids[parts[i]])
        return needed

    def kept(self, counts: Mapping[int, int], enough: Callable[[int, int], bool]) -> list[int]:
        """The ids that stay, ascending: those of `always`, and the most frequent ones with what they need.

        Args:
            counts: how often each token occurs.
            enough: (tokens with the next one, its count) -> whether to leave off before it.
        """
        kept = self.always
        for token in sorted((t for t, count in counts.items() if count), key=lambda t: (-counts[t], t)):
            more = kept | self.needed(token)
            if enough(len(more), counts[token]):
                break
            kept = more
        return sorted(kept)

    def reduced(self, kept: Iterable[int]) -> dict[str, Any]:
        """The document with these tokens alone, numbered in their order."""
        new = {old: i for i, old in enumerate(kept)}
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
            unknown = model.get("unk_id")
            model["unk_id"] = None if unknown is None else new[unknown]
        else:
            model["vocab"] = {token: new[i] for token, i in self.ids.items() if i in new}
        if self.kind == "BPE":
            left = [p for p in self.ranks if all(part in model["vocab"] for part in (*p, "".join(p)))]
            spaced = any(isinstance(m, str) for m in self.model["merges"])
            model["merges"] = [" ".join(pair) if spaced else [*pair] for pair in left]
        document = {**self.document, "model": model}
        for part in ("added_tokens", "post_processor", "padding"):
            document[part] = renumbered(document.get(part), new)
        return document


def renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """A part of tokenizer.json with the ids in it replaced: under `id`, `ids`, `pad_id`, and in pairs (token, id)."""
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int
        return [part[0], new[part[1]]] if pair else [renumbered(p, new) for p in part]
    if not isinstance(part, dict):
        return part
    return {key: _number(key, value, new) for key, value in part.items()}


def _number(key: str, value: Any, new: Mapping[int, int]) -> Any:
    if key in ("id", "pad_id") and type(value) is int:
        return new[value]
    return [new[i] for i in value] if key == "ids" else renumbered(value, new)


def renumbered_settings(settings: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config.json or generation_config.json under the new ids: of `…_token_id`, and of lists of tokens to suppress.

    What is gone is no longer suppressed, and no id of anything is left for it.
    """

    def number(key: str, value: Any) -> Any:
        named = key.endswith(("_token_id", "_token_ids", "suppress_tokens"))
        if named and isinstance(value, list):
            return [new[i] for i in value if i in new]
        return new.get(value) if named and type(value) is int else value

    return {key: number(key, value) for key, value in settings.items()}
