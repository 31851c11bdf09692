"""The epilogue's steps against torch, against the separate layers they replace, and under Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels.common.checks import allocate
from pqk.kernels.common.epilogue import (
    MAX_STEPS,
    STEPS,
    apply_steps,
    centred,
    check_params,
    check_steps,
    encode,
    epilogue,
    exact_dtype,
    fold_bias,
    names_of,
    program,
    reads_residual,
    scaled,
)
from pqk.kernels.common.launch import Launch, launch
from pqk.kernels.common.triton import INTERPRETED, jit, tl
from pqk.quant import qparams

pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
CPU = torch.device("cpu")
UINT8 = (0.1, 3.0, 0.0, 255.0)
ACTIVATIONS = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "hard_swish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


@jit
def _steps_alone(y_ptr, x_ptr, residual_ptr, params_ptr, n, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    y = epilogue(tl.load(x_ptr + at, mask=mask, other=0.0), STEPS, params_ptr, residual_ptr, at, mask)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def in_triton(x: Tensor, steps: str, params: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    with poisoned():
        y = allocate(x.shape, out_dtype, x.device)
    args = {"y_ptr": y, "x_ptr": x, "residual_ptr": residual, "params_ptr": params, "n": x.numel()}
    launch(Launch(_steps_alone, (-(-x.numel() // 128),), args, {"STEPS": encode(steps), "BLOCK": 128}))
    return y


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_torchs(name: str) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-0.0, 1e-30, -200.0, 200.0])])
    steps, params = program((name,))
    got = apply_steps(x, steps, params, None, torch.float32)
    torch.testing.assert_close(got, ACTIVATIONS[name](x.double()).float(), rtol=2e-6, atol=1e-6)


def test_requantize_is_two_layers() -> None:
    """A requantize equals quantize and dequantize of `pqk.quant.qparams`, bit for bit; a quantize is the first."""
    x = torch.cat([draw((999,), torch.float32) * 5, torch.arange(-300, 300) * 0.05])  # half of the latter are ties
    for dtype, low, high, zero_point in (("uint8", 0, 255, 3), ("int8", -127, 127, 0), ("int8", -128, 127, -100)):
        grid = qparams.Grid(dtype, low, high, symmetric=False)  # type: ignore[arg-type]
        q = qparams.QParams(torch.tensor(0.1), torch.tensor(zero_point), grid)
        row = (0.1, zero_point, low, high)
        steps, params = program(("requantize", *row, 0.1))
        whole = qparams.dequantize(qparams.quantize(x, q), q)
        assert torch.equal(apply_steps(x, steps, params, None, torch.float32), whole)
        steps, params = program(("quantize", *row))
        assert torch.equal(apply_steps(x, steps, params, None, grid.torch_dtype), qparams.quantize(x, q))


def test_a_table_is_any_function_of_the_integers() -> None:
    """Its numbers are those that the integers have, from the least one on."""
    function = [float((i * 37) % 101) for i in range(255)]
    x = torch.arange(-140, 140) * 0.5
    steps, params = program(("table", 0.5, 0, -127, 127), ("relu",), table=function)
    want = torch.tensor(function)[torch.arange(-140, 140).clamp(-127, 127) + 127]
    assert params.shape == (60, 5) and torch.equal(apply_steps(x, steps, params, None, torch.float32), want)
    if INTERPRETED:
        assert torch.equal(in_triton(x, steps, params, None, torch.float32), want)
    with pytest.raises(InputError, match="2 tables"):
        check_steps("table,table", params, None, x.shape, torch.float32, CPU)
    with pytest.raises(InputError, match="params"):
        check_steps("table", params[:1], None, x.shape, torch.float32, CPU)


def test_known_answers() -> None:
    """Ties to even, saturation at both ends and at infinity, and qmin for a NaN."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0, math.inf, -math.inf, math.nan, 3e9])
    steps, params = program(("quantize", 1.0, 0, -127, 127))
    want = torch.tensor([0, 2, 2, 0, -2, 127, -127, 127, -127, -127, 127], dtype=torch.int8)
    assert torch.equal(apply_steps(x, steps, params, None, torch.int8), want)
    if INTERPRETED:
        assert torch.equal(in_triton(x, steps, params, None, torch.int8), want)


