"""Linear layers on the grid of `MatMulNBits`: quantizers of their inputs and weights in blocks of 32.

A weight that is an embedding table, too, is rounded once, and looked up as it is multiplied with: the file stores it
once, as `MatMulNBits` and `GatherBlockQuantized` read the same integers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from pqk.core.graph import operand, shape
from pqk.errors import Reason
from pqk.passes.quantize.embeddings import call_quantizer
from pqk.passes.quantize.points import BlockPoint
from pqk.quant.block_fake_quant import BlockFakeQuant, BlockWeightFakeQuant
from pqk.target.target import Target


def why_not_in_blocks(target: Target) -> Reason | None:
    """Why ONNX Runtime computes other numbers there than `pqk.quant.blocks` says, or none; None where it is the same.

    Read in its sources (1.32): for Arm, KleidiAI's kernels of 4 bits take one range with a zero point for a whole row
    wherever blocks fill it, and the others round halves away from zero.
    """
    if target.runtime == "triton":
        return "it runs student.pt2, whose fused kernels have one scale a tensor"
    if target.name.startswith("arm"):
        return "ONNX Runtime's MatMulNBits rounds activations there by the row or with halves away from zero"
    return None


def insert_blocks(
    student: fx.GraphModule, layers: Sequence[tuple[BlockPoint, fx.Node]], tables: Sequence[fx.Node], learned: bool
) -> None:
    """Round input and weight of the linear `layers`, and the weights that `tables` look rows up in.

    Layers that read one value, or one weight, share its quantizer.
    """
    order = {node: i for i, node in enumerate(student.graph.nodes)}
    sources: dict[fx.Node, list[fx.Node]] = {}
    weights: dict[fx.Node, list[fx.Node]] = {}
    bits = {}
    for point, node in layers:
        sources.setdefault(operand(node), []).append(node)
        weights.setdefault(operand(node, 1), []).append(node)
        bits[operand(node, 1)] = point.bits
    for weight, readers in weights.items():
        layer, (rows, columns) = readers[0].meta["layer"], shape(weight)
        assert rows is not None and columns is not None
        module = BlockWeightFakeQuant(rows, columns, bits[weight], learned)
        look_ups = [node for node in tables if operand(node) is weight]
        with student.graph.inserting_before(min((*readers, *look_ups), key=order.__getitem__)):
            fake = call_quantizer(student, f"{layer}.weight", module, weight, f"{layer}.weight")
        for node in (*readers, *look_ups):
            node.replace_input_with(weight, fake)
    for source, readers in sources.items():
        layer = readers[0].meta["layer"]
        with student.graph.inserting_before(min(readers, key=order.__getitem__)):
            fake = call_quantizer(student, f"{layer}.input", BlockFakeQuant(), source, source.meta["layer"])
        for node in readers:
            node.update_arg(0, fake)
