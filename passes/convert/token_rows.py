"""Tokens as rows: what treats every token by itself works on [B*T, C], from one attention to the next.

`capture` gives every linear layer two axes, between a reshape and its inverse. An operator that reads no axis but the
last computes the same on rows, so here a reshape moves behind it, where it meets its inverse and both go. On a short
text ONNX Runtime spends a tenth of its time on them, and its skip-layer-norm kernel, which wants three axes, is slower
than the sum and the norm that stay two operators on rows.
"""

from __future__ import annotations

from torch import fx

from pqk.core.aten import BY_ROW, DEQUANTIZE, NORMS, TAKES_SCALE, aten
from pqk.core.graph import call, operand, replace, shape
from pqk.core.reshapes import as_rows, spelled_sizes

RowsOf = dict[fx.Node, fx.Node]
"""a value of more than two axes -> the same with two"""


def keep_rows(graph_module: fx.GraphModule) -> None:
    """Move every reshape of rows behind the operators that work on rows; what is dead afterwards stays."""
    rows: RowsOf = {}
    for node in list(graph_module.graph.nodes):
        if node.target is aten.reshape.default:
            _join_rows(graph_module, node, rows)
        elif any(n in rows for n in _row_operands(node)):
            _convert(graph_module, node, rows)


def _row_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of the shape of `node`, which works by row; [] where it does not."""
    if node.op != "call_function" or node.target not in BY_ROW or len(shape(node)) < 3 or shape(node)[-1] is None:
        return []
    has_axes = (node.target in TAKES_SCALE and len(shape(operand(node, 1)))) or (
        node.target in NORMS and len(node.args[1]) != 1  # type: ignore[arg-type]
    )
    same_shape = [n for n in node.all_input_nodes if n.meta.get("shape") == shape(node)]
    others = [n for n in node.all_input_nodes if n not in same_shape]
    return [] if has_axes or any(len(n.meta.get("shape", ())) > 1 for n in others) else same_shape


def _join_rows(graph_module: fx.GraphModule, node: fx.Node, rows: RowsOf) -> None:
    """A reshape from rows puts them at hand; one to rows takes those at hand; another one reads them."""
    source = operand(node)
    before, after = shape(source), shape(node)
    by_row = before[-1:] == after[-1:] != (None,)
    if by_row and len(before) == 2 < len(after):
        rows[node] = source
    elif by_row and len(after) == 2 < len(before) and source not in rows:
        rows[source] = node
    elif by_row and len(after) == 2 < len(before):
        replace(graph_module, node, rows[source])
    elif source in rows:
        node.args = (rows[source], *node.args[1:])


def _convert(graph_module: fx.GraphModule, node: fx.Node, rows: RowsOf) -> None:
    """Compute `node` on rows; the reshape that takes its place is dead where nothing reads it."""
    sources, size = _row_operands(node), shape(node)
    with graph_module.graph.inserting_before(node):
        for source in sources:
            _put_rows(source, rows)
        result = _on_rows(node, rows)
        sizes = spelled_sizes(graph_module, sources[0], size)
        layer = f"{node.meta['layer']}.reshape"
        reshaped = call(graph_module.graph, aten.reshape.default, (result, sizes), node, layer=layer)
    replace(graph_module, node, reshaped)
    rows[reshaped] = result


def _put_rows(source: fx.Node, rows: RowsOf) -> None:
    """Have the rows of `source` at hand, made at the insertion point; of dequantized values from their integers."""
    if source in rows:
        return
    if source.target is DEQUANTIZE and _row_operands(source):
        _put_rows(operand(source), rows)
        rows[source] = _on_rows(source, rows)
    else:
        rows[source] = as_rows(source, f"{source.meta['layer']}.rows")


def _on_rows(node: fx.Node, rows: RowsOf) -> fx.Node:
    result = node.graph.node_copy(node, lambda n: rows.get(n, n))
    result.meta["shape"] = (None, shape(node)[-1])
    return result
