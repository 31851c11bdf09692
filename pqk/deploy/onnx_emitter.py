"""Student or teacher → `model.onnx`: integer weights, QDQ, dynamic batch, one file that needs neither pqk nor torch.

What ONNX Runtime reads is plain standard: QuantizeLinear / DequantizeLinear around float operators, which it fuses into
integer kernels; integers in blocks alone have operators of its own (see `onnx_blocks`). Torch's exporter writes source
paths and stack traces into the file; they are taken out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op
from torch import Tensor, fx, nn

from pqk.copies import copy_of
from pqk.core.aten import DEQUANTIZE, DYNAMIC, GATHER_NBITS, MULTIPLY, NBITS, QUANTIZE, aten, quantized_tensors
from pqk.core.graph import register_containers
from pqk.core.modes import fused_layers
from pqk.core.onnxruntime_session import HIDDEN, PAST, PRESENT, encoder_of
from pqk.data.structures import named_tensors
from pqk.deploy.decoder import deployed_decoder
from pqk.deploy.decoder_operators import TRANSLATIONS as DECODER_TRANSLATIONS
from pqk.deploy.float_gates import with_joined_gates
from pqk.deploy.generation import POSITION, places
from pqk.deploy.onnx_blocks import gather_block_quantized, matmul_nbits
from pqk.deploy.onnx_ops import MICROSOFT, QUANTIZERS
from pqk.deploy.onnx_pools import Value, average_pool, max_pool
from pqk.deploy.token_operators import OPERATOR_SET, needs_operator_set, with_token_operators
from pqk.deploy.two_files import split_graphs
from pqk.errors import InputError, PqkError
from pqk.files import write_whole
from pqk.passes.capture.capture import capture, fixed_size
from pqk.quiet import quiet
from pqk.task.axes import Axes, batch_axes, free_axes
from pqk.task.task import Task

OPSET = 21
SHOWN = 3
"""past tokens of the example that a graph with a cache is exported by"""
KEPT_SHOWN = 2
"""tokens of its source whose keys and values are given there"""


def _quantize(x: Value, scale: Value, zero_point: Value, qmin: int, qmax: int) -> Value:
    """The grid is the whole range of the zero point's dtype wherever ONNX is emitted, so QuantizeLinear saturates."""
    return op.QuantizeLinear(x, scale, zero_point)


def _quantize_dynamic(x: Value) -> Value:
    return op.DynamicQuantizeLinear(x)


def _matmul_integer_to_float(x: Value, x_scale: Value, x_zero: Value, weight: Value, weight_scale: Value) -> Value:
    """In the form that ONNX Runtime fuses with the quantizer before it, and with the sum behind it."""
    product = op.Cast(op.MatMulInteger(x, weight, x_zero), to=onnx.TensorProto.FLOAT)
    return op.Mul(product, op.Mul(x_scale, weight_scale))


def _dequantize(q: Value, scale: Value, zero_point: Value, axis: int | None = None) -> Value:
    return op.DequantizeLinear(q, scale, zero_point, axis=1 if axis is None else axis)


def _log_sigmoid(x: Value) -> Value:
    """`log(sigmoid(x))` is minus infinity where the sigmoid is 0 in float32; this is not."""
    return op.Sub(
        op.Min(x, op.Constant(value_float=0.0)), op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), op.Constant(value_float=1.0)))
    )


def _mean(x: Value, dim: Sequence[int], keepdim: bool = False, dtype: int | None = None) -> Value:
    """Means over all axes after the channels have an integer kernel under the name GlobalAveragePool."""
    rank = len(x.shape)
    if keepdim and rank >= 3 and sorted(d % rank for d in dim) == list(range(2, rank)):
        return op.GlobalAveragePool(x)
    return op.ReduceMean(x, op.Constant(value_ints=list(dim)), keepdims=int(keepdim))  # type: ignore[arg-type]


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    QUANTIZE: _quantize,
    DYNAMIC: _quantize_dynamic,
    MULTIPLY: _matmul_integer_to_float,
    DEQUANTIZE: _dequantize,
    NBITS: matmul_nbits,
    GATHER_NBITS: gather_block_quantized,
    aten.mean.dim: _mean,
    aten.log_sigmoid.default: _log_sigmoid,
    aten.avg_pool1d.default: average_pool,
    aten.avg_pool2d.default: average_pool,
    aten.avg_pool3d.default: average_pool,
    aten.max_pool1d.default: max_pool,
    aten.max_pool2d.default: max_pool,
    aten.max_pool3d.default: max_pool,
    **DECODER_TRANSLATIONS,
}


