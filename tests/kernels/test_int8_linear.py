"""The linear kernel in its three shapes: its cases, any sizes and strides, its refusals, and its machine code."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, outside_interpreter, poisoned, recorded_addresses, restrided
from torch import Tensor

from pqk.errors import InputError
from pqk.gpu.roofline import ARCHES, Arch
from pqk.kernels import int8_linear
from pqk.kernels.common import checks
from pqk.kernels.common import launch as launches
from pqk.kernels.common.configs import Config, fits
from pqk.kernels.common.epilogue import program
from pqk.kernels.common.gpu import Gpu
from pqk.kernels.common.launch import Launch, launch, signature
from pqk.kernels.common.triton import INTERPRETED, TRITON_MISSING
from pqk.kernels.int8_linear import CASES, CONFIGS, Case, choose

pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
TILED = Config(16, 16, 32, 4, 2, group_m=2)
VARIANTS = {"tiled": TILED, "persistent": replace(TILED, persistent=True), "split_k": replace(TILED, split_k=3)}
EPILOGUES = [
    ("", torch.float32), ("", torch.float16), ("", torch.bfloat16), ("", torch.int32),
    ("quantize", torch.int8), ("requantize,relu,quantize", torch.uint8), ("relu6,quantize", torch.uint8),
    ("requantize,gelu,quantize", torch.int8), ("gelu_tanh", torch.float32), ("requantize,silu,quantize", torch.int8),
    ("hard_swish,quantize", torch.uint8), ("requantize,add,quantize", torch.int8), ("add", torch.float16),
    ("requantize,sigmoid,mul", torch.float32),
]  # fmt: skip


def check_case(case: Case, config: Config | None = None) -> None:
    arguments = case.arguments("cpu")
    with poisoned() as outputs:
        got = int8_linear.run(**arguments, config=config)
    assert len(outputs) == 1
    assert_matches(int8_linear.reference(**arguments), got)


def raw(m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> dict[str, Any]:
    """Arguments that give the int32 accumulators."""
    return Case(m, n, k, dtype, "", torch.int32).arguments("cpu")


@interpreted
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.full if c.m * c.n > 100_000 else ()) for c in CASES], ids=str
)
def test_cases(case: Case) -> None:
    check_case(case)


@interpreted
@pytest.mark.parametrize(("steps", "out_dtype"), EPILOGUES)
@pytest.mark.parametrize("x_dtype", [torch.int8, torch.uint8])
def test_epilogues(x_dtype: torch.dtype, steps: str, out_dtype: torch.dtype) -> None:
    check_case(Case(19, 21, 40, x_dtype, steps, out_dtype), TILED)


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_residual_may_be_one_row_for_all(variant: str) -> None:
    """As if it were written out, in every variant; also where there is a single row."""
    for m in (1, 19):
        row = Case(m, 21, 40, torch.uint8, "requantize,add,quantize", torch.uint8, every_row=True).arguments("cpu")
        rows = row | {"residual": row["residual"].expand(m, -1).contiguous()}
        got = int8_linear.run(**row, config=VARIANTS[variant])
        assert torch.equal(got, int8_linear.run(**rows, config=VARIANTS[variant]))
        assert torch.equal(got, int8_linear.reference(**row))
    with pytest.raises(InputError, match=r"residual: shape is \[20\], must be \[21\]"):
        int8_linear.run(**row | {"residual": row["residual"][:20]})


@interpreted
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 33, 97), (17, 16, 64), (40, 35, 130)])
def test_variants(variant: str, shape: tuple[int, int, int]) -> None:
    """Each shape of the kernel gives the same accumulators and the same integers."""
    for steps, out_dtype in (("", torch.int32), ("requantize,relu,requantize,add,quantize", torch.int8)):
        check_case(Case(*shape, torch.uint8, steps, out_dtype), VARIANTS[variant])


@interpreted
@pytest.mark.full
@pytest.mark.parametrize("config", [*VARIANTS.values(), *CONFIGS], ids=str)
def test_every_shape_and_epilogue(config: Config) -> None:
    for m, n, k in product((1, 16, 65), (1, 31, 129), (1, 64, 257)):
        for x_dtype in (torch.int8, torch.uint8):
            check_case(Case(m, n, k, x_dtype, "", torch.int32), config)
    for (steps, out_dtype), x_dtype in product(EPILOGUES, (torch.int8, torch.uint8)):
        check_case(Case(33, 65, 129, x_dtype, steps, out_dtype), config)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 40), st.integers(0, 100), st.sampled_from([torch.int8, torch.uint8]),
    st.sampled_from(sorted(VARIANTS)), st.integers(0, 7), st.integers(0, 5), st.integers(0, 99),
)  # fmt: skip
def test_any_size_and_rows(
    m: int, n: int, k: int, dtype: torch.dtype, variant: str, gap: int, offset: int, seed: int
) -> None:
    """Sizes down to 0, rows with gaps between them, storage that starts anywhere: accumulators are equal."""

    def with_gaps(t: Tensor) -> Tensor:
        room = t.new_full((offset + t.shape[0] * (t.shape[1] + gap),), 77)
        view = room[offset:].view(t.shape[0], t.shape[1] + gap)[:, : t.shape[1]]
        return view.copy_(t)

    x, weight = with_gaps(draw((m, k), dtype, seed)), with_gaps(draw((n, k), torch.int8, seed + 1))
    bias, steps_params = draw((n,), torch.int32, seed + 2), program()
    with poisoned():
        got = int8_linear.run(
            x, weight, bias, torch.ones(n), *steps_params, None, torch.int32, config=VARIANTS[variant]
        )
    from_zero = x.long() if dtype == torch.int8 else x.long() - 128
    assert torch.equal(got, (from_zero @ weight.long().T + bias).int())


@interpreted
def test_leading_axes() -> None:
    arguments = Case(12, 5, 33, torch.uint8, "requantize,add,quantize", torch.uint8).arguments("cpu")
    flat = int8_linear.run(**arguments)
    shaped = {**arguments, "x": arguments["x"].view(3, 1, 4, 33), "residual": arguments["residual"].view(3, 1, 4, 5)}
    assert torch.equal(int8_linear.run(**shaped), flat.view(3, 1, 4, 5))
    one = {**arguments, "x": arguments["x"][0], "residual": arguments["residual"][0]}
    assert torch.equal(int8_linear.run(**one), flat[0])


@interpreted
@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (0, 0, 0), (3, 4, 0)])
def test_empty(m: int, n: int, k: int) -> None:
    """No rows or no outputs give nothing; an empty sum gives the bias."""
    arguments = raw(m, n, k)
    for call in (int8_linear.run, int8_linear.int8_linear):
        assert torch.equal(call(**arguments), arguments["bias"].expand(m, n))


@interpreted
def test_columns_of_a_wider_output() -> None:
    """Two producers write one buffer; nothing else of it changes."""
    a, b = (Case(6, n, 40, torch.int8, "quantize").arguments("cpu") for n in (5, 9))
    whole = torch.full((6, 20), 90, dtype=torch.int8)
    int8_linear.run(**a, out=whole[:, :5])
    int8_linear.run(**b, out=whole[:, 6:15])
    assert torch.equal(whole[:, :5], int8_linear.reference(**a))
    assert torch.equal(whole[:, 6:15], int8_linear.reference(**b))
    assert bool((whole[:, [5, *range(15, 20)]] == 90).all())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": torch.zeros(4, 8)}, "x: dtype is float32, must be uint8 or int8"),
        ({"x": torch.zeros((), dtype=torch.int8)}, "a scalar"),
        ({"weight": torch.zeros(3, 8, dtype=torch.uint8)}, "weight: dtype is uint8"),
        ({"weight": torch.zeros(3, 7, dtype=torch.int8)}, r"weight: shape is \[3, 7\], must be \[-1, 8\]"),
        ({"bias": torch.zeros(3)}, "bias: dtype is float32, must be int32"),
        ({"bias": torch.zeros(2, dtype=torch.int32)}, "bias: shape"),
        ({"scale": torch.tensor([1.0, 0.0, 2.0])}, r"scale: 0.0 at \[1\] \(1 of 3\)"),
        ({"scale": torch.tensor([1.0, 2.0, -1.0])}, "above 0"),
        ({"scale": torch.tensor([math.nan, 2.0, math.inf])}, r"\(2 of 3\); a scale must be finite"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, "scale: dtype is float64"),
        ({"scale": torch.ones(6)[::2]}, "scale: strides"),
        ({"out_dtype": torch.int32}, "steps must be empty"),
        ({"out_dtype": torch.float32}, "end in quantize"),
    ],
)
def test_refusals(changed: dict[str, Any], says: str) -> None:
    arguments = Case(4, 3, 8).arguments("cpu")
    for call in (int8_linear.int8_linear, int8_linear.run):
        with pytest.raises(InputError, match=says):
            call(**{**arguments, **changed})


def test_tensors_of_two_devices() -> None:
    arguments = raw(4, 3, 8)
    for name in ("weight", "bias", "scale"):
        with pytest.raises(InputError, match=f"{name}: is on meta, the other tensors are on cpu"):
            int8_linear.run(**{**arguments, name: arguments[name].to("meta")})


def test_what_it_cannot_read_in_place() -> None:
    x, weight = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8)
    assert int8_linear.why_not_supported(x, weight) is None
    assert "do not share K" in (int8_linear.why_not_supported(x[:, :7], weight) or "")
    assert "it multiplies" in (int8_linear.why_not_supported(x.float(), weight) or "")
    for odd in (x.T.contiguous().T, restrided(x)):
        assert "rows must be dense" in (int8_linear.why_not_supported(odd, weight) or "")
        assert "rows must be dense" in (int8_linear.why_not_supported(x, odd[:3]) or "")
        with pytest.raises(InputError, match="rows must be dense"):
            int8_linear.run(**{**raw(4, 3, 8), "x": odd})
    spaced = torch.zeros(2, 3, 8, dtype=torch.int8)[:, :2]
    assert "evenly spaced" in (int8_linear.why_not_supported(spaced, weight) or "")
    long = torch.zeros(1, int8_linear.LARGEST_K + 1, dtype=torch.int8)
    assert "could overflow" in (int8_linear.why_not_supported(long, long) or "")
    wide = torch.empty((1 << 24) + 1, dtype=torch.int8).as_strided((2, 1), (1 << 24, 1))
    assert "evenly spaced" in (int8_linear.why_not_supported(wide, weight[:, :1]) or "")
    tall = torch.zeros(1, 1, dtype=torch.int8).expand(1 << 31, 1)
    assert "rows" in (int8_linear.why_not_supported(tall, weight[:, :1]) or "")


def test_memory_it_must_not_write() -> None:
    arguments = Case(4, 8, 8).arguments("cpu")
    for out, says in (
        (arguments["x"], "shares memory with x"),
        (arguments["weight"][2:6], "shares memory with weight"),
        (torch.zeros(1, 8, dtype=torch.int8).expand(4, 8), "overlap"),
        (torch.zeros(20, dtype=torch.int8).as_strided((4, 8), (4, 1)), "overlap"),
        (torch.zeros(8, 4, dtype=torch.int8).T, "rows must be dense"),
        (torch.zeros(4, 8), "out: dtype"),
        (torch.zeros(4, 7, dtype=torch.int8), "out: shape"),
    ):
        with pytest.raises(InputError, match=says):
            int8_linear.run(**arguments, out=out)


def test_misaligned_memory() -> None:
    buffer = bytearray(64)
    start = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    bias = torch.frombuffer(buffer, dtype=torch.int32, offset=1 + -start % 4, count=3)
    with pytest.raises(InputError, match="is not a multiple of 4 bytes"):
        int8_linear.run(**{**raw(4, 3, 8), "bias": bias})


def test_a_scale_is_read_again_after_a_write() -> None:
    scale = torch.ones(3)
    checks.check_scale("scale", scale)
    checks.check_scale("scale", scale)
    scale[1] = -1
    with pytest.raises(InputError, match="-1.0 at"):
        checks.check_scale("scale", scale)
    with torch.inference_mode():
        checks.check_scale("scale", torch.ones(3))


@interpreted
def test_offsets_have_64_bits() -> None:
    """Rows 2**24 - 1 elements apart: the last ones of 300 are read and written beyond 2**32, where they belong."""
    stride, m, k, n = (1 << 24) - 1, 300, 4, 3
    planned = int8_linear.plan(**raw(m, n, k), config=Config(128, 16, 32, 4, 2))
    args = {**planned.args, "stride_xm": stride, "stride_ym": stride}
    with recorded_addresses() as seen:
        launch(replace(planned, args=args))
    x, y = (t.data_ptr() for t in (args["x_ptr"], args["out_ptr"]))  # type: ignore[union-attr]
    loads, stores = set(np.concatenate(seen["loads"]).tolist()), set(np.concatenate(seen["stores"]).tolist())
    assert {x + i * stride + j for i in range(m) for j in range(k)} <= loads
    assert stores == {y + 4 * (i * stride + j) for i in range(m) for j in range(n)}
    assert max(stores) - y > 1 << 34


@pytest.mark.parametrize("arch", ARCHES, ids=lambda a: a.name)
def test_choices(arch: Arch) -> None:
    """A choice covers its output, fits the target, and uses Hopper's instruction where rows and target allow it."""
    gpu, capability = arch.planned, arch.planned.capability
    for m, n, k in product((1, 16, 17, 64, 256, 4096), (10, 384, 4096), (1, 64, 1536)):
        config = choose(m, n, k, gpu)
        assert fits(config, gpu.shared) and config in int8_linear.candidates(m, n, k, gpu)
        assert not arch.amd or config.block_k == (128 if m <= 16 else 64), "Hopper's tiles are not AMD's"
        assert config.block_m >= 16 and config.block_n >= 16 and config.block_k >= 32
        assert config.split_k == 1 or (m <= 64 and config.split_k * config.block_k <= k and not config.persistent)
        assert not config.persistent or capability >= (9, 0)
        assert capability < (9, 0) or m < 64 or config.block_m >= 64
    assert choose(1, 384, 1536, gpu).split_k > 1
    assert choose(4096, 4096, 1024, gpu).persistent == (capability >= (9, 0))


