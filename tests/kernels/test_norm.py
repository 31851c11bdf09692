"""layer_norm_quantize and rms_norm_quantize: interpreter against reference, reference against torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned, restrided
from kernels_rows import assert_alike, faked, far, programs
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from pqk.errors import InputError
from pqk.kernels import layer_norm_quantize, rms_norm_quantize
from pqk.kernels.common.epilogue import program
from pqk.kernels.common.norm import MAX_COLUMNS, Case, Norm
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.common.values import MAX_ROWS
from pqk.quant.qparams import Grid, QParams, quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: Triton, and no CUDA device"),
]
MODULES = (layer_norm_quantize, rms_norm_quantize)
CASES = [
    pytest.param(module, case, marks=[pytest.mark.full] if programs(module.specialize(case)) > 32 else [])
    for module in MODULES
    for case in module.CASES
]
U8, S8, F32 = torch.uint8, torch.int8, torch.float32


def agree(module: ModuleType, norm: Norm) -> None:
    """Only the order of a row's sums differs: quantized within 1 step and 99.9 % equal, floats to their rounding.

    The kept sum is one float addition, or none: the same bits, where the interpreter rounds as a GPU does.
    """
    with poisoned() as outputs:
        got = module.run(norm)
    assert [o is g for o, g in zip(outputs, got, strict=True)] == [True, True]
    for expected, actual in zip(module.reference(norm), got, strict=True):
        assert_matches(expected, actual, atol=2e-6)
    if norm.keep == "sum" and norm.kept_dtype != torch.bfloat16:
        assert torch.equal(got[1], module.reference(norm)[1])


@pytest.mark.parametrize(("module", "case"), CASES)
def test_cases(module: ModuleType, case: Any) -> None:
    agree(module, case.arguments("cpu"))


def floats(x: Tensor, **changes: Any) -> Norm:
    """A norm of floats to floats, without anything around it."""
    plain = Norm(x, None, None, None, torch.zeros(0, 5), "", 1e-5, 1.0, 0, 1.0, 0, "nothing", F32)
    return replace(plain, **changes)


def torch_norm(module: ModuleType, v: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if module is layer_norm_quantize:
        return layer_norm(v, v.shape[-1:], weight, bias, eps)
    y = rms_norm(v, v.shape[-1:], weight, eps)
    return y if bias is None else y + bias


@settings(max_examples=20, deadline=None)
@given(
    module=st.sampled_from(MODULES), shape=st.lists(st.integers(1, 5), max_size=2), c=st.integers(1, 90),
    dtype=st.sampled_from((F32, torch.float16, U8, S8)), residual=st.sampled_from((None, F32, U8, S8)),
    affine=st.booleans(), keep=st.sampled_from(("nothing", "sum", "norm")), quantized=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_norms_are_those_of_torch(
    module: ModuleType, shape: list[int], c: int, dtype: torch.dtype, residual: torch.dtype | None, affine: bool,
    keep: str, quantized: bool, seed: int,
) -> None:  # fmt: skip
    """Of the dequantized sum, in float64: the reference is near it, and the kernel is the reference."""
    steps, out = ("quantize", S8) if quantized else ("", F32)
    case = Case((*shape, c), dtype, residual, affine, keep, steps, out)
    norm = replace(case.arguments("cpu", seed), eps=1e-3)
    v = exact(norm.x, norm.x_scale, norm.x_zero_point)
    if norm.residual is not None:
        v = v + exact(norm.residual, norm.residual_scale, norm.residual_zero_point)
    vectors = [t if t is None else t.double() for t in (norm.weight, norm.bias)]
    y = torch_norm(module, v, *vectors, norm.eps)
    got, kept = module.reference(norm)
    if quantized:
        expected = quantize(y.float(), QParams(*norm.params[0, :2], Grid("int8", -127, 127, True)))
        assert_matches(expected, got)
    else:
        torch.testing.assert_close(got.double(), y, rtol=1e-4, atol=1e-4)
    if keep != "nothing":
        tolerance = 2e-3 if kept.dtype == torch.float16 else 1e-4
        torch.testing.assert_close(kept.double(), v if keep == "sum" else y, rtol=tolerance, atol=tolerance)
    agree(module, norm)


def exact(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return x.double() if x.is_floating_point() else (x.double() - zero_point) * scale


def test_known_rows() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-4.0, -4.0, -4.0, -4.0]])
    for f in (layer_norm_quantize.reference, layer_norm_quantize.run):
        y, _ = f(floats(x, eps=0.5))  # mean 3, variance 3.5; then variance 0
        torch.testing.assert_close(y, torch.tensor([[-1.0, -0.5, 0.0, 1.5], [0.0, 0.0, 0.0, 0.0]]), rtol=1e-6, atol=0)
    for f in (rms_norm_quantize.reference, rms_norm_quantize.run):
        y, _ = f(floats(x, eps=0.0))  # mean square 12.5, then 16
        torch.testing.assert_close(y[1], -torch.ones(4), rtol=1e-6, atol=0)
        torch.testing.assert_close(y[0], x[0] / 12.5**0.5, rtol=1e-6, atol=0)


def test_a_large_mean_does_not_cancel_the_variance() -> None:
    """Two passes over the row in registers: `mean(v²) - mean(v)²` would leave nothing of a spread of 1 at 10,000."""
    x = 10000 + draw((4, 200), F32, 5) / 3
    for f in (layer_norm_quantize.reference, layer_norm_quantize.run):
        y, _ = f(floats(x))
        torch.testing.assert_close(y.double(), layer_norm(x.double(), (200,)), rtol=1e-2, atol=1e-2)


def test_what_follows_the_norm_reads_the_quantized_value() -> None:
    """A requantize in the epilogue leaves floats that lie on its grid."""
    steps, params = program(("requantize", 0.25, 3, 0, 15, 0.25))
    y, _ = layer_norm_quantize.run(floats(draw((3, 33), F32), steps=steps, params=params))
    assert torch.equal(y, (y / 0.25).round() * 0.25)
    assert y.min() == -0.75 and y.max() <= 3.0


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # ∞ - ∞, in the interpreter's numpy
def test_a_row_of_nan_or_infinity_spoils_no_other() -> None:
    x = draw((8, 20), F32)
    x[3, 4], x[5, 0] = float("nan"), float("inf")
    steps, params = program(("quantize", 0.02, 0, -127, 127))
    good = [0, 1, 2, 4, 6, 7]
    for module in MODULES:
        norm = floats(x, steps=steps, params=params, out_dtype=S8)
        for f in (module.reference, module.run):
            out, _ = f(norm)
            assert torch.equal(out[good], f(floats(x[good], steps=steps, params=params, out_dtype=S8))[0])
            assert (out[3] == -127).all()  # a NaN quantizes to the least integer
        assert torch.equal(module.run(norm)[0], module.reference(norm)[0])


def test_what_has_no_rows_gives_no_rows() -> None:
    for module, keep, f in product(MODULES, ("nothing", "sum", "norm"), ("reference", "run")):
        out, kept = getattr(module, f)(floats(torch.empty(2, 0, 7), keep=keep))
        assert out.shape == (2, 0, 7) and kept.shape == ((0,) if keep == "nothing" else (2, 0, 7))


def test_offsets_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of 2 GiB, most of which is never touched and so never there."""
    columns, block = 512, 4
    rows = (1 << 31) // columns + block
    x = torch.empty(rows, columns, dtype=S8)
    x[-block:] = draw((block, columns), S8, 7)
    steps, params = program(("quantize", 0.02, 0, -127, 127))
    norm = floats(x, x_scale=0.1, steps=steps, params=params, out_dtype=S8)
    planned = layer_norm_quantize.plan(norm)
    assert planned.constexprs["BLOCK_R"] == block
    far(monkeypatch, replace(planned, grid=(1,)), first=rows // block - 1)
    expected, _ = layer_norm_quantize.reference(replace(norm, x=x[-block:]))
    assert_matches(expected, planned.args["out_ptr"][-block:])  # type: ignore[index]


X = torch.zeros(2, 8)
REFUSALS = [
    (floats(X.double()), "x: dtype is float64, must be uint8 or int8 or float32"),
    (floats(restrided(X)), "x: strides"),
    (floats(torch.tensor(1.0)), "a row needs at least one element"),
    (floats(torch.empty(3, 0)), "a row needs at least one element"),
    (floats(X, residual=X[:1]), r"residual: shape is \[1, 8\], must be \[2, 8\]"),
    (floats(X, residual=X.to("meta")), "residual: is on meta"),
    (floats(X, residual=X.to(S8), residual_scale=0.0), "residual scale: 0.0"),
    (floats(X.to(U8), x_zero_point=-1), "x zero point: -1"),
    (floats(X.to(U8), x_scale=float("inf")), "x scale: inf"),
    (floats(X, weight=torch.ones(7)), r"weight: shape is \[7\], must be \[8\]"),
    (floats(X, bias=torch.ones(8).half()), "bias: dtype is float16"),
    (floats(X, eps=-1e-5), "eps: -1e-05"),
    (floats(X, eps=float("nan")), "eps: nan"),
    (floats(X, keep="mean"), "known: nothing, sum, norm"),
    (floats(X, out_dtype=S8), "out_dtype"),
    (floats(X, steps="add", params=torch.zeros(1, 5)), "read a residual tensor"),
]


@pytest.mark.parametrize(("norm", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input_is_refused_by_kernel_and_reference(norm: Norm, message: str) -> None:
    for module, f in product(MODULES, ("reference", "run")):
        with pytest.raises(InputError, match=message):
            getattr(module, f)(norm)


def test_what_the_kernels_do_not_take_has_a_reason() -> None:
    long, many = torch.empty(2, MAX_COLUMNS + 1), torch.empty(MAX_ROWS + 1, 1, device="meta")
    for module in MODULES:
        assert "does not stay in registers" in str(module.why_not_supported(floats(long)))
        assert "32-bit index" in str(module.why_not_supported(floats(many)))
        assert module.why_not_supported(floats(long[:, :-1])) is None
        with pytest.raises(InputError, match="registers"):
            module.run(floats(long))


@pytest.mark.parametrize("module", MODULES)
def test_the_operator_is_the_reference_and_its_fake_tells_the_shapes(module: ModuleType) -> None:
    operator = getattr(torch.ops.pqk, module.__name__.rpartition(".")[2]).default
    for keep, residual in (("nothing", None), ("sum", S8)):
        norm = Case((3, 9), torch.float16, residual, keep=keep).arguments("cpu")
        values = tuple(vars(norm).values())
        for got, expected, fake in zip(operator(*values), module.reference(norm), faked(operator, values), strict=True):
            assert torch.equal(got, expected)
            assert_alike(fake, got)


def test_traffic_is_inputs_and_outputs_once() -> None:
    for module in MODULES:
        for case in module.CASES:
            planned = module.specialize(case)
            tensors = {n: t for n, t in planned.args.items() if isinstance(t, Tensor) and n != "params_ptr"}
            assert module.traffic(case) == sum(t.nbytes for t in tensors.values())


DTYPES = (F32, torch.float16, torch.bfloat16, U8, S8)


@pytest.mark.full
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(1,), (1, 2), (7, 31), (3, 5, 384), (2, 1023), (1, 16384)], ids=str)
@pytest.mark.parametrize(("dtype", "residual"), list(product(DTYPES, (None, *DTYPES))), ids=str)
def test_every_dtype(
    module: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, residual: torch.dtype | None
) -> None:
    for keep, (steps, out) in product(
        ("nothing", "sum", "norm"),
        (("quantize", S8), ("gelu,quantize", U8), ("", F32), ("", torch.float16), ("relu", torch.bfloat16)),
    ):
        agree(module, Case(shape, dtype, residual, keep != "norm", keep, steps, out).arguments("cpu"))
