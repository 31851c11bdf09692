"""A causal model of random weights, and sequences of tokens for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk.models.answer_match import LIKELIHOOD
from pqk.models.decoder import Decoder
from pqk.models.hub import quietly
from pqk.models.language import NextTokens, Text, choice, next_tokens
from pqk.task.kept_tokens import kept
from pqk.task.task import Task

VOCABULARY = 64


def small_decoder(seed: int = 0, layers: int = 2, **settings: Any) -> Decoder:
    """A Llama of width 32 with two heads a group, over 64 tokens, of which 2 ends a text."""
    with quietly() as transformers, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=VOCABULARY, max_position_embeddings=48, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3, **settings,
        )  # fmt: skip
        return Decoder(transformers.LlamaForCausalLM(config)).eval()


def sequences(count: int = 16, seed: int = 0, batch_size: int = 4, prompt: int = 3) -> NextTokens:
    """Texts of 6 to 13 tokens from 3 to 63, of which the first `prompt` are given."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 14, (count,), generator=g).tolist()
    rows = [[1, *torch.randint(3, VOCABULARY, (n - 1,), generator=g).tolist()] for n in lengths]
    return next_tokens([Text(row, prompt) for row in rows], batch_size, 0)


def sequence_task(train: NextTokens | None = None, **settings: Any) -> Task:
    """Next tokens of random sequences."""
    data = sequences() if train is None else train
    held: NextTokens = sequences(8, 1)
    example: tuple[Tensor, ...] = tuple(t[:2] for t in next(held.batches()).inputs)
    return Task(
        data, held, held, metric=LIKELIHOOD, decision=choice,
        kept=kept, generates=True, class_axis=2, example=example, input_names=("input_ids", "attention_mask"),
        output_names=("logits",),
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in ("input_ids", "attention_mask")}, **settings,
    )  # fmt: skip
