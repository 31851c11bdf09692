"""Quantizers in blocks to packed weights: each linear layer between them becomes one `pqk::matmul_nbits`."""

from __future__ import annotations

from torch import fx

from pqk.core.aten import GATHER_NBITS, NBITS, aten
from pqk.core.graph import arguments, attach, attribute, call, free_path, operand, replace, tensor_node
from pqk.quant.block_fake_quant import BlockFakeQuant, BlockWeightFakeQuant
from pqk.quant.blocks import pack, round_weights


def convert_blocks(student: fx.GraphModule) -> None:
    """Replace linear layers of values that a quantizer in blocks rounds, and look-ups in such weights."""
    called = [(n, attribute(student, str(n.target))) for n in student.graph.nodes if n.op == "call_module"]
    for node, module in called:
        if isinstance(module, BlockWeightFakeQuant):
            _weight(student, node, module)
    for node, module in called:
        if isinstance(module, BlockFakeQuant):
            node.replace_all_uses_with(operand(node))
            student.graph.erase_node(node)


def _weight(student: fx.GraphModule, node: fx.Node, module: BlockWeightFakeQuant) -> None:
    """Packed integers and scales instead of the quantizer `node`, and the operators that read these."""
    path, scales = str(operand(node).target), module.block_scales()
    packed = pack(round_weights(attribute(student, path).detach(), scales, module.bits), module.bits)
    with student.graph.inserting_before(node):
        stored = [
            tensor_node(student, attach(student, free_path(student, f"{path}_{name}"), value))
            for name, value in ((f"int{module.bits}", packed.contiguous()), ("scale", scales.clone()))
        ]
    for reader in list(node.users):
        a = arguments(reader)
        with student.graph.inserting_before(reader):
            if reader.target is aten.embedding.default:
                value = call(student.graph, GATHER_NBITS, (*stored, a["indices"]), reader)
            else:
                value = call(student.graph, NBITS, (a["input"], *stored, a["bias"]), reader)
        replace(student, reader, value)
    student.graph.erase_node(node)
