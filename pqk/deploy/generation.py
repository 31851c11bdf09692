"""The way with a cache: a captured decoder that also takes the keys and values of the tokens before.

The graph that trains sees whole texts. What it computes for a token depends on the tokens before by their keys and
values alone (Pope et al. 2023, "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.1): so with
those as inputs, put before the new ones, the same graph continues a text. What tokens see is counted from the mask of
all of them, the older ones included; where they stand is an input, as the tools that generate texts give it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.copies import copy_of
from pqk.core.aten import DEQUANTIZE, aten
from pqk.core.attention import POSITIONS, SIGHTS, Site, sites
from pqk.core.graph import call, finish, shape
from pqk.errors import InputError

TEXTS, SEQUENCE, TOTAL, PAST = "batch_size", "sequence", "total_sequence", "past_sequence"
"""axes: the texts, the new tokens, all of them, those before; transformers.js 4.3 makes an empty cache of the right
size where the first has this very name, and of no text elsewhere"""
POSITION = "position_ids"
"""the input that says where the new tokens stand"""


@dataclass(frozen=True)
class CacheEntry:
    """The keys and values of one layer: each of `dtype`, [B, `groups`, P, `width`]."""

    groups: int
    key_width: int
    value_width: int
    dtype: torch.dtype = torch.float32
    """int8 where they are kept in 8 bits, with steps that are the graph's"""

    def empty(self, batch: int, tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Zeros for `tokens` of each text; by default, for none."""
        sizes = ((batch, self.groups, tokens, width) for width in (self.key_width, self.value_width))
        return tuple(torch.zeros(size, dtype=self.dtype) for size in sizes)  # type: ignore[return-value]


@dataclass(frozen=True)
class Cache:
    """What a decoder remembers of the tokens before, layer by layer."""

    entries: tuple[CacheEntry, ...]

    def names(self, prefix: str) -> tuple[str, ...]:
        """`PREFIX.0.key`, `PREFIX.0.value`, `PREFIX.1.key` …, as Hugging Face's tools call them."""
        return tuple(f"{prefix}.{i}.{kind}" for i in range(len(self.entries)) for kind in ("key", "value"))

    def empty(self, batch: int, tokens: int = 0) -> tuple[Tensor, ...]:
        """The keys and values of `tokens` zeros of each text, in the order of the names."""
        return tuple(t for entry in self.entries for t in entry.empty(batch, tokens))

    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """The names of the free axes of `input_ids`, `attention_mask`, `position_ids`, and each key and value."""
        new, kept = (TEXTS, SEQUENCE), (TEXTS, None, PAST, None)
        return (new, (TEXTS, TOTAL), new, *[kept] * (2 * len(self.entries)))


def with_past(graph_module: fx.GraphModule, *, by_mask: bool = False) -> tuple[fx.GraphModule, Cache]:
    """A captured decoder (unchanged) with a cache, and what its cache holds.

    Args:
        graph_module: of a `Decoder`: `input_ids` and `attention_mask` int64 [B, S] to logits [B, S, V].
        by_mask: the mask alone says how many tokens there are, not the past, which may be a longer buffer.

    Returns:
        A graph over the same weights: `input_ids` [B, S], `attention_mask` [B, P + S], `position_ids` int64 [B, S] as
        `places` gives them, then key and value of each layer [B, G, P, D]; to logits [B, S, V], and keys and values
        [B, G, P + S, D]. P may be 0.

    Raises:
        InputError: the graph has no attention, or none of the modules that say what a token sees.
    """
    found = copy_of(graph_module, "student")
    assert isinstance(found, fx.GraphModule)
    attentions = sites(found)
    if not attentions:
        raise InputError("generation: the model has no attention, so there is nothing to keep of the tokens before")
    cache = Cache(tuple(entry_of(site) for site in attentions))
    ids, mask = (n for n in found.graph.nodes if n.op == "placeholder")
    places_of_new = _add_input(found.graph, mask, POSITION, ids)
    pasts = _add_pasts(found.graph, places_of_new, cache, attentions)
    sizes = _Sizes.add(found.graph, ids, pasts, mask if by_mask else None)
    _see_the_whole(found, mask, places_of_new, sizes)
    presents = [appended(found.graph, past, new) for past, new in zip(pasts, _kept(attentions), strict=True)]
    output = found.graph.output_node()
    output.args = ((output.args[0], *presents),)
    found.graph.set_codegen(fx.graph.CodeGen())
    found.meta.pop("structure", None)
    return finish(found), cache


def continued(graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The graph with a cache, and inputs that continue texts [B, S] in their middle, after what it keeps of the rest.

    What it computes from them is what the graph without a cache computes for the second half of each text.
    """
    continuing, cache = with_past(graph_module)
    ids, mask = inputs
    half = ids.shape[1] // 2
    where = places(mask)
    with torch.no_grad():
        _, *past = continuing(ids[:, :half], mask[:, :half], where[:, :half], *cache.empty(len(ids)))
    return continuing, (ids[:, half:], mask, where[:, half:], *past)


def places(mask: Tensor) -> Tensor:
    """The place of each token among those of its text that are no padding: int64 [B, S] of a mask [B, S]."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


# ---- finding


def entry_of(site: Site) -> CacheEntry:
    """What is kept of an attention."""
    (_, groups, _, key_width), (_, _, _, value_width) = shape(site.key), shape(site.value)
    assert groups is not None and key_width is not None and value_width is not None
    return CacheEntry(groups, key_width, value_width, stored(site.key).meta["dtype"])


def stored(value: fx.Node) -> fx.Node:
    """What is kept of keys or values: their integers, where they are kept in 8 bits."""
    integers = value.args[0] if value.target is DEQUANTIZE else value
    return integers if isinstance(integers, fx.Node) else value


def _kept(attentions: list[Site]) -> list[fx.Node]:
    """What is kept of keys and values, layer by layer."""
    return [stored(value) for site in attentions for value in (site.key, site.value)]


# ---- rewriting


@dataclass(frozen=True)
class _Sizes:
    """Nodes for how many tokens there are."""

    new: fx.Node
    past: fx.Node
    total: fx.Node

    @classmethod
    def add(cls, graph: fx.Graph, ids: fx.Node, pasts: list[fx.Node], mask: fx.Node | None) -> _Sizes:
        with graph.inserting_before(pasts[-1].next):
            new = graph.call_function(aten.sym_size.int, (ids, 1))
            if mask is not None:
                total = graph.call_function(aten.sym_size.int, (mask, 1))
                return cls(new, graph.call_function(operator.sub, (total, new)), total)
            past = graph.call_function(aten.sym_size.int, (pasts[0], 2))
            return cls(new, past, graph.call_function(operator.add, (past, new)))


def _add_pasts(graph: fx.Graph, last: fx.Node, cache: Cache, attentions: list[Site]) -> list[fx.Node]:
    """Inputs for what was kept, behind `last`."""
    added = []
    for name, new in zip(cache.names("past"), _kept(attentions), strict=True):
        last = _add_input(graph, last, name, new)
        added.append(last)
    return added


def _add_input(graph: fx.Graph, last: fx.Node, name: str, like: fx.Node) -> fx.Node:
    """An input of the shape and dtype of `like`, behind `last`."""
    with graph.inserting_after(last):
        added = graph.placeholder(name.replace(".", "_"))
    added.meta.update(shape=shape(like), dtype=like.meta["dtype"], layer=name)
    return added


def _see_the_whole(found: fx.GraphModule, mask: fx.Node, places_of_new: fx.Node, sizes: _Sizes) -> None:
    """Places and sight of the new tokens among all; every other length is that of the new ones."""
    graph, points = found.graph, found.meta.get("points", {})
    names = {n.name: n for n in graph.nodes}
    if POSITIONS not in points or not any(name in points for name in SIGHTS):
        raise InputError(
            "generation: the graph does not say what a token sees; compile what pqk.models.decoder.decoder gives"
        )
    names[points[POSITIONS]].replace_all_uses_with(places_of_new)
    for name in SIGHTS:
        if name in points:
            before = names[points[name]]
            before.replace_all_uses_with(_sight(graph, before, mask, sizes))
    for node in [n for n in graph.nodes if n.target is aten.sym_size.int and n.args == (mask, 1)]:
        if node is not sizes.total:
            node.replace_all_uses_with(sizes.new)


def _sight(graph: fx.Graph, before: fx.Node, mask: fx.Node, sizes: _Sizes) -> fx.Node:
    """What stands in `before`, for the new tokens over all: float32 [B, 1, S, P + S]."""
    window = next((n.args[1] for n in _above(before) if n.target is aten.lt.Scalar), None)
    unseen = before.args[-1]
    with graph.inserting_after(before):
        last = before

        def add(target: Any, *args: Any) -> fx.Node:
            nonlocal last
            with graph.inserting_after(last):
                last = call(graph, target, args, before)
            return last

        order = add(aten.arange.default, sizes.total)
        own = add(aten.unsqueeze.default, add(aten.arange.start, sizes.past, sizes.total), 1)
        seen = add(aten.le.Tensor, order, own)
        if window is not None:
            seen = add(aten.bitwise_and.Tensor, seen, add(aten.lt.Scalar, add(aten.sub.Tensor, own, order), window))
        there = add(aten.unsqueeze.default, add(aten.unsqueeze.default, add(aten.gt.Scalar, mask, 0), 1), 1)
        return add(aten.where.Scalar, add(aten.bitwise_and.Tensor, seen, there), 0.0, unseen)


def _above(node: fx.Node) -> Iterator[fx.Node]:
    """Every node that `node` is computed from."""
    waiting, seen = [node], set()
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
                yield source


def appended(graph: fx.Graph, past: fx.Node, new: fx.Node) -> fx.Node:
    """Kept and new tokens one after the other, for all who read `new`."""
    with graph.inserting_after(new):
        both = call(graph, aten.cat.default, ([past, new], 2), new)
    new.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    return both
