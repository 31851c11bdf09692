"""What quantizing one layer costs: SQNR of its output, the rest in float."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from pqk.core.aten import FLOAT_OUTPUT, root
from pqk.core.graph import attribute
from pqk.core.program import Example
from pqk.data.structures import tensors
from pqk.passes.quantize.placement import inputs
from pqk.quant.fake_quant import ActivationFakeQuant, DynamicFakeQuant, Quantizer, WeightFakeQuant, set_mode
from pqk.quant.noise import sqnr

QUIETEST = 200.0
"""decibels of outputs that do not change at all, in a number that JSON has"""


def sensitivity(student: fx.GraphModule, layers: set[str], batches: Iterable[Example]) -> dict[str, float]:
    """Layer -> signal over noise, in decibels, of a calibrated student's worst output with that layer alone quantized.

    What a layer needs to run in integers is rounded: its inputs, its weight and bias, and its output where its kernel
    cannot put out floats. `layers` are those that run in integers. All quantizers end switched on.
    """
    nodes = [n for n in student.graph.nodes if n.op == "call_function" and n.meta.get("layer") in layers]
    inputs = list(batches)
    set_mode(student, "off")
    decibels = {}
    with torch.no_grad():
        float_outputs = [tensors(student(*batch)) for batch in inputs]
        for node in nodes:
            quantizers = _own_quantizers(student, node)
            for quantizer in quantizers:
                quantizer.mode = "on"
            outputs = [tensors(student(*batch)) for batch in inputs]
            ratios = [sqnr(*sides) for sides in zip(_joined(float_outputs), _joined(outputs), strict=True)]
            decibels[node.meta["layer"]] = min(*ratios, QUIETEST)
            for quantizer in quantizers:
                quantizer.mode = "off"
    set_mode(student, "on")
    return decibels


def _own_quantizers(student: fx.GraphModule, node: fx.Node) -> list[Quantizer | DynamicFakeQuant]:
    """The quantizers that a node needs to run in integers (a bias's follows its weight's)."""
    around = [root(i) for i in inputs(node)] + [n for n in node.all_input_nodes if n.op == "call_module"]
    if node.target not in FLOAT_OUTPUT:
        around += node.users
    called = {n: attribute(student, str(n.target)) for n in around if n.op == "call_module"}
    return [m for m in called.values() if isinstance(m, ActivationFakeQuant | DynamicFakeQuant | WeightFakeQuant)]


def _joined(outputs: list[list[Tensor]]) -> list[Tensor]:
    """Each output over all batches."""
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
