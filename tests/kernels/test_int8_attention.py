"""Attention over integers: the kernel is its reference, the reference is attention, and masks hide what they say."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned, restrided
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pqk.errors import InputError
from pqk.kernels import int8_attention as module
from pqk.kernels.common.epilogue import program
from pqk.kernels.common.gpu import Gpu
from pqk.kernels.common.launch import signature
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.int8_attention import (
    CASES,
    CONFIGS,
    HEADS,
    Attention,
    Case,
    choose,
    fits,
    plan,
    reference,
    run,
    unpack,
)
from pqk.quant.qparams import Grid, dequantize, quantize
from pqk.quant.qparams import choose as choose_qparams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="kernels run on CPU tensors under TRITON_INTERPRET=1 only"),
]
INT8, UINT8 = Grid("int8", -127, 127, symmetric=True), Grid("uint8", 0, 255, symmetric=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **changes: Any) -> Attention:
    """Float outputs; scores of a few units; zero points in the middle."""
    steps, params = program()
    zero = 128 if q.dtype == torch.uint8 else 0
    scale = 3e-3 / q.shape[-1] ** 0.5
    plain = Attention(q, k, v, mask, params, steps, scale, 0.02, zero, zero, zero, torch.float32)
    return dataclasses.replace(plain, **changes)


def drawn(batch: int, queries: int, keys: int, heads: int, head: int, dtype: torch.dtype = torch.int8) -> list[Tensor]:
    return [draw((batch, s, heads, head), dtype, seed) for seed, s in enumerate((queries, keys, keys))]


def poisoned_run(a: Attention, **named: Any) -> Tensor:
    """By the kernel, with every byte of the output wrong before it."""
    with poisoned() as outputs:
        got = run(a, **named)
    assert len(outputs) == 1 and outputs[0] is got
    return got


def agree(a: Attention, **named: Any) -> Tensor:
    """The kernel against its reference. A score that differs in its last bit moves one weight by 1 of 16256 steps."""
    got = poisoned_run(a, **named)
    assert_matches(reference(a), got, atol=2e-4 * 255 * a.value_scale)
    return got


def float_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √D + mask) v of [B, S, heads, D], as torch computes it."""
    if mask is not None:
        mask = mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# The kernel is its reference


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_its_reference(case: Case) -> None:
    """The shapes of `CASES` with two heads at most: an interpreted program takes a tenth of a second."""
    agree(dataclasses.replace(case, heads=min(2, case.heads)).arguments("cpu"))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 40),
    keys=st.integers(1, 150),
    head=st.sampled_from(HEADS),
    dtype=st.sampled_from([torch.int8, torch.uint8]),
    mask=st.sampled_from([None, torch.bool, torch.float32]),
    steps=st.sampled_from(["", "requantize,silu", "relu,quantize"]),
    data=st.data(),
)
def test_any_shape_dtype_zero_point_and_mask(
    batch: int, queries: int, keys: int, head: int, dtype: torch.dtype, mask: torch.dtype | None, steps: str, data: Any
) -> None:
    limits = torch.iinfo(dtype)
    zero_points = [data.draw(st.integers(limits.min, limits.max)) for _ in range(3)]
    q, k, v = drawn(batch, queries, keys, 1, head, dtype)
    numbers = {"requantize": (0.02, 5, -128, 127, 0.02), "quantize": (0.015, 3, -128, 127)}
    words, params = program(*((name, *numbers.get(name, ())) for name in steps.split(",") if name))
    a = attention(
        q, k, v, None if mask is None else draw((batch, keys), torch.float32),
        q_zero_point=zero_points[0], k_zero_point=zero_points[1], v_zero_point=zero_points[2], steps=words,
        params=params, out_dtype=torch.int8 if "quantize" in steps.split(",") else torch.float32,
    )  # fmt: skip
    agree(dataclasses.replace(a, mask=a.mask > -1) if mask is torch.bool and a.mask is not None else a)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_m} rows")
def test_rows_of_a_block_do_not_change_a_bit(config: Any) -> None:
    a = attention(*drawn(1, 33, 70, 1, 32))
    assert torch.equal(agree(a, config=config), run(a, config=CONFIGS[-1]))


