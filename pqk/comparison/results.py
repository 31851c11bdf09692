"""What the cells of a comparison say: means and intervals over seeds, differences paired by seed, tables of both."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pqk.comparison.config import Comparison, Confirm
from pqk.comparison.statistics import Spread, spread
from pqk.errors import InputError


@dataclass(frozen=True)
class Result:
    """One variant on one seed."""

    variant: str
    seed: int
    validation: float | None
    """the metric of the INT8 graph on validation data; choices are made by it"""
    evaluation: float
    """the metric of the deployed student on evaluation data"""
    epochs: float
    steps: int
    seconds: float
    """of all its passes, also of those that it shares"""
    parameters: int
    macs: int
    size_bytes: int
    """of `model.onnx`, or of the student's tensors where there is none"""
    losses: list[list[float]]
    """mean training loss of each epoch, of each pass that trains"""


@dataclass(frozen=True)
class ComparedRow:
    """What some seeds say of one variant."""

    variant: str
    seeds: list[int]
    validation: float | None
    evaluation: Spread
    difference: Spread | None
    """from the baseline, paired by seed; None: it is the baseline"""
    seconds: float
    parameters: int
    macs: int
    size_bytes: int


def significance(difference: Spread | None) -> str:
    """Whether the interval of a difference excludes zero."""
    if difference is None:
        return "not paired"
    if difference.low is None or difference.high is None:
        return "one seed: no interval"
    return "helps" if difference.low > 0 else "hurts" if difference.high < 0 else "no significant difference"


# ---- statistics


def rows_of(comparison: Comparison, cells: Iterable[Result], seeds: Sequence[int]) -> list[ComparedRow]:
    """A row for each variant that has cells on `seeds`, in the comparison's order."""
    found = {(c.variant, c.seed): c for c in cells if c.seed in seeds}
    rows = []
    for name in (v.name for v in comparison.trained):
        own = [found[name, s] for s in seeds if (name, s) in found]
        if not own:
            continue
        pairs = [
            c.evaluation - found[comparison.baseline, c.seed].evaluation
            for c in own
            if (comparison.baseline, c.seed) in found and name != comparison.baseline
        ]
        validations = [c.validation for c in own if c.validation is not None]
        rows.append(
            ComparedRow(
                variant=name,
                seeds=[c.seed for c in own],
                validation=statistics.fmean(validations) if validations else None,
                evaluation=spread([c.evaluation for c in own]),
                difference=spread(pairs) if pairs else None,
                seconds=statistics.fmean(c.seconds for c in own),
                parameters=own[0].parameters,
                macs=own[0].macs,
                size_bytes=own[0].size_bytes,
            )
        )
    return rows


def best(rows: Sequence[ComparedRow], baseline: str, confirm: Confirm) -> list[str]:
    """The variants with the highest mean metric on validation data, in that order; the baseline is not among them.

    Raises `InputError` where validation data has no labels.
    """
    scores = {r.variant: r.validation for r in rows if r.variant != baseline and r.validation is not None}
    if not scores:
        raise InputError("[confirm] chooses on validation data, which has no labels; leave it out, or give labels")
    return sorted(scores, key=lambda name: -scores[name])[: confirm.best]


# ---- words
