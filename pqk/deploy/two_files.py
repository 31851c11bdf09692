"""An encoder and a decoder as two graphs: the source is read once, and the target made from what is kept of it.

The graph that trains reads a source and a whole target. What it computes for a token of the target depends on the
source by the keys and values of cross attention alone, and on the tokens before by those of their own (Vaswani et al.
2017, "Attention Is All You Need", section 3.2.3). So it is split where the encoder ends, and its second half takes both
kinds as inputs. Keys and values of the source are made of that part of it that none are given for: all of it with the
first token, and nothing afterwards, by the same operators and without a branch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.copies import copy_of
from pqk.core.aten import aten
from pqk.core.attention import attentions_by_kind, below, encoder_states
from pqk.core.graph import call, finish, shape
from pqk.core.onnxruntime_session import ENCODED, SOURCE_MASK
from pqk.deploy.generation import PAST, TEXTS, CacheEntry, appended, entry_of
from pqk.errors import InputError

QUERIES, KEYS, CAUSAL = "queries", "keys", "causal_mask"
"""the modules of an `EncoderDecoder` for positions of target tokens, and for what they attend to"""
SOURCE, TARGET, KEPT = "source", "target", "kept_source"
"""axes: the tokens of the source, the new ones of the target, and those of the source whose keys are given"""
KINDS = ("decoder", "encoder")
"""of keys and values: of the target, and of the source"""


@dataclass(frozen=True)
class SplitGraphs:
    """Two graphs over the weights of one."""

    encoder: fx.GraphModule
    """the inputs of the source, to float32 [B, S, C]"""
    decoder: fx.GraphModule
    """mask of the source int64 [B, S] where there is one, `input_ids` [B, T], the hidden states [B, S, C], and of each
    layer key and value of the target [B, H, P, D] and of the source [B, H, K, D], K being 0 or S; to logits
    [B, T, V], and the same keys and values with the new ones [B, H, P + T, D] and [B, H, S, D]"""
    layers: tuple[tuple[CacheEntry, CacheEntry], ...]
    """what is kept of the target and of the source, layer by layer"""
    masked: bool
    """whether there is a mask of the source"""

    def names(self, prefix: str) -> tuple[str, ...]:
        """`PREFIX.0.decoder.key`, `PREFIX.0.decoder.value`, `PREFIX.0.encoder.key` …, as Hugging Face has it."""
        each = [(i, kind, part) for i in range(len(self.layers)) for kind in KINDS for part in ("key", "value")]
        return tuple(f"{prefix}.{i}.{kind}.{part}" for i, kind, part in each)

    def empty(self, batch: int, tokens: int = 0, kept: int = 0) -> tuple[Tensor, ...]:
        """Zeros for `tokens` of each target and `kept` of each source, in the order of the names."""
        return tuple(t for a, s in self.layers for t in (*a.empty(batch, tokens), *s.empty(batch, kept)))

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the decoder's inputs before the keys and values are called."""
        return (*((SOURCE_MASK,) if self.masked else ()), "input_ids", ENCODED)

    def axes(self, free: bool) -> tuple[tuple[str | None, ...], ...]:
        """The names of the free axes of the decoder's inputs; `free`: whether sources have any length."""
        source = SOURCE if free else None
        of_target, of_source = (TEXTS, None, PAST, None), (TEXTS, None, KEPT, None)
        each = (of_target, of_target, of_source, of_source)
        mask = ((TEXTS, source),) if self.masked else ()
        return (*mask, (TEXTS, TARGET), (TEXTS, source, None), *each * len(self.layers))


def split_graphs(graph_module: fx.GraphModule) -> SplitGraphs:
    """A captured encoder-decoder (unchanged) as two graphs.

    Args:
        graph_module: of an `EncoderDecoder`: the inputs of the source, `decoder_input_ids` and
            `decoder_attention_mask` int64 [B, T], to logits [B, T, V].

    Raises:
        InputError: the graph has no cross attention, does not say what a token attends to, or counts
            positions elsewhere, too.
    """
    encoder, decoder = (copy_of(graph_module, "student") for _ in range(2))
    assert isinstance(encoder, fx.GraphModule) and isinstance(decoder, fx.GraphModule)
    for half in (encoder, decoder):
        half.graph.set_codegen(fx.graph.CodeGen())
        half.meta.pop("structure", None)
    return _decoder(decoder, _encoder(encoder))


