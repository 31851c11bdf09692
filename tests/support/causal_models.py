"""Tiny causal language models with random weights: one of each family, and a directory with a tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

VOCABULARY, WIDTH, WINDOW = 100, 32, 6
SPECIAL = ("<pad>", "<s>", "</s>")
PLAIN = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = PLAIN | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8, "sliding_window": WINDOW}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | NO_DROPOUT),
    "opt": (
        "OPT",
        {k: v for k, v in PLAIN.items() if k != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "gemma": ("Gemma", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2", WIDE),
    "gemma3": ("Gemma3Text", WIDE | {"num_hidden_layers": 3, "sliding_window_pattern": 3}),
    "phi": ("Phi", PLAIN),
    "phi3": ("Phi3", GROUPED),
    "mistral": ("Mistral", WIDE),
    "smollm3": ("SmolLM3", GROUPED),
    "granite": ("Granite", GROUPED),
    "olmo2": ("Olmo2", PLAIN),
}
"""name -> (the prefix of its configuration's class in transformers, arguments)"""


def hub_model(family: str, **changes: Any) -> Any:
    """A model of `transformers`, whose texts differ in what they mean."""
    import transformers

    prefix, arguments = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{prefix}Config")(**arguments | changes)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def letters() -> Any:
    """A tokenizer whose tokens are letters, with a token in front; it spells any text by bytes."""
    return byte_letters(SPECIAL, "<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def byte_letters(special: tuple[str, ...], template: str, **named: str) -> Any:
    """A tokenizer of bytes, with what a template has around a text; `named` says what special tokens are for."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, names.index(t)) for t in template.split() if t in special]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, model_input_names=["input_ids", "attention_mask"], **named
    )


def directory(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A directory of Hugging Face: a model of the family, and a tokenizer of letters."""
    tokenizer = letters()
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub_model(family, **ends | changes).save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    return folder


def stories(count: int, seed: int = 0) -> list[str]:
    """Texts of a few words, of which some follow others."""
    g = torch.Generator().manual_seed(seed)
    words = ("a dog", "ran", "to me", "sat", "by a tree")
    return [" ".join(words[i] for i in torch.randint(0, 5, (4 + n % 3,), generator=g)) for n in range(count)]
