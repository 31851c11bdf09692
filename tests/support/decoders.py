"""Small causal models of Hugging Face with random weights, by family."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pqk.models.decoder import Decoder

WORDS = 100
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8}
GPT2 = {
    "vocab_size": WORDS,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
OPT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "dropout": 0.0,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | GROUPED),
    "mistral": ("MistralConfig", SIZES | WIDE | {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", SIZES | GROUPED),
    "qwen3": ("Qwen3Config", SIZES | WIDE),
    "gpt2": ("GPT2Config", GPT2),
    "opt": ("OPTConfig", OPT),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gemma2": ("Gemma2Config", SIZES | WIDE | {"sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", SIZES | WIDE | {"sliding_window": 6, "sliding_window_pattern": 3}),
    "phi": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", SIZES | GROUPED),
}


def small_decoder(family: str, **changes: Any) -> Decoder:
    """A decoder of three layers, four heads of eight channels (grouped families: two groups) and 48 hidden units."""
    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no bias at zero, no scale at one
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Decoder(model).eval()


def texts(length: int = 15, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Token ids and mask int64 [batch, length], the last text shorter."""
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, WORDS, (batch, length), generator=generator), torch.ones(batch, length).long()
    mask[-1, 2 * length // 3 :] = 0
    return ids, mask


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The list of a decoder's layers."""
    return next(m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == 3)
