"""The parity contract: the graph that was trained, the INT8 graph and ONNX Runtime compute the same thing.

Per layer and on the same integers, ONNX Runtime and the INT8 graph differ by at most one step of the output (LSB);
convolutions, linear layers and matrix products are equal on 99.9 % and their int32 accumulators everywhere; float
outputs agree to 1e-5, and so does what operators read that round it inside (`MatMulNBits`). A product's output that
differs is right, too, where it is the one of exact arithmetic, found in float64: the graph adds up floats and may round
a sum the other way, the runtime adds up integers. (A share alone does not tell that from an error: of the 320 outputs
of a small layer, one is 0.3 %.) What is a half before rounding, or nearer to one than one rounding of the quotient, is
left out of the exact share. End to end, decisions agree on 99.5 % of the samples and the metric within 0.1 points, but
never finer than one sample; where a runtime disagrees with itself, reading a text at once and token by token, twice as
often is allowed (`own_agreement`). The first layer that breaks the contract is named, with its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from pqk.core.aten import DYNAMIC, rounded_inside
from pqk.core.onnxruntime_session import OnnxModel, encoder_of, session
from pqk.data.structures import tensors
from pqk.deploy.qdq import AccumulatorTwin, Array, Layer, QdqFile
from pqk.errors import InputError
from pqk.report.schema import LayerParity, Parity
from pqk.task.task import Task
from pqk.verify.interpreters import Recorder, Ties, rounded_once
from pqk.verify.own_agreement import own_agreement
from pqk.verify.verdict import EXACT_SHARE, MAX_LSB, RELATIVE, compare_ends, verdict


def check_parity(
    fake_quant: nn.Module,
    int8_graph: fx.GraphModule,
    onnx_path: Path,
    task: Task,
    *,
    optimized: bool = True,
    samples: int | None = None,
    layer_samples: int = 16,
) -> Parity:
    """Check the contract on the student's file.

    Layers are compared on `layer_samples` validation samples, end to end on (the first `samples` of) the evaluation
    data. `optimized=False` runs ONNX Runtime without its optimizations, for a target that is not this machine. A
    broken contract is a result, not an error; `InputError` is raised for a file that is not this graph's.
    """
    inputs = next(task.calibration(layer_samples))
    layers = check_layers_of(int8_graph, onnx_path, task, inputs, optimized=optimized)
    with torch.inference_mode():
        deployed = OnnxModel(onnx_path, fake_quant(*task.example), optimized=optimized)
    # a range of all that is read together is no rounding: with one, reading a text otherwise is other arithmetic
    together = any(n.target is DYNAMIC for n in int8_graph.graph.nodes)
    itself = (lambda: None) if together else partial(own_agreement, onnx_path, task, optimized=optimized)
    ends = compare_ends(rounded_once(fake_quant), deployed, task, samples=samples, itself=itself)
    return verdict(layers, ends, "optimized" if optimized else "unoptimized")


# Layers


def check_layers_of(
    int8_graph: fx.GraphModule,
    onnx_path: Path,
    task: Task,
    inputs: tuple[Tensor, ...],
    *,
    optimized: bool = True,
) -> list[LayerParity]:
    """Every layer of the student's file against the INT8 graph, on `inputs` of the task.

    A file that continues texts is held against the graph with a cache, in the middle of each text; those of an encoder
    and a decoder, against the two that the graph is split into, at the begin of each target and in its middle.
    """
    from pqk.deploy.decoder import deployed_decoder
    from pqk.deploy.generation import continued  # these emit through torch.onnx, which is slow to import
    from pqk.deploy.onnx_emitter import quantized_tensors
    from pqk.deploy.token_operators import with_token_operators
    from pqk.deploy.two_files import first_and_next_inputs, split_graphs

    if task.seq2seq:
        parts = split_graphs(int8_graph)
        encoder, decoder = parts.encoder, with_token_operators(parts.decoder)
        source = inputs[:-2]
        rows = check_layers(encoder, quantized_tensors(encoder), encoder_of(onnx_path), source, optimized=optimized)
        for given in first_and_next_inputs(parts, inputs):
            rows += check_layers(decoder, quantized_tensors(decoder), onnx_path, given, optimized=optimized)
        return rows
    form = int8_graph
    if task.generates:
        form, _ = deployed_decoder(int8_graph, task.decoder_form)
        one_text = task.decoder_form.attention == "grouped"  # which reads several tokens after others of no more
        _, inputs = continued(int8_graph, tuple(t[:1] for t in inputs) if one_text else inputs)
    return check_layers(form, quantized_tensors(form), onnx_path, inputs, optimized=optimized)


def check_layers(
    int8_graph: fx.GraphModule,
    activations: Sequence[tuple[str, fx.Node]],
    onnx_path: Path,
    inputs: tuple[Tensor, ...],
    *,
    optimized: bool = True,
) -> list[LayerParity]:
    """Every layer of the file against the INT8 graph, on the integers that the graph computes from `inputs`, and on the
    floats that its operators round inside.

    `activations` are the graph's quantize nodes with their layers' names, in the order of the file's quantizers of
    activations.
    """
    file = QdqFile(onnx.load(onnx_path))
    quantizers = [layer for layer in file.layers if layer.quantized]
    floats = [layer for layer in file.layers if not layer.quantized]
    rounded = rounded_inside(int8_graph)
    found = len(quantizers) + len(file.rounded), len(file.inputs)
    if found != (len(activations) + len(rounded), len(inputs)):
        raise InputError(
            f"parity: {onnx_path} quantizes {found[0]} tensors of {found[1]} inputs, the INT8 graph "
            f"{len(activations) + len(rounded)} of {len(inputs)}: the file was not made from this graph"
        )
    recorder = Recorder(int8_graph)
    with torch.inference_mode():
        results = tensors(recorder.run(*inputs))
        ties = Ties(int8_graph, recorder.integers)
        if activations:
            ties.run(*inputs)
    recorded = {name: value.numpy() for name, value in zip(file.inputs, inputs, strict=True)}
    nodes = {layer.output: node for layer, (_, node) in zip(quantizers, activations, strict=True)}
    for layer, (_, node) in zip(quantizers, activations, strict=True):
        outputs = file.integers[layer.output].output  # a dynamic quantizer's scale and zero point as well
        recorded |= {name: t.numpy() for name, t in zip(outputs, recorder.integers[node], strict=True)}
    recorded |= {name: recorder.rounded[n].numpy() for name, n in zip(file.rounded, rounded, strict=True)}
    names = {layer.output: name for layer, (name, _) in zip(quantizers, activations, strict=True)}
    rows = []
    for layer in quantizers:
        node = nodes[layer.output]
        exact = ties.exact.get(node, recorder.integers[node][0]).numpy()
        halves = ties.masks[node].numpy()
        rows.append(check_integers(file, layer, names[layer.output], recorded, exact, halves, optimized))
    called = {name: node.meta["layer"] for name, node in zip(file.rounded, rounded, strict=True)}
    positions = {output.name: i for i, output in enumerate(file.model.graph.output)}
    for layer in floats:
        ends = layer.output in positions
        expected = results[positions[layer.output]].numpy() if ends else recorded[layer.output]
        rows.append(check_float(file, layer, called.get(layer.output, layer.output), recorded, expected, optimized))
    return rows


def check_integers(
    file: QdqFile,
    layer: Layer,
    name: str,
    recorded: Mapping[str, Array],
    exact_integers: Array,
    halves: Array,
    optimized: bool,
) -> LayerParity:
    """One layer with an integer output.

    `exact_integers` are those of exact arithmetic, `halves` marks what may be rounded either way.
    """
    got = run_layer(file, layer, recorded, optimized).astype(np.int32)
    difference = np.abs(got - recorded[layer.output])
    equal = difference == 0
    if layer.is_product:
        equal |= got == exact_integers
    compared = equal[~halves]
    max_lsb = int(difference.max(initial=0))
    exact = float(compared.mean()) if compared.size else 1.0
    twin = file.twin(layer, recorded) if layer.is_product else None
    accumulators = None if twin is None else equal_accumulators(twin, optimized)
    passed = max_lsb <= MAX_LSB and accumulators is not False and (exact >= EXACT_SHARE or not layer.is_product)
    return LayerParity(name=name, op=layer.op, max_lsb=max_lsb, exact=exact, accumulators=accumulators, passed=passed)


def check_float(
    file: QdqFile, layer: Layer, name: str, recorded: Mapping[str, Array], expected: Array, optimized: bool
) -> LayerParity:
    """One layer with a float output: differences are relative to the tensor's largest value, as sums cancel."""
    got = run_layer(file, layer, recorded, optimized)
    size = max(float(np.abs(expected).max(initial=0)), float(np.finfo(np.float32).tiny))
    relative = np.abs(got.astype(np.float64) - expected) / size
    worst = float(relative.max(initial=0))
    return LayerParity(
        name=name,
        op=layer.op,
        max_lsb=None,
        exact=float((relative <= RELATIVE).mean()) if relative.size else 1.0,
        max_relative=worst,
        passed=worst <= RELATIVE,
    )