def emit_onnx_for(module: nn.Module, task: Task, path: Path) -> None:
    """Write `module`, which takes the inputs of `task`, to `path`, with a cache where it continues texts.

    A sequence-to-sequence model is two files: its decoder at `path`, and its encoder beside it (`encoder_of`). Raises
    `InputError` as `emit_onnx`, `with_past` and `split_graphs` do.
    """
    if not task.generates:
        emit_onnx(module, task.example, path, task.input_names, task.output_names, task.axes)
        return
    graph = module if isinstance(module, fx.GraphModule) else capture(copy_of(module), task.example, axes=task.axes)
    assert isinstance(graph, fx.GraphModule)
    if task.seq2seq:
        _emit_two_files(graph, task, path)
        return
    form, cache = deployed_decoder(graph, task.decoder_form)
    ids, mask = task.example
    whole = torch.cat([torch.ones(len(ids), SHOWN, dtype=mask.dtype), mask], 1)
    emit_onnx(
        form,
        (ids, whole, places(whole)[:, SHOWN:], *cache.empty(len(ids), SHOWN)),
        path,
        (*task.input_names, POSITION, *cache.names(PAST.rstrip("."))),
        (*(task.output_names or ("logits",)), *cache.names(PRESENT.rstrip("."))),
        cache.axes(),
    )


def _emit_two_files(graph: fx.GraphModule, task: Task, path: Path) -> None:
    """Write the encoder and the decoder of a captured graph."""
    parts, (*source, ids, _) = split_graphs(graph), task.example
    inputs = len(source)
    emit_onnx(parts.encoder, tuple(source), encoder_of(path), task.input_names[:inputs], (HIDDEN,), task.axes[:inputs])
    free = len(task.axes[0]) > 1 and task.axes[0][1] is not None
    with torch.no_grad():
        hidden = parts.encoder(*source)
    given = (*source[1:], ids, hidden)
    if hidden.shape[1] < 2 * KEPT_SHOWN:  # sizes of 0 and 1 would be taken for fixed ones
        given = (*(torch.cat([t] * 4, 1) for t in source[1:]), ids, torch.cat([hidden] * 4, 1))
    if ids.shape[1] < 2:
        given = tuple(torch.cat([t, t], 1) if t is ids else t for t in given)
    emit_onnx(
        with_token_operators(parts.decoder),
        (*given, *parts.empty(len(ids), SHOWN, KEPT_SHOWN)),
        path,
        (*parts.input_names, *parts.names(PAST.rstrip("."))),
        (*(task.output_names or ("logits",)), *parts.names(PRESENT.rstrip("."))),
        parts.axes(free),
    )