def test_strides_change_nothing() -> None:
    """Views of a packed buffer, of other layouts, and copies hold the same numbers."""
    q, k, v = unpack(draw((2, 21, 3 * 2 * 32), torch.int8), heads=2)
    assert q.stride() == (21 * 192, 192, 32, 1) and k.data_ptr() - q.data_ptr() == 64
    packed = poisoned_run(attention(q, k, v, torch.ones(2, 21)[:, ::1] > 0))
    mask = restrided(torch.ones(2, 21)) > 0
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(packed, poisoned_run(attention(*heads_first, mask)))
    assert torch.equal(packed, poisoned_run(attention(q.contiguous(), k, v.contiguous())))


def test_samples_and_heads_do_not_meet() -> None:
    q, k, v = drawn(2, 18, 18, 2, 32)
    whole = poisoned_run(attention(q, k, v))
    alone = [t[1:, :, 1:] for t in (q, k, v)]
    assert torch.equal(whole[1:, :, 1:], poisoned_run(attention(*alone)))


def test_offsets_beyond_32_bits() -> None:
    """Two samples 2 GiB apart in one buffer, of which a few pages are touched."""
    apart = (1 << 31) + 64
    memory = torch.empty(apart + 3 * 16 * 32, dtype=torch.int8)
    q, k, v = (memory[i * 512 :].as_strided((2, 16, 1, 32), (apart, 32, 32, 1)) for i in range(3))
    values = drawn(2, 16, 16, 1, 32)
    for view, value in zip((q, k, v), values, strict=True):
        view.copy_(value)
    a = attention(q, k, v)
    types, _, _ = signature(plan(a))
    assert types["q_batch"] == "i64" and types["q_row"] == "i32"
    assert torch.equal(poisoned_run(a), poisoned_run(attention(*values)))


# The reference is attention


def test_known_answers() -> None:
    q, k, v = drawn(1, 5, 1, 1, 32)
    assert torch.equal(agree(attention(q, k, v))[0, :, 0], (v[0, 0].float() * torch.tensor(0.02)).expand(5, 32))
    q, k, v = drawn(1, 3, 64, 1, 64)
    same = agree(attention(torch.zeros_like(q), k, v))  # equal scores: the mean
    torch.testing.assert_close(same[0, 0, 0], 0.02 * v[0, :, 0].float().mean(0))
    constant = agree(attention(q, k, torch.full_like(v, -77), v_zero_point=3))
    assert torch.equal(constant, torch.full_like(constant, -80.0) * torch.tensor(0.02))


def realistic(head: int, length: int = 128, batch: int = 2, heads: int = 2) -> list[Tensor]:
    """What trained encoders do: the first token draws most of the attention and says little, a few channels are
    several times larger than the rest, queries and keys have an offset, and scores spread over several units."""
    generator = torch.Generator().manual_seed(head)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    loud = torch.where(torch.arange(head) % 16 == 3, 4.0, 1.0)
    q, k, v = ((normal(batch, length, heads, head) + 0.5 * normal(heads, head)) * loud for _ in range(3))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / head**0.5
    q = q * (1.5 / scores.std())
    direction = q.mean((0, 1))
    k[:, 0] = direction * (4 * head**0.5 / direction.square().sum(-1, keepdim=True))
    v[:, 0] *= 0.05
    return [q, k, v]


def signal_to_noise(signal: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - got).square().sum()))


def quantized(floats: list[Tensor], grid: Grid) -> tuple[Attention, list[Tensor]]:
    """Attention on the integers of float q, k, v, and the values that those integers stand for."""
    qparams = [choose_qparams(t, grid, "percentile") for t in floats]
    q, k, v = (quantize(t, p) for t, p in zip(floats, qparams, strict=True))
    scales, zeros = [float(p.scale) for p in qparams], [int(p.zero_point) for p in qparams]
    a = attention(
        q, k, v, score_scale=scales[0] * scales[1] / q.shape[-1] ** 0.5, value_scale=scales[2],
        q_zero_point=zeros[0], k_zero_point=zeros[1], v_zero_point=zeros[2],
    )  # fmt: skip
    return a, [dequantize(t, p) for t, p in zip((q, k, v), qparams, strict=True)]