def first_and_next_inputs(
    parts: SplitGraphs, inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the decoder takes of whole inputs: for the first half of each target, and for the second one after it."""
    *source, ids, _ = inputs
    half = max(ids.shape[1] // 2, 1)
    with torch.no_grad():
        hidden = parts.encoder(*source)
        given = source[1:] if parts.masked else []
        first = (*given, ids[:, :half], hidden, *parts.empty(len(ids)))
        _, *kept = parts.decoder(*first)
    return first, (*given, ids[:, half:] if ids.shape[1] > half else ids[:, :half], hidden, *kept)


# ---- the encoder


def _encoder(found: fx.GraphModule) -> fx.GraphModule:
    graph = found.graph
    memory = hidden = encoder_states(attentions_by_kind(found).cross)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_before(inputs[-1].next):
        batch = graph.call_function(aten.sym_size.int, (inputs[0], 0))
    for size in [n for n in graph.nodes if n.target is aten.sym_size.int and n.args[1] == 0 and n is not batch]:
        if size.args[0] in inputs:
            size.replace_all_uses_with(batch)
    if len(shape(memory)) == 2:
        with graph.inserting_before(memory.next):
            sizes = (None, None, shape(memory)[-1])
            hidden = call(graph, aten.reshape.default, (memory, [batch, -1, sizes[-1]]), memory, shape=sizes)
    graph.output_node().args = (hidden,)
    return _without(found, inputs[-2:])


def _without(found: fx.GraphModule, inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The graph without inputs that nothing reads any more."""
    found.graph.eliminate_dead_code()
    for node in inputs:
        found.graph.erase_node(node)
    return finish(found)


# ---- the decoder


def _decoder(found: fx.GraphModule, encoder: fx.GraphModule) -> SplitGraphs:
    parts, graph = attentions_by_kind(found), found.graph
    memory = encoder_states(parts.cross)
    *source, ids, mask = (n for n in graph.nodes if n.op == "placeholder")
    layers = tuple((entry_of(o), entry_of(c)) for o, c in zip(parts.decoder, parts.cross, strict=True))
    halved = SplitGraphs(encoder, found, layers, masked=len(source) > 1)
    hidden = _input(graph, mask, ENCODED, (None, None, shape(memory)[-1]), memory)
    news = [n for o, c in zip(parts.decoder, parts.cross, strict=True) for n in (o.key, o.value, c.key, c.value)]
    pasts, last = list[fx.Node](), hidden
    for name, new in zip(halved.names("past"), news, strict=True):
        _, heads, _, width = shape(new)
        last = _input(graph, last, name, (None, heads, None, width), new)
        pasts.append(last)
    sizes = _Counts.add(graph, ids, hidden, pasts)
    new_length = _read_what_is_new(graph, memory, hidden, source, sizes)
    _free(hidden, shape(parts.cross[0].key)[2], new_length)
    _mask_all_tokens(found, ids, mask, sizes)
    presents = [appended(graph, past, new) for past, new in zip(pasts, news, strict=True)]
    output = graph.output_node()
    output.args = ((output.args[0], *presents),)
    graph.eliminate_dead_code()
    _refuse_other_positions(graph, sizes)
    if halved.masked:
        ids.prepend(source[1])
    _without(found, [source[0], mask])
    return halved


def _input(graph: fx.Graph, last: fx.Node, name: str, sizes: tuple[int | None, ...], like: fx.Node) -> fx.Node:
    """A float input behind `last`."""
    with graph.inserting_after(last):
        added = graph.placeholder(name.replace(".", "_"))
    added.meta.update(shape=sizes, dtype=like.meta["dtype"], layer=name)
    return added


@dataclass(frozen=True)
class _Counts:
    """Nodes for how many tokens there are."""

    batch: fx.Node
    new: fx.Node
    past: fx.Node
    total: fx.Node
    kept: fx.Node
    """tokens of the source whose keys and values are given"""
    source: fx.Node
    last: fx.Node
    """the node behind which others may stand"""

    @classmethod
    def add(cls, graph: fx.Graph, ids: fx.Node, hidden: fx.Node, pasts: Sequence[fx.Node]) -> _Counts:
        with graph.inserting_before(pasts[-1].next):
            batch, new = (graph.call_function(aten.sym_size.int, (ids, axis)) for axis in (0, 1))
            past = graph.call_function(aten.sym_size.int, (pasts[0], 2))
            kept = graph.call_function(aten.sym_size.int, (pasts[2], 2))
            source = graph.call_function(aten.sym_size.int, (hidden, 1))
            total = graph.call_function(operator.add, (past, new))
        return cls(batch, new, past, total, kept, source, total)


def _read_what_is_new(
    graph: fx.Graph, memory: fx.Node, hidden: fx.Node, source: Sequence[fx.Node], sizes: _Counts
) -> fx.Node:
    """In the place of `memory`, that part of `hidden` that no keys are given for; the source is as long as that.

    Returns that length.
    """
    before = [n for n in graph.nodes if n.target is aten.sym_size.int and n.args[0] in source]
    rows = len(shape(memory)) == 2
    with graph.inserting_before(sizes.last.next):
        part = call(graph, aten.slice.Tensor, (hidden, 1, sizes.kept, sizes.source), hidden)
        length = graph.call_function(aten.sym_size.int, (part, 1))
        flat = [-1, shape(memory)[-1]]
        read = call(graph, aten.reshape.default, (part, flat), memory) if rows else part
    memory.replace_all_uses_with(read)
    for size in before:
        size.replace_all_uses_with(length if size.args[1] == 1 else sizes.batch)
    return length


def _free(hidden: fx.Node, fixed: int | None, length: fx.Node) -> None:
    """Put the `length` of a source that is there where one that all sources have is written down."""
    for node in [n for n in below(hidden) if n.target is aten.reshape.default and len(shape(n)) > 2]:
        wanted: Any = node.args[1]
        if fixed is not None and wanted[1] == fixed:
            node.args = (node.args[0], [wanted[0], length, *wanted[2:]])
            node.meta["shape"] = (*shape(node)[:1], None, *shape(node)[2:])


def _mask_all_tokens(found: fx.GraphModule, ids: fx.Node, mask: fx.Node, sizes: _Counts) -> None:
    """Positions and mask of the new tokens among all; every other length of a target is that of the new ones."""
    graph, points = found.graph, found.meta.get("points", {})
    names = {n.name: n for n in graph.nodes}
    if not {QUERIES, KEYS, CAUSAL} <= {*points}:
        raise InputError(
            "two files: the graph does not say what a token attends to; compile what "
            "pqk.models.encoder_decoder.encoder_decoder gives"
        )
    queries, keys, causal = (names[points[name]] for name in (QUERIES, KEYS, CAUSAL))
    before = [n for n in graph.nodes if n.target is aten.sym_size.int and n.args[0] in (ids, mask)]
    with graph.inserting_before(sizes.last.next):
        order = call(graph, aten.arange.default, (sizes.total,), queries)
        own = call(graph, aten.arange.start, (sizes.past, sizes.total), queries)
        left = call(graph, aten.unsqueeze.default, (own, 1), queries, shape=(None, 1))
        seen = call(graph, aten.le.Tensor, (order, left), queries, shape=(None, None), dtype=torch.bool)
        added = call(graph, aten.where.Scalar, (seen, 0.0, causal.args[-1]), causal, shape=(None, None))
        for axis in (0, 0):
            added = call(graph, aten.unsqueeze.default, (added, axis), causal, shape=(1, *shape(added)))
    queries.replace_all_uses_with(own)
    keys.replace_all_uses_with(order)
    causal.replace_all_uses_with(added)
    for size in before:
        if size not in (sizes.batch, sizes.new):
            size.replace_all_uses_with(sizes.new if size.args[1] == 1 else sizes.batch)


def _refuse_other_positions(graph: fx.Graph, sizes: _Counts) -> None:
    """Raises `InputError` where positions of tokens are counted elsewhere than in the modules for them."""
    for node in graph.nodes:
        counted = str(node.target).startswith(("aten.arange.", "aten.cumsum."))
        if counted and sizes.total not in node.args:
            raise InputError(
                f"two files: {node.meta.get('layer', node.name)} counts positions of tokens by itself, so that "
                "its decoder cannot go on after tokens that are kept"
            )
