"""What ONNX Runtime executes of a file: its operators with shapes, layers and the kind of each, without their times."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from pqk.bench.contenders import Feeds
from pqk.bench.layer_times import KERNEL, layers_of
from pqk.core.onnxruntime_session import session
from pqk.deploy.onnx_ops import Shape, in_integers
from pqk.scratch import ScratchFolder

CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"})
PRODUCTS = frozenset({
    "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "MatMulNBits",
})  # fmt: skip
LightKind = Literal["integer", "movement", "rounding", "float", "function", "softmax", "norm", "sum and norm"]
"""arithmetic of integers, moving values, going to integers and back, arithmetic of floats, functions of one value,
softmax, norms, and norms of a sum"""
KINDS: Mapping[str, LightKind] = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"), "rounding"),
    **dict.fromkeys(
        ("Slice", "Pad", "Transpose", "Reshape", "Concat", "QLinearConcat", "Gather", "Split", "Squeeze", "Unsqueeze",
         "Flatten", "Expand", "ReorderInput", "ReorderOutput", "MaxPool", "Identity", "Cast", "Shape"), "movement",
    ),
    **dict.fromkeys(
        ("Erf", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Tanh", "Sigmoid", "Exp", "Pow", "Sqrt", "Log"),
        "function",
    ),
    **dict.fromkeys(("Softmax", "QLinearSoftmax"), "softmax"),
    **dict.fromkeys(
        ("LayerNormalization", "SimplifiedLayerNormalization", "InstanceNormalization", "GroupNorm",
         "BatchNormalization"), "norm",
    ),
    **dict.fromkeys(("SkipLayerNormalization", "EmbedLayerNormalization"), "sum and norm"),
}  # fmt: skip
"""operators without weights; those that begin with QLinear are arithmetic of integers, and all others of floats"""


@dataclass(frozen=True)
class LayerShape:
    """All of a layer's shape but its channels: layers that have it share one surface of time over channels."""

    integer: bool
    kernel: tuple[int, ...]
    """of a convolution; () for a product of matrices"""
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int
    """1 or more; 0 where each channel is a group"""
    sizes: tuple[int, ...]
    """of what a convolution reads; the rows of a product"""

    def __str__(self) -> str:
        def times(sizes: tuple[int, ...]) -> str:
            return "x".join(map(str, sizes))

        kind = "int8" if self.integer else "float"
        if not self.kernel:
            return f"{kind} linear, {times(self.sizes)} rows"
        groups = "" if self.groups == 1 else ", depthwise" if self.groups == 0 else f", {self.groups} groups"
        dilated = "" if set(self.dilations) <= {1} else f", dilation {times(self.dilations)}"
        strides = times(self.strides)
        return f"{kind} convolution {times(self.kernel)}, stride {strides}{dilated}{groups}, of {times(self.sizes)}"


@dataclass(frozen=True)
class ExecutedNode:
    """An operator that the runtime executes."""

    operator: str
    layer: str
    """the layer that it belongs to, as `layers_of` says"""
    shape: LayerShape | None
    """None for operators that are no layers"""
    channels: tuple[int, int]
    """in and out, of a layer"""
    elements: int
    """the most that one of its values holds"""

    @property
    def kind(self) -> LightKind:
        """What an operator that is no layer does."""
        return KINDS.get(self.operator, "integer" if self.operator.startswith("QLinear") else "float")


def executed_nodes(model: Path, feeds: Feeds, *, threads: int) -> list[ExecutedNode]:
    """The operators that ONNX Runtime makes of an ONNX file, in the order in which it executes them on `feeds`.

    Raises `InputError` where it refuses the model.
    """
    with ScratchFolder("executed") as folder:
        executed = Path(folder) / "executed.onnx"
        run = session(model, threads=threads, save_to=executed, profile_to=Path(folder) / "profile")
        run.run(None, dict(feeds))
        events = json.loads(Path(run.end_profiling()).read_text())
        written, graph = (onnx.load(path, load_external_data=False).graph for path in (model, executed))
    of_node = zip(graph.node, layers_of(graph, written), strict=True)
    known = {node.name: (node, layer) for node, layer in of_node}
    return [_node(event, *known[name]) for name, event in _kernels(events) if name in known]


def _kernels(events: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(KERNEL):
            yield event["name"].removesuffix(KERNEL), event["args"]


def _node(event: Mapping[str, Any], node: onnx.NodeProto, layer: str) -> ExecutedNode:
    read, made = ([_shape(each) for each in event[f"{side}_type_shape"]] for side in ("input", "output"))
    elements = max(map(math.prod, (*read, *made)), default=0)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    shape, channels = None, (0, 0)
    if node.op_type in CONVOLUTIONS:
        shape, channels = _convolution(node.op_type, attributes, read[0], made[0])
    elif node.op_type in PRODUCTS and read[0] and made[0]:
        rows, columns = math.prod(made[0][:-1]), made[0][-1]
        shape = LayerShape(in_integers(node.op_type, attributes), (), (), (), 1, (rows,))
        channels = read[0][-1], columns
    return ExecutedNode(node.op_type, layer, shape, channels, elements)


def _shape(typed: Mapping[str, Sequence[int]]) -> Shape:
    """The shape in an entry of the profile, which has it by dtype; () for what is absent."""
    return next((tuple(shape) for shape in typed.values()), ())


def _convolution(
    operator: str, attributes: Mapping[str, Any], read: Shape, made: Shape
) -> tuple[LayerShape, tuple[int, int]]:
    last = bool(attributes.get("channels_last", operator == "NhwcFusedConv"))
    sizes, axis = (read[1:-1], -1) if last else (read[2:], 1)
    channels, ones, groups = (read[axis], made[axis]), (1,) * len(sizes), attributes.get("group", 1)
    shape = LayerShape(
        in_integers(operator, attributes),
        tuple(attributes.get("kernel_shape", ones)),
        tuple(attributes.get("strides", ones)),
        tuple(attributes.get("dilations", ones)),
        0 if 1 < groups == channels[0] == channels[1] else groups,
        sizes,
    )
    return shape, channels
