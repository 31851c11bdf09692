"""Functions of one quantized value as tables: 256 integers in, 256 numbers out.

    q -> dequantize -> x * sigmoid(x), hard-swish, hard sigmoid, leaky ReLU … (quantized between, or not)

SiLU and its kind reach the INT8 graph as several operators with quantizers between them. Whatever they are, they see
nothing but the 256 integers of `q`, so the graph's own nodes, run on all of them, give a table that is exact, and one
step of a launch's epilogue looks the result up.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from pqk.core.aten import DEQUANTIZE, POINTWISE
from pqk.core.graph import attribute, is_float
from pqk.kernels.common.epilogue import ENTRIES


def tabulated(root: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, tuple[float, ...]] | None:
    """The first value computed from the integers of `node`, a quantize, alone, that all readers of `node` end in.

    With it its numbers, for each integer of the grid from the least on; None where there is no such value.
    """
    qmin, qmax = (int(node.args[i]) for i in (3, 4))  # type: ignore[arg-type]
    if qmax - qmin >= ENTRIES:
        return None
    numbers = {node: torch.arange(qmin, qmax + 1).to(node.meta["dtype"])}
    reader = node.next
    while reader.op != "root":
        if any(source in numbers for source in reader.all_input_nodes):
            value = _computed(root, reader, numbers)
            if value is None:
                return None  # who reads this may read no step of a launch
            numbers[reader] = value
            inner = [n for n in numbers if n is not reader]
            closed = all(user in numbers for n in inner for user in n.users)
            if closed and is_float(reader) and reader.target is not DEQUANTIZE:
                return reader, tuple(value.tolist())
        reader = reader.next
    return None


def _computed(root: fx.GraphModule, node: fx.Node, numbers: dict[fx.Node, Tensor]) -> Tensor | None:
    """The value of a pointwise node whose other arguments are single constants; None for any other."""
    if node.op != "call_function" or node.target not in POINTWISE:
        return None
    arguments: dict[fx.Node, Tensor] = {}
    for source in node.all_input_nodes:
        value = numbers.get(source)
        value = _constant(root, source) if value is None else value
        if value is None:
            return None
        arguments[source] = value
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: arguments[n])
    with torch.no_grad():
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _constant(root: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """A stored tensor of one element, or what is computed from such alone."""
    if node.op == "get_attr":
        value: Tensor = attribute(root, str(node.target))
        return value.reshape(()) if value.numel() == 1 else None
    return _computed(root, node, {}) if node.op == "call_function" else None
