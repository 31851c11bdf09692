"""Convert: integer weights, int32 biases, and explicit quantize / dequantize nodes; the numbers stay the same.

Each activation quantizer becomes `pqk::quantize` followed by `pqk::dequantize`. Operators that only move values act on
the integers between the two, so that no runtime has to find that out. A dynamic quantizer becomes
`pqk::quantize_dynamic_linear`, whose scale and zero point are values, too, and its readers integer products. Each
weight becomes an int8 buffer and each bias an int32 buffer with a dequantize of its own. Layers that are rounded in
blocks become operators of their own (see `blocks`).
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from pqk.core.aten import (
    DEQUANTIZE,
    DYNAMIC,
    MULTIPLY,
    OUTPUT_AXIS,
    PADS,
    QUANTIZE,
    aten,
    moves,
    pads_below,
)
from pqk.core.graph import (
    arguments,
    attach,
    attribute,
    call,
    facts,
    finish,
    free_path,
    operand,
    replace,
    shape,
    tensor_node,
)
from pqk.core.program import Example, Pass, Program, RewriteFunction, Stage
from pqk.passes.convert.blocks import convert_blocks
from pqk.passes.convert.token_rows import keep_rows
from pqk.passes.quantize.embeddings import TableFakeQuant, convert_table
from pqk.quant.fake_quant import (
    ActivationFakeQuant,
    BiasFakeQuant,
    CacheFakeQuant,
    DynamicFakeQuant,
    WeightFakeQuant,
    set_mode,
)
from pqk.quant.qparams import QParams, quantize, quantize_bias
from pqk.settings import settings
from pqk.task.task import Task

Integers = dict[fx.Node, tuple[fx.Node, fx.Node, fx.Node]]
"""a dequantized value -> its integers, scale and zero point"""
Grids = dict[tuple[fx.Node, float, int, str], tuple[fx.Node, fx.Node, fx.Node]]
"""a value with a scale, zero point and dtype -> its integers, scale and zero point"""


@settings
class Convert(Pass):
    """Turn the fake-quantized student into integers: int8 weights, int32 biases, explicit quantize / dequantize."""

    name: ClassVar[str] = "convert"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.FAKE_QUANT})
    produces: ClassVar[Stage | None] = Stage.INT8

    def timed_form(self, floats: tuple[str, ...]) -> Pass | None:
        return self

    def apply(self, program: Program, task: Task) -> Program:
        return program.rewrite(convert, task.example)


def convert(student: nn.Module, example: Example) -> nn.Module:
    """The INT8 graph of a FAKE_QUANT graph, which is changed. In eval mode both compute the same numbers."""
    assert isinstance(student, fx.GraphModule)
    student.eval()
    set_mode(student, "on")
    pixels_last = any(t.ndim == 4 and not t.is_contiguous() for t in example)
    convert_blocks(student)
    integers: Integers = {}
    grids: Grids = {}
    dynamic: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in list(student.graph.nodes):
        if node.op == "call_module":
            module = attribute(student, str(node.target))
            if isinstance(module, TableFakeQuant):
                convert_table(student, node, module)
            elif isinstance(module, CacheFakeQuant):
                _activation(student, node, module, {}, {})  # what moves keys moves their floats: attention is in float
            elif isinstance(module, ActivationFakeQuant):
                _activation(student, node, module, integers, grids)
            elif isinstance(module, DynamicFakeQuant):
                dynamic[node] = _ranged(student, node)
            elif isinstance(module, WeightFakeQuant | BiasFakeQuant):
                _tensor(student, node, module)
        elif moves(node) and node.args[0] in integers:
            _move(student, node, integers, pixels_last)
        elif node.target in OUTPUT_AXIS and operand(node, 1).op == "get_attr" and node.args[0] in integers:
            _stay_float(student, node, integers)
        elif node.target is aten.linear.default and node.args[0] in dynamic:
            _multiply(student, node, dynamic[operand(node)])
    for node in dynamic:
        student.graph.erase_node(node)
    keep_rows(student)
    for parameter in finish(student).parameters():
        parameter.requires_grad_(False)
    return student


def _constants(student: fx.GraphModule, stem: str, qparams: QParams, dtype: torch.dtype) -> list[fx.Node]:
    """`get_attr` nodes of a scale and a zero point of `dtype`, at the insertion point."""
    values = {"scale": qparams.scale.clone(), "zero_point": qparams.zero_point.to(dtype)}
    return [tensor_node(student, attach(student, free_path(student, f"{stem}_{k}"), v)) for k, v in values.items()]


def _layer(quantizer: fx.Node) -> str:
    return str(quantizer.target).removeprefix("quantizers.")


def _activation(
    student: fx.GraphModule, node: fx.Node, module: ActivationFakeQuant, integers: Integers, grids: Grids
) -> None:
    """Quantize and dequantize instead of the quantizer `node`.

    Two quantizers of one value with one scale, which only training tells apart, are one: an exporter would merge them.
    """
    qparams, grid, graph, source = module.qparams(), module.grid, student.graph, operand(node)
    alike = (source, float(qparams.scale), int(qparams.zero_point), grid.dtype)
    with graph.inserting_before(node):
        if alike in grids:
            q, scale, zero_point = grids[alike]
        else:
            q, scale, zero_point = grids[alike] = _quantized(student, node, module, qparams)
        if module.gain != 1:
            path = attach(student, free_path(student, f"{scale.target}_out"), module.output_scale())
            scale = tensor_node(student, path)
        value = call(graph, DEQUANTIZE, (q, scale, zero_point), node)
    integers[value] = (q, scale, zero_point)
    replace(student, node, value)


def _quantized(
    student: fx.GraphModule, node: fx.Node, module: ActivationFakeQuant, qparams: QParams
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Integers, scale and zero point of what the quantizer `node` reads, at the insertion point."""
    grid, source = module.grid, operand(node)
    scale, zero_point = _constants(student, f"qparams.{_layer(node)}", qparams, grid.torch_dtype)
    if source.op == "get_attr":  # a constant operand is stored as its integers
        integer = quantize(attribute(student, str(source.target)).detach(), qparams)
        q = tensor_node(student, attach(student, free_path(student, f"{source.target}_{grid.dtype}"), integer))
    else:
        arguments = (source, scale, zero_point, grid.qmin, grid.qmax)
        q = call(student.graph, QUANTIZE, arguments, node, dtype=grid.torch_dtype)
    return q, scale, zero_point


