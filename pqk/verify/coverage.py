"""Integer coverage: the share of MACs that run in integer kernels, read from the graph ONNX Runtime will execute.

A quantized file promises nothing. An operator becomes an integer kernel only if the runtime's own fusions find
quantized inputs and output around it, so the optimized graph is written out and its operators are counted. Shapes come
from running that graph once with every intermediate value as an output; the batch is divided out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from pqk.core.onnxruntime_session import EncoderDecoderSession, OnnxSource, encoder_of, session
from pqk.deploy.onnx_ops import MACS, Operands, Shape, in_integers, plain_name
from pqk.errors import InputError, Reason


@dataclass(frozen=True)
class LayerMacs:
    """One operator that multiplies: its MACs for one sample, whether in an integer kernel, and if not, why."""

    name: str
    op: str
    macs: int
    integer: bool
    reason: str | None


@dataclass(frozen=True)
class Coverage:
    """`share` of `total_macs` (per sample) in integer kernels, 0 to 1; 1 where nothing multiplies."""

    share: float | None
    """None where an operator cannot be counted, which `reason` says"""
    total_macs: int
    integer_macs: int
    layers: tuple[LayerMacs, ...]
    reason: Reason | None = None


def integer_coverage(model: OnnxSource, example_feeds: Mapping[str, NDArray[Any]]) -> Coverage:
    """Coverage of an ONNX model; `example_feeds` is one batch of its inputs by name.

    An operator whose MACs cannot be told from shapes leaves no share and a reason. Raises `InputError` for a model that
    ONNX Runtime refuses, and feeds that do not fit.
    """
    if isinstance(model, Path) and encoder_of(model).is_file():
        run = session(model)
        if isinstance(run, EncoderDecoderSession):
            return _of_both(run, example_feeds)
    return _of_one(model, example_feeds)


def _of_both(run: EncoderDecoderSession, feeds: Mapping[str, NDArray[Any]]) -> Coverage:
    """The coverage of reading a source, and of what the decoder does with `feeds`."""
    encoder, decoder = run.paths
    parts = (
        _of_one(encoder, run.feeds_of_encoder(feeds)),
        _of_one(decoder.read_bytes(), run.feeds_of_decoder(feeds)),
    )
    total, integer = sum(p.total_macs for p in parts), sum(p.integer_macs for p in parts)
    reason = next((p.reason for p in parts if p.reason is not None), None)
    share = None if reason is not None else integer / total if total else 1.0
    return Coverage(share, total, integer, tuple(layer for p in parts for layer in p.layers), reason)


def _of_one(model: OnnxSource, example_feeds: Mapping[str, NDArray[Any]]) -> Coverage:
    graph = executed_graph(model)
    shapes = value_shapes(graph, example_feeds)
    batch = len(next(iter(example_feeds.values())))
    layers, uncounted = [], []
    for node in graph.graph.node:
        if node.op_type not in MACS:
            uncounted += [node] if is_uncounted(node) else []
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        integer = in_integers(node.op_type, attributes)
        operands = Operands(tuple(shapes.get(n, ()) for n in node.input), shapes.get(node.output[0], ()), attributes)
        macs = MACS[node.op_type](operands)
        if macs is None:
            uncounted.append(node)
            continue
        reason = None if integer else float_reason(node, graph)
        layers.append(LayerMacs(human_name(node), node.op_type, macs // batch, integer, reason))
    total, of_integers = sum(la.macs for la in layers), sum(la.macs for la in layers if la.integer)
    if uncounted:
        names = ", ".join(f"{n.op_type} ({human_name(n)})" for n in uncounted[:3])
        return Coverage(None, total, of_integers, tuple(layers), f"the MACs of {names} cannot be counted")
    return Coverage(of_integers / total if total else 1.0, total, of_integers, tuple(layers))


def is_uncounted(node: onnx.NodeProto) -> bool:
    """Whether a node multiplies how often no shape tells: products in a loop or branch."""
    bodies = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    inner = [n for body in bodies for n in body.node]
    return any(n.op_type in MACS or is_uncounted(n) for n in inner)


def executed_graph(model: OnnxSource) -> onnx.ModelProto:
    """The graph as ONNX Runtime executes it on this machine, with its default optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "executed.onnx"
        session(model, save_to=path)
        return onnx.load(path)


def value_shapes(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Shape]:
    """The shape of every input, initializer and node output; intermediate values are made outputs and run once."""
    shapes: dict[str, Shape] = {i.name: tuple(i.dims) for i in model.graph.initializer}
    shapes |= {name: tuple(value.shape) for name, value in feeds.items()}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    # Only the operands of products are wanted; an output needs no type, the runtime infers it.
    products = [n for n in model.graph.node if n.op_type in MACS]
    for name in dict.fromkeys(name for n in products for name in (*n.input, n.output[0])):
        if name and name not in shapes:
            probe.graph.output.add().name = name
    if not probe.graph.output:
        return shapes
    try:
        names = [o.name for o in probe.graph.output]
        values = session(probe.SerializeToString(), optimized=False).run(names, dict(feeds))
    except InputError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise InputError(f"integer coverage: the example inputs do not fit the model: {error}") from error
    return shapes | {o.name: tuple(v.shape) for o, v in zip(probe.graph.output, values, strict=True)}


def float_reason(node: onnx.NodeProto, model: onnx.ModelProto) -> str:
    """Why the runtime left this operator in float: what its neighbours lack."""
    producers = {name: n for n in model.graph.node for name in n.output}
    weights = {i.name for i in model.graph.initializer}
    for position, name in enumerate(node.input[:2]):
        producer = producers.get(name)
        if producer is None or producer.op_type != "DequantizeLinear":
            what = "weight" if name in weights else f"input {position}" if position else "input"
            source = f" (from {producer.op_type} {human_name(producer)})" if producer else ""
            return f"its {what} is float{source}"
    readers = [n for n in model.graph.node if node.output[0] in n.input]
    float_reader = next((n for n in readers if n.op_type != "QuantizeLinear"), None)
    if float_reader is not None:
        return f"its output is not quantized before {float_reader.op_type} {human_name(float_reader)}"
    if not readers:
        return "its output leaves the model in float"
    return f"the runtime has no integer kernel for this {node.op_type}"


def human_name(node: onnx.NodeProto) -> str:
    """The layer whose weight it reads, else the node's name or its output's, without what fusions append."""
    weight = next((n for n in node.input if ".weight" in n), None)
    if weight is not None:
        return weight.partition(".weight")[0]
    return plain_name(node.name or node.output[0]).removeprefix("node_")
