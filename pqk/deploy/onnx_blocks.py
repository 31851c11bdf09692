"""ONNX Runtime's operators on integers in blocks: `MatMulNBits` and `GatherBlockQuantized` (com.microsoft).

Their schemas are ONNX Runtime's, as far as a student needs them; onnx itself knows neither operator.
"""

from __future__ import annotations

from onnx.defs import OpSchema
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from pqk.deploy.onnx_ops import MICROSOFT
from pqk.deploy.onnx_pools import Value
from pqk.quant.blocks import BLOCK

VERSION = 1
INT8 = 4
"""the accuracy level at which activations are rounded to 8 bits; below it weights are multiplied as floats"""


def _operator(name: str, inputs: tuple[str, ...], optional: tuple[str, ...], attributes: tuple[str, ...]) -> Op:
    """An operator of ONNX Runtime's, whose attributes are whole numbers."""
    required, extra = OpSchema.FormalParameterOption.Single, OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name,
        MICROSOFT,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(each, f"T_{each}", param_option=extra if each in optional else required)
            for each in (*inputs, *optional)
        ],
        outputs=[OpSchema.FormalParameter("output", "T_output")],
        type_constraints=[(f"T_{each}", list(TYPES), "") for each in (*inputs, *optional, "output")],
        attributes=[OpSchema.Attribute(each, OpSchema.AttrType.INT) for each in attributes],
    )
    return Op(Opset(MICROSOFT, VERSION), name, schema)


TYPES = ("tensor(float)", "tensor(uint8)", "tensor(int32)", "tensor(int64)")
MATMUL = _operator(
    "MatMulNBits",
    ("A", "B", "scales"),
    ("zero_points", "g_idx", "bias"),
    ("K", "N", "bits", "block_size", "accuracy_level"),
)
GATHER = _operator(
    "GatherBlockQuantized",
    ("data", "indices", "scales"),
    (),
    ("gather_axis", "quantize_axis", "block_size", "bits"),
)


def matmul_nbits(x: Value, weight: Value, scale: Value, bias: Value | None) -> Value:
    """`pqk::matmul_nbits`; without zero points the operator takes the middle of the range for zero."""
    return MATMUL(
        x, weight, scale, None, None, bias,
        K=int(x.shape[-1]), N=int(weight.shape[0]), bits=_bits(weight), block_size=BLOCK, accuracy_level=INT8,
    )  # fmt: skip


def gather_block_quantized(table: Value, scale: Value, indices: Value) -> Value:
    """`pqk::gather_block_quantized`; the operator takes a table of two axes, so a weight's blocks are joined first."""
    rows = op.Reshape(table, op.Constant(value_ints=[int(table.shape[0]), -1]))  # type: ignore[arg-type]
    return GATHER(rows, indices, scale, gather_axis=0, quantize_axis=1, block_size=BLOCK, bits=_bits(table))


def _bits(packed: Value) -> int:
    return int(packed.shape[-1]) * 8 // BLOCK
