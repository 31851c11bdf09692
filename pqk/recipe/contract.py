"""What a student must keep beside its teacher, in its user's words, and what finding it may cost."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field

from pqk.errors import InputError
from pqk.recipe.specs import StudentSpec
from pqk.settings import settings

Free = Literal["speed", "metric"]
"""what is made as good as it gets, where every clause holds"""
DEFAULT_DROP = 1.0
"""points of a share, or per cent of the teacher's value of any other metric"""
LEAST_DROP = 1e-6
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|epochs?)")


@settings
class Contract:
    """What must hold of the student, and the budget in which it is looked for.

    Where no clause is about speed, the fastest student is chosen that keeps the clauses; else, and where the size alone
    is bounded, the one that loses least of the metric. Without any clause at most one point of a share, or 1 % of any
    other metric, is lost.

    Raises:
        InputError: a bound is out of its range, or the budget is neither a time nor a number of epochs.
    """

    max_drop: float | None = Field(default=None, ge=0)
    """the most that the metric may fall below the teacher's, in its own unit: points for a share"""
    min_speedup: float | None = Field(default=None, gt=0)
    """how many times faster than the teacher in FP32 it is at least, both in the target's runtime at batch 1"""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """the longest that it may take for one sample, in milliseconds"""
    max_size_mb: float | None = Field(default=None, gt=0)
    """the largest that its file may be, in millions of bytes"""
    budget: str = "15m"
    """what the search may take: "30m", "2h", or "40 epochs" of training, all students together"""
    cascade: bool = False
    """where no student keeps it alone, let one answer what it is sure of and the teacher the rest; classifiers only"""
    shapes: tuple[StudentSpec, ...] = ()
    """factories of students of another shape, which compete with those that are cut out of the teacher"""

    def __post_init__(self) -> None:
        if self.max_drop is not None and 0 < self.max_drop < LEAST_DROP:
            raise InputError(f"contract: max_drop = {self.max_drop:g} is less than any data can tell; write 0.1 or so")
        match = BUDGET.fullmatch(self.budget.strip())
        if match is None or not 0 < float(match[1]) < math.inf:
            raise InputError(
                f'contract: budget = "{self.budget}" is neither a time nor a number of epochs; write "30m", "2h" or '
                '"40 epochs"'
            )

    @property
    def timed(self) -> bool:
        """Whether a clause is about speed."""
        return self.min_speedup is not None or self.max_latency_ms is not None

    def in_time(self, ratio: float, milliseconds: float) -> bool:
        """Whether a network keeps every clause about time that is so many times faster, and takes so long."""
        fast = self.min_speedup is None or ratio >= self.min_speedup
        return fast and (self.max_latency_ms is None or milliseconds <= self.max_latency_ms)

    @property
    def free(self) -> Free:
        """What is made as good as it gets: the metric where a clause bounds speed, or size alone; else speed."""
        bounded = self.timed or (self.max_size_mb is not None and self.max_drop is None)
        return "metric" if bounded else "speed"

    @property
    def seconds(self) -> float:
        """The budget in seconds; infinite where it is in epochs."""
        number, unit = self._budget()
        return number * SECONDS[unit] if unit in SECONDS else math.inf

    @property
    def epochs(self) -> float:
        """The budget in epochs of training; infinite where it is in time."""
        number, unit = self._budget()
        return math.inf if unit in SECONDS else number

    def _budget(self) -> tuple[float, str]:
        match = BUDGET.fullmatch(self.budget.strip())
        assert match is not None
        return float(match[1]), match[2]

    def allowed_drop(self, unit: str, teacher: float) -> float:
        """The most that the metric may fall, as a fraction for a share; infinite where no clause bounds it.

        Args:
            unit: the metric's.
            teacher: the teacher's value.

        Raises:
            InputError: more points than a share has.
        """
        if self.max_drop is None and self.free == "metric":
            return math.inf
        if unit == "share":
            points = DEFAULT_DROP if self.max_drop is None else self.max_drop
            if points >= 100:
                raise InputError(
                    f"contract: max_drop = {points:g} points of a share, which has 100; write 1 for one point"
                )
            return points / 100
        return DEFAULT_DROP / 100 * abs(teacher) if self.max_drop is None else self.max_drop
