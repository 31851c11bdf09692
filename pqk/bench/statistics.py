"""Ratios of times measured in turn, with a bootstrap interval."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ratio(NamedTuple):
    """How many times faster than the baseline, with its bootstrap 95 % interval."""

    ratio: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return not self.low <= 1 <= self.high


def bootstrap_ratio(ratios: NDArray[np.float64], *, seed: int = 0, resamples: int = 4000) -> Ratio:
    """Median of per-round ratios `[rounds]` with the percentile-bootstrap 95 % interval of that median."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
