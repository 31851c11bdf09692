"""What became of one stranger, as it is kept on disk, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pqk.strangers.contest import Standing

End = Literal["kept", "refused", "failed"]
POINTS = 1.0
"""that the default contract lets a share lose"""
SLACK = 1e-9
TEACHER = Standing("teacher, FP32", 0.0, 1.0, 1.0, 1.0)
"""what ships where no quantized form is as good; its metric is not compared"""


@dataclass
class Row:
    """One stranger's end."""

    name: str
    what: str
    teacher: float
    """its metric on evaluation data, a share"""
    end: End
    """`kept`: an artifact that says it keeps the contract; `refused`: in words; `failed`: anything else"""
    words: str | None
    """of the error, where there is one"""
    chosen: str | None
    """the name of the student that ships; None where there is no artifact"""
    trained: bool | None
    """whether that student was trained at all"""
    student: Standing | None
    post_training: tuple[Standing, ...]
    """the teacher quantized without training"""
    teacher_seconds: float
    """that training the teacher took"""
    seconds: float
    """that the compile took, the report with it; of one that was stopped, since it went on"""
    peers: tuple[Standing, ...] = field(default=())

    @staticmethod
    def read(values: dict[str, Any]) -> Row:
        """A row from JSON."""
        student = values["student"]
        lists = {name: tuple(Standing(**s) for s in values[name]) for name in ("post_training", "peers")}
        return Row(**{**values, **lists, "student": None if student is None else Standing(**student)})

    def document(self) -> dict[str, Any]:
        """JSON of all fields."""
        return asdict(self)

    def drop(self, standing: Standing) -> float | None:
        """Points of the metric that something loses against the teacher on evaluation data."""
        return None if standing.metric is None else 100 * (self.teacher - standing.metric)

    def keeps(self, standing: Standing) -> bool:
        """Whether something loses no more than the contract allows."""
        drop = self.drop(standing)
        return drop is not None and drop <= POINTS + SLACK

    @property
    def held(self) -> bool:
        """Whether the promise holds on evaluation data, or none was made."""
        return self.end == "refused" or (self.end == "kept" and self.student is not None and self.keeps(self.student))

    @property
    def dominating(self) -> list[Standing]:
        """What beats the student without training."""
        return [] if self.student is None else [s for s in self.post_training if s.beats(self.student)]

    @property
    def best_untrained(self) -> Standing:
        """The fastest form without training that loses no more than is allowed; the teacher where none is faster."""
        kept = [s for s in self.post_training if s.ratio is not None and s.ratio > 1 and self.keeps(s)]
        return max(kept, key=lambda s: s.ratio or 0.0, default=TEACHER)

    @property
    def gain(self) -> float | None:
        """How many times faster a trained student is than `best_untrained`; None where nothing trained was shipped."""
        if self.end != "kept" or not self.trained or self.student is None or self.student.ratio is None:
            return None
        return self.student.ratio / (self.best_untrained.ratio or 1.0)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The counts that judge a search on strangers."""
    gains = [row.gain for row in rows if row.gain is not None]
    return {
        "strangers": len(rows),
        "held_or_refused": sum(row.held for row in rows),
        "kept": sum(row.end == "kept" and row.held for row in rows),
        "dominated": sum(bool(row.dominating) for row in rows),
        "trained": len(gains),
        "gain": math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None,
    }