def emit_onnx(
    module: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> None:
    """Write `module`, a float module or an INT8 graph, to `path`, whole or not at all; its mode becomes eval.

    `example` are inputs whose first axis is the batch (at least 2), which becomes the dynamic axis "batch"; `axes`
    names further free axes. Outputs are named by `output_names`; by default `logits` where there is one tensor, else by
    the path of each in their structure (`named_tensors`). The outputs of the QuantizeLinear nodes of activations are
    named `LAYER_q`. Raises `InputError` where the module cannot be exported, and for a full disk.
    """
    module.eval()
    example = tuple(t.clone() for t in example)  # one tensor twice would be one input to the exporter
    names = _names_of_outputs(module, example, input_names)
    names = list(output_names or names)
    try:
        model = _written(module, example, input_names, names, axes)
    except InputError:
        plain = _written_as_captured(module, example, input_names, names, axes)
        if plain is None:
            raise
        model = plain
    write_whole(Path(path), lambda partial: partial.write_bytes(model.SerializeToString()))


def _written(
    module: nn.Module,
    example: tuple[Tensor, ...],
    input_names: Sequence[str],
    names: list[str],
    axes: Axes | None,
) -> onnx.ModelProto:
    """The model, valid and with its names. Raises `InputError` where the exporter cannot write one."""
    try:
        model = _exported(module, example, len(input_names), len(names), axes)
    except Exception as error:  # the exporter's own, and what its translations raise
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"emit_onnx: {type(module).__name__} cannot be written as ONNX: {reason}") from error
    _anonymize(model)
    ends = {_end(kind, i): n for kind, all_ in (("input", input_names), ("output", names)) for i, n in enumerate(all_)}
    _rename(model.graph, {**ends, **_making_way(model.graph, set(ends.values()))})
    _refuse_fixed(model, module, example, axes or batch_axes(example))
    _name_axes(model, axes or batch_axes(example))
    if isinstance(module, fx.GraphModule):
        _name_layers(model, module)
    _slim(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's exceptions share no base class
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"emit_onnx: the exporter wrote {type(module).__name__} as ONNX that is not valid: {reason}. Replace the "
            "operator that is named there"
        ) from error
    return model


def _exported(
    module: nn.Module, example: tuple[Tensor, ...], inputs: int, outputs: int, axes: Axes | None
) -> onnx.ModelProto:
    if isinstance(module, fx.GraphModule):
        module = with_joined_gates(module)
    # The exporter prints, logs, and warns of itself.
    with quiet(level=logging.CRITICAL, printing=True), fused_layers(False), torch.no_grad():
        program = torch.onnx.export(
            module,
            example,
            input_names=[_end("input", i) for i in range(inputs)],
            output_names=[_end("output", i) for i in range(outputs)],
            dynamic_shapes=free_axes(module, example, axes),
            custom_translation_table=TRANSLATIONS,
            opset_version=OPERATOR_SET if needs_operator_set(module) else OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _written_as_captured(
    module: nn.Module, example: tuple[Tensor, ...], input_names: Sequence[str], names: list[str], axes: Axes | None
) -> onnx.ModelProto | None:
    """A float module by its graph, in whose plain operators the exporter may know what it does not in the module's.

    It translates attention of four axes alone, for one. None where there is no graph, it is refused, too, or the module
    is one.
    """
    if isinstance(module, fx.GraphModule):
        return None
    try:
        graph = capture(copy_of(module), example, axes=axes)
        return _written(graph, example, input_names, names, axes)
    except PqkError:
        return None


def _end(kind: str, number: int) -> str:
    """What an input or an output is called until the graph is written; nothing inside has a name with a space."""
    return f"{kind} {number}"


def _making_way(graph: onnx.GraphProto, wanted: set[str]) -> dict[str, str]:
    """Other names for the values and weights inside that are called as an input or an output is to be.

    The exporter calls values after operators and weights after parameters: `add`, `mean`, `head.weight`.
    """
    inside = _defined(graph)
    taken = inside | wanted
    others: dict[str, str] = {}
    for name in sorted(inside & wanted):
        free = next(n for n in (f"{name}_{i}" for i in itertools.count(1)) if n not in taken)
        taken.add(free)
        others[name] = free
    return others


def _defined(graph: onnx.GraphProto) -> set[str]:
    """The names of all weights and of what nodes make, in the bodies of conditions and loops, too."""
    names = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        names.update(node.output)
        for body in _bodies(node):
            names |= _defined(body) | {value.name for value in body.input}
    return names


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]


def _rename(graph: onnx.GraphProto, new_names: Mapping[str, str]) -> None:
    """Call values and weights otherwise, wherever they stand."""
    for node in graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        node.output[:] = [new_names.get(name, name) for name in node.output]
        for body in _bodies(node):
            _rename(body, new_names)
    for part in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.name = new_names.get(part.name, part.name)


