"""The report's numbers in words, its rows as cells, and the attribution table that every compile ends in."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from pqk.report.promise import Clause, Promise
from pqk.report.schema import TITLES, AttributionRow, LatencyRow, LayerParity, MetricValues, Parity, Report


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def scaled(count: float | None, unit: float, suffix: str, digits: int = 1) -> str:
    return "–" if count is None else f"{count / unit:.{digits}f} {suffix}"


def metric_text(metric: MetricValues | None, value: float | None) -> str:
    """A metric in its unit; shares as percentages."""
    if metric is None or value is None:
        return "–"
    return percent(value) if metric.unit == "share" else f"{value:.4g} {metric.unit}".strip()


def is_share(report: Report) -> bool:
    """Whether the metric is a share: shown in per cent, and differences of it in points."""
    return report.metric is None or report.metric.unit == "share"


def value_text(value: float | None, *, share: bool) -> str:
    """A value of the metric without its unit: a share in per cent."""
    return percent(value) if share or value is None else f"{value:.4g}"


def difference_text(value: float | None, *, share: bool, signed: bool = False) -> str:
    """How much of the metric lies between two values: points of a share, else in its own unit."""
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.2f} points" if share else f"{value:{sign}.4g}"


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


def reasons_of(rows: Sequence[AttributionRow]) -> list[str]:
    """Why numbers are missing: a line for all of a row that are for the same reason."""
    fields: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for field, why in row.reasons.items():
            fields.setdefault((row.label or TITLES[row.variant], why), []).append(field)
    return [f"{who}: no {', '.join(names)}: {why}" for (who, why), names in fields.items()]


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


DECIDING = (
    "Deciding data are the samples that the student was chosen by: those of Task(validation=…), or, where none were "
    "given, half of the evaluation samples. Validation data are what passes are calibrated and scored on; where none "
    "were given, they are split off the training data."
)
"""the two kinds of data that choices are made by, which may be the same"""
CLAUSE_UNITS = {"min_speedup": "x", "max_latency_ms": " ms", "max_size_mb": " MB"}


def clause_text(clause: Clause, *, share: bool) -> str:
    """`max_drop = 1: 0.4 points on deciding data (at most 0.9 points for certain): held; 0.5 points on evaluation data:
    held`, where the metric is a share."""
    told = {True: "held", False: "broken"}
    known = "at least" if clause.name == "min_speedup" else "at most"
    unit = CLAUSE_UNITS.get(clause.name, " points" if share else "")
    text = (
        f"{clause.name} = {clause.bound:g}: {clause.validation:.3g}{unit} on deciding data ({known} "
        f"{clause.certain:.3g}{unit} for certain): {told[clause.held]}"
    )
    if clause.evaluation is None or clause.held_on_evaluation is None:
        return text
    return f"{text}; {clause.evaluation:.3g}{unit} on evaluation data: {told[clause.held_on_evaluation]}"


def cascade_text(report: Report) -> str:
    """Who answers how much of a cascade, how good the whole is, and how long it takes, in lines; "" where none is."""
    made = report.cascade
    if made is None:
        return ""
    lines = [
        f"cascade: the student answers what it is sure of (at least {made.threshold:.4g} for a class at temperature "
        f"{made.temperature:.3g}), the teacher the rest: {percent(made.routed)} of evaluation samples, "
        f"{percent(made.routed_validation)} of deciding samples, by which it was chosen"
    ]
    if made.metric is not None and report.metric is not None:
        own, student, teacher = (
            metric_text(report.metric, m) for m in (made.metric, made.student_metric, made.teacher_metric)
        )
        lines.append(
            f"{report.metric.name} of the whole {own}; of the student alone {student}, of the teacher {teacher}"
        )
    if made.mean_ms is not None and made.ratio is not None:
        lines.append(
            f"{made.mean_ms:.3g} ms on average at batch 1, {made.ratio:.2f}x as fast as the teacher; p95 "
            f"{made.p95_ms:.3g} ms, p99 {made.p99_ms:.3g} ms over {made.timed_samples} samples (student "
            f"{made.student_ms:.3g} ms, teacher {made.teacher_ms:.3g} ms)"
        )
    return "\n".join([*lines, f"both files together {made.size_bytes / 1e6:.2f} MB"])


def texts_text(report: Report) -> str:
    """Where the student's texts leave the teacher's, and how fast they come, in lines; "" where it continues none."""
    made = report.texts
    if made is None:
        return ""
    least, low, middle, high, most = (int(n) for n in quantiles(made.alike))
    if made.sources:
        asked = f"{made.texts} sources of evaluation data, answered by at most {made.tokens} likeliest tokens"
    else:
        asked = (
            f"{made.texts} prompts of at most {made.prompt_tokens} tokens of evaluation data, continued by at most "
            f"{made.tokens} likeliest tokens"
        )
    lines = [
        f"{asked}: {percent(made.equal)} of the texts are the teacher's; the tokens before the "
        f"first other one, or the end, are {least} to {most}, median {middle}, quartiles {low} and {high}",
        f"step by step the student chooses {percent(made.as_whole)} of the tokens that it chooses where the text is "
        f"read at once; scores differ by {made.whole_difference:.2g} of the largest, at most",
        f"of four tokens in a row {percent(made.student_repeated)} had stood in the same text before, of the teacher's "
        f"{percent(made.teacher_repeated)}",
    ]
    if made.ratio is not None:
        lines.append(
            f"{made.student_per_second:.4g} tokens a second after the first, {made.ratio:.2f}x the teacher's "
            f"{made.teacher_per_second:.4g} ({made.ratio_low:.2f} to {made.ratio_high:.2f}, texts in turn)"
        )
    if made.student_first_ms is not None:
        lines.append(f"{made.student_first_ms:.3g} ms to the first token, teacher {made.teacher_first_ms:.3g} ms")
    kept = made.student_kept_bytes, made.teacher_kept_bytes
    return "\n".join([*lines, f"{kept[0] / 1e3:.4g} kB are kept of a token, of the teacher's {kept[1] / 1e3:.4g} kB"])


def quantiles(values: Sequence[int]) -> tuple[float, ...]:
    """The least, the quartiles and the largest."""
    ordered = sorted(values)
    return tuple(ordered[round(share * (len(ordered) - 1))] for share in (0, 0.25, 0.5, 0.75, 1))


def promise_text(promise: Promise, *, share: bool) -> str:
    """What was promised, whether it holds, and what ships, in lines."""
    kept = "kept" if promise.kept else "not kept"
    lines = [f"contract {kept} by {promise.chosen!r}, {len(promise.tried)} tried in {promise.seconds:.0f} s"]
    lines += [clause_text(clause, share=share) for clause in promise.clauses]
    if promise.obstacle:
        lines.append(f"in the way: {promise.obstacle}")
    if promise.ended:
        lines.append(promise.ended)
    if promise.caution:
        lines.append(promise.caution)
    if promise.dominated_by:
        lines.append(f"better in metric and speed is {promise.dominated_by}")
    return "\n".join(lines)


def declined_rows(entries: Iterable[tuple[str, str, str]]) -> list[list[str]]:
    """(pass, layer, reason) -> rows of a pass, the first layers of one reason and how many more there are, the reason.

    report.json has all of them.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for pass_name, layer, reason in entries:
        layers.setdefault((pass_name, reason), []).append(layer)
    return [[name, few(found), reason] for (name, reason), found in layers.items()]


