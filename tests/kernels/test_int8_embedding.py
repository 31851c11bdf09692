"""int8_embedding: interpreter against reference, reference against torch's own embedding."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_matches, draw, poisoned, restrided
from kernels_rows import assert_alike, faked, programs
from torch import Tensor
from torch.nn.functional import embedding, layer_norm

from pqk.errors import InputError
from pqk.kernels import int8_embedding
from pqk.kernels.common.norm import MAX_COLUMNS
from pqk.kernels.common.triton import INTERPRETED
from pqk.kernels.int8_embedding import Case, Embedding, reference, run, why_not_supported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: Triton, and no CUDA device"),
]
CASES = [
    pytest.param(case, marks=[pytest.mark.full] if programs(int8_embedding.specialize(case)) > 32 else [])
    for case in int8_embedding.CASES
]
S8, F32 = torch.int8, torch.float32


def agree(arguments: Embedding) -> None:
    """Without a layer norm the same bits; with one, whose sums have another order, or an erf, within the contract."""
    with poisoned() as outputs:
        results = run(arguments)
    assert [o is r for o, r in zip(outputs, results, strict=True)] == [True, True]
    for expected, got in zip(reference(arguments), results, strict=True):
        assert_matches(expected, got, atol=2e-6)
        if not arguments.normalize and got.dtype != torch.bfloat16 and "gelu" not in arguments.steps:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_cases(case: Case) -> None:
    agree(case.arguments("cpu"))


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), c=st.integers(1, 70), words=st.integers(1, 40),
    dtype=st.sampled_from((torch.int32, torch.int64)), scales=st.sampled_from(("table", "row", "column")),
    positions=st.sampled_from((None, S8, F32)), types=st.sampled_from((None, S8, F32)), given_ids=st.booleans(),
    normalize=st.booleans(), keep=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_rows_are_those_of_torch(
    shape: list[int], c: int, words: int, dtype: torch.dtype, scales: str, positions: torch.dtype | None,
    types: torch.dtype | None, given_ids: bool, normalize: bool, keep: bool, seed: int,
) -> None:  # fmt: skip
    case = Case(tuple(shape), c, words, dtype, scales, positions, types, given_ids, normalize, keep, "relu", F32)
    e = replace(case.arguments("cpu", seed), eps=1e-3)
    v = gather(e.words, e.word_scale, e.ids)
    if e.types is not None:
        v = v + gather(e.types, e.type_scale, torch.zeros_like(e.ids) if e.type_ids is None else e.type_ids)
    if e.positions is not None:
        places = torch.arange(shape[-1]).expand(shape)
        v = v + gather(e.positions, e.position_scale, places if e.position_ids is None else e.position_ids)
    if normalize:
        v = layer_norm(v, (c,), *(t if t is None else t.double() for t in (e.weight, e.bias)), e.eps)
    out, kept = reference(e)
    torch.testing.assert_close(out.double(), v.relu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.double(), v if keep else v.new_empty(0), rtol=1e-4, atol=1e-4)
    agree(e)


def gather(table: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
    """float64 rows, through a dequantized table."""
    if scale is None:
        return embedding(ids, table.double())
    return embedding(ids, table.double() * (scale if scale.ndim == 2 else scale.reshape(-1, 1)).double())


def test_known_rows() -> None:
    words = torch.tensor([[1, 2], [3, 4], [-5, 6]], dtype=S8)
    e = Embedding(
        torch.tensor([[2, 0, 1]]), words, torch.tensor([1.0, 10.0, 0.5]), torch.tensor([[100.0, 0.0]] * 4), None, None,
        torch.tensor([[0.0, 7.0]]), None, None, None, None, torch.zeros(0, 5), "", False, 0.0, False, F32,
    )  # fmt: skip
    for f in (reference, run):
        assert f(e)[0].tolist() == [[[97.5, 10.0], [101.0, 9.0], [130.0, 47.0]]]
        columns = replace(e, word_scale=torch.tensor([[10.0, 0.5]]), keep=True)
        for result in f(columns):
            assert result.tolist() == [[[50.0, 10.0], [110.0, 8.0], [130.0, 9.0]]]


@pytest.mark.parametrize(("field", "table"), [("ids", "words"), ("type_ids", "types"), ("position_ids", "positions")])
@pytest.mark.parametrize("bad", [-1, 1 << 30])
def test_an_id_outside_its_table(field: str, table: str, bad: int) -> None:
    """The reference names it. The kernel, which cannot, reads nothing for it: as if that row were zeros."""
    e = Case((2, 3), 8, 20, with_ids=True, normalize=False, steps="", out_dtype=F32).arguments("cpu")
    ids = getattr(e, field).clone()
    ids[1, 2] = bad
    spoiled = replace(e, **{field: ids})
    rows = len(getattr(e, table))
    with pytest.raises(InputError, match=rf"{field}\[1, 2\]: {bad} is outside a table of {rows} rows"):
        reference(spoiled)
    with pytest.raises(InputError, match="is outside a table"):
        torch.ops.pqk.int8_embedding(*vars(spoiled).values())
    (got, _), (whole, _) = run(spoiled), reference(e)
    assert torch.equal(got.flatten(0, 1)[:5], whole.flatten(0, 1)[:5])
    zeroed = getattr(e, table).clone()
    zeroed[getattr(e, field)[1, 2]] = 0
    assert torch.equal(got[1, 2], reference(replace(e, **{table: zeroed}))[0][1, 2])


def test_what_has_no_tokens_gives_no_rows() -> None:
    for f, shape in product((reference, run), ((0,), (3, 0), (0, 4))):
        e = Case(shape, 8, with_ids=True).arguments("cpu")
        out, kept = f(replace(e, keep=True))
        assert out.shape == kept.shape == (*shape, 8) and f(e)[1].shape == (0,)


def test_offsets_have_64_bits() -> None:
    """The last row of a table of 2 GiB, most of which is never touched and so never there."""
    columns = 64
    words = torch.empty((1 << 31) // columns + 1, columns, dtype=S8)
    words[-1], words[1] = draw((columns,), S8, 3), 5
    e = Case((2,), columns, positions=None, types=None, scales="table", normalize=False, steps="", out_dtype=F32)
    arguments = replace(e.arguments("cpu"), ids=torch.tensor([len(words) - 1, 1]), words=words)
    got, _ = run(arguments)
    assert torch.equal(got, torch.stack([words[-1], words[1]]).float() * arguments.word_scale)


def case(**changes: Any) -> Embedding:
    return replace(Case((2, 3), 8, with_ids=True).arguments("cpu"), **changes)


REFUSALS = [
    (case(ids=torch.zeros(2, 3)), "ids: dtype is float32, must be int64 or int32"),
    (case(ids=torch.tensor(1)), "ids: a scalar"),
    (case(ids=restrided(torch.zeros(2, 3, dtype=torch.int64))), "ids: strides"),
    (case(words=torch.zeros(4, 8, dtype=torch.uint8)), "words: dtype is uint8, must be int8 or float32"),
    (case(words=torch.zeros(4, 0, dtype=S8)), "empty rows"),
    (case(words=torch.zeros(4, 8, dtype=S8, device="meta")), "words: is on meta"),
    (case(word_scale=None), "words: a torch.int8 table needs a scale"),
    (case(words=torch.zeros(300, 8)), "words: a torch.float32 table has no scale"),
    (case(word_scale=torch.ones(5)), r"words scale: shape is \[5\], must be \[300\]"),
    (case(word_scale=torch.ones(300, 1)), r"words scale: shape is \[300, 1\], must be \[1, 8\]"),
    (case(word_scale=torch.zeros(())), "words scale: 0.0 .*must be finite and above 0"),
    (case(word_scale=torch.full((300,), float("nan"))), r"words scale: nan at \[0\]"),
    (case(types=torch.zeros(2, 9)), r"types: shape is \[2, 9\]"),
    (case(types=None), "types: a scale or ids are given, but no table"),
    (case(type_ids=torch.zeros(2, 4, dtype=torch.int64)), r"types ids: shape is \[2, 4\], must be \[2, 3\]"),
    (case(positions=torch.zeros(2, 8, dtype=S8), position_ids=None), "sequences of 3, but positions has 2 rows"),
    (case(normalize=False), "belong to the layer norm"),
    (case(weight=torch.ones(9)), "weight: shape"),
    (case(eps=float("inf")), "eps: inf"),
    (case(out_dtype=F32), "out_dtype"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_bad_input_is_refused_by_kernel_and_reference(arguments: Embedding, message: str) -> None:
    for f in (reference, run):
        with pytest.raises(InputError, match=message):
            f(arguments)


def test_what_the_kernel_does_not_take_has_a_reason() -> None:
    long = Case((1,), MAX_COLUMNS + 1, words=2).arguments("cpu")
    assert "does not stay in registers" in str(why_not_supported(long))
    with pytest.raises(InputError, match="registers"):
        run(long)
    assert all(why_not_supported(c.arguments()) is None for c in int8_embedding.CASES)


def test_the_operator_is_the_reference_and_its_fake_tells_the_shape() -> None:
    operator = torch.ops.pqk.int8_embedding.default
    for keep in (False, True):
        arguments = replace(int8_embedding.CASES[2].arguments("cpu"), keep=keep)
        values = tuple(vars(arguments).values())
        for got, expected, fake in zip(operator(*values), reference(arguments), faked(operator, values), strict=True):
            assert torch.equal(got, expected)
            assert_alike(fake, got)


def test_traffic_counts_the_rows_that_are_read() -> None:
    """Two tokens of one word at two positions: one word row, two position rows, two rows out."""
    table = torch.tensor([[0, 1]])
    e = Case((1, 2), 16, words=1, positions=S8, types=None, normalize=False, steps="", out_dtype=F32)
    assert e.arguments("cpu").ids.shape == table.shape
    assert int8_embedding.traffic(e) == 2 * 8 + 16 + 2 * 16 + 2 * 16 * 4
    columns = replace(e, scales="column", keep=True)
    assert int8_embedding.traffic(columns) == int8_embedding.traffic(e) + 2 * 16 * 4 + 2 * 16 * 4


@pytest.mark.full
@pytest.mark.parametrize("shape", [(1,), (5, 7), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("columns", [1, 31, 384, 1025])
@pytest.mark.parametrize(("positions", "types"), list(product((None, S8, F32), repeat=2)), ids=str)
def test_every_table(
    shape: tuple[int, ...], columns: int, positions: torch.dtype | None, types: torch.dtype | None
) -> None:
    for dtype, (flag, scales), normalize, (steps, out) in product(
        int8_embedding.IDS, ((False, "table"), (True, "row"), (True, "column")), (False, True),
        (("quantize", S8), ("quantize", torch.uint8), ("", F32), ("gelu", torch.float16), ("relu", torch.bfloat16)),
    ):  # fmt: skip
        case = Case(shape, columns, 50, dtype, scales, positions, types, flag, normalize, flag, steps, out)
        agree(case.arguments("cpu"))
