"""Gated linear units: the kernel is its reference in all its shapes, and that is what separate layers give."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, poisoned, restrided
from kernels_rows import assert_alike, faked, programs
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels import int8_gated_linear as module
from pqk.kernels import int8_linear
from pqk.kernels.common.configs import Config
from pqk.kernels.common.epilogue import apply_steps, program
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.int8_gated_linear import CASES, Case, GatedLinear, interleaved, plan, reference, run

pytestmark = pytest.mark.slow
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
TILED = Config(16, 16, 32, 4, 2, group_m=2)
VARIANTS = {"tiled": TILED, "persistent": replace(TILED, persistent=True), "split_k": replace(TILED, split_k=3)}
PROGRAMS = [
    ("requantize,silu,requantize", "requantize", "quantize", torch.int8),
    ("table", "requantize", "quantize", torch.uint8),
    ("silu", "", "", torch.float16),
    ("gelu_tanh", "relu", "requantize", torch.float32),
    ("", "sigmoid", "quantize", torch.int8),
]


def agree(a: GatedLinear, config: Config | None = None) -> Tensor:
    """The kernel against its reference, every byte of the output wrong before it."""
    with poisoned() as outputs:
        got = run(a, config)
    assert len(outputs) == 1 and outputs[0] is got
    assert_matches(reference(a), got)
    return got


def call(m: int, n: int, k: int, dtype: torch.dtype, gate: str, up: str, steps: str, out: torch.dtype) -> GatedLinear:
    case = Case(m, n, k, dtype, "silu" if gate == "table" else gate, up, steps, out, table=gate == "table")
    return case.arguments("cpu")


@interpreted
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.full] if programs(module.specialize(c)) > 40 else []) for c in CASES]
)
def test_cases(case: Case) -> None:
    agree(case.arguments("cpu"))


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 17, 97), (17, 16, 64), (40, 19, 130)])
def test_variants(variant: str, shape: tuple[int, int, int]) -> None:
    agree(call(*shape, torch.uint8, *PROGRAMS[0]), VARIANTS[variant])


@interpreted
@pytest.mark.parametrize("programs", PROGRAMS, ids=lambda p: "/".join(p[:3]))
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_programs(dtype: torch.dtype, programs: tuple[str, str, str, torch.dtype]) -> None:
    agree(call(19, 21, 40, dtype, *programs), TILED)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(0, 40), st.integers(0, 20), st.integers(0, 100), st.sampled_from([torch.int8, torch.uint8]),
    st.sampled_from(sorted(VARIANTS)), st.sampled_from(PROGRAMS),
)  # fmt: skip
def test_any_size(m: int, n: int, k: int, dtype: torch.dtype, variant: str, programs: Any) -> None:
    agree(call(m, n, k, dtype, *programs), VARIANTS[variant])


def test_it_is_two_linear_layers_and_a_product() -> None:
    """As `int8_linear` gives gate and up, each with its own program, and their product rounded once more."""
    a = call(23, 18, 50, torch.uint8, *PROGRAMS[0])
    halves = []
    for i, (steps, params) in enumerate(((a.gate_steps, a.gate_params), (a.up_steps, a.up_params))):
        layer = (a.weight[i::2], a.bias[i::2], a.scale[i::2])
        halves.append(int8_linear.reference(a.x, *layer, steps, params, None, torch.float32))
    assert torch.equal(reference(a), apply_steps(halves[0] * halves[1], a.steps, a.params, None, a.out_dtype))
    assert float(reference(a).float().std()) > 10, "the case fills its grid"


def test_a_known_answer() -> None:
    """silu(2) * 3 = 5.2848: one gate of weight 2 and one up of weight 3 on an input of 1."""
    none, silu = program(), program(("silu",))
    weight = interleaved(torch.tensor([[2]], dtype=torch.int8), torch.tensor([[3]], dtype=torch.int8))
    a = GatedLinear(
        torch.tensor([[1]], dtype=torch.int8), weight, torch.zeros(2, dtype=torch.int32), torch.ones(2),
        *silu, *none, *none, torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(reference(a), torch.tensor([[5.28478]]))


def test_rows_alternate() -> None:
    gate, up = torch.arange(6).view(3, 2), -torch.arange(6).view(3, 2)
    assert interleaved(gate, up).tolist() == [[0, 1], [0, -1], [2, 3], [-2, -3], [4, 5], [-4, -5]]


@interpreted
def test_rows_with_gaps_and_leading_axes() -> None:
    a = call(12, 5, 33, torch.uint8, *PROGRAMS[0])
    flat = agree(a)
    room = torch.zeros(12, 40, dtype=torch.uint8)
    room[:, 3:36] = a.x
    assert torch.equal(agree(replace(a, x=room[:, 3:36])), flat)
    assert torch.equal(agree(replace(a, x=a.x.view(3, 1, 4, 33))), flat.view(3, 1, 4, 5))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(4, 8)}, "x: dtype is float32"),
    ({"x": torch.zeros((), dtype=torch.int8)}, "a scalar"),
    ({"weight": torch.zeros(6, 7, dtype=torch.int8)}, r"weight: shape is \[6, 7\]"),
    ({"weight": torch.zeros(5, 8, dtype=torch.int8)}, "weight: 5 rows; rows of gate and up come in pairs"),
    ({"bias": torch.zeros(3, dtype=torch.int32)}, "bias: shape"),
    ({"scale": torch.tensor([1.0, 1, 0, 1, 1, 1])}, r"scale: 0.0 at \[2\]"),
    ({"gate_steps": "quantize", "gate_params": torch.zeros(1, 5)}, "end in quantize"),
    ({"up_steps": "mul", "up_params": torch.zeros(1, 5)}, "read a residual"),
    ({"steps": "add", "out_dtype": torch.float32}, "read a residual"),
    ({"out_dtype": torch.float32}, "end in quantize"),
    ({"params": torch.zeros(2, 5)}, "params: shape"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSALS)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    a = replace(call(4, 3, 8, torch.int8, *PROGRAMS[0]), **changes)
    for compute in (reference, run):
        with pytest.raises(InputError, match=says):
            compute(a)


def test_what_it_cannot_read_in_place() -> None:
    a = call(4, 3, 8, torch.int8, *PROGRAMS[0])
    assert module.why_not_supported(a) is None
    assert "rows must be dense" in (module.why_not_supported(replace(a, x=restrided(a.x))) or "")
    with pytest.raises(InputError, match="int8_gated_linear: x: shape"):
        run(replace(a, x=restrided(a.x)))


def test_the_operator() -> None:
    a = call(4, 3, 8, torch.int8, *PROGRAMS[1])
    arguments = tuple(getattr(a, field.name) for field in dataclasses.fields(a))
    operator = torch.ops.pqk.int8_gated_linear.default
    assert torch.equal(operator(*arguments), reference(a))
    assert_alike(faked(operator, arguments), reference(a))
    torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])


def test_one_token_of_a_large_layer_splits_its_sum() -> None:
    long = plan(Case(1, 768, 4096).arguments())
    assert long.name == "_gated_split_k" and long.grid[1] > 1
