"""Where quantizers go: on every edge that the runtime needs to stay in integers.

A runtime fuses DequantizeLinear -> op -> QuantizeLinear into an integer kernel, so an operator that lacks a quantizer
on one of its inputs or on its output becomes a float island. Three kinds of operator are told apart:

    heavy     convolutions, linear, matmul: always integer, unless left in float
    light     add, mul, concat, pooling, sigmoid: integer where a neighbour wants the result in integers, or where all
              inputs are integers anyway; elsewhere rounding twice costs more than a float operator
    movement  slice, pad, reshape, transpose, max-pool …: no quantizer of their own; `convert` lets them act on the
              integers of their input, with its scale

A ReLU or clamp, and a scaling by a constant, that a quantizer follows is taken over by it. Linear and matmul need no
quantizer on an output that only float operators read: the runtime has integer kernels that put out floats.

Activations can also be quantized dynamically, on the range that each tensor, or each block of a row, has at run time:
then linear layers with weights of their own are integer, each with a quantizer on its input alone, and everything else
is float.

Tables of embeddings are stored as integers and their rows dequantized (see `embeddings`), whoever reads them. One that
is the weight of a linear layer in blocks, too, is stored once, as that weight.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx

from pqk.core.aten import FLOAT_OUTPUT, FOLLOWS_INPUTS, HEAVY, LIGHT, WEIGHTED, aten, bounds, gain, moves, root
from pqk.core.graph import arguments, is_float, operand, shape
from pqk.errors import InputError, nearest
from pqk.passes.quantize.embeddings import LEAST, is_table
from pqk.passes.quantize.points import ActivationPoint, BlockPoint, BlockTablePoint, Point, TablePoint, WeightPoint
from pqk.quant.blocks import BLOCK, WeightBits

Activations = Literal["static", "dynamic", "blockwise"]
"""on which ranges activations are rounded"""


def absorbed(node: fx.Node) -> tuple[fx.Node, tuple[float | None, float | None], float]:
    """What a quantizer on `node` reads, and the bounds and the gain of the clamp and scaling that it takes over.

    It takes over nothing behind a product that others read as well: the runtime has integer kernels that put out either
    integers or floats, not both.
    """
    factor = gain(node)
    clamp = node if factor is None else operand(node)
    limits = bounds(clamp) if clamp is node or len(clamp.users) == 1 else None
    source = operand(clamp) if limits else clamp
    if source is not node and source.target in FLOAT_OUTPUT and len(source.users) > 1:
        return node, (None, None), 1.0
    return source, limits or (None, None), factor or 1.0


def last_absorbed(node: fx.Node) -> fx.Node:
    """The last of `node`, a clamp that alone reads it, and a constant scaling that alone reads that."""
    for follows in (bounds, gain):
        users = list(node.users)
        if len(users) == 1 and follows(users[0]) is not None:
            node = users[0]
    return node


def inputs(node: fx.Node) -> list[fx.Node]:
    """The values that `node` computes with, weights and biases of layers aside."""
    if node.target in WEIGHTED:
        return [operand(node)]
    if node.target is aten.cat.default:
        return list(node.args[0])  # type: ignore[arg-type]
    return [a for a in node.args if is_float(a)]  # type: ignore[misc]


def is_angle(node: fx.Node) -> bool:
    """Whether a cosine or sine reads `node`, perhaps after movement: as the places of tokens by rotary frequencies.

    An angle is a number of turns, of which all but the last say nothing: rounded to 8 bits, two places of a long text
    are one, and those of low frequency are all the same.
    """
    moved = [u for u in node.users if moves(u) or u.target is aten.cat.default]
    return any(u.target in (aten.cos.default, aten.sin.default) for u in node.users) or any(map(is_angle, moved))


class Placement:
    """Which operators compute in integers and which values have a quantizer. The module's docstring has the rules."""

    def __init__(
        self, graph_module: fx.GraphModule, floats: Mapping[str, str], activations: Activations = "static"
    ) -> None:
        """`floats`: layer -> why it stays in float."""
        self.activations: Activations = activations
        self.dynamic = activations != "static"
        self.nodes = [n for n in graph_module.graph.nodes if n.op != "output" and is_float(n)]
        self.float_layers = {n: floats[n.meta["layer"]] for n in self.nodes if n.meta["layer"] in floats}
        self.integer = {n for n in self.nodes if n.target in HEAVY and self.capable(n)}
        if self.dynamic:
            self.values = {value for node in self.integer for value in inputs(node)}
            return
        for node in reversed(self.nodes):
            if self.light(node) and self.read_in_integers(last_absorbed(node)):
                self.integer.add(node)
        self.values = {value for value in map(self.value, self.nodes) if value is not None}
        for node in self.nodes:
            if node.target in FOLLOWS_INPUTS and self.light(node) and all(root(i) in self.values for i in inputs(node)):
                self.integer.add(node)
                self.values.add(last_absorbed(node))

    def capable(self, node: fx.Node) -> bool:
        """Whether a heavy operator can compute in integers: its weight is a parameter, or both factors are values."""
        if node in self.float_layers or node.meta["dtype"] != torch.float32:
            return False
        if self.dynamic and node.target is not aten.linear.default:
            return False
        if node.target in WEIGHTED:
            return isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
        return len(inputs(node)) == 2 and not is_angle(node)

    def light(self, node: fx.Node) -> bool:
        """Whether `node` is a light operator in a form that has an integer kernel."""
        if node.op != "call_function" or node.target not in LIGHT or node in self.float_layers:
            return False
        a = arguments(node)
        if node.target is aten.mean.dim:
            rank = len(shape(a["self"]))
            return rank == 4 and a["keepdim"] and sorted(d % rank for d in a["dim"]) == [2, 3]
        if node.target in (aten.add.Tensor, aten.mul.Tensor):
            return len(inputs(node)) == 2 and a.get("alpha", 1) == 1
        return node.meta["dtype"] == torch.float32

    def read_in_integers(self, node: fx.Node) -> bool:
        """Whether some integer operator reads `node`, perhaps after movement."""
        users = node.users
        return any((u in self.integer and node in inputs(u)) or (moves(u) and self.read_in_integers(u)) for u in users)

    def value(self, node: fx.Node) -> fx.Node | None:
        """The value of `node` that has a quantizer: its own, or that of the clamp and scaling after it; None: none."""
        if node in self.integer and (node.target not in FLOAT_OUTPUT or self.read_in_integers(last_absorbed(node))):
            return last_absorbed(node)
        return node if not moves(node) and self.read_in_integers(node) else None


