"""The report's numbers in words, its rows as cells, and the attribution table that every compile ends in."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from pqk.report.promise import Clause, Promise
from pqk.report.schema import TITLES, AttributionRow, LatencyRow, MetricValues, Report


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def scaled(count: float | None, unit: float, suffix: str, digits: int = 1) -> str:
    return "–" if count is None else f"{count / unit:.{digits}f} {suffix}"


def metric_text(metric: MetricValues | None, value: float | None) -> str:
    """A metric in its unit; shares as percentages."""
    if metric is None or value is None:
        return "–"
    return percent(value) if metric.unit == "share" else f"{value:.4g} {metric.unit}".strip()


def attribution_cells(report: Report, row: AttributionRow) -> list[str]:
    latency = next((la for la in report.latency if same_measurement(la, row)), None)
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}x"
    if None not in (row.ratio_low, row.ratio_high) and row.variant != "teacher_fp32":
        ratio = latency.verdict if latency else f"{ratio} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
    return [
        row.label or TITLES[row.variant],
        metric_text(report.metric, row.metric),
        "–" if row.latency_ms is None else f"{row.latency_ms:.3f} ms",
        ratio,
        scaled(row.size_bytes, 1e3, "kB", 0),
        scaled(row.parameters, 1e3, "k", 0),
        scaled(row.macs, 1e6, "M"),
        percent(row.integer_coverage),
    ]


def same_measurement(latency: LatencyRow, row: AttributionRow) -> bool:
    named = (latency.variant, latency.runtime, latency.median_ms) == (row.variant, row.runtime, row.latency_ms)
    return named and (latency.ratio, latency.ratio_low) == (row.ratio, row.ratio_low)


ATTRIBUTION_HEADER = ("network", "metric", "latency", "speed-up", "size", "parameters", "MACs", "integer")


def attribution_table(report: Report) -> Table:
    """The table every compile ends in, for a terminal."""
    machine = report.machine
    threads = {la.threads for la in report.latency}
    caption = f"{report.target}; {machine.get('cpu', 'unknown CPU')}"
    if threads:
        count = "/".join(map(str, sorted(threads)))
        caption += f", {count} threads, batch 1; speed-up against the teacher in ONNX Runtime FP32"
    table = Table(title="Pass attribution", caption=caption)
    for index, header in enumerate(ATTRIBUTION_HEADER):
        table.add_column(header, justify="right" if index else "left", no_wrap=index not in (0, 3))
    for row in report.attribution:
        table.add_row(*attribution_cells(report, row), style="bold" if row.variant == "student" else None)
    return table


def to_text(report: Report, width: int = 120) -> str:
    """The attribution table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(attribution_table(report))
    return buffer.getvalue()


LATENCY_HEADER = (
    "network",
    "runtime",
    "batch",
    "threads",
    "median",
    "5 % to 95 %",
    "decides alike",
    "against the teacher",
)


def latency_cells(row: LatencyRow) -> list[str]:
    return [
        TITLES[row.variant],
        row.runtime if row.spinning else f"{row.runtime}, no spinning",
        f"{row.batch}, {row.inputs}" if row.inputs else str(row.batch),
        str(row.threads),
        f"{row.median_ms:.3f} ms",
        f"{row.p05_ms:.3f} to {row.p95_ms:.3f} ms",
        percent(row.agreement) + (": other answers" if row.decides_otherwise else ""),
        row.verdict,
    ]


def clause_text(clause: Clause) -> str:
    """`max_drop 1: 0.4 (at most 0.9, by 95 %): held; on evaluation data 0.5: held`."""
    told = {True: "held", False: "broken"}
    known = "at least" if clause.name == "min_speedup" else "at most"
    text = (
        f"{clause.name} = {clause.bound:g}: {clause.validation:.3g} on validation data ({known} {clause.certain:.3g} "
        f"for certain): {told[clause.held]}"
    )
    if clause.evaluation is None or clause.held_on_evaluation is None:
        return text
    return f"{text}; {clause.evaluation:.3g} on evaluation data: {told[clause.held_on_evaluation]}"


def promise_text(promise: Promise) -> str:
    """What was promised, whether it holds, and what ships, in lines."""
    kept = "kept" if promise.kept else "not kept"
    lines = [f"contract {kept} by {promise.chosen!r}, {len(promise.tried)} tried in {promise.seconds:.0f} s"]
    lines += [clause_text(clause) for clause in promise.clauses]
    if promise.obstacle:
        lines.append(f"in the way: {promise.obstacle}")
    if promise.caution and not promise.chosen.endswith("trained"):
        lines.append(promise.caution)
    if promise.dominated_by:
        lines.append(f"better in metric and speed is {promise.dominated_by}")
    return "\n".join(lines)
