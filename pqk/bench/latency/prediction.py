"""How long networks take by the latency table: the sum of their layers and operators, and a constant for the call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pqk.bench.latency.executed import ExecutedNode
from pqk.bench.latency.table import LatencyTable
from pqk.core.run_context import Channels, TimesByWidth, WidthPair


def predict(table: LatencyTable, nodes: Iterable[ExecutedNode]) -> float:
    """Milliseconds of a network that executes `nodes`. What the table does not know is measured."""
    nodes = list(nodes)
    table.prepare((n.shape, n.channels) for n in nodes if n.shape is not None)
    return table.call + sum(node_milliseconds(table, n) for n in nodes)


def node_milliseconds(table: LatencyTable, node: ExecutedNode, channels: WidthPair | None = None) -> float:
    """Milliseconds of a node, with other `channels` where it is a layer."""
    if node.shape is None:
        return table.light(node.kind, node.elements)
    return table.layer(node.shape, channels or node.channels)


def layer_times(table: LatencyTable, nodes: Sequence[ExecutedNode], asked: Channels) -> TimesByWidth:
    """What a network takes whose layers have other channels: `asked` are those by layer, in and out.

    A layer's own node is interpolated. What follows it, as sums and pools, has as many elements for each channel that
    it makes; a product of two values, as attention's, takes as long for each.
    """
    heavy: list[tuple[ExecutedNode, WidthPair]] = []
    owners: dict[str, ExecutedNode] = {}
    for node in nodes:
        if node.layer in asked and node.shape is not None:
            owners.setdefault(node.layer, node)
    for node in nodes:
        if node.shape is not None:
            wanted = asked[node.layer] if owners.get(node.layer) is node else ()
            heavy += [(node, node.channels), *((node, channels) for channels in wanted)]
    table.prepare((n.shape, channels) for n, channels in heavy if n.shape is not None)
    layers = {
        layer: [_with_followers(table, nodes, owner, channels) for channels in asked[layer]]
        for layer, owner in owners.items()
    }
    rest = table.call + sum(node_milliseconds(table, n) for n in nodes if n.layer not in owners)
    return TimesByWidth(layers, rest)


def _with_followers(
    table: LatencyTable, nodes: Sequence[ExecutedNode], owner: ExecutedNode, channels: WidthPair
) -> float:
    share, total = channels[1] / owner.channels[1], node_milliseconds(table, owner, channels)
    for node in nodes:
        if node.layer == owner.layer and node is not owner:
            if node.shape is None:
                total += table.light(node.kind, round(share * node.elements))
            else:
                total += share * node_milliseconds(table, node)
    return total
