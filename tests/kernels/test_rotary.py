"""Rotary embeddings: the kernel is its reference bit for bit, and the reference turns channels in pairs."""

from __future__ import annotations

import math
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
from pqk.kernels import rotary as module
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.rotary import CASES, Case, Rotary, reference, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: Triton, and no CUDA device"),
]


def agree(a: Rotary) -> tuple[Tensor, Tensor]:
    """The same bits in float32; in half precision as the interpreter rounds."""
    with poisoned() as outputs:
        got = run(a)
    assert [o is g for o, g in zip(outputs, got, strict=True)] == [True, True]
    for expected, actual in zip(reference(a), got, strict=True):
        assert_matches(expected, actual)
        assert a.q.dtype != torch.float32 or torch.equal(expected, actual)
    return got


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.full] if programs(module.specialize(c)) > 30 else []) for c in CASES]
)
def test_cases(case: Case) -> None:
    agree(case.arguments("cpu"))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), length=st.integers(0, 9), groups=st.integers(0, 3), share=st.integers(1, 3),
    head=st.integers(1, 20), part=st.integers(0, 10), shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)  # fmt: skip
def test_any_size(
    batch: int, length: int, groups: int, share: int, head: int, part: int, shared: bool, dtype: torch.dtype
) -> None:
    turned = min(2 * part, head // 2 * 2)
    agree(Case(batch, length, max(1, groups) * share, groups, head, turned, dtype, shared).arguments("cpu"))


def test_channels_turn_in_pairs() -> None:
    """A quarter of a turn takes (1, 0) to (0, 1), and what is behind the turned channels stays."""
    x = torch.tensor([1.0, 2.0, 0.0, 0.0, 7.0]).expand(1, 1, 2, 5).clone()
    quarter = torch.full((1, 1, 4), math.pi / 2)
    a = Rotary(x, None, quarter.cos(), quarter.sin())
    y, none = agree(a)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 1.0, 2.0, 7.0]).expand(1, 2, 1, 5), atol=1e-6, rtol=0)
    assert none.shape == (0,)


def test_products_depend_on_distances_alone() -> None:
    """The reason for it all: q at place m with k at place n is q at m + 5 with k at n + 5."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 16, generator=g).expand(1, 12, 1, 16) for _ in range(2))
    frequencies = 0.5 ** torch.arange(8.0)
    angles = (torch.arange(12.0)[:, None] * frequencies)[None].repeat(1, 1, 2)
    q, k = agree(Rotary(q.contiguous(), k.contiguous(), angles.cos(), angles.sin()))
    products = (q @ k.transpose(2, 3))[0, 0]
    torch.testing.assert_close(products[:7, :7], products[5:, 5:], atol=1e-4, rtol=0)
    assert float(products.std()) > 0.1


def test_strides_change_nothing() -> None:
    a = Case(2, 6, 4, 2, 8, 8).arguments("cpu")
    assert a.k is not None and a.q.stride() == (6 * 64, 64, 8, 1)
    plain = replace(a, q=a.q.contiguous(), k=a.k.contiguous())
    gaps = replace(
        plain, q=plain.q.transpose(1, 2).contiguous().transpose(1, 2), cos=torch.cat([a.cos] * 2, -1)[..., :8]
    )
    for other in (plain, gaps):
        assert all(torch.equal(x, y) for x, y in zip(agree(a), agree(other), strict=True))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(5, 4, 8)}, "3 and 4 axes"),
    ({"k": torch.zeros(2, 4, 2, 8)}, "do not fit together"),
    ({"cos": torch.zeros(2, 5, 6)}, "cos .* and sin"),
    ({"sin": torch.zeros(5, 8)}, "cos .* and sin"),
    ({"cos": torch.zeros(2, 5, 7), "sin": torch.zeros(2, 5, 7)}, "it turns 7 channels"),
    ({"cos": torch.zeros(2, 5, 10), "sin": torch.zeros(2, 5, 10)}, "it turns 10 channels of heads of 8"),
    ({"q": restrided(torch.zeros(2, 5, 4, 8))}, "side by side"),
    ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int8)}, "q: dtype is int8"),
    ({"k": torch.zeros(2, 5, 2, 8, dtype=torch.float16)}, "k: dtype is float16"),
    ({"cos": torch.zeros(2, 5, 8, dtype=torch.float16)}, "cos: dtype is float16"),
    ({"sin": torch.zeros(2, 5, 8, device="meta")}, "sin: is on meta"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSALS)
def test_refusals(changes: dict[str, Any], says: str) -> None:
    a = replace(Case(2, 5, 4, 2, 8, 8).arguments("cpu"), **changes)
    for compute in (reference, run):
        with pytest.raises(InputError, match=says):
            compute(a)


def test_the_operator() -> None:
    a = Case(2, 5, 4, 2, 8, 4).arguments("cpu")
    for arguments in ((a.q, a.k, a.cos, a.sin), (a.q, None, a.cos, a.sin)):
        real = torch.ops.pqk.rotary(*arguments)
        for fake, value in zip(faked(torch.ops.pqk.rotary.default, arguments), real, strict=True):
            assert_alike(fake, value)
    assert all(
        torch.equal(x, y) for x, y in zip(torch.ops.pqk.rotary(a.q, a.k, a.cos, a.sin), reference(a), strict=True)
    )
    torch.library.opcheck(torch.ops.pqk.rotary.default, arguments, test_utils=["test_schema", "test_faketensor"])
    assert module.plan(a).name == "rotary_kernel"
