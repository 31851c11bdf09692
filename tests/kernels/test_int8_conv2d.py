"""Convolution kernels: equal to their reference, and the reference equal to a float64 convolution of the values.

In the interpreter a program costs about as much whatever its size, so cases run as one or two large ones; small shapes
run the blocks that a GPU would.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, poisoned, restrided
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from pqk.errors import InputError
from pqk.gpu.codegen import Code, compile_all, job
from pqk.kernels import int8_conv2d, int8_depthwise_conv2d, int8_linear
from pqk.kernels.common import conv as _conv
from pqk.kernels.common.configs import Config, fits
from pqk.kernels.common.conv import EPILOGUES, Case, Conv
from pqk.kernels.common.epilogue import fold_bias
from pqk.kernels.common.gpu import Gpu
from pqk.kernels.common.launch import collecting

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = {int8_conv2d: Config(1024, 64, 128, 4, 1), int8_depthwise_conv2d: Config(256, 128, 1, 4, 1)}
"""blocks that hold a whole case, which no GPU would take"""
EVERY = [(m, case) for m in WHOLE for case in m.CASES]
DTYPES = (torch.uint8, torch.int8)


def label(value: object) -> str | None:
    if isinstance(value, Case):
        sizes = (*value.x, value.out, *value.kernel)
        return f"{'x'.join(map(str, sizes))}-{value.epilogue}-{str(value.dtype).removeprefix('torch.')}"
    return value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else None


def run(module: ModuleType, conv: Conv, config: Config | None = None) -> Tensor:
    """By the kernel, into poisoned memory."""
    with poisoned() as seen:
        y = module.run(conv, config or (WHOLE[module] if DEVICE == "cpu" else None))
    assert [t.data_ptr() for t in seen] == [y.data_ptr()], "one output, and nothing else is allocated"
    return y


def accumulators(case: Case, **changes: Any) -> Conv:
    return replace(case, epilogue="int32", **changes).conv(DEVICE)


@pytest.mark.parametrize(("module", "case"), EVERY, ids=label)
def test_a_kernel_equals_its_reference(module: ModuleType, case: Case) -> None:
    conv = case.conv(DEVICE)
    assert_matches(module.reference(conv), run(module, conv))


@pytest.mark.parametrize(("module", "case"), EVERY, ids=label)
def test_accumulators_are_exact(module: ModuleType, case: Case) -> None:
    """On the grid that the case itself does not use."""
    other = torch.int8 if case.dtype == torch.uint8 else torch.uint8
    conv = accumulators(case, dtype=other)
    y = run(module, conv)
    assert y.dtype == torch.int32
    assert torch.equal(y, module.reference(conv))


@pytest.mark.parametrize(("module", "case"), EVERY, ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_a_convolution_of_values(module: ModuleType, case: Case, dtype: torch.dtype) -> None:
    """Of `x - zero_point` with zeros for padding, in float64, and the plain bias: what `fold_bias` stands for."""
    conv = accumulators(case, dtype=dtype)
    x = (conv.x.double() - conv.zero_point).permute(0, 3, 1, 2)
    weight = conv.weight.double().permute(0, 3, 1, 2)
    geometry = {k: tuple(getattr(conv, k)) for k in ("stride", "padding", "dilation")}
    truth = conv2d(x, weight, conv.bias.double(), **geometry, groups=conv.groups).permute(0, 2, 3, 1)
    folded = replace(conv, bias=fold_bias(conv.bias, conv.weight, conv.zero_point, dtype))
    assert torch.equal(module.reference(folded).double(), truth)


def test_the_cases_leave_no_corner_out() -> None:
    cases = [case for _, case in EVERY]
    for name, plain in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1)), ("kernel", (3, 3))):
        values = {getattr(c, name) for c in cases}
        assert values - {plain} and plain in values, name
    assert {c.dtype for c in cases} == set(DTYPES)
    assert any(1 < c.groups < c.x[3] for c in cases) and any(c.out > c.groups == c.x[3] for c in cases)
    assert {c.x[3] for c in int8_conv2d.CASES} >= {3, 16, 32, 64}
    outputs = {(case.conv("meta").out_dtype, case.conv("meta").residual is None) for case in cases}
    assert {d for d, _ in outputs} >= {torch.uint8, torch.int8, torch.float16} and (torch.uint8, False) in outputs


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("module", WHOLE, ids=label)
def test_every_epilogue(module: ModuleType, epilogue: str) -> None:
    groups = 16 if module is int8_depthwise_conv2d else 1
    conv = Case((1, 6, 5, 16), 16, groups=groups, dtype=torch.int8, epilogue=epilogue).conv(DEVICE)
    assert_matches(module.reference(conv), run(module, conv))


@pytest.mark.parametrize(
    ("module", "case", "config"),
    [
        (int8_conv2d, Case((2, 5, 5, 8), 20), Config(16, 16, 32, 2, 2)),  # 4 x 2 programs, the last ones part empty
        (int8_conv2d, Case((2, 5, 3, 8), 40, groups=2, stride=(2, 1)), Config(16, 16, 64, 2, 2)),
        (int8_conv2d, Case((1, 4, 4, 3), 1, (1, 4), padding=(0, 0)), Config(16, 16, 32, 2, 2)),
        (int8_depthwise_conv2d, Case((2, 5, 3, 10), 20, groups=10), Config(16, 16, 1, 1, 1)),
    ],
    ids=label,
)
def test_blocks_smaller_than_the_layer(module: ModuleType, case: Case, config: Config) -> None:
    conv = accumulators(case)
    assert torch.equal(run(module, conv, config), module.reference(conv))
    conv = replace(case, epilogue="residual").conv(DEVICE)
    assert_matches(module.reference(conv), run(module, conv, config))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ModuleType, Case]:
    """Any small convolution that has an output."""
    pair = lambda low, high: (draw(st.integers(low, high)), draw(st.integers(low, high)))  # noqa: E731
    kernel, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    height, width = (low + draw(st.integers(0, 5)) for low in least)
    groups, inner, each = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    module = draw(st.sampled_from(tuple(WHOLE)))
    inner = 1 if module is int8_depthwise_conv2d else inner
    shape = (draw(st.integers(1, 2)), height, width, groups * inner)
    dtype = draw(st.sampled_from(DTYPES))
    return module, Case(shape, groups * each, kernel, stride, padding, dilation, groups, dtype, "int32")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(geometries(), st.integers(0, 3))
def test_any_geometry(drawn: tuple[ModuleType, Case], offset: int) -> None:
    """Whatever the shape, and wherever in its storage the input starts."""
    module, case = drawn
    conv = case.conv(DEVICE, seed=offset)
    moved = torch.zeros(conv.x.numel() + offset, dtype=conv.x.dtype, device=DEVICE)[offset:].view(case.x)
    conv = replace(conv, x=moved.copy_(conv.x))
    assert torch.equal(run(module, conv), module.reference(conv))


def test_a_pixel_is_the_linear_kernel() -> None:
    conv = Case((1, 4, 4, 32), 8, (1, 1), padding=(0, 0), epilogue="residual").conv(DEVICE)
    rest = (conv.bias, conv.scale, conv.steps, conv.params, conv.residual, conv.out_dtype)
    linear = int8_linear.plan(conv.x, conv.weight.flatten(1), *rest)
    assert int8_conv2d.plan(conv).kernel is linear.kernel
    for changes in ({"stride": (2, 2)}, {"padding": (1, 0)}):
        assert int8_conv2d.plan(replace(conv, **changes)).kernel is int8_conv2d.int8_conv2d_kernel
    assert_matches(int8_conv2d.reference(conv), run(int8_conv2d, conv, Config(16, 16, 32, 2, 2)))


def test_a_shortcut_is_strided_and_padded_as_it_is_read() -> None:
    """The padded half-size copy, which is not made, would give the same; what padding adds is the integer 0."""
    conv = Case((2, 3, 5, 4), 8, epilogue="residual", shortcut=True).conv(DEVICE)
    assert conv.residual is not None and conv.residual.shape == (2, 6, 10, 4)
    padded = pad(conv.residual[:, ::2, ::2], (2, 2))
    truth = int8_conv2d.reference(replace(conv, residual=padded, residual_channels=None, residual_stride=1))
    assert torch.equal(int8_conv2d.reference(conv), truth)
    assert_matches(truth, run(int8_conv2d, conv))
    assert_matches(truth, run(int8_conv2d, conv, Config(16, 16, 32, 2, 2)))
    assert torch.equal(op_of(int8_conv2d)(**named(int8_conv2d, conv)), truth)
    odd = conv.residual[:, :5, :9].contiguous()  # every second pixel of 5 x 9 is 3 x 5 as well
    assert_matches(truth, run(int8_conv2d, replace(conv, residual=odd)))


def test_a_shortcut_that_does_not_fit() -> None:
    conv = Case((1, 3, 3, 4), 8, epilogue="residual", shortcut=True).conv()
    assert conv.residual is not None and conv.residual_channels is not None
    for words, changes in (
        ("every 1. pixel of [1, 6, 6, 4] is not 3 x 3 pixels", {"residual_stride": 1}),
        ("a stride of at least 1 are needed, not 0", {"residual_stride": 0}),
        ("residual: a residual [N, H, W, C]", {"residual": None}),
        ("residual_channels: shape is [7]", {"residual_channels": conv.residual_channels[:7]}),
        ("residual: shape is [2, 6, 6, 4], must be [1, 6, 6, 4]", {"residual": conv.residual.repeat(2, 1, 1, 1)}),
    ):
        for call in (int8_conv2d.reference, int8_conv2d.run):
            with pytest.raises(InputError) as refused:
                call(replace(conv, **changes))
            assert words in str(refused.value)
    plain = Case((1, 3, 3, 8), 8, groups=8, epilogue="residual").conv()
    assert "int8_conv2d does that" in (
        int8_depthwise_conv2d.why_not_supported(replace(plain, residual_channels=conv.residual_channels)) or ""
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_depthwise_weight_may_lie_taps_first(dtype: torch.dtype) -> None:
    conv = accumulators(Case((1, 6, 7, 12), 12, (3, 2), groups=12, dtype=dtype))
    turned = replace(conv, weight=int8_depthwise_conv2d.taps_first(conv.weight))
    assert turned.weight.stride(0) == 1 and torch.equal(turned.weight, conv.weight)
    truth = int8_depthwise_conv2d.reference(conv)
    for given_ in (conv, turned):
        assert torch.equal(run(int8_depthwise_conv2d, given_), truth)
    assert torch.equal(int8_depthwise_conv2d.reference(turned), truth)


@pytest.mark.parametrize("module", WHOLE, ids=label)
def test_an_empty_batch_is_an_empty_result(module: ModuleType) -> None:
    conv = Case((0, 8, 8, 16), 32, stride=(2, 2), groups=16 if module is int8_depthwise_conv2d else 1).conv(DEVICE)
    for y in (run(module, conv), module.reference(conv), op_of(module)(**named(module, conv))):
        assert y.shape == (0, 4, 4, 32) and y.dtype == torch.uint8


@pytest.fixture
def far_away() -> Iterator[Tensor]:
    """uint8 [6, 4096, 4096, 32]: 3 GiB that take no memory, but for the pages of the pixels that a test writes."""
    if DEVICE == "cuda":
        pytest.skip("memory of a GPU is not lazy")
    x = torch.empty(6, 4096, 4096, 32, dtype=torch.uint8)
    yield x
    del x
    gc.collect()


@pytest.mark.parametrize("module", WHOLE, ids=label)
def test_offsets_beyond_32_bits(module: ModuleType, far_away: Tensor) -> None:
    """The last images start 2.5 GiB into the input; strides of 372 pixels leave few outputs."""
    groups = 32 if module is int8_depthwise_conv2d else 1
    near = Case((6, 12, 12, 32), 32, (1, 1), (1, 1), (0, 0), groups=groups, epilogue="int32").conv()
    far_away[:, ::372, ::372] = near.x
    conv = replace(near, x=far_away, stride=(372, 372))
    assert far_away[-1].data_ptr() - far_away.data_ptr() >= 1 << 31
    block = Config(128, 32, 32, 4, 1)
    assert torch.equal(module.run(conv, block), module.reference(near))


def op_of(module: ModuleType) -> Any:
    return getattr(torch.ops.pqk, label(module) or "")


def named(module: ModuleType, conv: Conv) -> dict[str, Any]:
    """What the operator takes, in its order."""
    values = {a.name: getattr(conv, a.name) for a in op_of(module).default._schema.arguments}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


@pytest.mark.parametrize("module", WHOLE, ids=label)
def test_the_operator(module: ModuleType) -> None:
    """Its schema, its fake, its CPU body, and what it would launch on a GPU."""
    groups = 16 if module is int8_depthwise_conv2d else 1
    conv = Case((2, 6, 5, 16), 16, stride=(1, 2), groups=groups, epilogue="residual").conv()
    op, given_ = op_of(module), named(module, conv)
    torch.library.opcheck(op, tuple(given_.values()), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*given_.values()), module.reference(conv))
    with collecting() as launches:
        y = getattr(module, label(module) or "")._backend_fns["cuda"](**given_)
    assert [each.kernel for each in launches] == [module.plan(conv).kernel]
    assert y.shape == conv.out_shape and y.dtype == conv.out_dtype


class Layer(nn.Module):
    """One convolution; everything but the input is a constant."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.rest = list(named(int8_conv2d, conv).values())[1:]
        for i, value in enumerate(self.rest):
            if isinstance(value, Tensor):
                self.register_buffer(f"constant_{i}", value)

    def forward(self, x: Tensor) -> Tensor:
        rest = [getattr(self, f"constant_{i}", value) for i, value in enumerate(self.rest)]
        y: Tensor = torch.ops.pqk.int8_conv2d(x, *rest)
        return y


