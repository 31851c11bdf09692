"""The report's part on a contract: whether it was kept, and what was tried for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pqk.report.base import Count, Part, Positive

ClauseName = Literal["max_drop", "min_speedup", "max_latency_ms", "max_size_mb"]


class Clause(Part):
    """One clause of the contract, on validation data and on evaluation data."""

    name: ClauseName
    bound: float
    """as it was given: points for a share, milliseconds, millions of bytes"""
    validation: float
    """what was found on validation data, by which the student was chosen"""
    certain: float
    """the end of its interval that must keep the bound: one-sided 95 % for a drop, two-sided for times"""
    held: bool
    """whether `certain` keeps the bound"""
    evaluation: float | None = None
    """what the final report found; null where it was not measured"""
    held_on_evaluation: bool | None = None


class TriedStudent(Part):
    """One network that was tried: what it is worth on validation data, what it cost, and what became of it."""

    name: str
    what: str
    """how it is made"""
    metric: float | None = None
    """null where it does not compile or was not tried, as `fate` says"""
    drop: float | None = None
    """of the metric below the teacher's, as a fraction for a share"""
    drop_high: float | None = None
    """upper end of its one-sided 95 % interval"""
    ratio: Positive | None = None
    """times faster than the teacher in FP32; null where nothing can be timed here, too"""
    ratio_low: Positive | None = None
    ratio_high: Positive | None = None
    size_bytes: Count | None = None
    macs: Count | None = None
    epochs: Annotated[float, Field(ge=0)]
    """of training, those of the ladder above it among them"""
    seconds: Annotated[float, Field(ge=0)]
    """that it took beyond what others had left it"""
    on_front: bool = False
    """whether no other one is as good in metric and speed and better in one of them"""
    fate: str = ""
    """why it was chosen, or was not"""


class Promise(Part):
    """What was promised, whether it holds, and the networks that were tried."""

    kept: bool
    """whether every clause held on validation data for the student that ships"""
    chosen: str
    """the name of the one that ships, which is the nearest one where none keeps the contract"""
    free: str
    """what no clause bounds, and was made as good as it gets: speed or metric"""
    metric: str
    """what drops are of: the task's metric, or decisions that are the teacher's where data has no labels"""
    teacher: float
    """its value on validation data"""
    clauses: tuple[Clause, ...]
    tried: tuple[TriedStudent, ...]
    obstacle: str | None = None
    """what stands in the way, where none keeps the contract"""
    ended: str | None = None
    """why no student was pruned further; null where no search looked for one"""
    dominated_by: str | None = None
    """a row of the table that is better in metric and speed on evaluation data, with certainty; null where none is"""
    caution: str | None = None
    """what to know of the validation data that decided"""
    validation_samples: Count
    budget: str
    seconds: Annotated[float, Field(ge=0)]
    """that the search took"""
