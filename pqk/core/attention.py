"""Attention in a captured graph, found by what it computes: a softmax between two products of four axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from pqk.core.aten import aten
from pqk.core.graph import operand, shape
from pqk.errors import InputError

POSITIONS, SIGHTS = "positions", ("sight", "near")
"""the modules of `pqk.models.decoder.Decoder` that say where a token stands, and what it sees"""
SOFTMAX, MATMUL = aten.softmax.int, aten.matmul.default


@dataclass(frozen=True)
class Site:
    """An attention in a captured graph, by the nodes whose values its cache holds: [B, G, S, D]."""

    query: fx.Node
    """[B, H, S, D]"""
    key: fx.Node
    value: fx.Node
    total: fx.Node
    """scores with what is added where a token does not see another"""
    products: tuple[fx.Node, fx.Node]
    """of queries with keys, and of shares with values"""


def sites(graph_module: fx.GraphModule) -> list[Site]:
    """Every attention in order. Raises `InputError` where a softmax is not that of two products of four axes."""
    return [_site(node) for node in graph_module.graph.nodes if node.target is SOFTMAX]


def _site(softmax: fx.Node) -> Site:
    scores = next((n for n in _upwards(softmax) if n.target is MATMUL), None)
    shares: fx.Node | None = softmax
    while shares is not None and shares.target is not MATMUL:
        shares = next(iter(shares.users), None) if len(shares.users) == 1 else None
    turned = None if scores is None else operand(scores, 1)
    if shares is None or turned is None or turned.target is not aten.transpose.int or len(shape(operand(turned))) != 4:
        raise InputError(
            f"attention: what follows {softmax.meta.get('layer', softmax.name)} is no attention of two products of "
            "four axes, whose keys and values could be kept"
        )
    assert scores is not None
    query = next((operand(n) for n in _upwards(scores) if n.target is aten.reshape.default), operand(scores))
    return Site(query, operand(turned), operand(shares, 1), operand(softmax), (scores, shares))


def _upwards(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes above `node` by first operands, the nearest first."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
