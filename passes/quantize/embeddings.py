"""Embedding tables as 8-bit integers: the table is most of a small encoder's file, and nothing multiplies with it.

The rows that are looked up are integers until they are dequantized, with one scale for each column, so neither the file
nor memory holds the table in float. Training sees the same numbers: the rows are rounded after the look-up, which costs
what the batch is long and not what the vocabulary is. Every target can use the whole range, as no product saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from pqk.core.aten import DEQUANTIZE, aten
from pqk.core.graph import (
    arguments,
    attach,
    attribute,
    call,
    facts,
    free_path,
    move_points,
    operand,
    replace,
    shape,
    tensor_node,
)
from pqk.quant.autograd import LearnedStepPerChannel
from pqk.quant.fake_quant import WeightFakeQuant
from pqk.quant.qparams import Grid, Method, choose, quantize

LEAST = 1024
"""values of the smallest table that is worth a dequantize of its own"""
GRID = Grid("int8", -127, 127, symmetric=True)


class TableFakeQuant(WeightFakeQuant):
    """Fake-quantizer of rows [..., C] that were looked up in a table [V, C]; `scale` is a float32 [C] parameter."""

    def forward(self, rows: Tensor) -> Tensor:
        if self.mode != "on":
            return rows
        columns = rows.reshape(-1, rows.shape[-1]).t()
        return LearnedStepPerChannel.apply(columns, self.scale, self.grid.qmin, self.grid.qmax).t().reshape(rows.shape)

    def calibrate(self, weight: Tensor, method: Method, percentile: float) -> None:
        """Set the scales from the values of the table [V, C] and turn the quantizer on."""
        qparams = choose(weight, self.grid, method, axis=1, percentile=percentile)
        with torch.no_grad():
            self.scale.copy_(qparams.scale)
        self.mode = "on"


def is_table(node: fx.Node) -> bool:
    """Whether `node` looks up rows of a parameter that is large enough."""
    if node.op != "call_function" or node.target is not aten.embedding.default:
        return False
    table = operand(node)
    size = shape(table)
    return table.op == "get_attr" and table.meta["dtype"] == torch.float32 and (size[0] or 0) * (size[1] or 0) >= LEAST


def call_quantizer(student: fx.GraphModule, name: str, module: nn.Module, source: fx.Node, layer: str) -> fx.Node:
    """A call of a quantizer of `source` at the insertion point, which becomes the module `quantizers.NAME`."""
    path = attach(student, free_path(student, f"quantizers.{name.replace('.', '_')}"), module)
    node = student.graph.create_node("call_module", path, (source,), name=path.replace(".", "_"))
    node.meta.update(facts(source) | {"layer": layer})
    return node


def insert_table(student: fx.GraphModule, node: fx.Node, learned: bool) -> None:
    """Put a `TableFakeQuant` behind a look-up."""
    layer, module = node.meta["layer"], TableFakeQuant(GRID, shape(node)[-1] or 0, learned)
    with student.graph.inserting_after(node):
        fake = call_quantizer(student, f"{layer}_rows", module, node, layer)
    node.replace_all_uses_with(fake, delete_user_cb=lambda user: user is not fake)
    move_points(student, node, fake)


def convert_table(student: fx.GraphModule, node: fx.Node, module: TableFakeQuant) -> None:
    """Replace the table by its integers, looked up and then dequantized."""
    look_up, qparams = operand(node), module.qparams()
    path = str(operand(look_up).target)
    columns = attribute(student, path).detach().t()
    integers = quantize(columns, qparams).t().contiguous()
    values = {"int8": integers, "scale": qparams.scale.clone(), "zero_point": qparams.zero_point.to(torch.int8)}
    with student.graph.inserting_before(node):
        table, scale, zero = (
            tensor_node(student, attach(student, free_path(student, f"{path}_{k}"), v)) for k, v in values.items()
        )
        a = arguments(look_up)
        rows = call(student.graph, aten.embedding.default, (table, a["indices"]), look_up, dtype=torch.int8)
        rank = len(shape(look_up))
        value = call(student.graph, DEQUANTIZE, (rows, scale, zero, rank - 1), node)
    replace(student, node, value)


def table_of(node: fx.Node) -> fx.Node:
    """What a weight's quantizer `node` is calibrated on: the weight, or the table behind the look-up."""
    source = operand(node)
    return operand(source) if source.op == "call_function" else source