def test_choices_fit_the_shared_memory() -> None:
    """Of less memory smaller blocks are chosen; of too little none."""
    small = Gpu((9, 0), 132, 70_000)
    assert not fits(choose(4096, 4096, 1024, replace(small, shared=99 * 1024)), small.shared)
    for m, n, k in product((1, 17, 64, 4096), (10, 4096), (64, 1536)):
        assert fits(choose(m, n, k, small), small.shared)
    with pytest.raises(InputError, match="no configuration fits 1000 bytes"):
        choose(1, 1, 64, replace(small, shared=1000))


def test_the_op() -> None:
    for case in (CASES[0], Case(4, 3, 8, torch.int8, "requantize,add,quantize", torch.uint8)):
        arguments = case.arguments("cpu")
        assert torch.equal(int8_linear.int8_linear(**arguments), int8_linear.reference(**arguments))
        torch.library.opcheck(int8_linear.int8_linear, tuple(arguments.values()))


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING, "pqk.kernels"):
        assert all(launches.falls_back("some_op", device, "the GPU is too old") for _ in range(3))
        assert launches.falls_back("some_op", device) == (TRITON_MISSING is not None)
    messages = [r.getMessage() for r in caplog.records if "too old" in r.getMessage()]
    assert messages == ["some_op runs its reference on this device: the GPU is too old"]


