"""A QDQ file cut into layers: what lies between integers and the next integers, as models of their own.

A *layer* ends in an activation's QuantizeLinear (or in a float output of the model) and reaches back to the integers it
reads. An operator that makes integers inside of itself, `MatMulNBits`, is cut off in front: what it reads is the end of
a layer, in float. ONNX Runtime fuses such a piece into the same integer kernel as in the whole model, so a layer can be
run alone on recorded integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pqk.core.onnxruntime_session import session
from pqk.deploy.onnx_ops import INSIDE, MOVERS, PLUMBING, PRODUCTS, QUANTIZERS

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """`nodes` compute `output` from `inputs`: inputs of the model, integers (with scales found at run time), and what
    operators read that round inside."""

    output: str
    inputs: tuple[str, ...]
    nodes: tuple[onnx.NodeProto, ...]
    quantized: bool
    """whether `output` is integers"""

    @property
    def op(self) -> str:
        """Its operators in order, without what only moves numbers between float and integers."""
        kinds = [n.op_type for n in self.nodes]
        return " ".join(dict.fromkeys(k for k in kinds if k not in PLUMBING)) or kinds[-1]

    @property
    def is_product(self) -> bool:
        return any(n.op_type in PRODUCTS for n in self.nodes)


class QdqFile:
    """A QDQ model and its layers, in the file's order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.constants = {i.name: i for i in model.graph.initializer}
        self.inputs = {i.name: i for i in model.graph.input if i.name not in self.constants}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.order = {id(node): i for i, node in enumerate(model.graph.node)}
        computed = set(self.inputs)
        for node in model.graph.node:
            if any(name in computed for name in node.input):
                computed |= set(node.output)
        quantizers = [n for n in model.graph.node if n.op_type in QUANTIZERS and n.input[0] in computed]
        self.integers = {name: n for n in quantizers for name in n.output}
        """and the scales and zero points that are made with them"""
        self.rounded = tuple(n.input[0] for n in model.graph.node if n.op_type in INSIDE and n.input[0] in computed)
        """what each operator reads that rounds it inside"""
        ends = [(n.output[0], True) for n in quantizers]
        others = dict.fromkeys([*self.rounded, *(o.name for o in model.graph.output if o.name in computed)])
        ends += [(name, False) for name in others if name not in self.integers and name not in self.inputs]
        self.layers = tuple(self._layer(end, quantized) for end, quantized in ends)

    def _layer(self, output: str, quantized: bool) -> Layer:
        nodes: dict[int, onnx.NodeProto] = {}
        inputs: dict[str, None] = {}
        pending = [output]
        while pending:
            name = pending.pop()
            if name in self.inputs or (name != output and (name in self.integers or name in self.rounded)):
                inputs[name] = None
            elif name in self.producers and id(self.producers[name]) not in nodes:
                node = self.producers[name]
                nodes[id(node)] = node
                pending += [n for n in node.input if n]
        ordered = sorted(nodes.values(), key=lambda n: self.order[id(n)])
        return Layer(output, tuple(inputs), tuple(ordered), quantized)

    def element_type(self, name: str) -> int:
        """ONNX element type of what a layer reads."""
        if name in self.inputs:
            return self.inputs[name].type.tensor_type.elem_type
        if name not in self.integers:
            return TensorProto.FLOAT
        node = self.integers[name]
        if node.op_type == "DynamicQuantizeLinear":
            return TensorProto.FLOAT if name == node.output[1] else TensorProto.UINT8
        if len(node.input) > 2 and node.input[2]:
            return self.constants[node.input[2]].data_type
        return next((a.i for a in node.attribute if a.name == "output_dtype" and a.i), TensorProto.UINT8)

    def extract(self, layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        """The layer as a model for inputs of these shapes."""
        used = {name for node in layer.nodes for name in node.input}
        graph = helper.make_graph(
            layer.nodes,
            "layer",
            [helper.make_tensor_value_info(n, self.element_type(n), shapes[n]) for n in layer.inputs],
            [onnx.ValueInfoProto(name=layer.output)],
            [self.constants[n] for n in used if n in self.constants],
        )
        return self._model(graph)

    def _model(self, graph: onnx.GraphProto) -> bytes:
        model = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=list(self.model.functions),
        )
        return model.SerializeToString()

    # Accumulators

    def twin(self, layer: Layer, recorded: Mapping[str, Array]) -> AccumulatorTwin | None:
        """The layer's product on bare integers; None unless its only product reads integers on both sides.

        Integers may be moved (reshaped, transposed, padded by zeros …) on their way to the product.
        """
        products = [n for n in layer.nodes if n.op_type in PRODUCTS]
        if len(products) != 1 or products[0].op_type == "ConvTranspose":  # ONNX has no ConvTransposeInteger
            return None
        node = products[0]
        if node.op_type == "MatMulInteger":
            return self._bare_twin(node, recorded)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        sources = [self._dequantizer(name) for name in node.input[:2]]
        if attributes.get("transA") or attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or None in sources:
            return None
        zero_points = [self._zero_point(source) for source in sources if source is not None]
        if any(z is None or (np.size(z) != 1 and np.any(z)) for z in zero_points):
            return None
        operands = [
            as_integers(centred, zero_point)
            for centred, zero_point in zip(self._centred(layer, node.input[:2], recorded), zero_points, strict=True)
        ]
        if operands[0] is None or operands[1] is None or (node.op_type == "Conv" and operands[1].zero_point):
            return None
        return AccumulatorTwin(node.op_type, operands[0], operands[1], attributes)

    def _bare_twin(self, node: onnx.NodeProto, recorded: Mapping[str, Array]) -> AccumulatorTwin | None:
        """The twin of a product that is on bare integers already, whose zero point was found at run time."""
        values, stored, zero = (*node.input, "")[:3]
        if values not in recorded or zero not in recorded or stored not in self.constants:
            return None
        left = Operand(recorded[values], int(recorded[zero]))
        return AccumulatorTwin("MatMul", left, Operand(numpy_helper.to_array(self.constants[stored]), 0), {})

    def _dequantizer(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear whose values arrive under `name`, at most moved."""
        node = self.producers.get(name)
        while node is not None and node.op_type in MOVERS:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _zero_point(self, node: onnx.NodeProto) -> Array | None:
        """The zero point of a DequantizeLinear, in the dtype of its integers; None where it is computed."""
        if len(node.input) > 2 and node.input[2]:
            stored = self.constants.get(node.input[2])
            return None if stored is None else numpy_helper.to_array(stored)
        source = node.input[0]
        kind = self.constants[source].data_type if source in self.constants else self.element_type(source)
        return np.zeros((), helper.tensor_dtype_to_np_dtype(kind))

    def _centred(self, layer: Layer, names: Sequence[str], recorded: Mapping[str, Array]) -> list[Array]:
        """The values `names` inside a layer in steps: float32 `q - zero_point`, with every scale replaced by 1."""
        nodes: list[onnx.NodeProto] = []
        needed = set(names)
        for node in reversed(layer.nodes):
            if needed & set(node.output):
                nodes.insert(0, node)
                needed |= set(node.input)
        scales = {n.input[1] for n in nodes if n.op_type == "DequantizeLinear"}
        constants = [self.constants[n] for n in sorted(needed) if n in self.constants]
        ones = {c.name: np.ones_like(numpy_helper.to_array(c)) for c in constants if c.name in scales}
        feeds = {n: recorded[n] for n in layer.inputs if n in needed}
        graph = helper.make_graph(
            nodes,
            "centred",
            [helper.make_tensor_value_info(n, self.element_type(n), v.shape) for n, v in feeds.items()],
            [onnx.ValueInfoProto(name=name) for name in names],
            [numpy_helper.from_array(ones[c.name], c.name) if c.name in ones else c for c in constants],
        )
        return list(session(self._model(graph), optimized=False).run(None, feeds))


class Operand(NamedTuple):
    """One side of a product: uint8 or int8 values and their zero point."""

    values: Array
    zero_point: int


def as_integers(centred: Array, zero_point: Array | None) -> Operand | None:
    """`centred + zero_point` in the zero point's dtype; None where that does not hold the values."""
    if zero_point is None:
        return None
    zero = int(zero_point.flat[0]) if zero_point.size else 0
    values = (centred + zero).astype(zero_point.dtype)
    return Operand(values, zero) if np.array_equal(values.astype(np.float32), centred + zero) else None


@dataclass(frozen=True)
class AccumulatorTwin:
    """A convolution or matrix product that gives its int32 accumulator, which QLinearConv and QGemm hide."""

    op: str
    left: Operand
    right: Operand
    attributes: dict[str, Any]

    def operands(self) -> tuple[Operand, Operand]:
        """Left and right as ConvInteger and MatMulInteger take them. Left int8 of a convolution is moved to uint8, the
        only type ConvInteger has; its zero point moves along, so the accumulator is the same."""
        left, right = self.left, self.right
        if self.op == "Conv" and left.values.dtype == np.int8:
            left = Operand((left.values.astype(np.int16) + 128).astype(np.uint8), left.zero_point + 128)
        return left, right._replace(values=right.values.T) if self.attributes.get("transB") else right

    def model(self) -> bytes:
        """ConvInteger or MatMulInteger with the input `left` and the output `accumulator` [int32]."""
        left, right = self.operands()
        op = "ConvInteger" if self.op == "Conv" else "MatMulInteger"
        kind = helper.np_dtype_to_tensor_dtype(left.values.dtype)
        inputs = ["left", "right", "left_zero", "right_zero"]
        graph = helper.make_graph(
            [helper.make_node(op, inputs, ["accumulator"], **(self.attributes if self.op == "Conv" else {}))],
            "twin",
            [helper.make_tensor_value_info("left", kind, left.values.shape)],
            [onnx.ValueInfoProto(name="accumulator")],
            [
                numpy_helper.from_array(np.ascontiguousarray(right.values), "right"),
                numpy_helper.from_array(np.asarray(left.zero_point, left.values.dtype), "left_zero"),
                numpy_helper.from_array(np.asarray(right.zero_point, right.values.dtype), "right_zero"),
            ],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
