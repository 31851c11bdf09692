"""int8_add, int8_concat and int8_pool: interpreter against reference, reference against torch and the INT8 graph."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned, restrided
from kernels_rows import assert_alike, faked, far, programs
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from pqk.errors import InputError
from pqk.kernels import int8_add, int8_concat, int8_mul, int8_pool
from pqk.kernels.common.epilogue import program
from pqk.kernels.common.launch import launch
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.common.values import MAX_ROWS
from pqk.kernels.int8_add import Add
from pqk.kernels.int8_concat import Concat
from pqk.kernels.int8_pool import Pool
from pqk.quant.qparams import Grid, QParams, dequantize, quantize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: Triton, and no CUDA device"),
]
U8, S8 = torch.uint8, torch.int8
MODULES = (int8_add, int8_mul, int8_concat, int8_pool)
CASES = [
    pytest.param(module, case, marks=[pytest.mark.full] if programs(module.specialize(case)) > 12 else [])
    for module in MODULES
    for case in module.CASES
]
EXACT = {"gelu", "gelu_tanh", "silu", "sigmoid"}
"""steps with an exponential, whose last bit is the platform's"""
ZERO = {U8: 128, S8: 0}
LIMITS = {U8: (0, 255), S8: (-128, 127)}
GRIDS = st.sampled_from((U8, S8))


def grid(dtype: torch.dtype, scale: float, zero_point: int) -> QParams:
    low, high = LIMITS[dtype]
    name: Any = str(dtype).removeprefix("torch.")
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), Grid(name, low, high, False))


def to(dtype: torch.dtype, scale: float, zero_point: int) -> tuple[str, Tensor]:
    """The program that quantizes onto all of `dtype`."""
    return program(("quantize", scale, zero_point, *LIMITS[dtype]))


def agree(module: ModuleType, arguments: Any) -> None:
    """The kernel leaves what the reference computes, bit for bit where no exponential is in the way."""
    with poisoned() as outputs:
        got = module.run(arguments)
    assert len(outputs) == 1 and outputs[0] is got
    expected = module.reference(arguments)
    if EXACT.isdisjoint(arguments.steps.split(",")) and arguments.out_dtype != torch.bfloat16:
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert_matches(expected, got)


@pytest.mark.parametrize(("module", "case"), CASES)
def test_cases(module: ModuleType, case: Any) -> None:
    agree(module, case.arguments("cpu"))


# ---- against the INT8 graph: dequantize, the float operator, quantize


@settings(max_examples=25, deadline=None)
@given(a=GRIDS, b=GRIDS, out=GRIDS, scale=st.floats(2**-10, 0.5, width=32), seed=st.integers(0, 999))
def test_adding_is_what_the_int8_graph_computes(
    a: torch.dtype, b: torch.dtype, out: torch.dtype, scale: float, seed: int
) -> None:
    x, y = draw((3, 17), a, seed), draw((3, 17), b, seed + 1)
    ga, gb, go = grid(a, 0.013, ZERO[a]), grid(b, scale, ZERO[b] - 3), grid(out, 0.02, ZERO[out])
    steps, params = to(out, 0.02, ZERO[out])
    got = int8_add.reference(Add(x, y, params, steps, float(ga.scale), ZERO[a], scale, ZERO[b] - 3, out))
    assert torch.equal(got, quantize(dequantize(x, ga) + dequantize(y, gb), go))


@pytest.mark.parametrize("gates", [False, True])
def test_multiplying_is_what_the_int8_graph_computes(gates: bool) -> None:
    case = int8_mul.Case((2, 3, 5, 7), gates, U8, S8, "quantize", U8)
    arguments = case.arguments("cpu")
    sides = ((arguments.a, U8, 0.013, 101), (arguments.b, S8, 0.017, 0))
    a, b = (dequantize(x, grid(dtype, scale, zero)) for x, dtype, scale, zero in sides)
    scale, zero = float(arguments.params[0, 0]), int(arguments.params[0, 1])
    assert arguments.gates == gates and float((a * b).std()) > 0.1
    assert torch.equal(int8_mul.reference(arguments), quantize(a * b, grid(U8, scale, zero)))


