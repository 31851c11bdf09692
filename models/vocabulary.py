"""A text encoder with the tokens that its texts use: the same answers to them from a table a fraction as large.

    python -m pqk.models.vocabulary out/teacher --texts banking77_train.tsv --out out/teacher_small [--data DATA]

The result is a Hugging Face directory, to be compressed as any other. Half of MiniLM's weights, and nine tenths of a
small student's file, are the rows of its 30,522 tokens; a task's texts use a tenth of them.

Kept are the tokens of the texts, special tokens, and every single character, so that another word is spelled where it
was one token. WordPiece takes the longest token that fits, and all that the texts were split into are left, so these
texts are split as before. Other texts may be split finer: hold the metric on texts that were not counted against it.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pqk.errors import InputError
from pqk.models.encoder import find_directory, quietly
from pqk.models.text_data import column, read_table

log = logging.getLogger(__name__)

CONTINUES = "##"
"""what WordPiece puts before a token that goes on with a word"""
TABLE = "word_embeddings.weight"
"""how the tables of tokens are called in the families that use WordPiece"""


def trim_vocabulary(directory: str | Path, out: Path, texts: Iterable[str], data: Path | None = None) -> list[int]:
    """Write the encoder in `directory` with the tokens of `texts` only to `out`, whole or not at all.

    Returns the old ids in the order of the new ones, which is that of the old. Raises `InputError` where `out` exists,
    and for a tokenizer that is not WordPiece or a model without a table of its tokens.
    """
    if out.exists():
        raise InputError(f"vocabulary: {out} is there already; choose another folder")
    folder = find_directory(directory, data)
    tokenizer, config = _tokenizer(folder), json.loads((folder / "config.json").read_text())
    kept = kept_tokens(folder, tokenizer, texts)
    new = {old: i for i, old in enumerate(kept)}
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_tables(folder, partial, kept, config["vocab_size"])
        _write_tokenizer(folder, partial, tokenizer, new)
        renamed = {k: new[v] for k, v in config.items() if k.endswith("_token_id") and v in new}
        _write_json(partial / "config.json", config | renamed | {"vocab_size": len(kept)})
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("%d of %d tokens are left", len(kept), config["vocab_size"])
    return kept


def kept_tokens(folder: Path, tokenizer: dict[str, Any], texts: Iterable[str]) -> list[int]:
    """The ids that stay, in order."""
    with quietly() as transformers:
        reader = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        sequences = reader(list(texts), truncation=False)["input_ids"]
    kept = {t["id"] for t in tokenizer["added_tokens"]}
    kept |= {i for token, i in tokenizer["model"]["vocab"].items() if len(token.removeprefix(CONTINUES)) <= 1}
    kept.add(tokenizer["model"]["vocab"][tokenizer["model"]["unk_token"]])
    return sorted(kept.union(*sequences))


def _tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"vocabulary: {folder} has no tokenizer.json; save its fast tokenizer with save_pretrained")
    tokenizer = json.loads(path.read_text())
    kind = tokenizer["model"].get("type")
    if kind != "WordPiece":
        raise InputError(
            f"vocabulary: the tokenizer in {folder} is {kind}; only WordPiece can lose tokens and split the rest as "
            "before (BPE builds tokens from others)"
        )
    return tokenizer


def _write_tables(folder: Path, out: Path, kept: list[int], words: int) -> None:
    """Every safetensors file, with the rows of `kept` only in the tables of tokens."""
    tables = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name, value in tensors.items():
            if name.endswith(TABLE) and len(value) == words:
                tensors[name], tables = value[torch.tensor(kept)].contiguous(), tables + 1
        save_file(tensors, out / path.name, {"format": "pt"})
    if not tables:
        raise InputError(f"vocabulary: no *{TABLE} of {words} rows in the safetensors files of {folder}")


def _write_tokenizer(folder: Path, out: Path, tokenizer: dict[str, Any], new: dict[int, int]) -> None:
    """tokenizer.json and the files beside it, under the new ids."""
    vocabulary = {token: new[i] for token, i in tokenizer["model"]["vocab"].items() if i in new}
    tokenizer = {**tokenizer, "model": {**tokenizer["model"], "vocab": vocabulary}}
    for part in ("added_tokens", "post_processor", "padding"):
        tokenizer[part] = _renumbered(tokenizer.get(part), new)
    _write_json(out / "tokenizer.json", tokenizer)
    (out / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__)))
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        config = json.loads(settings.read_text())
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {str(new[int(i)]): t for i, t in config["added_tokens_decoder"].items()}
        _write_json(out / settings.name, config)
    for name in ("special_tokens_map.json",):
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    """A part of tokenizer.json with the ids in it replaced: under `id`, `ids`, `pad_id`, and in pairs (token, id)."""
    number: Callable[[Any], Any] = lambda i: new[i] if type(i) is int else i  # noqa: E731
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int
        return [part[0], new[part[1]]] if pair else [_renumbered(p, new) for p in part]
    if not isinstance(part, dict):
        return part
    return {
        key: number(value)
        if key == "pad_id" or (key == "id" and type(value) is int)
        else [number(i) for i in value]
        if key == "ids"
        else _renumbered(value, new)
        for key, value in part.items()
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pqk.models.vocabulary", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", help="the encoder to start from")
    parser.add_argument("--texts", nargs="+", required=True, help=".tsv or .jsonl files whose texts are counted")
    parser.add_argument("--text", default="text", help="the name of their column")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--data", type=Path, help="the folder with the texts")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        texts = [t for name in options.texts for t in column(read_table(name, options.data), options.text, name)]
        trim_vocabulary(options.directory, options.out, texts, options.data)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