def test_an_exported_layer_takes_any_batch() -> None:
    conv = Case((2, 6, 6, 3), 4).conv()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Layer(conv), (conv.x,), dynamic_shapes=({0: batch},), strict=True)
    more = Case((5, 6, 6, 3), 4).conv()
    assert torch.equal(exported.module()(more.x), int8_conv2d.reference(replace(conv, x=more.x)))


def bad(words: str, module: ModuleType = int8_conv2d, **changes: Any) -> Any:
    return pytest.param(module, changes, words, id=words)


@pytest.mark.parametrize(
    ("module", "changes", "words"),
    [
        bad("x: dtype is int32", x=torch.zeros(1, 6, 6, 8, dtype=torch.int32)),
        bad("x: shape is [6, 6, 8]", x=torch.zeros(6, 6, 8, dtype=torch.uint8)),
        bad("x: strides", x=restrided(torch.zeros(1, 6, 6, 8, dtype=torch.uint8))),
        bad("x: strides", x=torch.zeros(1, 8, 6, 6, dtype=torch.uint8).permute(0, 2, 3, 1)),
        bad("weight: dtype is uint8", weight=torch.zeros(4, 3, 3, 8, dtype=torch.uint8)),
        bad("weight: strides", weight=torch.zeros(4, 8, 3, 3, dtype=torch.int8).permute(0, 2, 3, 1)),
        bad("has no taps", weight=torch.zeros(4, 0, 3, 8, dtype=torch.int8)),
        bad("do not fit x with 8 channels", weight=torch.zeros(4, 3, 3, 4, dtype=torch.int8)),
        bad("groups: 3 groups", groups=3),
        bad("fewer than a kernel of 3 x 3 with dilation [9, 1]", dilation=[9, 1]),
        bad("stride: [0, 1]; must be two integers of at least 1", stride=[0, 1]),
        bad("padding: [-1, 1]", padding=[-1, 1]),
        bad("dilation: [1]", dilation=[1]),
        bad("zero_point: 256 is not a torch.uint8, [0, 255]", zero_point=256),
        bad("bias: shape is [3], must be [4]", bias=torch.zeros(3, dtype=torch.int32)),
        bad("scale: 0.0 at [0] (4 of 4)", scale=torch.zeros(4)),
        bad("scale: nan at [2]", scale=torch.tensor([1, 1, torch.nan, 1])),
        bad("scale: dtype is float64", scale=torch.ones(4, dtype=torch.float64)),
        bad('no step is named "rellu"', steps="rellu"),
        bad("out_dtype torch.float32 must be", out_dtype=torch.float32),
        bad("out_dtype int32 gives the accumulators", out_dtype=torch.int32),
        bad("reads no residual", residual=torch.zeros(1, 6, 6, 4, dtype=torch.uint8)),
        bad("1 groups of 8 channels; depthwise is", module=int8_depthwise_conv2d),
    ],
)
def test_bad_input_is_refused(module: ModuleType, changes: dict[str, Any], words: str) -> None:
    """Alike by the reference, the kernel and the operator."""
    conv = replace(Case((1, 6, 6, 8), 4).conv(), **changes)
    for call in (module.reference, module.run, lambda c: op_of(module)(**named(module, c))):
        with pytest.raises(InputError) as refused:
            call(conv)
        assert words in str(refused.value)


