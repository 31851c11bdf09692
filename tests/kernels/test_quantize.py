"""The quantize kernels: every case, any strides, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned, recorded_addresses, restrided
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels import quantize
from pqk.kernels.common.epilogue import FLOATS
from pqk.kernels.common.launch import Launch, launch
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.quantize import Case, quantize_dynamic, quantize_static
from pqk.quant import qparams

pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")


def check_case(case: Case) -> None:
    arguments = case.arguments("cpu")
    with poisoned() as outputs:
        if case.dynamic:
            got, reference = quantize.run_dynamic(**arguments), quantize.reference_dynamic(**arguments)
        else:
            got, reference = (quantize.run(**arguments),), (quantize.reference(**arguments),)
    assert len(outputs) == len(got)
    for a, b in zip(got, reference, strict=True):
        assert_matches(b, a, exact=1.0)


@interpreted
@pytest.mark.parametrize("case", quantize.CASES, ids=str)
def test_cases(case: Case) -> None:
    check_case(case)


@interpreted
@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_shape(dtype: torch.dtype) -> None:
    for shape in product((1, 2, 3), (1, 3, 16), (1, 7), (1, 5, 33)):
        check_case(Case(shape, dtype, dynamic=True))
        for to_nhwc, out_dtype in product((False, True), (torch.int8, torch.uint8)):
            check_case(Case(shape, dtype, to_nhwc=to_nhwc, out_dtype=out_dtype))
    for columns in (1023, 1024, 1025, 16384, 16385, 40000):
        check_case(Case((2, columns), dtype, dynamic=True))
        check_case(Case((2, columns), dtype))


def test_the_reference_is_the_grids_own() -> None:
    """The static formula is `pqk.qparams.quantize`, bit for bit."""
    x = torch.cat([draw((500,), torch.float32), torch.arange(-400, 400) * 0.015])
    q = qparams.QParams(torch.tensor(0.03), torch.tensor(121), qparams.Grid("uint8", 0, 255, symmetric=False))
    assert torch.equal(quantize.reference(x, 0.03, 121, 0, 255, torch.uint8), qparams.quantize(x, q))


def test_known_answers() -> None:
    x = torch.tensor([[1.0, -2.54, 0.0, 0.01], [0.0, 0.0, 0.0, 0.0]])
    q, scale = quantize_dynamic(x)
    assert torch.equal(q, torch.tensor([[50, -127, 0, 0], [0, 0, 0, 0]], dtype=torch.int8))
    torch.testing.assert_close(scale, torch.tensor([0.02, 1e-9]))
    got = quantize_static(torch.tensor([0.5, 1.5, 2.5, math.nan, math.inf]), 1.0, 10, 0, 255, torch.uint8)
    assert got.tolist() == [10, 12, 12, 0, 255]


@st.composite
def strided(draw_from: st.DrawFn) -> Tensor:
    """A float tensor of up to four axes whose memory is permuted, has gaps, is broadcast, or starts late."""
    shape = tuple(draw_from(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    order = draw_from(st.permutations(range(len(shape))))
    x = draw(tuple(shape[i] for i in order), draw_from(st.sampled_from(FLOATS)), draw_from(st.integers(0, 99)))
    kind = draw_from(st.sampled_from(["dense", "gaps", "broadcast"]))
    if kind == "gaps":
        x = restrided(x, draw_from(st.integers(2, 3)), draw_from(st.integers(0, 5)))
    elif kind == "broadcast":
        x = x.narrow(0, 0, 1).expand_as(x)
    return x.permute(sorted(range(len(shape)), key=lambda i: order[i]))


@interpreted
@settings(max_examples=40, deadline=None)
@given(strided(), st.sampled_from([(torch.int8, -127, 127, 0), (torch.int8, -128, 127, -9), (torch.uint8, 0, 255, 77)]))
def test_any_strides(x: Tensor, grid: tuple[torch.dtype, int, int, int]) -> None:
    dtype, low, high, zero_point = grid
    with poisoned():
        got = quantize.run(x, 0.05, zero_point, low, high, dtype)
    assert_matches(quantize.reference(x, 0.05, zero_point, low, high, dtype), got, exact=1.0)


@interpreted
@settings(max_examples=25, deadline=None)
@given(strided())
def test_any_rows(x: Tensor) -> None:
    """Rows that are evenly spaced are quantized in place; of others the kernel says so."""
    if reason := quantize.why_not_supported_dynamic(x):
        assert "evenly spaced" in reason
        x = x.contiguous()
    with poisoned():
        got = quantize.run_dynamic(x)
    for a, b in zip(got, quantize.reference_dynamic(x), strict=True):
        assert_matches(b, a, exact=1.0)


@given(strided())
@settings(max_examples=60, deadline=None)
def test_merged_axes_address_the_same(x: Tensor) -> None:
    """Fewer axes, the same offsets in the same order."""
    axes = quantize.merged_axes(tuple(x.shape), x.stride())
    offsets = np.zeros(1, dtype=np.int64)
    for size, stride in axes:
        offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
    want = [sum(i * s for i, s in zip(at, x.stride(), strict=True)) for at in np.ndindex(*x.shape)]
    assert offsets.tolist() == want and len(axes) <= x.ndim


@interpreted
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    for static in (quantize_static, quantize.run):
        assert static(x, 0.1, 0, -127, 127, torch.int8).shape == shape
    for dynamic in (quantize_dynamic, quantize.run_dynamic):
        q, scale = dynamic(x)
        assert q.shape == shape and scale.shape == shape[:-1] and bool((scale == qparams.TINY).all())


@interpreted
def test_a_scalar() -> None:
    assert quantize.run(torch.tensor(0.26), 0.1, 1, 0, 255, torch.uint8) == 4


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": torch.zeros(3, dtype=torch.int32)}, "x: dtype is int32, must be float32 or float16 or bfloat16"),
        ({"scale": 0.0}, "scale: 0.0; a scale must be finite and above 0"),
        ({"scale": -1.0}, "above 0"),
        ({"scale": math.nan}, "finite"),
        ({"scale": math.inf}, "finite"),
        ({"zero_point": 128}, "qmin ≤ zero_point ≤ qmax"),
        ({"qmin": -129}, "-128 ≤ -129"),
        ({"qmax": 128}, "128 ≤ 127"),
        ({"out_dtype": torch.int32}, "must be int8 or uint8"),
    ],
)
def test_refusals(changed: dict[str, object], says: str) -> None:
    arguments = {"x": torch.zeros(3), "scale": 0.1, "zero_point": 0, "qmin": -127, "qmax": 127, "out_dtype": torch.int8}
    for call in (quantize_static, quantize.run):
        call(**arguments)
        with pytest.raises(InputError, match=says):
            call(**{**arguments, **changed})


def test_dynamic_refusals() -> None:
    for call in (quantize_dynamic, quantize.run_dynamic):
        with pytest.raises(InputError, match="int8"):
            call(torch.zeros(3, dtype=torch.int8))
        with pytest.raises(InputError, match="scalar"):
            call(torch.tensor(1.0))


def test_what_it_cannot_read_in_place() -> None:
    x = torch.zeros(2, 3, 4, 5, 6)[:, ::2, ::2, ::2, ::2].permute(4, 2, 0, 3, 1)
    assert "at most 4" in (quantize.why_not_supported(x) or "")
    with pytest.raises(InputError, match="at most 4"):
        quantize.run(x, 0.1, 0, -127, 127, torch.int8)
    assert quantize.why_not_supported(x.contiguous()) is None


@interpreted
def test_offsets_have_64_bits() -> None:
    """A row whose first element is 6 * 2**31 elements away is read there, and no address wraps."""
    stride = 2**31 + 12345
    for planned, name in ((quantize.plan(torch.zeros(7, 6), 0.1, 0, -127, 127, torch.int8), "stride_2"),
                          (quantize.plan_dynamic(torch.zeros(7, 6)), "stride_r")):  # fmt: skip
        rows = {"rows": 7, "columns": 6, "size_1": 1, "size_2": 7, "stride_c": 1, name: stride}
        args = {k: rows.get(k, v) for k, v in planned.args.items()}
        x = args["x_ptr"]
        assert isinstance(x, Tensor)
        constexprs = {**planned.constexprs, "BLOCK_R": 8, "BLOCK_C": 8}
        with recorded_addresses() as seen:
            launch(Launch(planned.kernel, (1,), args, constexprs))
        want = [x.data_ptr() + 4 * (i * stride + j) for i in range(7) for j in range(6)]
        assert np.concatenate(seen["loads"]).tolist() == want


@pytest.mark.parametrize("out_dtype", [torch.int8, torch.uint8])
def test_ops_have_fakes(out_dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4)
    zero_point = 0 if out_dtype == torch.int8 else 3
    torch.library.opcheck(quantize_static, (x.permute(0, 2, 1), 0.1, zero_point, 0, 127, out_dtype))
    torch.library.opcheck(quantize_dynamic, (x,))


def test_the_op_is_the_reference_on_a_cpu() -> None:
    case = replace(quantize.CASES[0], shape=(1, 3, 4, 4))
    assert torch.equal(quantize_static(**case.arguments("cpu")), quantize.reference(**case.arguments("cpu")))
