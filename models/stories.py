"""The 260-thousand-parameter Llama that tells stories, as a Hugging Face directory.

    python -m pqk.models.stories --data DATA --out out/stories260k

Its weights come in the layout of llama2.c: rotary pairs lie side by side there, half a head apart in `transformers`;
pieces with scores are its tokenizer (SentencePiece's BPE), which here becomes a list of merges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.data.folders import data_folders
from pqk.errors import InputError
from pqk.files import read_json, read_tensors
from pqk.models.hub import quietly
from pqk.models.language import language_task
from pqk.models.text_data import column, read_table
from pqk.task.task import Task

STORIES, HELD, EVALUATED = "tinystories.jsonl", 300, 200
"""of the last stories 100 are validation data and 200 evaluation data"""
WEIGHTS, PIECES = "stories260k.safetensors", "stories260k_tokenizer.json"
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "tok_embeddings": "embed_tokens",
}
"""llama2.c's names of parts, and those of `transformers`"""
SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "▁"
"""what stands for a space in pieces, as in Llama's own tokenizer: other readers know this form alone"""
BYTES = 256
TOKENIZER = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "add_bos_token": True}


def write_stories(out: Path, data: Path | None = None) -> Path:
    """Writes config.json, model.safetensors and the tokenizer into `out`, and returns it.

    Raises `InputError` where the weights are in no data folder, or transformers is not installed.
    """
    places = [f for f in data_folders(data) if (f / WEIGHTS).is_file() and (f / PIECES).is_file()]
    if not places:
        raise InputError(f"stories: no {WEIGHTS} beside {PIECES}; point --data or PQK_DATA at the folder that has them")
    tensors, said = read_tensors(places[0] / WEIGHTS)
    with quietly() as transformers:
        config = transformers.LlamaConfig(
            hidden_size=int(said["dim"]), num_hidden_layers=int(said["n_layers"]),
            num_attention_heads=int(said["n_heads"]), num_key_value_heads=int(said["n_kv_heads"]),
            intermediate_size=int(said["hidden_dim"]), vocab_size=int(said["vocab_size"]),
            max_position_embeddings=int(said["max_seq_len"]), rms_norm_eps=float(said["norm_eps"]),
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(renamed(tensors, config), strict=False)
        model.tie_weights()
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out, safe_serialization=True)
        document = read_json(places[0] / PIECES)
        merged = transformers.LlamaTokenizerFast(
            tokenizer_object=tokenizer(document["pieces"], document["scores"]), **TOKENIZER
        )
        merged.model_max_length = config.max_position_embeddings
        merged.save_pretrained(out)
    return out


def stories_task(
    directory: str | Path, data: str | Path | None = None, *, limit: int | None = None, **task: Any
) -> Task:
    """Stories to tell, for the causal model in a directory; the last 200 of tinystories.jsonl are held out.

    Args:
        directory: the model's.
        data: the folder of the stories.
        limit: train on the first so many of 2,016.
        task: what `language_task` takes beside these.

    Raises `InputError` where the file is missing, and as `language_task` does.
    """
    table = read_table(STORIES, None if data is None else Path(data))
    texts = column(table, "text", STORIES)
    parts = {"train": texts[:-HELD][:limit], "validation": texts[-HELD:-EVALUATED], "evaluation": texts[-EVALUATED:]}
    tables: dict[str, Any] = {name: {"text": part} for name, part in parts.items()}
    return language_task(data, directory=directory, **tables, **task)


def renamed(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of llama2.c's file by the names, and with the rotary layout, of `transformers`."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for key, t in tensors.items():
        name = f"model.{key}"
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        count = next((n for part, n in heads.items() if part in name), None)
        found[name] = t if count is None else halves(t, count)
    return found


def halves(weight: Tensor, heads: int) -> Tensor:
    """A projection [H * D, C] with the rotary pairs of rows 2i and 2i + 1 of a head as its rows i and i + D / 2."""
    width = weight.shape[0] // heads
    return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """The same tokens as merging, again and again, the neighbours whose piece has the highest score.

    Text begins with a space; a character that is no piece is its bytes in UTF-8.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    names = [*SPECIAL, *(piece.replace(" ", SPACE) for piece in pieces[len(SPECIAL) :])]
    ids: dict[str, int] = {}
    for i, name in enumerate(names):
        ids.setdefault(name, i)
    first = len(SPECIAL) + BYTES
    merges = []
    for i, piece in enumerate(names[first:], first):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if ids.get(left, 0) >= first and ids.get(right, 0) >= first:
                merges.append((-scores[i], i, left, right))
    made = Tokenizer(
        models.BPE(
            vocab=ids, merges=[(left, right) for *_, left, right in sorted(merges)], unk_token="<unk>",
            fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    spaces = decoders.Replace(SPACE, " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=None, help="the folder with the weights and the pieces")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    options = parser.parse_args()
    with torch.no_grad():
        write_stories(options.out, options.data)


if __name__ == "__main__":
    main()
