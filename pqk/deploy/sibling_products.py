"""Products in blocks that read the same value, as one: queries, keys and values; gate and up.

A decoder that makes one token at a time pays the start of every operator, and each `MatMulNBits` rounds what it reads
anew. One with the rows of all of them computes the same numbers, as each output has a row of its own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import NBITS, aten
from pqk.core.graph import attach, attribute, call, calls, free_path, operand, replace, shape, tensor_node


def join_siblings(graph_module: fx.GraphModule) -> None:
    """Give products that read the same value one weight, and each reader its part of the result."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in calls(graph_module.graph, NBITS):
        weights = [attribute(graph_module, str(operand(node, i).target)) for i in (1, 2) if _is_stored(node, i)]
        if len(weights) == 2:
            key = (operand(node), weights[0].shape[1:], node.args[3] is None)
            groups.setdefault(key, []).append(node)
    for group in groups.values():
        if len(group) > 1 and all(node.args[3] is None or _is_stored(node, 3) for node in group):
            _join(graph_module, group)


def _is_stored(node: fx.Node, index: int) -> bool:
    """Whether an argument is a tensor of the module."""
    argument = node.args[index]
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _join(graph_module: fx.GraphModule, group: list[fx.Node]) -> None:
    graph, first = graph_module.graph, group[0]
    sizes = [shape(node)[-1] for node in group]
    with graph.inserting_before(first):
        parts = [_joined_tensor(graph_module, group, i) for i in (1, 2, 3)]
        wide = (*shape(first)[:-1], sum(size or 0 for size in sizes))
        product = call(graph, NBITS, (operand(first), *parts), first, shape=wide)
        split = call(graph, aten.split_with_sizes.default, (product, sizes, -1), first)
        split.meta.pop("shape")
        found = [call(graph, operator.getitem, (split, i), node) for i, node in enumerate(group)]
    for node, part in zip(group, found, strict=True):
        replace(graph_module, node, part)


def _joined_tensor(graph_module: fx.GraphModule, group: list[fx.Node], index: int) -> fx.Node | None:
    """The tensors that the products have as an argument, one behind the other; None where they have none."""
    if group[0].args[index] is None:
        return None
    paths = [str(operand(node, index).target) for node in group]
    tensors: list[Tensor] = [attribute(graph_module, path).detach() for path in paths]
    path = free_path(graph_module, f"{paths[0]}_joined")
    return tensor_node(graph_module, attach(graph_module, path, torch.cat(tensors)))
