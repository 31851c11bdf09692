"""Attention heads as channel groups, found by the products that attention is, wherever queries, keys and values stand.

Each output channel of a linear layer has a number, which views, splits and rotations carry along. Numbers that meet in
one matrix of scores, or are weighted by it, are of one head; heads that read the same keys (Ainslie et al. 2023, "GQA",
arXiv:2305.13245) are of one group. So layers that make queries, keys and values as one are read as they are, and the
queries of a group go with its keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pqk.core.modes import evaluating
from pqk.passes.prune.heads import AttentionLayer
from pqk.passes.prune.labels import Joined, along, varies

MOVED = """
    view reshape transpose permute split chunk __getitem__ squeeze unsqueeze expand repeat repeat_interleave cat concat
    stack flatten unflatten swapaxes movedim narrow select tensor_split unbind roll flip __get__ t
"""
MOVES = frozenset(MOVED.split())
"""functions that move values and compute none; `__get__` is a property such as `mT`"""
PRODUCTS = frozenset(("matmul", "__matmul__", "bmm"))


def find_attention_products(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, AttentionLayer]:
    """The attentions of `model` (unchanged) that one forward pass on `example` shows, by the module that computes them.

    Only those whose groups of heads are all alike: of as many channels in each layer.
    """
    watch = _ProductWatch({id(m.weight): path for path, m in model.named_modules() if isinstance(m, nn.Linear)})
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
    found = {path: watch.attention(path) for path in dict.fromkeys(s.module for s in watch.weighted)}
    return {path: attention for path, attention in found.items() if attention is not None}


@dataclass(frozen=True)
class _Weighted:
    """Values weighted by scores: the numbers that they have from then on, and whose attention it is."""

    module: str
    first: int
    stop: int
    size: int
    """channels of one head's values"""