@pytest.mark.parametrize("grid", [INT8, UINT8], ids=["int8", "uint8"])
@pytest.mark.parametrize("head", HEADS)
def test_noise_beside_float_attention(head: int, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is 30 dB with everything in it; what the kernel adds to its int8 inputs is 30 dB below that."""
    floats = realistic(head)
    a, values = quantized(floats, grid)
    y = reference(a)
    assert signal_to_noise(float_attention(*floats), y) > 30
    own = signal_to_noise(float_attention(*values), y)
    assert own > 60
    monkeypatch.setattr(module, "LEVELS", 127.0)  # one digit would not do: the test can tell
    assert signal_to_noise(float_attention(*values), reference(a)) < own - 30


def test_the_kernel_has_the_accuracy_of_its_reference() -> None:
    floats = realistic(64, length=100, batch=1, heads=1)
    a, values = quantized(floats, INT8)
    y = agree(a)
    assert signal_to_noise(float_attention(*floats), y) > 30 and signal_to_noise(float_attention(*values), y) > 60


def test_rising_scores_rescale_what_earlier_tiles_left() -> None:
    """Each tile's keys beat all earlier ones, so every tile raises the maximum; and the other way round."""
    q, k, v = drawn(1, 4, 256, 1, 32)
    q, k = q.fill_(100), (torch.arange(256) // 2 - 64).to(torch.int8)[None, :, None, None].expand(1, 256, 1, 32)
    for keys in (k.contiguous(), k.flip(1).contiguous()):
        a = attention(q, keys, v, score_scale=1e-4)
        values = [t.float() for t in (q, keys, v)]
        exact = float_attention(values[0] * 1e-4 * math.sqrt(32), values[1], values[2] * 0.02)
        assert signal_to_noise(exact, agree(a)) > 55


# Masks


def test_masked_keys_have_no_influence() -> None:
    q, k, v = drawn(2, 9, 80, 1, 32)
    mask = torch.arange(80) < torch.tensor([[67], [30]])
    hidden = poisoned_run(attention(q, k, v, mask))
    other_k, other_v = (torch.where(mask[..., None, None], t, 127 - t) for t in (k, v))
    assert torch.equal(hidden, poisoned_run(attention(q, other_k, other_v, mask)))
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    unknown = torch.zeros(mask.shape).masked_fill(~mask, torch.nan)
    for same in (added, lowest, unknown):
        assert torch.equal(hidden, poisoned_run(attention(q, k, v, same)))
    short = poisoned_run(attention(q[:1], k[:1, :67], v[:1, :67]))
    assert torch.equal(hidden[:1], short)
    assert not torch.equal(hidden, poisoned_run(attention(q, k, v)))


def test_an_additive_mask_is_added_to_the_scores() -> None:
    q, k, v = drawn(1, 6, 70, 1, 64)
    mask = draw((1, 70), torch.float32)
    values = [t.float() for t in (q * 1.0, k, v * 0.02)]
    scale = 3e-3 / 8
    exact = float_attention(values[0] * scale * 8, values[1], values[2], mask)
    got = agree(attention(q, k, v, mask))
    assert signal_to_noise(exact, got) > 55
    shifted = poisoned_run(attention(q, k, v, mask - 5))  # the same for all keys: softmax does not see it
    torch.testing.assert_close(got, shifted, rtol=0, atol=2e-4 * 255 * 0.02)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_without_keys_is_zero(kind: str) -> None:
    """The first sample has nothing to attend to; the second is as it would be alone. Zero is then quantized."""
    q, k, v = drawn(2, 5, 70, 1, 32)
    visible = torch.tensor([[False], [True]]).expand(2, 70)
    mask = visible if kind == "bool" else torch.zeros(2, 70).masked_fill(~visible, -torch.inf)
    got = agree(attention(q, k, v, mask, v_zero_point=9))
    assert bool((got[0] == 0).all())
    assert torch.equal(got[1:], poisoned_run(attention(q[1:], k[1:], v[1:], v_zero_point=9)))
    steps, params = program(("quantize", 0.01, -7, -128, 127))
    quantized = agree(attention(q, k, v, mask, steps=steps, params=params, out_dtype=torch.int8))
    assert bool((quantized[0] == -7).all())


@pytest.mark.parametrize("shape", [(0, 4, 4, 2), (2, 0, 4, 2), (2, 4, 0, 2), (2, 4, 4, 0)])
def test_empty_tensors(shape: tuple[int, int, int, int]) -> None:
    """No samples, queries or heads: nothing. No keys: zeros."""
    a = attention(*drawn(*shape, 32))
    got = poisoned_run(a)
    assert got.shape == a.q.shape and torch.equal(got, torch.zeros(a.q.shape)) and torch.equal(reference(a), got)


# The operator, its configurations, its refusals


def test_the_operator_on_a_cpu_and_while_exporting() -> None:
    a = Case(1, 12, 2, 32, torch.uint8, torch.bool).arguments("cpu")
    arguments = [getattr(a, field.name) for field in dataclasses.fields(a)]
    assert torch.equal(torch.ops.pqk.int8_attention(*arguments), reference(a))
    torch.library.opcheck(
        torch.ops.pqk.int8_attention.default, arguments, test_utils=["test_schema", "test_faketensor"]
    )
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        out = torch.ops.pqk.int8_attention(*fakes)
    assert out.shape == a.q.shape and out.dtype == torch.int8 and out.is_contiguous()


def test_configurations() -> None:
    for head in HEADS:
        assert all(fits(config, head, 99 * 1024) for config in CONFIGS)
        assert not any(fits(config, head, 4096) for config in CONFIGS)
    gpu = Gpu((8, 0), 132, 99 * 1024)
    assert choose(1, 12, 32, gpu).block_m == 16 and choose(16, 12, 32, gpu).block_m == 16
    assert choose(128, 12, 32, gpu).block_m == 32, "few pairs: more programs"
    assert choose(128, 32 * 12, 32, gpu).block_m == 128
    assert choose(40, 32 * 12, 32, gpu).block_m == 64
    assert choose(4096, 12, 128, Gpu((8, 0), 132, 45_000)).block_m == 32
    arguments = CASES[0].arguments()
    assert plan(arguments).grid == (48,)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"q": torch.zeros(1, 4, 2, 32)}, "all must be int8"),
    "mixed": ({"k": torch.zeros(1, 4, 2, 32, dtype=torch.uint8)}, "all must be int8"),
    "head": ({n: torch.zeros(1, 4, 2, 48, dtype=torch.int8) for n in "qkv"}, "heads of size 48"),
    "axes": ({"q": torch.zeros(4, 2, 32, dtype=torch.int8)}, "3, 4 and 4 axes"),
    "keys": ({"v": torch.zeros(1, 5, 2, 32, dtype=torch.int8)}, "do not fit together"),
    "heads": ({n: torch.zeros(1, 4, 1, 32, dtype=torch.int8) for n in "kv"}, "do not fit together"),
    "stride": ({"v": torch.zeros(1, 4, 32, 2, dtype=torch.int8).transpose(2, 3)}, "side by side"),
    "mask dtype": ({"mask": torch.zeros(1, 4, dtype=torch.int64)}, "the mask is torch.int64"),
    "mask shape": ({"mask": torch.zeros(4, 4)}, r"the mask is torch.float32 \[4, 4\]"),
    "device": ({"k": torch.zeros(1, 4, 2, 32, dtype=torch.int8, device="meta")}, "k: is on meta"),
    "scale": ({"score_scale": 0.0}, "score_scale: 0.0"),
    "negative scale": ({"value_scale": -0.1}, "value_scale: -0.1"),
    "nan": ({"value_scale": math.nan}, "value_scale: nan"),
    "zero point": ({"k_zero_point": 128}, r"k_zero_point: 128 is not in \[-128, 127\]"),
    "residual": ({"steps": "add", "params": torch.zeros(1, 5)}, "attention has none"),
    "out dtype": ({"out_dtype": torch.int8}, "out_dtype"),
    "params": ({"params": torch.zeros(2, 5)}, "params"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    a = dataclasses.replace(attention(*drawn(1, 4, 4, 2, 32)), **changes)
    for compute in (run, reference):
        with pytest.raises(InputError, match=reason):
            compute(a)
