"""What the cells of a comparison say: means and intervals over seeds, differences paired by seed, tables of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pqk.comparison.config import Comparison, Confirm
from pqk.errors import InputError
from pqk.report.markdown import markdown_table
from pqk.report.text import percent


@dataclass(frozen=True)
class Spread:
    """The mean of some seeds with its 95 % interval (Student's t); no interval of a single one."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Cell:
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
class Row:
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


def verdict(difference: Spread | None) -> str:
    """Whether the interval of a difference excludes zero."""
    if difference is None:
        return "not paired"
    if difference.low is None or difference.high is None:
        return "one seed: no interval"
    return "helps" if difference.low > 0 else "hurts" if difference.high < 0 else "no significant difference"


# ---- statistics


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95 % interval, mean ± t(n − 1) · s / √n (Student 1908)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Spread(mean, None, None)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half)


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t that |T| stays below with `confidence`, T of Student's distribution with `freedom` degrees, at least 1."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_within(t: float, freedom: int) -> float:
    """P(|T| < t), in closed form (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for k in range(freedom // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def rows_of(comparison: Comparison, cells: Iterable[Cell], seeds: Sequence[int]) -> list[Row]:
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
            Row(
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


def best(rows: Sequence[Row], baseline: str, confirm: Confirm) -> list[str]:
    """The variants with the highest mean metric on validation data, in that order; the baseline is not among them.

    Raises `InputError` where validation data has no labels.
    """
    scores = {r.variant: r.validation for r in rows if r.variant != baseline and r.validation is not None}
    if not scores:
        raise InputError("[confirm] chooses on validation data, which has no labels; leave it out, or give labels")
    return sorted(scores, key=lambda name: -scores[name])[: confirm.best]


# ---- words


NAMED = 3
"""variants that share a speed and are named with it, at most"""
HEADER = ("variant", "seeds", "validation", "evaluation", "beside the baseline", "verdict", "time")


def table_of(document: dict[str, Any], part: str) -> list[list[str]]:
    """The rows of one round, "screen" or "confirm", the best first: as texts under `HEADER`."""
    share = document["metric"]["unit"] == "share"

    def value(v: float | None) -> str:
        return "–" if v is None else percent(v) if share else f"{v:.4g} {document['metric']['unit']}".strip()

    def interval(d: dict[str, Any] | None) -> str:
        if d is None:
            return "–"
        numbers = [d[k] for k in ("mean", "low", "high") if d[k] is not None]
        texts = [f"{100 * x:+.2f}" if share else f"{x:+.4g}" for x in numbers]
        return texts[0] + (f" ({texts[1]} to {texts[2]})" if len(texts) > 1 else "") + (" points" if share else "")

    rows = sorted(document[part]["rows"], key=lambda r: -r["evaluation"]["mean"])
    return [
        [
            r["variant"],
            ", ".join(map(str, r["seeds"])),
            value(r["validation"]),
            value(r["evaluation"]["mean"]),
            interval(r["difference"]),
            r["verdict"],
            f"{r['seconds']:.0f} s",
        ]
        for r in rows
    ]


def notes_of(document: dict[str, Any]) -> list[str]:
    """The conditions of a comparison, what failed and what was not run: a sentence each."""
    budget, note = document["budget"], document["budget"]["note"]
    ran = sorted(set(budget["epochs"].values()))
    trained = f"{ran[0]:g}" if len(ran) == 1 else f"{ran[0]:g} to {ran[-1]:g}"
    notes = [
        f"{trained} epochs of {budget['samples']} samples each" + (f" ({note})" if note else "") + ", INT8 students "
        f"judged on {budget['evaluation_samples']} evaluation samples; chosen by {document['chosen_by']} "
        f"({budget['validation_samples']} samples)",
        f"intervals: {document['intervals']}",
    ]
    for s in document["speed"]:
        count = len(s["variants"])
        named = ", ".join(s["variants"]) if count <= NAMED else f"{count} variants of one network"
        who = "all variants" if len(document["speed"]) == 1 else named
        notes.append(
            f"{who}: {s['ratio']:.2f}x ({s['low']:.2f} to {s['high']:.2f}) the teacher's speed in ONNX Runtime FP32, "
            f"batch {s['batch']}, {s['threads']} threads"
        )
    notes += [f"not run: {name}: {reason}" for name, reason in document["declined"].items()]
    return notes + [f"failed: {f['variant']}, seed {f['seed']}: {f['reason']}" for f in document["failed"]]


def to_markdown(document: dict[str, Any]) -> str:
    """`comparison.md`: the tables and their conditions."""
    parts = [f"# Beside {document['baseline']}", f"```\n{document['command']}\n```"] if document["command"] else []
    for part, title in (("confirm", "Confirmed"), ("screen", "Screened")):
        if part in document:
            parts += [f"## {title}", markdown_table(HEADER, table_of(document, part))]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes_of(document))]) + "\n"
