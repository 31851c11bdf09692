"""A student that answers what it is sure of, and its teacher, which answers the rest.

Sure is a sample whose largest probability, of the student's logits over a temperature, is at least a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqk.errors import InputError

CASCADE_TEACHER = "cascade_teacher.onnx"
"""the file of the teacher that answers what the student is not sure of"""
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Routing:
    """Who answers a sample: the student where its largest probability at `temperature` is at least `threshold`.

    Raises `InputError` for a temperature that is not above 0, or a threshold that is no probability.
    """

    temperature: float
    threshold: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0 and 0 <= self.threshold <= 1):
            raise InputError(
                f"cascade: temperature {self.temperature} and threshold {self.threshold}; the first is above 0, the "
                "second from 0 to 1"
            )

    def confidence(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """The largest probability of each sample [B], from logits [B, C]; not a number where one of them is none."""
        scaled = logits.astype(np.float64) / self.temperature
        with np.errstate(invalid="ignore"):
            return 1 / np.exp(scaled - scaled.max(axis=1, keepdims=True)).sum(axis=1)

    def sure(self, logits: NDArray[Any]) -> NDArray[np.bool_]:
        """Which samples [B] the student answers; logits that are no numbers are the teacher's."""
        return self.confidence(logits) >= self.threshold


@dataclass(frozen=True)
class Cascade:
    """Runs both files: feeds by name in, the logits [B, C] of whoever answers each sample out, as the only output."""

    student: Callable[[Arrays], Sequence[NDArray[Any]]]
    teacher: Callable[[Arrays], Sequence[NDArray[Any]]]
    routing: Routing

    def __call__(self, feeds: Arrays) -> list[NDArray[Any]]:
        """The teacher sees the samples that are routed to it alone, and none where there are none."""
        (logits,) = self.student(feeds)
        unsure = ~self.routing.sure(logits)
        if unsure.any():
            (answers,) = self.teacher({name: np.ascontiguousarray(x[unsure]) for name, x in feeds.items()})
            logits = logits.copy()
            logits[unsure] = answers
        return [logits]
