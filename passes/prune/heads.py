"""Attention heads as channel groups, found by watching one forward pass, whatever the module's code calls them.

Queries, keys and values are linear layers whose outputs are viewed as [..., heads, size]; a module in whose forward
that happens is an attention, and the linear layer that reads the heads joined again ends it. A head goes whole: its
rows of queries, keys and values, and its columns of the layer that reads them (Michel et al. 2019, arXiv:1905.10650).

The module's own code then still asks for the heads that it was built with, as a number in an attribute or as the width
of its input. A module with fewer heads therefore runs under a mode that reads these views as what is there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqk.core.modes import evaluating


@dataclass
class AttentionLayer:
    """An attention module's layers: `heads` of `size` channels each, or groups of heads that share keys and values."""

    heads: int
    size: int
    makers: list[str] = field(default_factory=list)
    """linear layers whose outputs are split into heads"""
    readers: list[str] = field(default_factory=list)
    """linear layers that read the heads joined again"""
    share: int = 1
    """heads of a group"""
    places: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """layer and side -> for each group the channels that are its; by default of one head after the other"""


def find_attention(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, AttentionLayer]:
    """The attention modules of `model` (unchanged) that one forward pass on `example` shows, by path."""
    watch = _Watch({id(m.weight): path for path, m in model.named_modules() if isinstance(m, nn.Linear)})
    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(watch.entering(path)))
        handles.append(module.register_forward_hook(watch.leaving, always_call=True))
    try:
        with evaluating(model), torch.no_grad(), watch:
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return {path: a for path, a in watch.attention.items() if a.makers and a.readers}


class _Watch(TorchFunctionMode):
    """Follows the outputs of linear layers to where they are split into heads, and the joined heads to their reader."""

    def __init__(self, linears: dict[int, str]) -> None:
        super().__init__()
        self.linears = linears
        self.stack: list[str] = []
        self.attention: dict[str, AttentionLayer] = {}
        self.makers: dict[int, str] = {}
        """id of a linear layer's output, whatever was done to it since -> that layer"""
        self.joined: dict[int, str] = {}
        """id of a tensor of joined heads -> the attention module that joined them"""
        self.alive: list[Any] = []
        """every tensor of the pass: an id belongs to one object only as long as that lives"""

    def entering(self, path: str) -> Callable[..., None]:
        return lambda module, inputs: self.stack.append(path)

    def leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return result
        x, module = args[0], self.stack[-1] if self.stack else ""
        self.alive += (x, result)
        if func is F.linear:
            path = self.linears.get(id(args[1] if len(args) > 1 else (kwargs or {})["weight"]))
            if path is not None:
                self.makers[id(result)] = path
                if id(x) in self.joined:
                    _add(self.attention[self.joined[id(x)]].readers, path)
        elif result.shape == x.shape:
            for origin in (self.makers, self.joined):
                if id(x) in origin:
                    origin.setdefault(id(result), origin[id(x)])
        elif result.ndim == x.ndim + 1 and id(x) in self.makers and result.shape[-2:].numel() == x.shape[-1]:
            heads, size = result.shape[-2:]
            layer = self.attention.setdefault(module, AttentionLayer(heads, size))
            if heads > 1 and (heads, size) == (layer.heads, layer.size):
                _add(layer.makers, self.makers[id(x)])
        elif result.ndim == x.ndim - 1 and module in self.attention and result.shape[-1] == x.shape[-2:].numel():
            layer = self.attention[module]
            self.joined |= {id(result): module} if x.shape[-2:] == (layer.heads, layer.size) else {}
        return result


def _add(paths: list[str], path: str) -> None:
    if path not in paths:
        paths.append(path)


# ---- an attention with fewer heads than its code was written for


class FewerHeads(nn.Module):
    """Base class that a cut attention module gains: its forward runs under `Regrouped`."""

    _heads: tuple[int, tuple[int, ...], int, int]
    """how many groups of heads it was built with, which of them it still has, the size of a head, heads of a group"""


def _regrouped(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)  # torch.export reads the names of the inputs from it
    def run(self: FewerHeads, *args: Any, **kwargs: Any) -> Any:
        with Regrouped(*self._heads):
            return forward(self, *args, **kwargs)

    return run


SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)


