"""The rewrite that leaves out tokens: rows of a causal model's table and of the head that scores them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pqk.core.program import Example
from pqk.errors import InputError


def cut_vocabulary(student: nn.Module, example: Example, *, kept: Sequence[int], of: int) -> nn.Module:
    """Rewrite: leave the rows of `kept` in a table of `of` tokens and in its head. Changes `student`.

    A student that has these tokens alone already is returned as it is: where the pass comes first in a recipe, it is
    cut out of a teacher that lost them before. Raises `InputError` for a model with another number of tokens, or
    without a table.
    """
    owner = text_model(student)
    table, head = owner.get_input_embeddings(), owner.get_output_embeddings()
    if table.num_embeddings == len(kept):
        return student
    if table.num_embeddings != of or head is None or head.out_features != of:
        raise InputError(
            f"cutting {of - len(kept)} of {of} tokens: the model has {table.num_embeddings} in its table and "
            f"{None if head is None else head.out_features} in its head; is this the network that the compile began "
            "with?"
        )
    rows, tied = torch.tensor(kept), head.weight is table.weight
    table.weight = nn.Parameter(table.weight.detach()[rows].contiguous(), table.weight.requires_grad)
    table.num_embeddings = head.out_features = len(kept)
    if table.padding_idx is not None:
        table.padding_idx = kept.index(table.padding_idx) if table.padding_idx in kept else None
    if tied:
        head.weight = table.weight
    else:
        head.weight = nn.Parameter(head.weight.detach()[rows].contiguous(), head.weight.requires_grad)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[rows].contiguous(), head.bias.requires_grad)
    owner.config = copy.copy(owner.config)
    owner.config.vocab_size = len(kept)
    return student


def text_model(module: nn.Module) -> Any:
    """The model of Hugging Face's that has a table and a head. Raises `InputError` where there is none."""
    part: Any
    for part in module.modules():
        if hasattr(part, "get_input_embeddings") and hasattr(part, "get_output_embeddings"):
            table, head = part.get_input_embeddings(), part.get_output_embeddings()
            if isinstance(table, nn.Embedding) and isinstance(head, nn.Linear):
                return part
    raise InputError("vocabulary: the model has no table of tokens and a head, as causal models of Hugging Face do")