def run_layer(file: QdqFile, layer: Layer, recorded: Mapping[str, Array], optimized: bool) -> Array:
    feeds = {name: recorded[name] for name in layer.inputs}
    model = file.extract(layer, {name: value.shape for name, value in feeds.items()})
    return session(model, optimized=optimized).run(None, feeds)[0]


def equal_accumulators(twin: AccumulatorTwin, optimized: bool) -> bool:
    """Whether ONNX Runtime's int32 accumulators are the true ones (float64 holds every such sum exactly)."""
    left, right = twin.operands()
    got = session(twin.model(), optimized=optimized).run(None, {"left": left.values})[0]
    x, w = (torch.from_numpy(o.values.astype(np.float64) - o.zero_point) for o in (left, right))
    truth = integer_convolution(x, w, twin.attributes) if twin.op == "Conv" else x @ w
    return bool((torch.from_numpy(got).double() == truth).all())


def integer_convolution(x: Tensor, weight: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    """ONNX Conv without a bias, any number of axes, explicit pads; [N, C, …] float64."""
    axes = x.ndim - 2
    convolve: Callable[..., Tensor] = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
    pads = attributes.get("pads") or [0] * (2 * axes)
    ordered = [p for axis in reversed(range(axes)) for p in (pads[axis], pads[axis + axes])]
    return convolve(
        nn.functional.pad(x, ordered),
        weight,
        stride=tuple(attributes.get("strides") or [1] * axes),
        dilation=tuple(attributes.get("dilations") or [1] * axes),
        groups=int(attributes.get("group", 1)),
    )
