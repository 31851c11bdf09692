"""Embeddings that are read as one matrix instead of being looked up: tables of relative positions (He et al. 2021,
DeBERTa, arXiv:2006.03654, section 3). Nothing calls their module, so they are found by whose memory a layer is given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def find_whole_tables(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, str]:
    """Linear layers and norms that one forward pass of `model` (unchanged) gives a whole table -> its embedding."""
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad(), _Watch(model) as watch:
            model.eval()(*example)
    finally:
        for m, mode in modes.items():
            m.training = mode
    return watch.read


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)}
        self.tables = {_memory(m.weight): p for p, m in layers.items() if isinstance(m, nn.Embedding)}
        self.layers = {id(m.weight): p for p, m in layers.items() if not isinstance(m, nn.Embedding)}
        self.read: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.layer_norm) and args and (table := self.tables.get(_memory(args[0]))) is not None:
            given = (*args, *(kwargs or {}).values())
            self.read |= {self.layers[id(t)]: table for t in given if id(t) in self.layers}
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