@interpreted
@pytest.mark.parametrize("name", STEPS)
def test_steps_under_the_interpreter(name: str) -> None:
    x = torch.cat([draw((300,), torch.float32) * 2, torch.tensor([math.nan, 0.0, -0.0, 90.0, -90.0])])
    rows = {"quantize": UINT8, "requantize": (*UINT8, 0.2), "add": (0.05, 128), "mul": (0.05, 128), "table": UINT8}
    table = draw((256,), torch.float32).tolist() if name == "table" else ()
    steps, params = program((name, *rows.get(name, ())), table=table)
    residual = draw((305,), torch.uint8) if name in ("add", "mul") else None
    out_dtype = torch.uint8 if name == "quantize" else torch.float32
    reference, got = (f(x, steps, params, residual, out_dtype) for f in (apply_steps, in_triton))
    if name in ("gelu", "gelu_tanh", "silu", "sigmoid"):  # two libraries' exponentials
        torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-6, equal_nan=True)
    else:
        torch.testing.assert_close(got, reference, rtol=0, atol=0, equal_nan=True)


EXACT = ("relu", "relu6", "hard_swish", "requantize", "add", "mul")
SCALES = st.sampled_from([0.003, 0.0371, 0.125, 1.0, 1.7])
GRIDS = st.sampled_from([(0, 255, 0), (0, 255, 131), (-128, 127, -7), (-127, 127, 0)])


@st.composite
def programs(draw_from: st.DrawFn) -> tuple[list[tuple[str, *tuple[float, ...]]], torch.dtype]:
    """Rows of up to eight steps, all of arithmetic that is rounded once, and an output dtype that fits."""
    names = draw_from(st.lists(st.sampled_from(EXACT), max_size=MAX_STEPS - 1))
    last = draw_from(st.booleans())
    rows: list[tuple[str, *tuple[float, ...]]] = []
    out_dtype = torch.float32
    for name in [*names, *(["quantize"] if last else [])]:
        low, high, zero_point = draw_from(GRIDS)
        if name in ("requantize", "quantize"):
            rows.append((name, draw_from(SCALES), zero_point, low, high, draw_from(SCALES)))
        else:
            rows.append((name, draw_from(SCALES), zero_point) if name in ("add", "mul") else (name,))
    if last:
        out_dtype = torch.uint8 if rows[-1][3] == 0 else torch.int8
    return rows, out_dtype