def test_a_gate_has_the_shape_of_one() -> None:
    arguments = int8_mul.CASES[0].arguments("cpu")
    for wrong in (arguments.b[:1], arguments.b[..., :5], arguments.b.expand(-1, 2, -1, -1).contiguous()):
        with pytest.raises(InputError, match=r"b: shape is .*, must be \[2, 1, 1, 96\]"):
            int8_mul.run(replace(arguments, b=wrong))


def test_a_sum_on_a_tie_goes_to_the_even_neighbour() -> None:
    a = torch.tensor([[1, 3, 5, 7, -1, -3]], dtype=S8)
    steps, params = to(S8, 1.0, 0)
    for f in (int8_add.reference, int8_add.run):
        assert f(Add(a, torch.zeros_like(a), params, steps, 0.5, 0, 1.0, 0, S8)).tolist() == [[0, 2, 2, 4, 0, -2]]


def test_concatenating_is_what_the_int8_graph_computes() -> None:
    x, y = draw((2, 3, 5), U8, 1), draw((2, 3, 4), S8, 2)
    steps, params = to(U8, 0.02, 100)
    got = int8_concat.reference(Concat([x, y], params, steps, [0.02, 0.011], [100, 4], U8))
    joined = torch.cat([dequantize(x, grid(U8, 0.02, 100)), dequantize(y, grid(S8, 0.011, 4))], -1)
    assert torch.equal(got, quantize(joined, grid(U8, 0.02, 100)))
    assert torch.equal(got[..., :5], x), "an input with the qparams of the result keeps its integers"


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(("max", "average")), size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2), ceil_mode=st.booleans(), include_pad=st.booleans(), dtype=GRIDS,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_windows_are_those_of_torch(
    kind: str, size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: int,
    ceil_mode: bool, include_pad: bool, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Every drawn window is compared with torch's own pooling of the dequantized floats, and with the kernel."""
    padding = tuple(k // 2 for k in kernel)
    reach = (dilation if kind == "max" else 1,) * 2
    x = draw((2, *size, 3), dtype, seed)
    arguments = Pool(
        x, torch.zeros(0, 5), "", kind, kernel, stride, padding, reach, ceil_mode, include_pad, 0.05, ZERO[dtype],
        torch.float32,
    )  # fmt: skip
    try:
        got = int8_pool.reference(arguments)
    except InputError as refused:
        assume("holds no pixel" not in str(refused) and "must fit" not in str(refused))
        raise
    floats = dequantize(x, grid(dtype, 0.05, ZERO[dtype])).permute(0, 3, 1, 2)
    window = (list(kernel), list(stride), list(padding))
    if kind == "max":
        expected = max_pool2d(floats, *window, list(reach), ceil_mode)
    else:
        expected = avg_pool2d(floats, *window, ceil_mode, include_pad)
    torch.testing.assert_close(got, expected.permute(0, 2, 3, 1).contiguous(), rtol=1e-5, atol=1e-5)
    agree(int8_pool, arguments)


def test_a_global_average_is_the_mean_and_keeps_its_axes() -> None:
    x = torch.tensor([[10, 250], [11, 250], [12, 250], [14, 255]], dtype=U8).reshape(1, 2, 2, 2)
    none: list[int] = []
    arguments = Pool(x, *reversed(to(U8, 1.0, 0)), "global_average", *[none] * 4, False, False, 1.0, 0, U8)
    for f in (int8_pool.reference, int8_pool.run):
        assert f(arguments).tolist() == [[[[12, 251]]]]  # 11.75 and 251.25


def test_a_maximum_on_its_own_grid_moves_integers() -> None:
    """`quantize` with the qparams of the input gives back the integer, for every integer there is."""
    x = torch.arange(256, dtype=torch.int32).to(U8).reshape(1, 16, 16, 1)
    for scale in (1e-9, 0.0371, 1.0, 33.3):
        steps, params = to(U8, scale, 77)
        window = ([1, 1], [1, 1], [0, 0], [1, 1], False, False)
        assert torch.equal(int8_pool.reference(Pool(x, params, steps, "max", *window, scale, 77, U8)), x)


def test_padding_neither_wins_nor_adds() -> None:
    """Where the integers lie below 0, a padded 0 would win; where they lie off the zero point, it would pull."""
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False, False)
    for dtype, value in ((U8, 3), (U8, 120), (S8, -100), (S8, 120)):
        x = torch.full((1, 4, 4, 2), value).to(dtype)
        steps, params = to(dtype, 0.1, 64)
        for kind, f in product(("max", "average"), (int8_pool.reference, int8_pool.run)):
            out = f(Pool(x, params, steps, kind, *window, 0.1, 64, dtype))
            assert (out == value).all() and out.shape == (1, 2, 2, 2)


# ---- drawn shapes, memory


@settings(max_examples=10, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3), c=st.integers(1, 40), a=GRIDS, b=GRIDS, out=GRIDS,
    offset=st.integers(0, 5), scale=st.floats(2**-13, 2.0, width=32), seed=st.integers(0, 999),
)  # fmt: skip
def test_sums_and_concatenations_of_any_shape(
    shape: list[int], c: int, a: torch.dtype, b: torch.dtype, out: torch.dtype, offset: int, scale: float, seed: int
) -> None:
    """Also of tensors that begin anywhere in their storage."""
    whole = (*shape, c)
    x, y = draw(whole, a, seed), draw((int(torch.Size(whole).numel()) + offset,), b, seed)[offset:].reshape(whole)
    steps, params = to(out, 0.03, ZERO[out])
    agree(int8_add, Add(x, y, params, steps, scale, ZERO[a], 0.01, ZERO[b], out))
    agree(int8_concat, Concat([y, x], params, steps, [scale, 0.01], [ZERO[b], ZERO[a]], out))


