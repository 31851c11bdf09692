"""Signal over quantization noise against values by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pqk.quant.noise import sqnr


def test_it_is_ten_times_the_logarithm_of_the_ratio_of_squares() -> None:
    reference, found = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr(reference, found) == pytest.approx(20.0, abs=1e-9)  # 25 over 0.25
    assert sqnr(2 * reference, 2 * found) == pytest.approx(20.0, abs=1e-9)


def test_the_reference_is_the_signal() -> None:
    assert sqnr(torch.tensor([1.0]), torch.tensor([11.0])) == pytest.approx(-20.0, abs=1e-9)
    assert sqnr(torch.tensor([11.0]), torch.tensor([1.0])) == pytest.approx(10 * math.log10(1.21), abs=1e-9)


def test_integers_do_not_overflow() -> None:
    """A squared int8, or a difference of uint8, has no room in its own type."""
    low, high = torch.tensor([0, 200], dtype=torch.uint8), torch.tensor([20, 200], dtype=torch.uint8)
    assert sqnr(low, high) == pytest.approx(20.0, abs=1e-9)


def test_equal_tensors_are_without_noise_and_zeros_without_signal() -> None:
    zeros = torch.zeros(3)
    assert sqnr(torch.ones(3), torch.ones(3)) == math.inf == sqnr(zeros, zeros)
    assert -math.inf < sqnr(zeros, torch.ones(3)) < -1000
