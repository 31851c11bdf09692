"""The rule for what an encoder begins with: rows of its tables, summed, normed and quantized in one launch.

    words[ids] + types[type ids] + positions[0 .. T-1] -> layer norm -> quantize

The tables stay int8 (`pqk.passes.quantize.embeddings`), dequantized row by row with a scale a column. Who reads the
norm itself, such as the first residual sum, gets its floats from the same launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import DEQUANTIZE, aten
from pqk.core.graph import arguments, attribute, call, operand, shape
from pqk.errors import Reason
from pqk.kernels.int8_embedding import IDS
from pqk.passes.fuse.rule import Match, Rule, launch
from pqk.passes.fuse.rules_attention import affine, both_results, norm_endings, norm_is_read, why_not_norm


@dataclass(frozen=True)
class EmbeddedRows:
    """One addend: rows of `table` [R, C] at `ids`; without ids those at 0, 1 … of a sequence, or its only row."""

    table: Tensor
    scale: Tensor | None
    ids: fx.Node | None = None

    def keywords(self, name: str, at: str | None = None) -> dict[str, Any]:
        """The arguments of the launch that read it: `name`s, `name`_scale, and the ids as `at`."""
        keywords: dict[str, Any] = {f"{name}s": self.table, f"{name}_scale": self.scale}
        if self.ids is None:
            return keywords | {at or f"{name}_ids": None}
        return keywords | {at or f"{name}_ids": call(self.ids.graph, aten.contiguous.default, (self.ids,), self.ids)}


class EmbeddingRule(Rule):
    """`pqk::int8_embedding`: a layer norm of a sum of looked-up rows, of which at least one is int8.

    The kernel adds words, types and positions in this order, as BERT does; another order is another last bit.
    """

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        if node.target is not aten.layer_norm.default:
            return ()
        addends = _addends(operand(node))
        if not any(_looked_up(n) is not None and n.target is DEQUANTIZE for n in addends):
            return ()
        facts = {"slots": _slots(root, addends)}
        return [Match(m.anchor, (), m.ending, facts) for m in norm_endings(root, node)]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        slots, total = match.facts["slots"], operand(match.anchor)
        if isinstance(slots, str):
            return slots
        if shape(match.anchor)[:-1] != shape(slots["word"].ids):
            return f"the embedding is not one launch: its {list(shape(match.anchor))} are no row for each token"
        if any(len(n.users) > 1 for n in _sums(total)):
            return "the embedding ends before its layer norm: others read the sum of its rows"
        return why_not_norm(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        slots: dict[str, EmbeddedRows] = match.facts["slots"]
        absent: dict[str, Any] = {f"{n}{s}": None for n in ("position", "type") for s in ("s", "_scale", "_ids")}
        with root.graph.inserting_before(match.anchor):
            keywords = absent | slots["word"].keywords("word", "ids")
            for name in slots.keys() - {"word"}:
                keywords |= slots[name].keywords(name)
            keywords |= affine(match) | {"normalize": True, "keep": norm_is_read(match)}
            return both_results(root, match, launch(root, "int8_embedding", match, shape(match.anchor), **keywords))


def _sums(total: fx.Node) -> list[fx.Node]:
    """The additions that `total` is made of."""
    if total.target is not aten.add.Tensor or total.kwargs or not all(isinstance(n, fx.Node) for n in total.args):
        return []
    return [total, *_sums(operand(total)), *_sums(operand(total, 1))]


def _addends(total: fx.Node) -> list[fx.Node]:
    if total not in (sums := _sums(total)):
        return [total]
    return [n for s in sums for n in (operand(s), operand(s, 1)) if n not in sums]


def _looked_up(node: fx.Node) -> fx.Node | None:
    """The look-up of an addend, dequantized or not."""
    source = operand(node) if node.target is DEQUANTIZE else node
    return source if source.target is aten.embedding.default and operand(source).op == "get_attr" else None


def _slots(root: fx.GraphModule, addends: list[fx.Node]) -> dict[str, EmbeddedRows] | str:
    """Which addend is the kernel's words, types and positions, or why they cannot be.

    The words are the longest table that is read at ids; another one at ids may be either of the others.
    """

    def rank(pair: tuple[fx.Node, fx.Node]) -> tuple[bool, int]:
        table, ids = operand(pair[1]), operand(pair[1], 1)
        return bool(shape(ids)) and _first_place(root, ids, shape(ids)[-1]) is None, shape(table)[0] or 0

    looked_up = [(n, look_up) for n in addends if (look_up := _looked_up(n)) is not None]
    words, look_up = max(looked_up, key=rank)
    if not rank((words, look_up))[0]:
        return "the embedding is not one launch: no table is read at the ids of a sequence"
    ids = operand(look_up, 1)
    rest = list(addends)
    rest.remove(words)
    slots: dict[str, EmbeddedRows] = {}
    for node in (words, *rest):
        rows = _rows(root, node, ids)
        if isinstance(rows, str):
            return f"the embedding is not one launch: {rows}"
        names = ("type", "position") if rows.ids is not None else ("type",) if len(rows.table) == 1 else ("position",)
        free = [name for name in (("word",) if node is words else names) if name not in slots]
        if not free:
            return "the embedding is not one launch: it adds more tables than words, types and positions"
        slots[free[0]] = rows
    return slots


def _rows(root: fx.GraphModule, node: fx.Node, ids: fx.Node) -> EmbeddedRows | str:
    """What an addend reads, beside words at `ids`, or why the kernel cannot read it."""
    layer = node.meta["layer"]
    if node.op == "get_attr":
        return _constant(attribute(root, str(node.target)).detach(), shape(ids), layer)
    look_up = _looked_up(node)
    if look_up is None:
        return f"{layer} is no row of a table"
    table, at, scale = attribute(root, str(operand(look_up).target)).detach(), operand(look_up, 1), None
    if node.target is DEQUANTIZE:
        scale, zero_point = (attribute(root, str(operand(node, i).target)) for i in (1, 2))
        if bool(zero_point.any()) or scale.ndim != 1 or node.args[3] != len(shape(node)) - 1:
            return f"{layer} is not dequantized with a scale a column and zero point 0"
        scale = scale[None]
    if table.dtype != (torch.float32 if scale is None else torch.int8):
        return f"the table of {layer} is {table.dtype}"
    first = _first_place(root, at, shape(ids)[-1])
    if first is not None:
        return EmbeddedRows(table[first:], scale)
    if shape(at) != shape(ids) or at.meta["dtype"] not in IDS:
        return f"{layer} is read at ids {list(shape(at))} of {at.meta['dtype']}, not at one int64 or int32 a token"
    return EmbeddedRows(table, scale, at)


def _constant(value: Tensor, ids: tuple[int | None, ...], layer: str) -> EmbeddedRows | str:
    """A tensor that is added to every token, or to every sequence."""
    rows = value.reshape(-1, value.shape[-1])
    if value.dtype == torch.float32 and (len(rows) == 1 or len(rows) == value.shape[-2] == ids[-1]):
        return EmbeddedRows(rows.contiguous(), None)
    return f"{layer} of {list(value.shape)} is neither one row nor one for each place"


def _first_place(root: fx.GraphModule, at: fx.Node, length: int | None) -> int | None:
    """k where `at` is k, k + 1 … along sequences of `length`: a slice of a constant that counts; else None."""
    a = arguments(at) if at.target is aten.slice.Tensor else {}
    source = a.get("self", at)
    if source.op != "get_attr" or shape(at)[-1] != length or any(n != 1 for n in shape(at)[:-1]):
        return None
    start = a.get("start") or 0
    if a and (a["dim"] % len(shape(at)) != len(shape(at)) - 1 or a["step"] != 1 or not isinstance(start, int)):
        return None
    places = attribute(root, str(source.target)).flatten()[start:]
    consecutive = torch.arange(len(places)) + places[:1]
    return int(places[0]) if len(places) and torch.equal(places, consecutive) and places[0] >= 0 else None