def test_a_kernel_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = int8_linear.plan(**raw(1, 1, 1))
    monkeypatch.setattr(launches, "INTERPRETED", False)
    monkeypatch.setattr(launches, "TRITON_MISSING", None)
    with pytest.raises(InputError, match="tensors are on cpu; kernels run on CUDA"):
        launch(planned)
    monkeypatch.setattr(launches, "TRITON_MISSING", "Triton is not installed")
    with pytest.raises(InputError, match="Triton is not installed"):
        launch(planned)


@interpreted
def test_signature() -> None:
    """What the compiler is told: 1 and None are constants, and what 16 divides is said to be so."""
    planned = int8_linear.specialize(Case(1, 48, 40))
    types, constants, attrs = signature(planned)
    names = planned.kernel.arg_names
    assert list(types) == names and types["x_ptr"] == "*i8" and types["bias_ptr"] == "*i32" and types["K"] == "i32"
    assert types["M"] == types["residual_ptr"] == types["STEPS"] == "constexpr"
    assert constants["M"] == 1 and constants["residual_ptr"] is None
    assert {names[i] for (i,) in attrs} == {
        "x_ptr", "w_ptr", "out_ptr", "bias_ptr", "scale_ptr", "params_ptr", "N", "stride_ym", "stride_rm",
    }  # fmt: skip
    large = Launch(planned.kernel, (1,), {**planned.args, "K": 1 << 31}, planned.constexprs)
    assert signature(large)[0]["K"] == "i64"


