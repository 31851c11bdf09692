"""Inputs of other sizes than the example's, and the sizes that an axis may have."""

from __future__ import annotations

import pytest
import torch

from pqk.task.axes import Sizes, resized, sizes_of

AXES = [["batch", "time"], ["batch", "time"], ["batch", None]]


def example() -> tuple[torch.Tensor, ...]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    return torch.arange(12).reshape(2, 6), mask, torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2, 5, 6, 17])
def test_positions_keep_their_order_their_ends_and_their_masks(size: int) -> None:
    ids, mask, floats = resized(example(), AXES, {"time": size})
    assert ids.shape == mask.shape == (2, size) and floats.shape == (2, 4)
    assert torch.equal(ids.sort(1).values, ids) and ids[0, 0] == 0 and ids[0, -1] == 5
    assert torch.equal(mask[1], (ids[1] - 6 < 3).long()), "all inputs hold the same positions"
    assert sizes_of((ids, mask, floats), AXES) == {"batch": 2, "time": size}


def test_floats_are_scaled_and_masks_are_not() -> None:
    x, mask = torch.rand(4, 8) + 1, torch.rand(4, 8).round()
    one, two = resized((x, mask), [["batch", None]] * 2, {})
    assert (one < x).any() and (one >= 0.5 * x).all() and (one <= x).all() and torch.equal(two, mask)
    assert torch.equal(resized((x,), [["batch", None]], {}, scaled=False)[0], x)


def test_draws_are_the_same_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again = (resized(example(), AXES, {"batch": 9, "time": 3}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_some_sizes_are_near_and_far_and_legal() -> None:
    assert Sizes(0).some()[:3] == [1, 2, 3] and Sizes(0).some()[-1] > 1000
    assert Sizes(4, 20, 4).some() == [4, 8, 12, 16, 20] and Sizes(3, 3).some() == [3]