class _ProductWatch(TorchFunctionMode):
    """Follows the channels of linear layers through one pass."""

    def __init__(self, linears: dict[int, str]) -> None:
        super().__init__()
        self.linears = linears
        self.stack: list[str] = []
        self.made: dict[str, tuple[int, int]] = {}
        """linear layer -> the first of its channels' numbers, and one more than the last"""
        self.read: dict[str, list[int]] = {}
        """linear layer -> the numbers of the weighted values that it reads"""
        self.weighted: list[_Weighted] = []
        self.heads = Joined()
        self.next = 1
        self.channels: dict[int, Tensor] = {}
        """id of a tensor -> the channel that each of its elements is of, 0 for none"""
        self.scores: dict[int, Tensor] = {}
        """id of a tensor of scores -> a channel of the head that each of its elements is of"""
        self.alive: list[Any] = []
        """every tensor of the pass: an id belongs to one object only as long as that lives"""

    def entering(self, path: str) -> Callable[..., None]:
        return lambda module, inputs: self.stack.append(path)

    def leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
        self.alive += results
        name = getattr(func, "__name__", "")
        if func is F.linear:
            values = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self._linear(values["input"], values["weight"], result)
        elif name == "scaled_dot_product_attention" and len(args) >= 3:
            query, key, value = args[:3]
            scores = self._scores(query, key.transpose(-2, -1), self.channels.get(id(key)))
            if scores is not None:
                self._weigh(scores, value, result)
        elif name in PRODUCTS and len(args) == 2 and min(t.ndim for t in args) > 2:
            self._product(args[0], args[1], result)
        else:
            for labels in (self.channels, self.scores):
                self._carry(labels, func, name, args, kwargs, result, results)
        return result

    def _carry(
        self,
        labels: dict[int, Tensor],
        func: Any,
        name: str,
        args: Any,
        kwargs: Any,
        result: Any,
        results: list[Tensor],
    ) -> None:
        """Results have the numbers of what was read: moved alike, or in the same place."""
        parts = args[0] if args and isinstance(args[0], tuple | list) else args
        known = [labels[id(t)] for t in parts if id(t) in labels]
        if not known or not results:
            return
        if name in MOVES:
            head: Any = [_of(labels, t) for t in args[0]] if parts is not args else _of(labels, args[0]).contiguous()
            moved = func(head, *args[1:], **kwargs)
            for tensor, numbers in zip(results, moved if isinstance(moved, tuple | list) else [moved], strict=True):
                labels[id(tensor)] = numbers
        elif len(results) == 1 and result is results[0] and result.dtype != torch.bool:
            numbers = known[0]
            sizes = zip(numbers.shape, result.shape, strict=False)
            if numbers.ndim == result.ndim and all(n in (1, size) for n, size in sizes):
                labels[id(result)] = numbers.expand(result.shape)

    def _linear(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        path = self.linears.get(id(weight))
        if path is None:
            return
        numbers = self.channels.get(id(x))
        if numbers is not None:
            row = numbers.reshape(-1, numbers.shape[-1])[0].tolist()
            if any(w.first <= n < w.stop for w in self.weighted for n in row):
                self.read[path] = row
        if path not in self.made:
            self.made[path] = self.next, self.next + result.shape[-1]
            self.next += result.shape[-1]
        self.channels[id(result)] = along(torch.arange(*self.made[path], dtype=torch.int32), result, -1)

    def _product(self, a: Tensor, b: Tensor, result: Tensor) -> None:
        if id(a) in self.scores:
            self._weigh(self.scores[id(a)], b, result)
        elif (numbers := self.channels.get(id(b))) is not None:
            scores = self._scores(a, b, numbers.transpose(-2, -1))
            if scores is not None:
                self.scores[id(result)] = scores.expand(result.shape)

    def _scores(self, query: Tensor, turned: Tensor, key: Tensor | None) -> Tensor | None:
        """Queries [..., i, k] meet keys [..., k, j], whose numbers `key` are [..., j, k]: a number [..., 1, 1] each."""
        one = self.channels.get(id(query))
        if one is None or key is None or not varies(one, -1) or not varies(key, -1):
            return None
        leading = torch.broadcast_shapes(one.shape[:-2], key.shape[:-2])
        rows, others = (t.expand(*leading, *t.shape[-2:]).reshape(leading.numel(), -1) for t in (one, key))
        for met in torch.cat([rows, others], 1):
            self._join(met.unique().tolist())
        return rows.amax(1).reshape(*leading, 1, 1)

    def _weigh(self, scores: Tensor, value: Tensor, result: Tensor) -> None:
        """Values [..., j, d] are weighted by scores: each number of theirs gets another one behind it."""
        numbers = self.channels.get(id(value))
        if numbers is None or not varies(numbers, -1):
            return
        heads = scores[..., 0, 0].expand(result.shape[:-2]).flatten().tolist()
        rows = numbers.expand(*result.shape[:-2], *numbers.shape[-2:]).reshape(len(heads), -1)
        low, first = int(numbers[numbers > 0].min()), self.next
        self.next += int(numbers.max()) - low + 1
        for head, row in zip(heads, rows, strict=True):
            unique = [n for n in row.unique().tolist() if n]
            self._join([head, *unique, *(n - low + first for n in unique)])
        self.weighted.append(_Weighted(self.stack[-1] if self.stack else "", first, self.next, value.shape[-1]))
        self.channels[id(result)] = (numbers.amax(-2, keepdim=True) - low + first).expand(result.shape)

    def _join(self, numbers: Iterable[int]) -> None:
        some = [n for n in numbers if n]
        self.heads.join((some[0], n) for n in some[1:])

    def attention(self, module: str) -> AttentionLayer | None:
        """What one module attends by; None where its heads are not alike, or nothing reads them joined again."""
        own = [w for w in self.weighted if w.module == module]
        readers = {p: row for p, row in self.read.items() if any(w.first <= n < w.stop for w in own for n in row)}
        roots = list(dict.fromkeys(self.heads.root(n) for row in readers.values() for n in row))
        made = {path: [self.heads.root(n) for n in range(*span)] for path, span in self.made.items()}
        makers = {path: row for path, row in made.items() if not set(roots).isdisjoint(row)}
        rows = {(p, "out"): row for p, row in makers.items()}
        rows |= {(p, "in"): [self.heads.root(n) for n in row] for p, row in readers.items()}
        places = {key: _places(row, roots) for key, row in rows.items()}
        if not makers or any(len({*map(len, each)}) > 1 for each in places.values()):
            return None
        size = own[0].size
        joined = len(next(each for (_, dim), each in places.items() if dim == "in")[0])
        if joined % size or any(w.size != size for w in own) or len(roots) * joined == size:
            return None  # of one head, channels are no portions
        return AttentionLayer(len(roots), size, [*makers], [*readers], joined // size, places)


def _of(labels: dict[int, Tensor], value: Any) -> Any:
    """The numbers of a tensor's elements, zeros where it has none."""
    if not isinstance(value, Tensor):
        return value
    return labels.get(id(value), torch.zeros_like(value, dtype=torch.int32))


def _places(row: list[int], roots: list[int]) -> tuple[tuple[int, ...], ...]:
    """Where in `row` each of `roots` stands."""
    return tuple(tuple(i for i, n in enumerate(row) if n == root) for root in roots)
