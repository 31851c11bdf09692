"""Attention in a captured graph, found by what it computes: a softmax between two products of four axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from pqk.core.aten import DEQUANTIZE, aten
from pqk.core.graph import is_float, operand, shape
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
    scores = next((n for n in above(softmax) if n.target is MATMUL), None)
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
    query = next((operand(n) for n in above(scores) if n.target is aten.reshape.default), operand(scores))
    return Site(query, operand(turned), operand(shares, 1), operand(softmax), (scores, shares))


@dataclass(frozen=True)
class AttentionsByKind:
    """The attentions of a captured encoder-decoder, layer by layer."""

    encoder: list[Site]
    """self-attention of the encoder"""
    decoder: list[Site]
    """self-attention of the decoder"""
    cross: list[Site]
    """of the decoder, to the source"""


def attentions_by_kind(graph_module: fx.GraphModule) -> AttentionsByKind:
    """The attentions of a captured encoder-decoder, whose last inputs but one are the target's tokens.

    Raises `InputError` where its decoder's layers do not have two each: self-attention and cross-attention.
    """
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    target = below(inputs[-2]) if len(inputs) > 2 else set()
    every = sites(graph_module)
    encoder = [site for site in every if site.query not in target]
    decoder = [site for site in every if site.key in target]
    cross = [site for site in every if site.query in target and site.key not in target]
    if not cross or len(decoder) != len(cross):
        raise InputError(
            "attention: every layer of a decoder has one within the target and one to the source; here are "
            f"{len(decoder)} and {len(cross)}"
        )
    return AttentionsByKind(encoder, decoder, cross)


def encoder_states(cross: Sequence[Site]) -> fx.Node:
    """The encoder's hidden states, [B, S, C] or as rows: what keys and values of cross-attention are made of."""
    chains = [[end, *above(end)] for site in cross for end in (site.key, site.value)]
    common = next(node for node in chains[0] if all(node in chain for chain in chains[1:]))
    while not is_float(common) or common.target is DEQUANTIZE:  # the integers of it, which several layers read
        common = operand(common)
    if common.target is aten.reshape.default and len(shape(operand(common))) == 3:
        common = operand(common)
    return common


def below(node: fx.Node) -> set[fx.Node]:
    """The node and every node that is computed from its values; sizes are none."""
    found, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found and user.target is not aten.sym_size.int:
                found.add(user)
                waiting.append(user)
    return found


def above(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes above `node` by first operands, the nearest first."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
