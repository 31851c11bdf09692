"""A text model with the tokens that its texts use: the same answers to them from a table a fraction as large.

    python -m pqk.models.vocabulary out/teacher --texts banking77_train.tsv --out out/teacher_small [--data DATA]

The result is a Hugging Face directory, to be compressed as any other. Half of MiniLM's weights, and nine tenths of a
small student's file, are the rows of its 30,522 tokens; a task's texts use a tenth of them. Of a causal model the head
goes with the table: its scores of the tokens that stay are those of the whole model.

Kept are the tokens of the texts, or the most frequent of them, special tokens, and what every other word is spelled
with (`pqk.models.tokens`): single characters, or bytes. So texts whose tokens are all kept are split as before. Other
texts may be split finer: hold the metric on texts that were not counted against it, per character.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pqk.errors import InputError
from pqk.models.hub import find_directory, quietly
from pqk.models.text_data import read_table, strings
from pqk.models.tokens import TokenizerDocument, renumbered_settings

log = logging.getLogger(__name__)

TOKENIZER, SETTINGS = "tokenizer.json", ("config.json", "generation_config.json")
TABLES = (
    "word_embeddings.weight", "embed_tokens.weight", "wte.weight", "embed_in.weight", "tok_embeddings.weight",
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "embed_out.bias",
)  # fmt: skip
"""how the tables of tokens, and the heads that score them, are called"""
BESIDE = ("special_tokens_map.json", "chat_template.jinja")
"""files without ids, which stay as they are"""


@dataclass(frozen=True)
class TokenChoice:
    """Which of the tokens that occur stay. Exactly one is given."""

    size: int | None = None
    """so many tokens in all, at most, the most frequent"""
    share: float | None = None
    """those that make up this share of all that occur, the most frequent"""
    min_count: int | None = None
    """those that occur so often"""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.size, self.share, self.min_count)) != 1:
            raise InputError("vocabulary: give one of size, share and min_count, which say what tokens stay")
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"vocabulary: share = {self.share} is none of what occurs; it is above 0 and at most 1")

    def of(self, tokens: TokenizerDocument, counts: Mapping[int, int]) -> list[int]:
        """The ids that stay, ascending. Raises `InputError` where more must than may."""
        covered, total, always = 0, sum(counts.values()), len(tokens.always)
        if self.size is not None and always > self.size:
            raise InputError(
                f"vocabulary: size = {self.size}: {always} tokens stay in any case, special ones and what every text "
                "is spelled with"
            )

        def enough(count: int, occurs: int) -> bool:
            nonlocal covered
            done = self.share is not None and covered >= self.share * total
            covered += occurs
            return done or (self.size is not None and count > self.size) or occurs < (self.min_count or 1)

        return tokens.kept(counts, enough)


ALL = TokenChoice(min_count=1)


def trim_vocabulary(
    directory: str | Path, out: Path, texts: Iterable[str], data: Path | None = None, choice: TokenChoice = ALL
) -> list[int]:
    """Write the model in `directory` with tokens of `texts` only to `out`, whole or not at all.

    Args:
        directory: an encoder's or a causal model's, with its tokenizer.json.
        out: the folder to write.
        texts: what tokens are counted in.
        data: a folder that `directory` is looked up in, beside the current one.
        choice: which tokens stay; all that occur by default.

    Returns:
        The old ids in the order of the new ones, which is that of the old.

    Raises:
        InputError: `out` exists, the tokenizer cannot lose tokens, or the model has no table of its tokens.
    """
    if out.exists():
        raise InputError(f"vocabulary: {out} is there already; choose another folder")
    folder = find_directory(directory, data)
    tokens, config = read_tokens(folder), json.loads((folder / "config.json").read_text())
    kept = choice.of(tokens, count_tokens(folder, texts))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_tables(folder, partial, kept, config["vocab_size"])
        write_texts(folder, partial, tokens, kept)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%d of %d tokens are left", len(kept), config["vocab_size"])
    return kept


def count_tokens(folder: Path, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs in texts."""
    with quietly() as transformers:
        reader = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        sequences = reader(list(texts), truncation=False, verbose=False)["input_ids"]
    return Counter(token for sequence in sequences for token in sequence)


def read_tokens(folder: Path) -> TokenizerDocument:
    """The tokens of the tokenizer in a folder. Raises `InputError` where there is none that can lose some."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise InputError(f"vocabulary: {folder} has no {TOKENIZER}; save its fast tokenizer with save_pretrained")
    return TokenizerDocument(json.loads(path.read_text()), folder)


def write_tables(folder: Path, out: Path, kept: Sequence[int], words: int) -> None:
    """Every safetensors file, with the rows of `kept` only in the tables of tokens."""
    tables = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, value in tensors.items():
            if name.endswith(TABLES) and len(value) == words:
                tensors[name], tables = value[torch.tensor(kept)].contiguous(), tables + 1
        save_file(tensors, out / path.name, {"format": "pt"})
    if not tables:
        raise InputError(
            f"vocabulary: none of {', '.join(TABLES)} in the safetensors files of {folder} has {words} rows"
        )


def write_texts(folder: Path, out: Path, tokens: TokenizerDocument, kept: Sequence[int]) -> None:
    """The configurations and tokenizer files of a folder, under the new ids; not what only older readers take."""
    new = {old: i for i, old in enumerate(kept)}
    for name in SETTINGS:
        if (folder / name).is_file():
            settings = renumbered_settings(json.loads((folder / name).read_text()), new)
            sizes = {"vocab_size": len(kept)} if "vocab_size" in settings else {}
            _write_json(out / name, settings | sizes)
    document = tokens.reduced(kept)
    _write_json(out / TOKENIZER, document)
    if tokens.kind == "WordPiece":
        vocabulary = document["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        (out / "vocab.txt").write_text("".join(f"{token}\n" for token in names))
    if (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {str(new[int(i)]): t for i, t in config["added_tokens_decoder"].items()}
        _write_json(out / "tokenizer_config.json", config)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pqk.models.vocabulary", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", help="the model to start from")
    parser.add_argument("--texts", nargs="+", required=True, help=".tsv or .jsonl files whose texts are counted")
    parser.add_argument("--text", default="text", help="the name of their column")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=Path, help="the folder with the texts")
    several = parser.add_mutually_exclusive_group()
    several.add_argument("--size", type=int, help="keep so many tokens in all, at most, the most frequent")
    several.add_argument("--share", type=float, help="keep those that make up this share of all that occur")
    several.add_argument("--min-count", type=int, help="keep those that occur so often; 1 by default")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        texts = [t for name in options.texts for t in strings(read_table(name, options.data), options.text, name)]
        asked = {"size": options.size, "share": options.share, "min_count": options.min_count}
        given = {name: value for name, value in asked.items() if value is not None}
        trim_vocabulary(options.directory, options.out, texts, options.data, TokenChoice(**given) if given else ALL)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