@pytest.mark.parametrize("module", WHOLE, ids=label)
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "params", "residual"])
def test_one_device(module: ModuleType, name: str) -> None:
    groups = 8 if module is int8_depthwise_conv2d else 1
    conv = Case((1, 6, 6, 8), 8, groups=groups, epilogue="residual").conv()
    conv = replace(conv, **{name: getattr(conv, name).to("meta")})
    for call in (module.reference, module.run):
        with pytest.raises(InputError, match=f"{name}: is on meta, the other tensors are on cpu"):
            call(conv)


@pytest.mark.parametrize("module", WHOLE, ids=label)
def test_what_the_kernels_do_not_take(module: ModuleType) -> None:
    def reason(case: Case, **given_: bool) -> str:
        return module.why_not_supported(case.conv("meta"), **given_) or ""

    one = module is int8_depthwise_conv2d
    assert reason(Case((1, 8, 8, 8), 8, groups=8 if one else 1)) == ""
    assert "transposed" in reason(Case((1, 8, 8, 8), 8), transposed=True)
    channels = 1 if one else 1 << 16
    assert "overflow int32" in reason(Case((1, 3, 65536, channels), channels, (1 + 2 * one, 65536 if one else 3)))
    assert "split the batch" in reason(Case((1 << 20, 64, 64, 4), 4, groups=4 if one else 1))
    assert "32-bit offsets" in reason(Case((2, 1 << 14, 1 << 14, 8), 8, groups=8 if one else 1))


