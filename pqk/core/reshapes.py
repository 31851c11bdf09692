"""Tokens as rows: reshapes between [B, T, C] and [B*T, C] whose sizes are spelled out."""

from __future__ import annotations

from typing import Any

from torch import fx

from pqk.core.aten import SAME_SHAPE, aten
from pqk.core.graph import arguments, call, is_float, operand, shape


def as_rows(x: fx.Node, layer: str) -> fx.Node:
    """`x` [..., C] as [N, C], at the insertion point."""
    columns = shape(x)[-1]
    return call(x.graph, aten.reshape.default, (x, [-1, columns]), x, shape=(None, columns), layer=layer)


def spelled_sizes(graph_module: fx.GraphModule, x: fx.Node, size_of_result: tuple[int | None, ...]) -> list[Any]:
    """The sizes of a reshape to `size_of_result`, where the free sizes are those of `x`.

    Several free sizes are all spelled out: what follows from a -1 is a quotient that grows from layer to layer.
    """
    free = [axis for axis, size in enumerate(size_of_result) if size is None]
    lengths = {axis: _length(graph_module, x, axis) if len(free) > 1 else -1 for axis in free}
    return [lengths.get(axis, size) for axis, size in enumerate(size_of_result)]


def _length(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> fx.Node:
    """The node of a free size, read where it enters the graph: what lies between would be kept alive for it."""
    while True:
        if x.target is aten.reshape.default:
            size = arguments(x)["shape"][axis]
            if isinstance(size, fx.Node):
                return size
        if x.target is aten.embedding.default and axis < len(shape(operand(x, 1))):
            x = operand(x, 1)
            continue
        before = [n for n in x.all_input_nodes if x.target in SAME_SHAPE and _like(n, x, axis)]
        if not before:
            break
        x = before[0]
    graph = graph_module.graph
    behind = x if x.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(behind):
        node = graph.call_function(aten.sym_size.int, (x, axis))
    node.meta["layer"] = f"{x.meta['layer']}.size"
    return node


def _like(node: fx.Node, x: fx.Node, axis: int) -> bool:
    """Whether `node` has the axes of `x` as far as `axis`, of which `axis` is free in both."""
    return is_float(node) and len(shape(node)) == len(shape(x)) and shape(node)[axis] is None
