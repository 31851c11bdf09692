"""Writes into parts of a tensor (`y[:, :k] = x`), as the parts that a tensor is then made of.

Export turns such a write into operators that copy and scatter, of which some cannot be trained, and none has an integer
kernel. What they leave is a concatenation of slices; written at constant places, a choice among rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import aten
from pqk.core.graph import arguments, attach, attribute, call, calls, free_path, operand, replace, shape, tensor_node

Piece = tuple[fx.Node, int, int]
"""a tensor and the part of it that is meant, from and to"""


def plain_writes(graph_module: fx.GraphModule) -> None:
    """Rewrite copies, scatters of slices and writes at constant indices or by a mask."""
    graph = graph_module.graph
    for node in calls(graph, aten.copy.default):
        with graph.inserting_before(node):
            target, source = operand(node), operand(node, 1)
            if source.meta["dtype"] != target.meta["dtype"]:
                dtype = target.meta["dtype"]
                source = call(graph, aten.to.dtype, (source, dtype), source, dtype=dtype, layer=_named(node, "to"))
            source = _expanded(node, source, shape(target), target)
        replace(graph_module, node, source)
    joined: dict[fx.Node, tuple[int, list[Piece]]] = {}
    for node in calls(graph, aten.slice_scatter.default, aten.select_scatter.default):
        _join(graph_module, node, joined)
    for node in calls(graph, aten.index_put.default):
        _put(graph_module, node)
    graph.eliminate_dead_code()  # what was overwritten


def _named(node: fx.Node, what: str) -> str:
    return f"{node.meta['layer']}.{what}"


def _expanded(node: fx.Node, value: fx.Node, wanted: tuple[int | None, ...], like: fx.Node) -> fx.Node:
    """`value` broadcast to a shape whose free sizes are those of the same axes of `like`, at the insertion point."""
    missing = len(wanted) - len(shape(value))
    have = (*(1 for _ in range(missing)), *shape(value))
    if not missing and have == wanted:
        return value
    sizes: list[Any] = []
    for axis, (want, size) in enumerate(zip(wanted, have, strict=True)):
        if want is not None or size is None:
            sizes.append(-1 if want is None else want)
        else:
            length = node.graph.call_function(aten.sym_size.int, (like, axis))
            length.meta["layer"] = _named(node, "size")
            sizes.append(length)
    return call(node.graph, aten.expand.default, (value, sizes), value, shape=wanted, layer=_named(node, "expand"))


def _join(graph_module: fx.GraphModule, node: fx.Node, joined: dict[fx.Node, tuple[int, list[Piece]]]) -> None:
    """What a write of consecutive rows leaves: the rows before, the new ones, and the rows behind."""
    a, graph, base = arguments(node), graph_module.graph, operand(node)
    axis = a["dim"] % len(shape(base))
    size, source = shape(base)[axis], a["src"]
    if node.target is aten.select_scatter.default:
        start, stop, step = a["index"], a["index"] + 1 or None, 1
    else:
        start, stop, step = a["start"] or 0, a["end"], a["step"]
    if size is None:
        if start == 0 and step == 1 and isinstance(stop, int | None) and (stop is None or stop >= 1 << 62):
            replace(graph_module, node, source)  # all of a free axis
        return
    if not all(isinstance(bound, int | None) for bound in (start, stop, step)):
        return
    positions = range(size)[start:stop:step]
    with graph.inserting_before(node):
        if node.target is aten.select_scatter.default:
            shaped = (*shape(base)[:axis], 1, *shape(base)[axis + 1 :])
            source = call(
                graph, aten.unsqueeze.default, (source, axis), base, shape=shaped, layer=_named(node, "unsqueeze")
            )
        if step != 1:
            replace(graph_module, node, _rows_put(graph_module, node, base, source, axis, list(positions)))
            return
        start, stop = positions.start, max(positions.start, positions.stop)
        along, pieces = joined.get(base, (axis, [(base, 0, size)]))
        if along != axis:
            pieces = [(base, 0, size)]
        pieces = [*_part(pieces, 0, start), (source, 0, stop - start), *_part(pieces, stop, size)]
        pieces = [piece for piece in pieces if piece[1] < piece[2]]
        parts = [_slice(node, piece, axis) for piece in pieces]
        result = parts[0] if len(parts) == 1 else call(graph, aten.cat.default, (parts, axis), node)
    joined[result] = (axis, pieces)
    replace(graph_module, node, result)


def _part(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """The pieces of what lies between two places of the tensor that `pieces` make up."""
    found, at = [], 0
    for source, low, high in pieces:
        first, last = max(start, at), min(stop, at + high - low)
        if first < last:
            found.append((source, low + first - at, low + last - at))
        at += high - low
    return found


def _slice(node: fx.Node, piece: Piece, axis: int) -> fx.Node:
    source, low, high = piece
    if (low, high) == (0, shape(source)[axis]):
        return source
    size = (*shape(source)[:axis], high - low, *shape(source)[axis + 1 :])
    return call(
        node.graph, aten.slice.Tensor, (source, axis, low, high), source, shape=size, layer=_named(node, "slice")
    )


def _put(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Values put at constant indices of adjacent axes, or one value where a mask is true."""
    a, graph, base = arguments(node), graph_module.graph, operand(node)
    indices: list[fx.Node | None] = list(a["indices"])
    places = [axis for axis, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if a["accumulate"] or places != list(range(places[0], places[-1] + 1)):
        return
    if all(index.op == "get_attr" for index in given):
        _put_at(graph_module, node, places[0], [attribute(graph_module, str(index.target)) for index in given])
    elif len(given) == 1 and given[0].meta.get("dtype") == torch.bool and all(size == 1 for size in shape(a["values"])):
        mask, value = given[0], a["values"]
        with graph.inserting_before(node):
            for axis in itertools.chain(range(places[0]), range(places[0] + len(shape(mask)), len(shape(base)))):
                wide = (*shape(mask)[:axis], 1, *shape(mask)[axis:])
                mask = call(
                    graph, aten.unsqueeze.default, (mask, axis), mask, shape=wide, layer=_named(node, "unsqueeze")
                )
            if shape(value):
                value = call(graph, aten.reshape.default, (value, []), value, shape=(), layer=_named(node, "value"))
            chosen = call(graph, aten.where.self, (mask, value, base), node)
        replace(graph_module, node, chosen)


def _put_at(graph_module: fx.GraphModule, node: fx.Node, first: int, constants: list[Tensor]) -> None:
    """One axis at a time in its place; several are one while rows are chosen."""
    base, values = operand(node), arguments(node)["values"]
    places = [i for c in constants for i in (c.nonzero(as_tuple=True) if c.dtype == torch.bool else (c.long(),))]
    before, behind = shape(base)[:first], shape(base)[first + len(places) :]
    sizes = [size for size in shape(base)[first : first + len(places)] if size is not None]
    several = len(places) > 1 or places[0].dim() != 1
    if len(sizes) != len(places) or (several and sum(size is None for size in (*before, *behind)) > 1):
        return
    places = list(torch.broadcast_tensors(*(i % size for i, size in zip(places, sizes, strict=True))))
    flat = torch.zeros_like(places[0])
    for i, size in zip(places, sizes, strict=True):
        flat = flat * size + i
    with node.graph.inserting_before(node):
        rows = _expanded(node, values, (*before, *flat.shape, *behind), base)
        source = base
        if several:
            rows = _reshaped(node, rows, (*before, flat.numel(), *behind))
            source = _reshaped(node, base, (*before, math.prod(sizes), *behind))
        result = _rows_put(graph_module, node, source, rows, first, flat.flatten().tolist())
        if several:
            result = _reshaped(node, result, shape(base))
    replace(graph_module, node, result)


def _reshaped(node: fx.Node, x: fx.Node, size: tuple[int | None, ...]) -> fx.Node:
    sizes = [-1 if s is None else s for s in size]
    return call(node.graph, aten.reshape.default, (x, sizes), x, shape=size, layer=_named(node, "reshape"))


def _rows_put(
    graph_module: fx.GraphModule, node: fx.Node, base: fx.Node, rows: fx.Node, axis: int, positions: list[int]
) -> fx.Node:
    """`base` with `rows` at `positions` of `axis`, at the insertion point: rows of both, chosen."""
    graph, size = graph_module.graph, shape(base)[axis]
    assert size is not None
    chosen = list(range(size))
    for count, position in enumerate(positions):
        chosen[position] = size + count
    beside = (*shape(base)[:axis], size + len(positions), *shape(base)[axis + 1 :])
    both = call(graph, aten.cat.default, ([base, rows], axis), base, shape=beside, layer=_named(node, "cat"))
    index = tensor_node(
        graph_module, attach(graph_module, free_path(graph_module, f"constants.{node.name}"), torch.tensor(chosen))
    )
    return call(graph, aten.index_select.default, (both, axis, index), base, layer=node.meta["layer"])
