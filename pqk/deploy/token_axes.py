"""Rows as tokens again: what works by row takes [B, S, C], so that reshapes between the two go.

The graph that trains gives every linear layer two axes, and `convert` lets rows run from one attention to the next. A
decoder is called for one token at a time: there a reshape costs as much as a product, and ONNX's operators for heads
take three axes.
"""

from __future__ import annotations

import math
import operator

from torch import fx

from pqk.core.aten import BY_ROW, DYNAMIC, MULTIPLY, NBITS, aten
from pqk.core.graph import call, operand, replace, shape

ANY_RANK = frozenset((*BY_ROW, aten.linear.default, DYNAMIC, MULTIPLY, NBITS, operator.getitem))
"""operators that compute the same for rows as for tokens, whatever is constant in them"""


def rows_to_tokens(graph_module: fx.GraphModule) -> None:
    """Let what works by row take [B, S, C] in the place of [B*S, C]; reshapes between them are dead afterwards."""
    tokens: dict[fx.Node, fx.Node] = {}
    """what has or had two axes -> the same with three"""
    varying: set[fx.Node] = set()
    undone: dict[fx.Node, fx.Node] = {}
    """a reshape to three axes -> what has them already"""
    for node in list(graph_module.graph.nodes):
        if node.op == "placeholder" or any(n in varying for n in node.all_input_nodes):
            varying.add(node)
        if node.op != "call_function":
            continue
        rows = [n for n in node.all_input_nodes if n in tokens]
        if node.target is aten.reshape.default:
            _reshape(node, tokens, undone)
        elif rows and node.target in ANY_RANK and _lifts(node, tokens, varying):
            axes = shape(tokens[rows[0]])[:-1]
            for row in rows:
                node.replace_input_with(row, tokens[row])
            if len(node.meta.get("shape", ())) == 2:
                node.meta["shape"] = (*axes, shape(node)[-1])
            if node.target is DYNAMIC or len(node.meta.get("shape", ())) == 3:
                tokens[node] = node
        else:
            for row in (r for r in rows if tokens[r] is r):
                _lower(node, row)
    for node, source in undone.items():
        replace(graph_module, node, source)


def _lifts(node: fx.Node, tokens: dict[fx.Node, fx.Node], varying: set[fx.Node]) -> bool:
    """Whether all that `node` reads has three axes, or is a constant or a number."""
    return all(n in tokens or n not in varying or len(n.meta.get("shape", ())) < 2 for n in node.all_input_nodes)


def _reshape(node: fx.Node, tokens: dict[fx.Node, fx.Node], undone: dict[fx.Node, fx.Node]) -> None:
    """A reshape to rows is what it reshapes; one of what has three axes now reads that, or is it."""
    source = operand(node)
    before, after = shape(source), shape(node)
    if source in tokens and tokens[source] is source:
        if len(after) == 3 and after[-1] == before[-1]:
            undone[node] = source
        elif len(after) == 2 and after[-1] == before[-1]:
            tokens[node] = source
    elif len(before) == 3 and len(after) == 2 and after[-1] == before[-1] is not None:
        tokens[node] = source
    elif len(before) == 4 and len(after) == 2 and None not in before[2:] and after[-1] == math.prod(before[2:]):  # type: ignore[arg-type]
        with node.graph.inserting_before(node):
            flat = (*before[:2], after[-1])
            tokens[node] = call(node.graph, aten.flatten.using_ints, (source, 2, 3), node, shape=flat)


def _lower(node: fx.Node, row: fx.Node) -> None:
    """Give `node`, which takes rows alone, the rows of what has three axes now."""
    with node.graph.inserting_before(node):
        columns = shape(row)[-1]
        flat = call(node.graph, aten.reshape.default, (row, [-1, columns]), row, shape=(None, columns))
    node.replace_input_with(row, flat)
