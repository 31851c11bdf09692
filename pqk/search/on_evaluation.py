"""A promise, held against the final report: evaluation data is looked at there, once."""

from __future__ import annotations

from collections.abc import Collection

from pqk.report.promise import Clause, Promise
from pqk.report.schema import TITLES, AttributionRow, Report
from pqk.report.text import value_text


def on_evaluation(promise: Promise, report: Report, disputed: Collection[str] = ()) -> Promise:
    """With what the report found of every clause, and the rows of its table that beat the student.

    `disputed` are variants that seem to, and are no faster where they are timed again.
    """
    same = report.metric is not None and promise.metric == report.metric.name
    clauses = tuple(_measured(c, report) if same or c.name != "max_drop" else c for c in promise.clauses)
    better = "; ".join(_shown(row, report) for row in dominating(report) if row.variant not in disputed) or None
    return promise.model_copy(update={"clauses": clauses, "dominated_by": better})


def _student(report: Report) -> AttributionRow | None:
    return next((row for row in report.attribution if row.variant == "student"), None)


def _measured(clause: Clause, report: Report) -> Clause:
    student, cascade = _student(report), report.cascade
    value: float | None = None
    if clause.name == "max_drop" and report.metric is not None and report.metric.teacher is not None:
        if report.metric.student is not None:
            scale = 100.0 if report.metric.unit == "share" else 1.0
            own = report.metric.student if cascade is None else cascade.metric
            value = None if own is None else scale * (report.metric.teacher - own)
    elif clause.name == "min_speedup" and student is not None:
        value = student.ratio if cascade is None else cascade.ratio
    elif clause.name == "max_latency_ms" and student is not None:
        value = student.latency_ms if cascade is None else cascade.mean_ms
    elif clause.name == "max_size_mb":
        value = (report.size_bytes if cascade is None else cascade.size_bytes) / 1e6
    if value is None:
        return clause
    held = value >= clause.bound if clause.name == "min_speedup" else value <= clause.bound + 1e-9
    return clause.model_copy(update={"evaluation": value, "held_on_evaluation": held})


def dominating(report: Report) -> list[AttributionRow]:
    """The rows of the table that are no worse in the metric, and faster beyond both intervals, than what ships.

    A cascade is held against them as a whole: with the metric of all answers, and the mean of its times.
    """
    student, cascade = _student(report), report.cascade
    if student is None:
        return []
    metric, high = student.metric, student.ratio_high
    if cascade is not None:
        metric = cascade.metric
        high = None if high is None or cascade.ratio is None else max(cascade.ratio, 1 / (1 / high + cascade.routed))
    if metric is None or high is None:
        return []
    return [
        row
        for row in report.attribution
        if row is not student and row.metric is not None and row.ratio_low is not None
        if row.metric >= metric and row.ratio_low > high
    ]


def _shown(row: AttributionRow, report: Report) -> str:
    value = value_text(row.metric, share=report.metric is not None and report.metric.unit == "share")
    return f"{row.label or TITLES[row.variant]}: {value} at {row.ratio:.2f}x"


def broken_in_words(promise: Promise, *, share: bool) -> str:
    """Says that no student keeps the contract, what stands in the way, and what the nearest ones are.

    Drops of a share are in points, as the contract has them.
    """
    scale, unit = (100.0, " points") if share else (1.0, "")
    rows = [t for t in promise.tried if t.on_front and t.metric is not None]
    front = "; ".join(
        f"{t.name} loses {scale * t.drop:.3g}{unit}" + ("" if t.ratio is None else f" at {t.ratio:.2f}x")
        for t in sorted(rows, key=lambda t: t.ratio or 0)
        if t.drop is not None
    )
    return f"no student keeps it: {promise.obstacle}. The nearest is {promise.chosen}. The front: {front}"