def named_layers(graph_module: fx.GraphModule, patterns: tuple[str, ...]) -> dict[str, str]:
    """The layers that `float_layers` names, with that as the reason. Raises `InputError` for a pattern without any."""
    layers = [n.meta["layer"] for n in graph_module.graph.nodes if n.op == "call_function" and is_float(n)]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(layer, pattern) for layer in layers):
            raise InputError(f'quantize: float_layers "{pattern}" matches no layer{nearest(pattern, layers)}')
    named = (layer for layer in layers if any(fnmatch.fnmatchcase(layer, p) for p in patterns))
    return dict.fromkeys(named, "left in float by name (float_layers)")


def placement(
    graph_module: fx.GraphModule,
    floats: Mapping[str, str] | None = None,
    activations: Activations = "static",
    weight_bits: WeightBits = 8,
) -> tuple[list[Point], list[tuple[str, str]]]:
    """Where quantizers go, and `(layer, reason)` of what stays in float.

    `floats` are the layers that are to stay in float, with the reason; `weight_bits` those of weights in blocks.
    """
    where = Placement(graph_module, floats or {}, activations)
    if activations == "blockwise":
        return _in_blocks(where, weight_bits), _reasons(where)
    ends = {last_absorbed(n) for n in where.integer}
    points: list[Point] = []
    for node in where.nodes:
        if node in where.values:
            everyone = not where.dynamic and node in ends
            readers = [u.name for u in node.users if everyone or u in where.integer or (moves(u) and not where.dynamic)]
            points.append(ActivationPoint(node.name, tuple(readers), where.dynamic))
    points += [WeightPoint(n.name) for n in where.nodes if n in where.integer and n.target in WEIGHTED]
    points += [TablePoint(n.name) for n in where.nodes if is_table(n) and n not in where.float_layers]
    return points, _reasons(where)


def _in_blocks(where: Placement, bits: WeightBits) -> list[Point]:
    """Quantizers of linear layers, and of tables. A weight that is looked up as a table has 8 bits in any case."""
    tables = [n for n in where.nodes if is_table(n) and n not in where.float_layers]
    looked_up, read = {operand(n) for n in tables}, {operand(n, 1) for n in where.integer}
    points: list[Point] = [
        BlockPoint(n.name, 8 if operand(n, 1) in looked_up else bits) for n in where.nodes if n in where.integer
    ]
    for node in tables:
        shared = operand(node) in read and (shape(node)[-1] or 1) % BLOCK == 0
        points.append(BlockTablePoint(node.name) if shared else TablePoint(node.name))
    return points


def _reasons(where: Placement) -> list[tuple[str, str]]:
    reasons = []
    taken_over = set() if where.dynamic else {n for n in where.values if absorbed(n)[0] is not n}
    taken_over |= {operand(n) for n in taken_over if gain(n) and bounds(operand(n))}
    for node in where.nodes:
        operator = getattr(node.target, "_opname", str(node.target))
        if node.op != "call_function" or node in where.integer or node in taken_over or moves(node):
            continue
        if node in where.float_layers:
            reason = where.float_layers[node]
        elif is_table(node):
            continue
        elif node.target is aten.embedding.default:
            reason = f"{operator}: its table is computed, or has fewer than {LEAST} values"
        elif where.dynamic and node.target is not aten.linear.default:
            how = "in blocks" if where.activations == "blockwise" else "dynamically"
            reason = f"{operator}: of what computes, only linear layers are quantized {how}"
        elif node.target in HEAVY and is_angle(node):
            reason = f"{operator}: cosine and sine read it, an angle that 8 bits do not hold"
        elif node.target in HEAVY:
            reason = f"{operator}: its weight is computed, not a parameter, or it is not float32"
        elif where.light(node) or bounds(node):
            reason = f"{operator}: no neighbour needs its result in integers"
        else:
            reason = f"{operator}: the runtime has no integer kernel for it"
        reasons.append((node.meta["layer"], reason))
    return reasons