def _names_of_outputs(module: nn.Module, example: tuple[Tensor, ...], input_names: Sequence[str]) -> list[str]:
    with torch.no_grad():
        outputs = module(*example)
    register_containers(outputs)
    return list(named_tensors(outputs, input_names))


def _anonymize(model: onnx.ModelProto) -> None:
    """Take out what the exporter notes about the machine and the source it ran on."""
    graph = model.graph
    del model.metadata_props[:]
    model.ClearField("doc_string")
    model.producer_name, model.producer_version = "pqk", ""
    graph.name = "student"
    values = (*graph.initializer, *graph.value_info, *graph.input, *graph.output)
    for part in (graph, *graph.node, *values, *model.functions):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _refuse_fixed(model: onnx.ModelProto, module: nn.Module, example: tuple[Tensor, ...], axes: Axes) -> None:
    """Raises `InputError` where the file takes a free axis in the example's size alone: the exporter does not ask."""
    for value, names in zip(model.graph.input, axes, strict=True):
        for d, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if name and not d.dim_param:
                message, where = fixed_size(module, example, axes)
                raise InputError(f"emit_onnx: {type(module).__name__} cannot be written as ONNX: {message}{where}")


def _name_axes(model: onnx.ModelProto, axes: Axes) -> None:
    """Call every free axis by its name, wherever it is.

    A size that follows from one, such as half of it, is left unknown: readers differ in the expressions that they can
    read, and would take what they cannot for another axis.
    """
    axis_names: dict[str, str] = {}
    for value, names in zip(model.graph.input, axes, strict=False):
        for d, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if name and d.dim_param:
                axis_names.setdefault(d.dim_param, name)
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param in axis_names:
                d.dim_param = axis_names[d.dim_param]
            elif d.dim_param:
                d.ClearField("dim_param")


def _slim(model: onnx.ModelProto) -> None:
    """Take out what every reader infers: shapes inside the graph, where that works, and attributes that say defaults.

    Beside the integer weights of a small student these were a tenth of the file. Nodes are named as what they make.
    """
    declared = list(model.graph.value_info)
    del model.graph.value_info[:]
    own = {name for node in model.graph.node if node.domain == MICROSOFT for name in node.output}
    model.graph.value_info.extend(v for v in declared if v.name in own)  # of which onnx can infer nothing
    inferred = {v.name: v.type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    constant = {tensor.name for tensor in model.graph.initializer} | own
    versions = {entry.domain: entry.version for entry in model.opset_import}
    model.graph.value_info.extend(v for v in declared if v.name not in constant and inferred.get(v.name) != v.type)
    for node in model.graph.node:
        node.name = node.output[0]
        if node.domain == MICROSOFT:
            continue
        schema = onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
        attributes = [a for a in node.attribute if not _is_default(a, schema.attributes[a.name])]
        del node.attribute[:]
        node.attribute.extend(attributes)


def _is_default(attribute: onnx.AttributeProto, declared: onnx.defs.OpSchema.Attribute) -> bool:
    default = declared.default_value
    return default.type == attribute.type and onnx.helper.get_attribute_value(
        default
    ) == onnx.helper.get_attribute_value(attribute)


def _name_layers(model: onnx.ModelProto, int8_graph: fx.GraphModule) -> None:
    """Name the integers of every activation after its layer, and the values around it likewise."""
    layers = [layer for layer, _ in quantized_tensors(int8_graph)]
    initializers = {tensor.name for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in QUANTIZERS and n.input[0] not in initializers]
    if len(nodes) != len(layers):
        raise InputError(f"emit_onnx: {len(layers)} activations are quantized and the exporter wrote {len(nodes)}")
    new_names: dict[str, str] = {}
    given = _defined(model.graph) | {value.name for value in (*model.graph.input, *model.graph.output)}
    for layer, node in zip(layers, nodes, strict=True):
        name, taken = f"{layer}_q", {*new_names.values(), *given}
        count = itertools.count(1)
        while name in taken:  # a clamp behind a clamp ends in the layer that both are of
            name = f"{layer}_{next(count)}_q"
        new_names[node.output[0]] = name
    _rename(model.graph, new_names)
