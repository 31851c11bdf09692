"""Causal attention behind a cache: the kernel is its reference, that is attention, and a cache changes nothing."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned
from kernels_rows import assert_alike, faked, programs
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels import causal_attention as module
from pqk.kernels.causal_attention import (
    CASES,
    CONFIGS,
    Case,
    CausalAttention,
    candidates,
    choose,
    fits,
    plan,
    reference,
    run,
    visible,
)
from pqk.kernels.common.epilogue import program
from pqk.kernels.common.gpu import Gpu
from pqk.kernels.common.triton import INTERPRETED
from pqk.models.decoder import Sight, grouped_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: Triton, and no CUDA device"),
]


def agree(a: CausalAttention, **named: Any) -> Tensor:
    """The kernel against its reference, every byte of the output wrong before it.

    Weights are rounded to half precision before they are multiplied with values in half precision.
    """
    with poisoned() as outputs:
        got = run(a, **named)
    assert len(outputs) == 1 and outputs[0] is got
    half = a.q.dtype == torch.float16
    assert_matches(reference(a), got, exact=0.99 if half else 0.999, atol=4e-3 if half else 1e-5)
    return got


def floats(case: Case) -> CausalAttention:
    """The case with a float output and no steps."""
    return replace(case, steps="", out_dtype=torch.float32).arguments("cpu")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.full] if programs(module.specialize(c)) > 30 else []) for c in CASES]
)
def test_cases(case: Case) -> None:
    agree(case.arguments("cpu"))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    queries=st.integers(0, 40), past=st.integers(0, 80), groups=st.integers(1, 2), share=st.integers(1, 3),
    head=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float16]), masked=st.booleans(),
    texts=st.booleans(), window=st.sampled_from([0, 1, 7, 40]),
    steps=st.sampled_from(["", "quantize", "relu,quantize"]),
)  # fmt: skip
def test_any_size_and_sight(
    queries: int, past: int, groups: int, share: int, head: int, dtype: torch.dtype, masked: bool, texts: bool,
    window: int, steps: str,
) -> None:  # fmt: skip
    out = torch.int8 if steps else torch.float32
    agree(
        Case(2, queries, past, groups * share, groups, head, dtype, masked, texts, window, steps, out).arguments("cpu")
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_blocks_change_only_the_order_of_sums(config: Any) -> None:
    a = floats(Case(1, 40, 50, 4, 2, 24, texts=True, window=30))
    torch.testing.assert_close(agree(a, config=config), run(a, config=CONFIGS[-1]), atol=2e-6, rtol=0)


# The reference is attention


def test_it_is_the_attention_of_torch() -> None:
    a = floats(Case(2, 9, 0, 4, 2, 16, masked=False))
    k, v = (t.repeat_interleave(2, 1) for t in (a.k, a.v))
    want = torch.nn.functional.scaled_dot_product_attention(a.q, k, v, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(agree(a), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
def test_it_is_the_attention_of_a_decoder(window: int | None) -> None:
    """With padding behind, padding before that sees nothing, and two texts in one."""
    a = floats(Case(3, 10, 0, 4, 2, 16, texts=True, window=window or 0))
    mask = torch.ones(3, 10, dtype=torch.int64)
    mask[0, 7:], mask[1, :3], mask[2, 4:] = 0, 0, 2
    seen = Sight(window)(mask)
    want, _ = grouped_attention(torch.nn.Identity(), a.q, a.k, a.v, seen, scaling=a.scale)
    assert int((~(seen == 0).any(-1)).sum()) >= 3, "the padding before a text sees nothing"
    torch.testing.assert_close(agree(replace(a, mask=mask)), want, atol=1e-5, rtol=0)


def test_a_cache_changes_nothing() -> None:
    """A text in three parts, each behind what came before, is the text at once."""
    a = floats(Case(2, 20, 0, 4, 2, 16, texts=True, window=9))
    whole = agree(a)
    for begin, end in ((0, 7), (7, 8), (8, 20)):
        assert a.mask is not None
        part = replace(a, q=a.q[:, :, begin:end], k=a.k[:, :, :end], v=a.v[:, :, :end], mask=a.mask[:, :end])
        there = a.mask[:, begin:end] > 0
        torch.testing.assert_close(agree(part)[there], whole[:, begin:end][there], atol=1e-5, rtol=0)


def test_known_answers() -> None:
    """The first token sees itself, the second the mean of two where scores are equal; who sees none, that of all."""
    q, v = torch.zeros(1, 1, 3, 4), torch.arange(12.0).reshape(1, 1, 3, 4)
    steps, params = program()
    a = CausalAttention(q, torch.zeros(1, 1, 3, 4), v, None, False, 0, 1.0, params, steps, torch.float32)
    torch.testing.assert_close(agree(a)[0, :, 0, 0], torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(agree(replace(a, window=2))[0, :, 0, 0], torch.tensor([0.0, 2.0, 6.0]))
    steps, params = program(("quantize", 0.5, -7, -128, 127))
    hidden = replace(a, mask=torch.tensor([[0, 0, 1]]), steps=steps, params=params, out_dtype=torch.int8)
    assert agree(hidden)[0, :, 0, 0].tolist() == [1, 1, 9]


def test_what_is_hidden_has_no_influence() -> None:
    """Keys of padding and of tokens to come may be anything."""
    a = floats(Case(1, 30, 40, 2, 1, 16))
    assert a.mask is not None
    hidden = a.mask[0] == 0
    other = replace(a, k=a.k.masked_fill(hidden[:, None], 1e4), v=a.v.masked_fill(hidden[:, None], -1e4))
    assert torch.equal(agree(a), agree(other))
    last = replace(a, mask=None, k=a.k.clone().index_fill(2, torch.tensor(69), 9.0))
    assert torch.equal(agree(replace(a, mask=None))[:, :-1], agree(last)[:, :-1])


def test_strides_change_nothing() -> None:
    a = floats(Case(2, 6, 5, 4, 2, 16))
    plain = replace(a, v=a.v.contiguous())
    assert a.v.stride() != plain.v.stride()
    turned = replace(plain, q=a.q.transpose(1, 2).contiguous().transpose(1, 2))
    assert torch.equal(agree(a), agree(plain)) and torch.equal(agree(a), agree(turned))


def test_visible_counts_from_the_end() -> None:
    mask = torch.tensor([[0, 1, 1, 2, 2]])
    sees = visible(mask, 2, 5, 0, True, mask.device).int()
    assert sees.tolist() == [[[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]]
    assert visible(mask, 2, 5, 0, False, mask.device).int().tolist() == [[[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]]
    assert visible(None, 2, 5, 2, False, mask.device).int().tolist() == [[[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]


# The operator, its configurations, its refusals


def test_the_operator() -> None:
    a = Case(2, 5, 3, 4, 2, 8, texts=True).arguments("cpu")
    arguments = tuple(getattr(a, field.name) for field in dataclasses.fields(a))
    operator = torch.ops.pqk.causal_attention.default
    assert torch.equal(operator(*arguments), reference(a))
    assert_alike(faked(operator, arguments), reference(a))
    torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])


def test_configurations() -> None:
    gpu = Gpu((8, 0), 108, 163 * 1024)
    assert choose(3, 3, 64, 4, gpu).block_m == 16, "one token of three heads a group"
    assert choose(2048, 64, 64, 2, gpu).block_m == 64 and choose(2048, 64, 64, 4, gpu).block_m == 16
    assert choose(40, 4, 64, 4, gpu).block_m == 16
    for width in (16, 64, 128):
        assert candidates(width, 4, replace(gpu, shared=65536)), "of AMD's memory"
    assert not any(fits(config, 128, 4, 4096) for config in CONFIGS)
    assert plan(CASES[0].arguments()).grid == (3,)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(4, 5, 8)}, "3, 4 and 4 axes"),
    ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.bfloat16)}, "all must be float32, or all float16"),
    ({"v": torch.zeros(2, 2, 8, 8, dtype=torch.float16)}, "all must be float32, or all float16"),
    ({"q": torch.zeros(2, 3, 5, 8)}, "do not fit together"),
    ({"q": torch.zeros(2, 4, 9, 8)}, "do not fit together"),
    ({"v": torch.zeros(2, 2, 7, 8)}, "do not fit together"),
    ({"q": torch.zeros(2, 4, 5, 200), "k": torch.zeros(2, 2, 8, 200)}, "heads of size 200; the kernel takes up to 128"),
    ({"v": torch.zeros(2, 2, 8, 8).transpose(2, 3)}, "side by side"),
    ({"mask": torch.ones(2, 8)}, "the mask is torch.float32"),
    ({"mask": torch.ones(2, 7, dtype=torch.int64)}, r"int64 \[2, 8\] is needed"),
    ({"window": -1}, "a window of -1 tokens"),
    ({"scale": math.nan}, "scale: nan"),
    ({"steps": "add", "params": torch.zeros(1, 5)}, "attention has none"),
    ({"out_dtype": torch.float32}, "out_dtype"),
    ({"k": torch.zeros(2, 2, 8, 8, device="meta")}, "k: is on meta"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSALS)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    a = replace(Case(2, 5, 3, 4, 2, 8).arguments("cpu"), **changes)
    for compute in (reference, run):
        with pytest.raises(InputError, match=says):
            compute(a)


def test_draws_are_normal() -> None:
    """The cases' scores spread: a softmax that is flat would hide what is wrong with it."""
    a = floats(Case(1, 20, 20, 2, 1, 32))
    scores = torch.einsum("bhqd,bgkd->bhqk", a.q, a.k) * a.scale
    assert 0.5 < float(scores.std()) < 2 and float(draw((4, 4), torch.float32).std()) > 1
