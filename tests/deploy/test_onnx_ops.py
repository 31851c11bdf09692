"""The table of ONNX operators: complete, and of operators that ONNX and ONNX Runtime have."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from pqk.deploy import onnx_ops
from pqk.deploy.onnx_ops import MACS, ONNX_OPERATORS, Operands, in_integers

ROOT = Path(__file__).parents[2]
READERS = ("pqk/deploy/qdq.py", "pqk/deploy/onnx_emitter.py", "pqk/verify/coverage.py", "pqk/verify/parity.py")
"""files that tell ONNX operators apart, or write them"""
SCHEMAS = {(schema.domain, schema.name) for schema in get_all_operator_schema()}
NAMES = {name for _, name in SCHEMAS}


def operators(path: Path) -> Iterator[str]:
    """Operators that a file names: strings, and what it calls of the module `op`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in NAMES:
            yield node.value
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "op" and node.attr in NAMES:
            yield node.attr


def test_every_operator_that_is_named_has_a_row() -> None:
    rows = {row.name for row in ONNX_OPERATORS}
    named = {name: path for path in READERS for name in operators(ROOT / path)}
    assert {"Conv", "QuantizeLinear", "MatMulInteger", "GlobalAveragePool"} <= named.keys(), "the walk finds them"
    assert not {name: path for name, path in named.items() if name not in rows}


def test_every_row_is_an_operator() -> None:
    assert not [row.name for row in ONNX_OPERATORS if (row.domain, row.name) not in SCHEMAS]
    assert len({row.name for row in ONNX_OPERATORS}) == len(ONNX_OPERATORS)


SELECTIONS = {
    "PRODUCTS": "Conv ConvTranspose Gemm MatMul MatMulInteger",
    "MOVERS": "Reshape Transpose Squeeze Unsqueeze Flatten Slice Gather Pad Expand Identity",
    "QUANTIZERS": "QuantizeLinear DynamicQuantizeLinear",
    "PLUMBING": "QuantizeLinear DynamicQuantizeLinear DequantizeLinear Constant Shape Unsqueeze Cast",
    "INTEGER": "QLinearConv ConvInteger QGemm QLinearMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul "
    "QAttention DynamicQuantizeLSTM",
    "INSIDE": "MatMulNBits",
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_what_it_was(name: str) -> None:
    assert getattr(onnx_ops, name) == set(SELECTIONS[name].split())


def test_an_operator_that_multiplies_integers_is_counted() -> None:
    assert MACS.keys() >= onnx_ops.INTEGER


@pytest.mark.parametrize(
    ("operator", "attributes", "integers"),
    [
        ("QGemm", {}, True), ("MatMul", {}, False), ("MatMul", {"accuracy_level": 4}, False),
        ("MatMulNBits", {"accuracy_level": 4}, True), ("MatMulNBits", {"accuracy_level": 1}, False),
        ("MatMulNBits", {}, False),
    ],
)  # fmt: skip
def test_few_bits_are_multiplied_as_integers_at_one_accuracy_level(
    operator: str, attributes: dict[str, int], integers: bool
) -> None:
    assert in_integers(operator, attributes) == integers


@pytest.mark.parametrize(
    ("operator", "inputs", "output", "attributes", "macs"),
    [
        ("Conv", ((2, 8, 10, 10), (16, 4, 3, 3)), (2, 16, 5, 5), {"group": 2}, 2 * 16 * 25 * 4 * 9),
        ("QLinearConv", ((1, 8, 4, 4), (), (), (6, 8, 1, 1)), (1, 6, 4, 4), {}, 6 * 16 * 8),
        ("ConvTranspose", ((1, 4, 5, 5), (4, 3, 2, 2)), (1, 3, 10, 10), {}, 4 * 25 * 3 * 4),
        ("Gemm", ((7, 5), (7, 3)), (5, 3), {"transA": 1}, 5 * 3 * 7),
        ("MatMulInteger", ((2, 4, 6), (6, 5)), (2, 4, 5), {}, 2 * 4 * 5 * 6),
        ("Attention", ((2, 7, 12), (12, 36)), (2, 7, 12), {}, 2 * 7 * 12 * 36 + 2 * 2 * 49 * 12),
        ("LSTM", ((5, 2, 8), (2, 24, 8), (2, 24, 6)), (5, 2, 2, 6), {}, 5 * 2 * 2 * 24 * (8 + 6)),
        ("GRU", ((5, 2, 8), (1, 18, 8), (1, 18, 6)), (), {}, 5 * 2 * 18 * (8 + 6)),
        ("DynamicQuantizeLSTM", ((5, 2, 8), (1, 8, 24), (1, 6, 24)), (), {}, 5 * 2 * 24 * (8 + 6)),
        ("MatMulNBits", ((2, 4, 6), (5, 1, 3)), (2, 4, 5), {"N": 5, "K": 6}, 2 * 4 * 5 * 6),
        ("Einsum", ((2, 7, 3), (2, 9, 3)), (2, 7, 9), {"equation": b"btd, bsd -> bts"}, 2 * 7 * 9 * 3),
        ("MultiHeadAttention", ((2, 7, 12), (2, 9, 12)), (2, 7, 8), {}, 2 * 7 * 9 * (12 + 8)),
    ],
)
def test_macs_by_hand(operator: str, inputs: tuple, output: tuple, attributes: dict, macs: int) -> None:
    assert MACS[operator](Operands(inputs, output, attributes)) == macs


def test_attention_by_keys_is_counted_with_those_that_were_kept() -> None:
    """Heads of their own axis [B, H, T, D]; and tokens [B, T, H * D] behind 5 kept ones of 2 groups."""
    heads = Operands(((2, 4, 3, 8), (2, 4, 6, 8), (2, 4, 6, 8)), (2, 4, 3, 8), {})
    assert MACS["Attention"](heads) == 2 * 2 * 4 * 3 * 6 * 8
    kept = ((2, 2, 5, 8), (2, 2, 5, 8))
    tokens = Operands(((2, 1, 32), (2, 1, 16), (2, 1, 16), (2, 1, 1, 6), *kept), (2, 1, 32), {})
    assert MACS["Attention"](tokens) == 2 * 2 * 4 * 1 * 6 * 8
    grouped = Operands(((2, 1, 32), (2, 1, 16), (2, 1, 16), *kept), (2, 1, 32), {})
    assert MACS["GroupQueryAttention"](grouped) == MACS["Attention"](tokens)
    assert MACS["GroupQueryAttention"](Operands(((2, 1, 64), (), (), *kept), (2, 1, 32), {})) is None
    projected = Operands(((2, 5, 32), (32, 96)), (2, 5, 32), {})
    assert MACS["Attention"](projected) == 2 * 5 * 32 * 96 + 2 * 2 * 5 * 5 * 32
