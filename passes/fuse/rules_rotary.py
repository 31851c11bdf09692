"""The rule for rotary embeddings: queries and keys of a layer, turned by one table, in one launch.

    x * cos + cat(-x[R/2:], x[:R/2]) * sin          and, of the rest of a head that is not turned, cat(…, x[R:])

Attention's products stand in float in a model that keeps keys and values, and so does what is turned before them.
Cosine and sine are computed once for all layers, by torch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from pqk.core.aten import aten
from pqk.core.graph import arguments, call, operand, shape
from pqk.core.graph import replace as replace_node
from pqk.errors import Reason
from pqk.kernels import rotary
from pqk.passes.fuse.epilogue import Ending
from pqk.passes.fuse.rule import Match, Rule, launch, stand
from pqk.passes.fuse.rules_attention import heads_second


@dataclass(frozen=True)
class Turn:
    """A value [B, H, S, D] of which the first channels are turned; `end` is the result."""

    x: fx.Node
    cos: fx.Node
    """[B, S, R] or [1, S, R]"""
    sin: fx.Node
    end: fx.Node


class RotaryRule(Rule):
    """`pqk::rotary`: the turn that begins at this sum, and the next one by the same table, of which neither's result is
    read before both are there."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        first = turn(node)
        if first is None:
            return ()
        others = _turns_behind(first.end)
        second = next((t for t in others if (t.cos, t.sin) == (first.cos, first.sin)), None)
        pairs = [] if second is None else [(first, second)]
        return [Match(node, (), Ending(turns[-1].end), {"turns": turns}) for turns in (*pairs, (first,))]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        turns: tuple[Turn, ...] = match.facts["turns"]
        last = turns[-1].end
        places = {n: i for i, n in enumerate(root.graph.nodes)}
        if any(places[user] < places[last] for t in turns for user in t.end.users):
            return "rotary: what is turned first is read before the other is there; each is a launch of its own"
        heads = [torch.empty(_one(shape(t.x)), dtype=t.x.meta["dtype"], device="meta").transpose(1, 2) for t in turns]
        tables = [
            torch.empty(_one(shape(n)), dtype=n.meta["dtype"], device="meta") for n in (turns[0].cos, turns[0].sin)
        ]
        reason = rotary.why_not_supported(rotary.Rotary(heads[0], heads[1] if len(heads) == 2 else None, *tables))
        if reason is None and any(t.dtype != torch.float32 for t in (*heads, *tables)):
            reason = f"{heads[0].dtype} by tables of {tables[0].dtype}; in a graph both are float32"
        return None if reason is None else f"rotary: {reason}"

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        turns: tuple[Turn, ...] = match.facts["turns"]
        named = dict.fromkeys("qk", None) | {name: heads_second(t.x) for name, t in zip("qk", turns, strict=False)}
        node = launch(root, "rotary", match, (), **named, cos=turns[0].cos, sin=turns[0].sin)
        del node.meta["stands_for"]
        results = []
        for i, each in enumerate(turns):
            part = call(root.graph, operator.getitem, (node, i), each.end)
            results.append(stand(part, each.end))
        for each, result in zip(turns[:-1], results, strict=False):
            replace_node(root, each.end, result)
        return results[-1]


def turn(node: fx.Node) -> Turn | None:
    """The turn whose sum of two products is `node`; None for any other node."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs or len(shape(node)) != 4:
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        parts = [_factors(p) for p in (straight, crossed)]
        if parts[0] is None or parts[1] is None:
            continue
        for x, cos in (parts[0], parts[0][::-1]):
            for other, sin in (parts[1], parts[1][::-1]):
                tables = [_table(t) for t in (cos, sin)]
                if _is_other_half(other, x) and tables[0] is not None and tables[1] is not None:
                    return _whole(Turn(x, tables[0], tables[1], node))
    return None


def _turns_behind(node: fx.Node) -> Iterator[Turn]:
    while node.op != "output":
        node = node.next
        if node.op == "call_function" and (found := turn(node)) is not None:
            yield found


def _factors(node: object) -> tuple[fx.Node, fx.Node] | None:
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or len(node.users) != 1:
        return None
    one, other = node.args
    return (one, other) if isinstance(one, fx.Node) and isinstance(other, fx.Node) else None


def _table(node: fx.Node) -> fx.Node | None:
    """[B, S, R] that `node` is, with an axis for heads put in."""
    if node.target is not aten.unsqueeze.default or len(shape(node)) != 4 or arguments(node)["dim"] % 4 != 1:
        return None
    return operand(node)


def _is_other_half(node: fx.Node, x: fx.Node) -> bool:
    """Whether `node` is `cat(-x[..., R/2:], x[..., :R/2])`."""
    if node.target is not aten.cat.default or arguments(node)["dim"] % 4 != 3 or len(node.users) != 1:
        return False
    width, parts = shape(x)[-1], node.args[0]
    if width is None or width % 2 or not isinstance(parts, list | tuple) or len(parts) != 2:
        return False
    upper, lower = parts
    if not isinstance(upper, fx.Node) or upper.target is not aten.neg.default:
        return False
    return _is_slice(operand(upper), x, width // 2, width) and _is_slice(lower, x, 0, width // 2)


def _is_slice(node: object, x: fx.Node, begin: int, end: int) -> bool:
    """Whether `node` is the channels `begin` to `end` of `x`."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor or node.args[0] is not x:
        return False
    a, width = arguments(node), shape(x)[-1] or 0
    start, stop = a["start"] or 0, min(width, width if a["end"] is None else a["end"])
    return (a["dim"] % 4, a["step"], start, stop) == (3, 1, begin, end)


def _whole(part: Turn) -> Turn:
    """The turn of whole heads, where `part` is that of their first channels and the others are put behind it."""
    x, width = part.x, shape(part.end)[-1] or 0
    if x.target is not aten.slice.Tensor or len(part.end.users) != 1 or not _is_slice(x, operand(x), 0, width):
        return part
    (both,) = part.end.users
    whole = operand(x)
    if both.target is not aten.cat.default or arguments(both)["dim"] % 4 != 3:
        return part
    parts = both.args[0]
    rest = isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is part.end
    if not rest or not _is_slice(parts[1], whole, width, shape(whole)[-1] or 0):  # type: ignore[index]
        return part
    return Turn(whole, part.cos, part.sin, both)


def _one(size: tuple[int | None, ...]) -> list[int]:
    return [1 if n is None else n for n in size]