class Regrouped(TorchFunctionMode):
    """Reads a view of [..., built * size] or [..., built, size] as one of the heads that are kept.

    So it does of groups of `share` heads, of which there is one of keys and one of values. What is added to their
    scores [..., now, T, T] and was made elsewhere for all that were built, as a table of positions that all layers
    share, counts for the kept ones.
    """

    def __init__(self, built: int, kept: tuple[int, ...], size: int, share: int = 1) -> None:
        super().__init__()
        self.kept, self.size = tuple(g * share + h for g in kept for h in range(share)), size
        self.built, self.now = built * share, len(self.kept)
        self.counts = {(built, len(kept)), (self.built, self.now)}
        """how many were built of each kind, and how many there are"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.view, Tensor.reshape, torch.reshape) and not kwargs and not isinstance(args[1], torch.dtype):
            x, *sizes = args
            sizes = list(sizes[0]) if isinstance(sizes[0], tuple | list) else sizes
            args = (x, self.sizes(x, sizes))
        elif func in SUMS and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            args = (self.addend(args[0], args[1]), self.addend(args[1], args[0]), *args[2:])
        return func(*args, **(kwargs or {}))

    def sizes(self, x: Tensor, sizes: list[Any]) -> list[Any]:
        """`sizes`, or what they mean with fewer heads. Only plain numbers are compared: a traced size must not be."""
        numbers = [s if type(s) is int else None for s in sizes]
        for built, now in self.counts:
            if len(sizes) == x.ndim + 1 and _is(x.shape[-1], now * self.size):
                if numbers[-1] in (-1, self.size) and numbers[-2] in (-1, built, now):
                    return [*sizes[:-2], now, self.size]
            elif len(sizes) == x.ndim - 1 and _is(x.shape[-2], now) and _is(x.shape[-1], self.size):
                return [*sizes[:-1], now * self.size]
        return sizes

    def addend(self, x: Tensor, other: Tensor) -> Tensor:
        """`x`, or its values for the kept heads where `other` has no more than those."""
        if min(x.ndim, other.ndim) < 3 or self.now == self.built:
            return x
        if not (_is(x.shape[-3], self.built) and _is(other.shape[-3], self.now)):
            return x
        return torch.cat([x.narrow(-3, head, 1) for head in self.kept], -3)


def _is(size: Any, number: int) -> bool:
    return type(size) is int and size == number


def cut_heads(module: nn.Module, pruned: Sequence[int], heads: int, size: int, share: int = 1) -> None:
    """Lets an attention module of `heads` heads run without the `pruned` ones; its layers are cut on their own.

    Numbers that it keeps of its heads and of their width follow, in a configuration beside it, too, which becomes its
    own; and so do tables with a value for each head. With `share`, `heads` are groups of so many that go together.
    """
    kept = [h for h in range(heads) if h not in set(pruned)]
    if not isinstance(module, FewerHeads):
        kind = type(module)
        body = {"__module__": kind.__module__, "forward": _regrouped(kind.forward)}
        module.__class__ = type(kind.__name__, (FewerHeads, kind), body)
        module._heads = (heads, tuple(range(heads)), size, share)  # type: ignore[assignment]
    built, before, *_ = module._heads  # type: ignore[misc]
    module._heads = (built, tuple(before[h] for h in kept), size, share)  # type: ignore[assignment]
    if not pruned:
        return
    _count_heads(module, {heads: len(kept), heads * share: len(kept) * share}, size)
    config = getattr(module, "config", None)
    if config is not None and not isinstance(config, nn.Module | dict):
        module.config = copy.copy(config)
        _count_heads(module.config, {heads: len(kept), heads * share: len(kept) * share}, 0)
    for name, table in list(module.named_parameters(recurse=False)):
        if table.ndim > 1 and table.shape[-1] == heads * share:
            columns = [g * share + h for g in kept for h in range(share)]
            setattr(module, name, nn.Parameter(table.detach()[..., columns].contiguous(), table.requires_grad))


def _count_heads(owner: Any, counts: dict[int, int], size: int) -> None:
    """Sets the numbers of an object that are those of heads, by their names, or of all their channels."""
    widths = {before * size: now * size for before, now in counts.items()} if size else {}
    for name, value in list(vars(owner).items()):
        if type(value) is not int or "idx" in name or "index" in name:
            continue
        if value in widths:
            setattr(owner, name, widths[value])
        elif value in counts and "head" in name and "size" not in name and "dim" not in name:
            setattr(owner, name, counts[value])


def find_whole_tables(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, str]:
    """Linear layers and norms that read a whole table in one forward pass of `model` (unchanged) -> its embedding."""
    with evaluating(model), torch.no_grad(), _TableReads(model) as watch:
        model(*example)
    return watch.readers


class _TableReads(TorchFunctionMode):
    """Notes which linear layers and norms read the whole table of which embedding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | nn.Embedding)}
        self.tables = {_memory(m.weight): p for p, m in layers.items() if isinstance(m, nn.Embedding)}
        self.layers = {id(m.weight): p for p, m in layers.items() if not isinstance(m, nn.Embedding)}
        self.readers: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.layer_norm) and args and (table := self.tables.get(_memory(args[0]))) is not None:
            values = (*args, *(kwargs or {}).values())
            self.readers |= {self.layers[id(v)]: table for v in values if id(v) in self.layers}
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
