"""Tiny encoder-decoder models with random weights: one of each family, and a directory with a tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from causal_models import byte_letters

VOCABULARY, WIDTH, FRAMES = 100, 32, 20
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
ENDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
BART_LIKE = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
T5_LIKE = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", T5_LIKE),
    "flan": ("T5", T5_LIKE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "marian": ("Marian", BART_LIKE | {"decoder_vocab_size": VOCABULARY, "scale_embedding": True}),
    "bart": ("Bart", BART_LIKE),
    "mbart": ("MBart", BART_LIKE),
    "pegasus": ("Pegasus", BART_LIKE),
    "whisper": (
        "Whisper",
        BART_LIKE | {"num_mel_bins": 8, "max_source_positions": FRAMES, "max_target_positions": 64},
    ),
}
"""name -> (the prefix of its configuration's class in transformers, arguments)"""


def hub_model(family: str, **changes: Any) -> Any:
    """A model of `transformers`, whose texts differ in what they mean."""
    import transformers

    prefix, arguments = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{prefix}Config")(**ENDS | arguments | changes)
        kind = transformers.AutoModelForSpeechSeq2Seq if family == "whisper" else transformers.AutoModelForSeq2SeqLM
        model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_positions" not in name:
                p.add_(0.05 * torch.randn_like(p))
    return model


def inputs(family: str, read: int = 9, answered: int = 8) -> tuple[torch.Tensor, ...]:
    """Two sources, of which the second is padded, and two answers."""
    g = torch.Generator().manual_seed(3)
    ids, answer = (torch.randint(4, VOCABULARY, (2, n), generator=g) for n in (read, answered))
    masks = [torch.ones_like(t) for t in (ids, answer)]
    masks[0][1, read - 3 :] = 0
    if family == "whisper":
        return torch.randn(2, 8, 2 * FRAMES, generator=g), answer, masks[1]
    return ids, masks[0], answer, masks[1]


def letters() -> Any:
    """A tokenizer whose tokens are letters, with a token behind; it spells any text by bytes."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return byte_letters(SPECIAL, "$A </s>", **named)


def directory(folder: Path, family: str, **changes: Any) -> Path:
    """A directory of Hugging Face: a model of the family, and a tokenizer of letters."""
    tokenizer = letters()
    changes = {"vocab_size": len(tokenizer), **changes}
    if family == "marian":
        changes["decoder_vocab_size"] = len(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub_model(family, **changes).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    return folder


def pairs(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Words, and the same in another order."""
    g = torch.Generator().manual_seed(seed)
    words = ("a dog", "ran", "to me", "sat", "by a tree")
    drawn = [[words[i] for i in torch.randint(0, 5, (2 + n % 3,), generator=g)] for n in range(count)]
    return {"source": [" ".join(d) for d in drawn], "target": [" ".join(d[::-1]) for d in drawn]}
