"""Corruptions: they keep shapes and inputs, do what they say, and decline inputs that are not theirs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqk.data.data import ArrayData
from pqk.evaluation.corruptions import (
    CORRUPTIONS,
    Blur,
    Contrast,
    Corruption,
    ImageCorruption,
    Noise,
    Shift,
    WordDrop,
    WordSwap,
)
from pqk.task.task import Task

IMAGES = [c for c in CORRUPTIONS if isinstance(c, ImageCorruption)]
WORDS = [c for c in CORRUPTIONS if not isinstance(c, ImageCorruption)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_task(*inputs: Tensor, names: tuple[str, ...] | None = None) -> Task:
    data = ArrayData(inputs, torch.zeros(len(inputs[0]), dtype=torch.long))
    return Task(None, data, validation=data, input_names=names)


@pytest.fixture(scope="module")
def texts() -> Task:
    """Texts of 9, 6 and 3 tokens, which count up from 100."""
    ids = torch.arange(100, 109).repeat(3, 1)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [3]])).long()
    return a_task(ids * mask, mask, names=("input_ids", "attention_mask"))


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 20), st.integers(2, 20)), st.integers(0, 99))
def test_images_keep_their_shapes_and_stay_as_they_are(shape: tuple[int, ...], seed: int) -> None:
    images = torch.randn(shape, generator=seeded(seed))
    before, task = images.clone(), a_task(torch.zeros(2, *shape[1:]))
    for corruption in IMAGES:
        assert corruption.why_not_corrupted(task) is None
        (spoiled,) = corruption(task, (images,), seeded(seed))
        assert spoiled.shape == images.shape and spoiled.dtype == images.dtype and bool(spoiled.isfinite().all())
        assert torch.equal(images, before)
        assert torch.equal(corruption(task, (images,), seeded(seed))[0], spoiled)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-5, 5))
def test_strengths_are_relative_to_the_image(seed: int, scale: float, offset: float) -> None:
    """Whatever the normalisation of the inputs is, the same thing befalls them."""
    images = torch.randn(2, 3, 16, 16, generator=seeded(seed), dtype=torch.float64)
    for corruption in IMAGES:
        plain = corruption.corrupt(images, seeded())
        other = corruption.corrupt(images * scale + offset, seeded())
        torch.testing.assert_close(other, plain * scale + offset)


def test_each_does_what_it_says() -> None:
    images = torch.randn(2, 3, 16, 16, generator=seeded(), dtype=torch.float64)
    noise = Noise().corrupt(images, seeded()) - images
    assert float(noise.std() / images.std()) == pytest.approx(0.4, rel=0.1)
    assert float(Contrast().corrupt(images, seeded()).std() / images.std()) == pytest.approx(0.4, rel=0.05)
    shifted = Shift().corrupt(images, seeded())
    assert torch.equal(shifted[..., 2:, 2:], images[..., :-2, :-2])
    assert torch.equal(shifted[..., 0, 2:], images[..., 0, :-2])
    point = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    point[..., 32, 32] = 1
    blurred = Blur().corrupt(point, seeded())[0, 0]
    place = torch.arange(65, dtype=torch.float64) - 32
    assert float(blurred.sum()) == pytest.approx(1)
    assert float((blurred.sum(0) * place**2).sum()) == pytest.approx((65 / 32) ** 2, rel=0.05)  # its variance
    assert torch.allclose(blurred, blurred.T)


def test_words_are_dropped_and_swapped_inside_the_text(texts: Task) -> None:
    ids, mask = texts.example[0], texts.example[1]
    ids, mask = ids.repeat(500, 1), mask.repeat(500, 1)
    inner = torch.zeros_like(mask).bool()
    inner[:, 1:-1] = mask[:, 2:] != 0
    kept_ids, dropped = WordDrop()(texts, (ids, mask), seeded())
    assert torch.equal(kept_ids, ids) and torch.equal(dropped[~inner], mask[~inner]) and dropped.dtype == mask.dtype
    assert float((dropped[inner] == 0).double().mean()) == pytest.approx(0.15, abs=0.02)
    swapped, kept_mask = WordSwap()(texts, (ids, mask), seeded())
    assert torch.equal(kept_mask, mask) and torch.equal(swapped[~inner], ids[~inner])
    assert torch.equal(swapped.sort(1).values, ids.sort(1).values)
    moved = (swapped - ids).abs()
    assert int(moved.max()) == 1 and 0.1 < float((moved[inner] == 1).double().mean()) < 0.4


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.name)
def test_inputs_that_are_not_its_own_are_declined(corruption: Corruption, texts: Task) -> None:
    assert (corruption.why_not_corrupted(texts) is None) == (corruption in WORDS)
    vectors = corruption.why_not_corrupted(a_task(torch.zeros(2, 5)))
    assert vectors is not None and "input (2, 5) torch.float32" in vectors
    unmasked = corruption.why_not_corrupted(a_task(torch.zeros(2, 5, dtype=torch.long)))
    assert unmasked is not None
    two = corruption.why_not_corrupted(a_task(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)))
    assert two is not None


def test_names_are_distinct_and_said() -> None:
    assert len({c.name for c in CORRUPTIONS}) == len(CORRUPTIONS) and all(c.what for c in CORRUPTIONS)
