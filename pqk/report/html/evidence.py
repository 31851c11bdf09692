"""What the page says in proof: where the time goes, whether numbers are the trained ones, classes, conditions."""

from __future__ import annotations

from pqk.report.diagnostics_text import (
    CALIBRATION_HEADER,
    CALIBRATION_NOTE,
    CONTROL_HEADER,
    ROBUSTNESS_HEADER,
    calibration_cells,
    calibrations,
    control_rows,
    findings,
    robustness_note,
    robustness_rows,
    span,
)
from pqk.report.html.elements import Markup, bullets, element, folded, joined, paragraph, table
from pqk.report.html.pictures import accuracy_of_classes, time_by_layer
from pqk.report.layer_times import LayerTime, LayerTimes
from pqk.report.schema import TITLES, Parity, Report
from pqk.report.text import (
    LATENCY_HEADER,
    PARITY_HEADER,
    conditions_of,
    gathered,
    is_share,
    latency_cells,
    parity_cells,
    parity_text,
    percent,
)

KERNELS = {True: "integer", False: "float", None: ""}


def layers(report: Report) -> Markup:
    """Every layer of teacher and student, in float and in integers."""
    times = report.layer_times
    if times is None or not times.networks:
        why = report.latency_reason or "this report's evaluation did not measure it"
        return joined([paragraph(f"Not measured: {why}."), bullets([] if times is None else _missing(times))])
    there = {network.variant for network in times.networks}
    picture = Markup("")
    if {"teacher_fp32", "student"} <= there:
        picture = time_by_layer(times, "teacher_fp32", "student")
    shown = [TITLES.get(n.variant, n.variant) for n in times.networks]
    rows = [
        [layer, *(cell for n in times.networks for cell in _layer_cells(times.of(n.variant).get(layer), n.total_ms))]
        for layer in times.layer_names()
    ]
    header = ("layer", *(head for name in shown for head in (name, "of it", "kernels")))
    total = ["all layers", *(cell for n in times.networks for cell in (f"{n.total_ms:.3f} ms", "", ""))]
    note = paragraph(f"Batch {times.batch}, {times.threads} threads. {times.conditions}", class_="note")
    return joined([picture, table(header, [*rows, total], marked={len(rows)}), bullets(_missing(times)), note])


def _missing(times: LayerTimes) -> list[str]:
    return [f"{TITLES.get(variant, variant)} was not measured: {why}" for variant, why in times.reasons.items()]


def _layer_cells(layer: LayerTime | None, total: float) -> list[str]:
    if layer is None:
        return ["–", "", ""]
    return [f"{layer.milliseconds:.3f} ms", f"{100 * layer.milliseconds / total:.1f} %", KERNELS[layer.integer]]


def parity(report: Report) -> Markup:
    """Whether what is deployed is what was trained, and how much of it runs in integers."""
    covered = percent(report.integer_coverage)
    if report.integer_coverage is None:
        covered = f"not measured: {report.integer_coverage_reason or 'no reason given'}"
    parts = [paragraph(f"Share of multiplications in integer kernels: {covered}.")]
    if report.parity is None:
        parts.append(paragraph(f"Parity was not checked: {report.parity_reason or 'no reason given'}."))
    else:
        parts += _parity(report.parity, is_share(report))
    if (fusion := report.fusion) is not None:
        counts = [
            ["launches", f"{fusion.launches_before:,}", f"{fusion.launches_after:,}"],
            ["bytes moved", f"{fusion.bytes_before:,}", f"{fusion.bytes_after:,}"],
        ]
        parts += [element("h3", "Fused for a GPU"), table(("", "INT8 graph", "fused"), counts)]
        parts += [] if fusion.parity == report.parity else _parity(fusion.parity, is_share(report))
    return joined(parts)


def _parity(found: Parity, share: bool) -> list[Markup]:
    if not found.compared:
        return [paragraph(f"Of what is deployed and what was trained, {parity_text(found, share=share)}.")]
    verdict = element("strong", "met" if found.passed else "broken", class_="kept" if found.passed else "broken")
    numbers = f" ({parity_text(found, share=share)})."
    parts = [paragraph("That what is deployed computes what was trained is ", verdict, numbers)]
    if found.first_divergence:
        parts.append(paragraph(f"First divergence: {found.first_divergence}."))
    if found.layers:
        rows = [parity_cells(layer) for layer in found.layers]
        parts.append(folded(f"Every layer ({len(rows)})", table(PARITY_HEADER, rows, texts=2)))
    return parts


def by_class(report: Report) -> Markup:
    """Accuracy of teacher and student by the label; of earlier reports the share of equal decisions."""
    found = report.diagnostics
    if found is None:
        return Markup("")
    if found.accuracy_by_class:
        rows = [
            [f"{c.label}", f"{c.samples:,}", percent(c.teacher), percent(c.student), span(c.difference)]
            for c in found.accuracy_by_class
        ]
        header = ("class", "samples", "teacher", "student", "difference, 95 % interval")
        return joined(
            [
                accuracy_of_classes(found.accuracy_by_class),
                folded(f"Every class ({len(rows)})", table(header, rows)),
            ]
        )
    why = found.reasons.get("accuracy_by_class")
    if found.fidelity is None:
        return paragraph(f"There is none: {why}.") if why else Markup("")
    rows = [[f"{label}", percent(share)] for label, share in enumerate(found.fidelity.agreement_per_class)]
    said = f"Accuracy was not noted by class{f': {why}' if why else ''}. How often student and teacher decide alike:"
    return joined([paragraph(said), folded(f"Every class ({len(rows)})", table(("class", "decided alike"), rows))])


def distillation(report: Report) -> Markup:
    """Warnings, findings, calibration, robustness and controls."""
    found = report.diagnostics
    if found is None:
        return Markup("")
    warnings = [joined([element("strong", "Warning"), f": {text}."], "") for text in found.warnings]
    parts = [bullets(warnings), bullets(findings(found))]
    if networks := calibrations(found):
        rows = [calibration_cells(name, c) for name, c in networks.items()]
        without = [f"No temperature for the {name}: {c.reason}." for name, c in networks.items() if c.reason]
        note = paragraph(" ".join([CALIBRATION_NOTE, *without]), class_="note")
        parts += [element("h3", "Calibration"), table(CALIBRATION_HEADER, rows), note]
    if (robustness := found.robustness) is not None:
        shown = table(ROBUSTNESS_HEADER, robustness_rows(robustness), texts=2)
        parts += [element("h3", "Robustness"), shown, paragraph(robustness_note(robustness), class_="note")]
    if rows := control_rows(found):
        parts += [element("h3", "Controls"), table(CONTROL_HEADER, rows)]
    reasons = [f"No {name.replace('_', ' ')}: {why}." for name, why in gathered(found.reasons)]
    return joined([*parts, bullets(reasons)])


def latencies(report: Report) -> Markup:
    """Every contender that was timed."""
    if not report.latency:
        return paragraph(f"Not measured: {report.latency_reason or 'no reason given'}.")
    rows = [latency_cells(row) for row in report.latency]
    return joined([table(LATENCY_HEADER, rows, texts=2), paragraph(report.conditions.protocol, class_="note")])


def conditions(report: Report) -> Markup:
    """Under which conditions all numbers hold, and notes."""
    notes = [element("h3", "Notes"), bullets(report.notes)] if report.notes else []
    return joined([bullets(conditions_of(report)), *notes])