@interpreted
@settings(max_examples=30, deadline=None)
@given(
    programs(), st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.float16, torch.bfloat16]), st.integers()
)
def test_programs_under_the_interpreter(
    drawn: tuple[list[tuple[str, *tuple[float, ...]]], torch.dtype], dtype: torch.dtype, seed: int
) -> None:
    """Any program without an exponential is equal to its reference, bit for bit: nothing is contracted or reordered."""
    rows, out_dtype = drawn
    steps, params = program(*rows)
    x = draw((130,), torch.float32, seed % 1000) * 3
    residual = draw((130,), dtype, seed % 997) if reads_residual(steps) else None
    check_steps(steps, params, residual, x.shape, out_dtype, CPU)
    check_params(steps, params)
    assert torch.equal(
        in_triton(x, steps, params, residual, out_dtype), apply_steps(x, steps, params, residual, out_dtype)
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_out(dtype: torch.dtype) -> None:
    x = draw((200,), torch.float32)
    steps, params = program(("relu",))
    assert_matches(apply_steps(x, steps, params, None, dtype), in_triton(x, steps, params, None, dtype))


def test_encode() -> None:
    assert encode("") == 0 and names_of("") == ()
    assert encode("relu,quantize") == 1 + (11 << 4)
    code, names = encode(",".join(STEPS[:8])), []
    while code:
        names.append(STEPS[(code & 15) - 1])
        code >>= 4
    assert tuple(names) == STEPS[:8]
    assert reads_residual("relu,add") and reads_residual("mul") and not reads_residual("relu,quantize")


@pytest.mark.parametrize(
    ("steps", "residual", "out_dtype", "says"),
    [
        ("relux", None, torch.float32, 'no step is named "relux"'),
        (",".join(["relu"] * 9), None, torch.float32, "9 steps, at most 8"),
        ("quantize,relu", None, torch.float32, "quantize must come last"),
        ("relu", None, torch.int8, "do not end in quantize"),
        ("quantize", None, torch.float32, "end in quantize"),
        ("add", None, torch.float32, "needs a residual"),
        ("relu", torch.zeros(2, 3), torch.float32, "reads no residual"),
        ("add", torch.zeros(3, 2), torch.float32, r"residual: shape is \[3, 2\], must be \[2, 3\]"),
        ("add", torch.zeros(3, 2).T, torch.float32, "residual: strides"),
        ("add", torch.zeros(2, 3, dtype=torch.int64), torch.float32, "residual: dtype is int64"),
    ],
)
def test_refused_steps(steps: str, residual: Tensor | None, out_dtype: torch.dtype, says: str) -> None:
    params = torch.ones(len(names_of(steps)), 5)
    with pytest.raises(InputError, match=says):
        check_steps(steps, params, residual, (2, 3), out_dtype, CPU)


def test_refused_params() -> None:
    steps, params = program(("relu",), ("quantize", 0.1, 0, 0, 255))
    for wrong in (params[:1], params.double(), params[:, :4]):
        with pytest.raises(InputError, match="params: "):
            check_steps(steps, wrong, None, (2,), torch.uint8, CPU)
    check_params(steps, params)
    for scale in (0.0, -1.0, math.nan, math.inf):
        for row in (("quantize", scale, 0, 0, 255), ("requantize", 1.0, 0, 0, 255, scale), ("add", scale, 0)):
            with pytest.raises(InputError, match=f"step 0 .{row[0]}.*finite and above 0"):
                check_params(*program(row))
    for low, zero_point, high in ((0, 300, 255), (5, 3, 255), (-200, 0, 127), (0, 0, 256)):
        with pytest.raises(InputError, match="does not hold"):
            check_params(*program(("quantize", 0.1, zero_point, low, high)))


@given(st.integers(1, 40), st.integers(0, 255), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_zero_point_folds_into_the_bias(k: int, zero_point: int, unsigned: bool, seed: int) -> None:
    """Σ centred(x) * w + fold_bias = Σ (x - zp) * w + bias, in integers."""
    dtype, zero_point = (torch.uint8, zero_point) if unsigned else (torch.int8, zero_point - 128)
    x, w, bias = draw((5, k), dtype, seed), draw((7, k), torch.int8, seed + 1), draw((7,), torch.int32, seed + 2)
    want = (x.long() - zero_point) @ w.long().T + bias
    folded = fold_bias(bias, w, zero_point, dtype)
    assert torch.equal(centred(x).long() @ w.long().T + folded, want)
    assert torch.equal(scaled(centred(x).double() @ w.double().T, folded, torch.ones(7)), want.float())
    assert torch.equal(fold_bias(None, w, zero_point, dtype), folded - bias)


def test_a_folded_bias_has_to_fit() -> None:
    with pytest.raises(InputError, match="does not fit int32"):
        fold_bias(
            torch.tensor([2**31 - 1], dtype=torch.int32), torch.full((1, 64), 127, dtype=torch.int8), 0, torch.uint8
        )


@pytest.mark.parametrize("terms", [1, 1024, 1025, 32768])
def test_exact_sums(terms: int) -> None:
    """The chosen float sums the largest products exactly, and one less of them still differs."""
    x = torch.full((terms,), -128, dtype=torch.int8)
    dtype = exact_dtype(terms)
    assert int(x.to(dtype) @ x.to(dtype)) == terms * 128 * 128
    near = x.clone()
    near[0] = -127
    assert int(near.to(dtype) @ near.to(dtype)) == terms * 128 * 128 - 128 * 128 + 127 * 127
    assert dtype == (torch.float32 if terms <= 1024 else torch.float64)
