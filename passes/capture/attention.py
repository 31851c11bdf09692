"""Scaled dot-product attention as the matmuls that it is made of: they have integer kernels, the operator has none."""

from __future__ import annotations

import math

import torch
from torch import fx

from pqk.core.aten import aten
from pqk.core.graph import arguments, attach, attribute, call, free_path, is_float, replace, shape, tensor_node

LOWEST = torch.finfo(torch.float32).min
"""what a position that is not attended to scores: minus infinity has no gradient where a whole row is masked"""


def plain_attention(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Rewrites `node` as `softmax(q @ kᵀ * scale + mask) @ v`; one that draws, or is causal of free length, stays."""
    a, graph, layer = arguments(node), graph_module.graph, node.meta["layer"]
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    free = None in (shape(q)[-2], shape(k)[-2])
    if a["dropout_p"] or (a["is_causal"] and (free or mask is not None)):
        return
    groups = _repeats(q, k) if a["enable_gqa"] else 1
    if groups is None:
        return
    scale = a["scale"] or 1 / math.sqrt(shape(q)[-1])  # type: ignore[arg-type]
    with graph.inserting_before(node):
        if groups > 1:
            k, v = (_repeated(x, groups, f"{layer}.{name}") for x, name in ((k, "keys"), (v, "values_of")))
        if a["is_causal"]:
            mask = _causal(graph_module, shape(q)[-2], shape(k)[-2])  # type: ignore[arg-type]
        scores, across = (*shape(q)[:-1], shape(k)[-2]), (*shape(k)[:-2], shape(k)[-1], shape(k)[-2])
        transposed = call(graph, aten.transpose.int, (k, -2, -1), k, shape=across, layer=f"{layer}.transpose")
        score = call(graph, aten.matmul.default, (q, transposed), node, shape=scores, layer=f"{layer}.scores")
        score = call(graph, aten.mul.Tensor, (score, scale), score, layer=f"{layer}.scale")
        if mask is not None and is_float(mask):
            score = call(graph, aten.add.Tensor, (score, mask), score, layer=f"{layer}.mask")
        elif mask is not None:
            lowest = _constant(graph_module, "lowest", torch.full((1,), LOWEST))
            score = call(graph, aten.where.self, (mask, score, lowest), score, layer=f"{layer}.mask")
        shares = call(graph, aten.softmax.int, (score, -1), score, layer=f"{layer}.softmax")
        if mask is not None and not is_float(mask) and not _reaches_all(graph_module, mask):
            some = call(graph, aten.any.dim, (mask, -1, True), mask, shape=(*shape(mask)[:-1], 1), layer=f"{layer}.any")
            zero = _constant(graph_module, "zero", torch.zeros(1))
            shares = call(graph, aten.where.self, (some, shares, zero), shares, layer=f"{layer}.attended")
        values = call(graph, aten.matmul.default, (shares, v), node, layer=f"{layer}.values")
    replace(graph_module, node, values)


def _repeats(q: fx.Node, k: fx.Node) -> int | None:
    """How many heads of queries share one of keys; None where shapes do not tell."""
    heads, shared = shape(q)[-3], shape(k)[-3]
    return None if heads is None or shared is None or len(shape(k)) != 4 else heads // shared


def _repeated(x: fx.Node, groups: int, layer: str) -> fx.Node:
    """Heads [B, H, T, D] as [B, H * groups, T, D], each repeated in its place."""
    graph, (batch, heads, tokens, width) = x.graph, shape(x)
    apart, wide = (batch, heads, 1, tokens, width), (batch, heads, groups, tokens, width)
    x = call(graph, aten.unsqueeze.default, (x, 2), x, shape=apart, layer=f"{layer}.unsqueeze")
    x = call(graph, aten.expand.default, (x, [-1, -1, groups, -1, -1]), x, shape=wide, layer=f"{layer}.expand")
    together = (batch, heads * groups, tokens, width)  # type: ignore[operator]
    return call(graph, aten.flatten.using_ints, (x, 1, 2), x, shape=together, layer=f"{layer}.flatten")


def _causal(graph_module: fx.GraphModule, queries: int, keys: int) -> fx.Node:
    """The mask [T, S] of the positions up to a query's own."""
    return _constant(graph_module, f"causal_{queries}_{keys}", torch.ones(queries, keys, dtype=torch.bool).tril())


def _constant(graph_module: fx.GraphModule, name: str, value: torch.Tensor) -> fx.Node:
    path = f"constants.{name}"
    if free_path(graph_module, path) == path:
        attach(graph_module, path, value)
    return tensor_node(graph_module, path)


def _reaches_all(graph_module: fx.GraphModule, mask: fx.Node) -> bool:
    """Whether a mask is known, and every query attends to something."""
    return mask.op == "get_attr" and bool(attribute(graph_module, str(mask.target)).any(-1).all())