def few(names: Sequence[str], most: int = 4) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def gathered(reasons: dict[str, str]) -> list[tuple[str, str]]:
    """Names that have the same reason, together."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [(", ".join(group), why) for why, group in names.items()]


PARITY_HEADER = ("layer", "operators", "max LSB", "exact", "accumulators")
ACCUMULATORS = {True: "equal", False: "differ", None: "–"}


def parity_cells(layer: LayerParity) -> list[str]:
    lsb = "–" if layer.max_lsb is None else f"{layer.max_lsb:g}"
    return [layer.name, layer.op, lsb, percent(layer.exact), ACCUMULATORS[layer.accumulators]]


def deployed_form(parity: Parity) -> str:
    """What was run, and held against the graph that was trained."""
    return "fused student, reference bodies" if parity.mode == "reference" else f"{parity.mode} ONNX Runtime"


NOT_COMPARED = (
    "nothing was compared: another tool wrote this file, and no pass of pqk's made it, so there is no trained form "
    "whose numbers it could have; its metric, speed and size were measured as every network's were"
)


def parity_text(parity: Parity, *, share: bool) -> str:
    """What came of the comparison of what is deployed with what was trained, without its verdict."""
    if not parity.compared:
        return NOT_COMPARED
    delta = difference_text(parity.metric_delta, share=share, signed=True)
    alike = f"{percent(parity.agreement)} of {parity.samples} samples decided alike, metric differs by {delta}"
    own = percent(parity.own_agreement)
    itself = "" if parity.own_agreement is None else f"; the runtime decides {own} as itself, read one by one"
    return f"{deployed_form(parity)}: {alike}{itself}"


def conditions_of(report: Report) -> list[str]:
    """Under which conditions the numbers hold, a sentence each."""
    conditions, machine = report.conditions, report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"Training: {conditions.training_epochs:g} epochs, {conditions.training_seconds:.0f} s; "
        f"{conditions.train_samples} training, {conditions.validation_samples} validation, "
        f"{conditions.evaluation_samples} evaluation samples; seed {report.seed}; at most "
        f"{conditions.peak_memory_bytes / 1e9:.2f} GB of memory.",
        f"Machine: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('os')}, "
        f"instruction sets {' '.join(machine.get('isa', [])) or 'unknown'} ({machine.get('target')}).",
        f"Versions: Python {machine.get('python')}, {versions}.",
        f"Student: {report.size_bytes} bytes, {report.parameters} parameters, {report.macs} MACs.",
    ]
    return lines + [f"{name}: {seconds:.1f} s." for name, seconds in report.seconds.items()]