def test_other_limits() -> None:
    assert "65535" in (
        int8_conv2d.why_not_supported(Case((1, 3, 3, 1 << 17), 1 << 17, groups=1 << 16).conv("meta")) or ""
    )
    uneven = torch.zeros(8, 3, 6, 1, dtype=torch.int8)[:, :, ::2]
    conv = replace(Case((1, 6, 6, 8), 8, groups=8).conv(), weight=uneven[:, :, :2])
    assert "evenly spaced" in (int8_depthwise_conv2d.why_not_supported(conv) or "")


def test_configurations() -> None:
    """Each fits every GPU supported, and no block is larger than the 32-bit offsets allow for."""
    least = 99 * 1024  # of sm_86 and sm_89
    for config in int8_conv2d.CONFIGS:
        assert fits(config, least) and not fits(config, config.shared_bytes - 1)
        assert config.block_k >= 32 and min(config.block_m, config.block_n) >= 16
    assert max(c.block_m for m in WHOLE for c in m.CONFIGS) <= _conv.MAX_BLOCK


def test_more_work_takes_larger_blocks() -> None:
    def chosen(batch: int, channels: int, out: int) -> Config:
        return int8_conv2d.choose(Case((batch, 32, 32, channels), out).conv("meta"), gpu)

    gpu = Gpu((8, 0), 108, 163 * 1024)

    assert chosen(1, 64, 64).block_m < chosen(256, 64, 64).block_m == 128
    assert chosen(256, 64, 16).block_n == 16 and chosen(256, 64, 64).block_n == 64
    assert chosen(1, 3, 16).block_k == 32, "27 products are padded to 32, not to 64"
    gpu = Gpu((8, 0), 108, 16 * 1024)
    assert fits(chosen(256, 64, 64), gpu.shared), "as much as its shared memory holds"


@pytest.mark.full
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("module", "case"), EVERY, ids=label)
def test_sweep(module: ModuleType, case: Case, dtype: torch.dtype, epilogue: str) -> None:
    conv = replace(case, dtype=dtype, epilogue=epilogue).conv(DEVICE)
    assert_matches(module.reference(conv), run(module, conv))


@pytest.mark.full
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("config", int8_conv2d.CONFIGS, ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_no_configuration_spills(config: Config, arch: str) -> None:
    """At the two ends: single bytes of 3 channels, and runs of 64 channels with a residual."""
    cases = [c for c in int8_conv2d.CASES if c.x[3] == 3 or (c.epilogue == "residual" and c.x[3] == 64)]
    jobs = [job(int8_conv2d.plan(case.conv("meta"), config), arch) for case in cases]
    for case, code in zip(cases, compile_all(jobs), strict=True):
        assert isinstance(code, Code), code
        assert code.spills == 0, (case, code)
        assert code.integer and code.integer == list(code.matrix), (case, code)