def _ranged(student: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...]:
    """The integers, scale and zero point of what a dynamic quantizer reads."""
    graph = student.graph
    with graph.inserting_before(node):
        result = call(graph, DYNAMIC, (operand(node),), node, dtype=torch.uint8)
        parts = tuple(graph.call_function(operator.getitem, (result, i)) for i in range(3))
    for part, dtype in zip(parts, (torch.uint8, torch.float32, torch.uint8), strict=True):
        part.meta.update(facts(node) | {"dtype": dtype})
    return parts


def _multiply(student: fx.GraphModule, node: fx.Node, ranged: tuple[fx.Node, ...]) -> None:
    """A linear layer of `ranged` integers as an integer product and a sum. Its weights are stored as [in, out]."""
    a, graph = arguments(node), student.graph
    stored, scale = a["weight"].args[:2]
    columns = attribute(student, str(stored.target)).t().contiguous()
    with graph.inserting_before(node):
        weight = tensor_node(student, attach(student, free_path(student, f"{stored.target}_t"), columns))
        value = call(graph, MULTIPLY, (*ranged, weight, scale), node)
        if a["bias"] is not None:
            value = call(graph, aten.add.Tensor, (value, a["bias"]), node)
    replace(student, node, value)


def _move(student: fx.GraphModule, node: fx.Node, integers: Integers, pixels_last: bool) -> None:
    """Let `node` act on the integers and dequantize after it; padding puts in the zero point, or what is below all."""
    q, scale, zero_point = integers[operand(node)]
    args: tuple[Any, ...] = (q, *node.args[1:])
    if node.target in PADS:
        zero = int(attribute(student, str(zero_point.target)))
        zero = torch.iinfo(q.meta["dtype"]).min if pads_below(node) else zero
        args = (q, node.args[1], "constant", zero) if node.target is aten.pad.default else (q, node.args[1], zero)
    graph = student.graph
    with graph.inserting_before(node):
        if node.target is aten.max_pool2d.default and _needs_copy(q, pixels_last):
            layer = f"{node.meta['layer']}.contiguous"
            args = (call(graph, aten.contiguous.default, (q,), q, layer=layer), *args[1:])
        moved = call(graph, node.target, args, node, dtype=q.meta["dtype"])
        value = call(graph, DEQUANTIZE, (moved, scale, zero_point), node)
    integers[value] = (moved, scale, zero_point)
    replace(student, node, value)


def _needs_copy(image: fx.Node, pixels_last: bool) -> bool:
    """Whether 8-bit integers may lie in memory channels last, where torch's pool takes no more than 127 pixels.

    `pixels_last`: whether the inputs do.
    """
    height, width = shape(image)[-2:]
    if height is not None and width is not None and height * width <= 127:
        return False
    queue, seen = [image], {image}
    while (
        queue and not pixels_last
    ):  # convolutions keep the layout of what they read, so that a permutation reaches far
        node = queue.pop()
        pixels_last = node.target in (aten.permute.default, aten.transpose.int)
        queue += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return pixels_last


def _stay_float(student: fx.GraphModule, node: fx.Node, integers: Integers) -> None:
    """Dequantize the input of a layer with float weights per channel, all channels alike.

    ONNX Runtime quantizes float weights that stand between a dequantize and a quantize by itself, per tensor and with
    the full range, behind the back of training (its WeightBiasQuantization); it leaves alone what is not per tensor.
    """
    q, *scalars = integers[operand(node)]
    channels = shape(q)[1]
    assert channels is not None
    with student.graph.inserting_before(node):
        vectors = []
        for name, scalar in zip(("scale", "zero_point"), scalars, strict=True):
            value = attribute(student, str(scalar.target)).expand(channels).clone()
            path = free_path(student, f"qparams.{node.name}_input_{name}")
            vectors.append(tensor_node(student, attach(student, path, value)))
        value = call(student.graph, DEQUANTIZE, (q, *vectors, 1), operand(node))
    node.args = (value, *node.args[1:])


def _tensor(student: fx.GraphModule, node: fx.Node, module: WeightFakeQuant | BiasFakeQuant) -> None:
    path = str(operand(node).target)
    value: Tensor = attribute(student, path).detach()
    if isinstance(module, WeightFakeQuant):
        qparams, dtype = module.qparams(), torch.int8
        integer = quantize(value, qparams)
    else:
        scale = module.scale()
        qparams, dtype = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), module.grid, axis=0), torch.int32
        integer = quantize_bias(value, scale)
    with student.graph.inserting_before(node):
        stored = tensor_node(
            student, attach(student, free_path(student, f"{path}_{integer.dtype}".replace("torch.", "")), integer)
        )
        scales = _constants(student, path, qparams, dtype)
        replace(student, node, call(student.graph, DEQUANTIZE, (stored, *scales, 0), node))


REWRITES: tuple[RewriteFunction, ...] = (convert,)
Convert.rewrites = REWRITES
