"""Integer products that read the same value, as one: queries, keys and values; gate and up.

A decoder that makes one token at a time pays the start of every operator, and each `MatMulNBits` rounds what it reads
anew. One with the outputs of all of them computes the same numbers, as each output has a weight of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import MULTIPLY, NBITS, aten
from pqk.core.graph import attach, attribute, call, calls, free_path, operand, replace, shape, tensor_node


@dataclass(frozen=True)
class _Product:
    """An operator that multiplies what it reads by a stored weight."""

    read: int
    """how many arguments come first that are no part of the weight"""
    outputs: tuple[int, ...]
    """for each argument of the weight the axis of the product's outputs; None may be given for all but the first"""


PRODUCTS: dict[Any, _Product] = {NBITS: _Product(1, (0, 0, 0)), MULTIPLY: _Product(3, (1, 0))}


def join_siblings(graph_module: fx.GraphModule) -> None:
    """Give products that read the same value one weight, and each reader its part of the result."""
    groups: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in calls(graph_module.graph, *PRODUCTS):
        kind = PRODUCTS[node.target]
        parts = node.args[kind.read :]
        if not all(part is None or _is_stored(part) for part in parts):
            continue
        others = [
            None if part is None else _other_sizes(attribute(graph_module, str(part.target)), axis)  # type: ignore[union-attr]
            for part, axis in zip(parts, kind.outputs, strict=True)
        ]
        groups.setdefault((node.target, *node.args[: kind.read], *others), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _join(graph_module, group)


def _is_stored(argument: Any) -> bool:
    """Whether an argument is a tensor of the module."""
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _other_sizes(tensor: Tensor, axis: int) -> tuple[Any, ...]:
    return (tensor.dtype, *tensor.shape[:axis], *tensor.shape[axis + 1 :])


def _join(graph_module: fx.GraphModule, group: list[fx.Node]) -> None:
    graph, first = graph_module.graph, group[0]
    kind, sizes = PRODUCTS[first.target], [shape(node)[-1] for node in group]
    with graph.inserting_before(first):
        parts = [_joined_tensor(graph_module, group, kind.read + i, axis) for i, axis in enumerate(kind.outputs)]
        wide = (*shape(first)[:-1], sum(size or 0 for size in sizes))
        product = call(graph, first.target, (*first.args[: kind.read], *parts), first, shape=wide)
        split = call(graph, aten.split_with_sizes.default, (product, sizes, -1), first)
        split.meta.pop("shape")
        found = [call(graph, operator.getitem, (split, i), node) for i, node in enumerate(group)]
    for node, part in zip(group, found, strict=True):
        replace(graph_module, node, part)


def _joined_tensor(graph_module: fx.GraphModule, group: list[fx.Node], index: int, axis: int) -> fx.Node | None:
    """The tensors that the products have as an argument, one behind the other; None where they have none."""
    if group[0].args[index] is None:
        return None
    paths = [str(operand(node, index).target) for node in group]
    tensors: list[Tensor] = [attribute(graph_module, path).detach() for path in paths]
    path = free_path(graph_module, f"{paths[0]}_joined")
    return tensor_node(graph_module, attach(graph_module, path, torch.cat(tensors, axis)))