COMPILED = """
import os, re, subprocess, tempfile
from dataclasses import replace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pqk.kernels.common.configs import Config
from pqk.kernels.common.launch import signature
from pqk.kernels.int8_linear import CONFIGS, SKINNY, TILED, Case, specialize

def compiled(case, config, architecture, **options):
    run = specialize(case, config=config)
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(ASTSource(run.kernel, *signature(run)), target=target, options={**run.options, **options})
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    words = ("IMMA", "IGMMA", "FFMA", "STL")
    return {w: len(re.findall(rf"\\b{w}", sass)) for w in words} | {"wgmma": "wgmma.mma_async" in kernel.asm["ptx"]}

"""


@pytest.mark.skipif(TRITON_MISSING is not None, reason="needs Triton")
def test_machine_code() -> None:
    """Integer tensor cores on Ampere and Hopper, persistent too; nothing spilled; nothing contracted, unless asked."""
    code = """
plain = Case(256, 256, 256, torch.int8, "add", torch.float32)
small, hopper = CONFIGS[4], replace(CONFIGS[-1], persistent=True)
result = {
    "ampere": compiled(plain, small, 80),
    "contracted": compiled(plain, small, 80, enable_fp_fusion=True),
    "hopper": compiled(Case(4096, 1536, 384, torch.uint8, "requantize,relu,quantize", torch.uint8), hopper, 90),
}
"""
    result = outside_interpreter(COMPILED + code)
    assert result["ampere"]["IMMA"] > 0 and result["ampere"]["FFMA"] == 0 and result["contracted"]["FFMA"] > 0
    assert result["hopper"]["wgmma"] and result["hopper"]["IGMMA"] > 0
    assert result["ampere"]["STL"] == result["hopper"]["STL"] == 0


@pytest.mark.full
@pytest.mark.skipif(TRITON_MISSING is not None, reason="needs Triton")
@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_no_configuration_spills(architecture: int) -> None:
    code = f"""
case = Case(4096, 4096, 1024, torch.uint8, "requantize,gelu,requantize,add,quantize", torch.uint8)
walking = [replace(c, persistent=True) for c in CONFIGS if c.block_m >= 64 and c.block_k >= 128]
split = [replace(c, split_k=4) for c in (SKINNY[0], TILED[0])]  # what `choose` splits
result = [[str(c), compiled(case, c, {architecture})] for c in (*CONFIGS, *walking, *split)]
"""
    for config, found in outside_interpreter(COMPILED + code):
        assert found["STL"] == 0, config
        assert found["IMMA"] + found["IGMMA"] > 0, config
        assert found["wgmma"] == (architecture == 90 and re.search("block_m=(64|128)", config) is not None), config