def test_what_has_no_elements_gives_a_result_without_elements() -> None:
    steps, params = to(S8, 0.1, 0)
    x = torch.empty(0, 4, 4, 8, dtype=S8)
    none = (torch.empty(2, 3, 3, 0, dtype=S8), x)
    window = ([2, 2], [2, 2], [0, 0], [1, 1], False, False)
    for e in none:
        assert int8_add.run(Add(e, e, params, steps, 0.1, 0, 0.1, 0, S8)).shape == e.shape
        for kind, f in product(int8_pool.KINDS, (int8_pool.reference, int8_pool.run)):
            arguments = Pool(e, params, steps, kind, *window, 0.1, 0, S8)
            assert f(arguments).shape == arguments.out_shape
    wide = torch.ones(2, 3, 3, 5, dtype=S8)
    joined = int8_concat.run(Concat([none[0], wide, none[0]], params, steps, [0.1] * 3, [0] * 3, S8))
    assert torch.equal(joined, wide)
    assert int8_concat.run(Concat([x, x], params, steps, [0.1] * 2, [0] * 2, S8)).shape == (0, 4, 4, 16)


def test_offsets_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last elements of tensors of 2 GiB and more, most of which is never touched and so never there."""
    steps, params = to(S8, 0.1, 0)
    size = 1 << 31
    values = draw((1024,), S8, 3)
    x = torch.empty(size + 1024, dtype=S8)
    x[size:] = values
    planned = int8_add.plan(Add(x, x, params, steps, 0.05, 0, 0.05, 0, S8))
    block = planned.constexprs["BLOCK"]
    far(monkeypatch, replace(planned, grid=(1,)), first=size // block)
    assert torch.equal(planned.args["out_ptr"][size:], values)  # type: ignore[index]
    window = ([1, 1], [1, size // 64], [0, 0], [1, 1], False, False)
    x[:64] = 5
    pooled = int8_pool.run(Pool(x.reshape(1, 1, -1, 64), params, steps, "max", *window, 0.1, 0, S8))
    assert torch.equal(pooled.flatten(), torch.cat([x[:64], values[:64]]))
    part = int8_concat.plan(Concat([values[None]], params, steps, [0.1], [0], S8))[0]
    x[size:] = 0
    launch(replace(part, args={**part.args, "out_ptr": x, "first": size}))
    assert torch.equal(x[size:], values)


# ---- refusals


def add(**changes: Any) -> Add:
    return replace(int8_add.Case((2, 3), out_dtype=U8).arguments("cpu"), **changes)


def concat(**changes: Any) -> Concat:
    return replace(int8_concat.Case((2,), (3, 4), (U8, U8)).arguments("cpu"), **changes)


def pool(**changes: Any) -> Pool:
    case = int8_pool.Case((1, 6, 6, 4), "average", (2, 2), (2, 2))
    return replace(case.arguments("cpu"), **changes)


REFUSALS = [
    (int8_add, add(a=torch.zeros(2, 3)), "a: dtype is float32, must be uint8 or int8"),
    (int8_add, add(b=torch.zeros(2, 4, dtype=U8)), r"b: shape is \[2, 4\], must be \[2, 3\]"),
    (int8_add, add(b=torch.zeros(2, 3, dtype=U8, device="meta")), "b: is on meta, the other tensors are on cpu"),
    (int8_add, add(a=restrided(torch.zeros(2, 3, dtype=U8))), r"a: strides \(6, 2\).*contiguous"),
    (int8_add, add(a_scale=0.0), "a scale: 0.0; a scale must be finite and above 0"),
    (int8_add, add(b_scale=float("nan")), "b scale: nan"),
    (int8_add, add(b_zero_point=256), r"b zero point: 256 is not a torch.uint8, \[0, 255\]"),
    (int8_add, add(steps="add,quantize"), "add and mul read a residual"),
    (int8_add, add(steps="relu,quantise"), "no step is named"),
    (int8_add, add(out_dtype=torch.float32), "out_dtype"),
    (int8_concat, concat(inputs=[]), "at least one tensor"),
    (int8_concat, concat(scales=[0.1]), "2 tensors, 1 scales"),
    (int8_concat, concat(inputs=[torch.zeros(2, 3, dtype=U8), torch.zeros(3, 4, dtype=U8)]), r"inputs\[1\]: shape"),
    (int8_concat, concat(inputs=[torch.tensor(1, dtype=U8)] * 2), "a scalar has no channels"),
    (int8_concat, concat(scales=[0.1, -1.0]), r"inputs\[1\] scale: -1.0"),
    (int8_pool, pool(x=torch.zeros(1, 6, 6, dtype=U8)), r"x: shape is \[1, 6, 6\]"),
    (int8_pool, pool(x=torch.zeros(1, 0, 6, 4, dtype=U8)), "images without pixels"),
    (int8_pool, pool(kind="mean"), "known: max, average, global_average"),
    (int8_pool, pool(kernel=[2]), r"kernel: \[2\]; must be two integers of at least 1"),
    (int8_pool, pool(stride=[2, 0]), r"stride: \[2, 0\]"),
    (int8_pool, pool(dilation=[2, 2]), "average pooling has none"),
    (int8_pool, pool(kernel=[7, 7]), "must fit the padded image"),
    (int8_pool, pool(padding=[2, 2]), "at least twice the padding"),
    (int8_pool, pool(x=torch.zeros(1, 1, 6, 4, dtype=U8), kind="max", padding=[2, 0], dilation=[3, 1]), "no pixel"),
]


@pytest.mark.parametrize(("module", "arguments", "message"), REFUSALS, ids=lambda v: getattr(v, "__name__", None))
def test_bad_input_is_refused_by_kernel_and_reference(module: ModuleType, arguments: Any, message: str) -> None:
    for f in (module.reference, module.run):
        with pytest.raises(InputError, match=message):
            f(arguments)


def test_what_the_kernels_do_not_take_has_a_reason() -> None:
    """Sizes only: the tensors are on the meta device."""
    x = torch.empty(1, MAX_ROWS + 1, 1, 1, dtype=U8, device="meta")
    params = torch.empty(1, 5, device="meta")
    for shape, stride, reason in (
        ((4, 1 << 16, 1 << 14, 1), [1, 1], "output pixels do not fit a 32-bit index"),
        ((1, MAX_ROWS + 1, 1, 1), [MAX_ROWS, 1], "pixel coordinates do not fit"),
    ):
        sized = pool(x=x.new_empty(shape), params=params, kind="max", kernel=[1, 1], stride=stride)
        assert reason in str(int8_pool.why_not_supported(sized))
    assert "overflow int32" in str(int8_pool.why_not_supported(pool(x=x, params=params, kind="global_average")))
    rows = [x.reshape(-1, 1)] * 2
    assert "32-bit index" in str(int8_concat.why_not_supported(concat(inputs=rows, params=params)))
    with pytest.raises(InputError, match="32-bit index"):
        int8_concat.run(concat(inputs=rows, params=params))
    assert all(m.why_not_supported(c.arguments()) is None for m in MODULES for c in m.CASES)


# ---- the operators


@pytest.mark.parametrize("module", MODULES)
def test_the_operator_is_the_reference_and_its_fake_tells_the_shape(module: ModuleType) -> None:
    name = module.__name__.rpartition(".")[2]
    arguments = module.CASES[-1].arguments("cpu")
    operator = getattr(torch.ops.pqk, name).default
    values = tuple(vars(arguments).values())
    got = operator(*values)
    assert torch.equal(got, module.reference(arguments))
    assert_alike(faked(operator, values), got)


@pytest.mark.parametrize("module", MODULES)
def test_traffic_is_inputs_and_outputs_once(module: ModuleType) -> None:
    """Counted on the launch itself: every byte that its tensors hold (a slice of the output, for a concatenation)."""
    for case in module.CASES:
        planned = module.specialize(case)
        read = sum(t.nbytes for n, t in planned.args.items() if n in ("a_ptr", "b_ptr", "x_ptr"))
        out = planned.args["out_ptr"]
        written = out.nbytes if module is not int8_concat else planned.args["x_ptr"].numel() * out.element_size()
        assert module.traffic(case) == read + written


SWEEP = [
    (shape, a, b, steps, out)
    for shape in ((3, 1), (2, 5, 7), (1, 8, 8, 33))
    for a, b in ((U8, U8), (U8, S8), (S8, S8))
    for steps in ("", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hard_swish", "sigmoid", "requantize,relu")
    for out in (U8, S8, torch.float32, torch.float16, torch.bfloat16)
]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of numpy, where a float16 output is infinite
@pytest.mark.parametrize(("shape", "a", "b", "steps", "out"), SWEEP)
def test_every_epilogue(shape: tuple[int, ...], a: torch.dtype, b: torch.dtype, steps: str, out: torch.dtype) -> None:
    steps = ",".join(filter(None, (steps, "quantize" if out in (U8, S8) else "")))
    agree(int8_add, int8_add.Case(shape, a, b, steps, out).arguments("cpu"))
    lead, c = shape[:-1], shape[-1]
    agree(int8_concat, int8_concat.Case(lead, (c, 3, c), (a, b, a), steps, out).arguments("cpu"))
    image = (*(1,) * (3 - len(lead)), *lead, c)
    for kind in int8_pool.KINDS:
        window = ((2, 2), (1, 2), (1, 1))
        agree(int8_pool, int8_pool.Case(image, kind, *window, dtype=a, steps=steps, out_dtype=out).arguments("cpu"))
