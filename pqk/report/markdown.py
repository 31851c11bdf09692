"""`report.md`: the page of a report."""

from __future__ import annotations

from pqk.report.diagnostics import Diagnostics, Robustness
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
)
from pqk.report.promise import Promise
from pqk.report.schema import Parity, Report
from pqk.report.text import (
    ACCUMULATORS,
    ATTRIBUTION_HEADER,
    DECIDING,
    LATENCY_HEADER,
    PARITY_HEADER,
    attribution_cells,
    cascade_text,
    conditions_of,
    declined_rows,
    difference_text,
    gathered,
    is_share,
    latency_cells,
    parity_cells,
    parity_text,
    percent,
    promise_text,
    reasons_of,
    texts_text,
    value_text,
)


def markdown_table(header: tuple[str, ...], rows: list[list[str]], *, texts: int = 1) -> str:
    """`texts` leading columns are words and start on the left; the others are numbers."""
    escape = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *escape])


def to_markdown(report: Report) -> str:
    """`report.md`: attribution, latency, parity, coverage, diagnostics, what was declined, the conditions."""
    sections = [
        f"# Compressed for {report.target}",
        markdown_table(ATTRIBUTION_HEADER, [attribution_cells(report, row) for row in report.attribution]),
        *missing_numbers(report),
        *([] if report.promise is None else promise_section(report.promise, report)),
        *lines_section("The cascade", cascade_text(report)),
        *lines_section("Texts", texts_text(report)),
        "## Latency",
        latency_section(report),
        "## Parity",
        parity_section(report),
        *fusion_section(report),
        *diagnostics_section(report),
        "## Declined",
        declined_section(report),
        "## Conditions",
        "\n".join(f"- {text}" for text in conditions_of(report)),
    ]
    if report.notes:
        sections += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(sections) + "\n"


def missing_numbers(report: Report) -> list[str]:
    """One bullet for every reason of a null in the attribution table; nothing where there is none."""
    lines = [f"- {text}" for text in reasons_of(report.attribution)]
    return ["\n".join(lines)] if lines else []


def lines_section(title: str, text: str) -> list[str]:
    """A bullet for every line under a title; nothing where there is none."""
    return [f"## {title}", "\n".join(f"- {line}" for line in text.splitlines())] if text else []


def promise_section(promise: Promise, report: Report) -> list[str]:
    """Whether the contract is kept, and everything that was tried for it."""
    share = is_share(report)
    header = ("tried", "how", "fate", promise.metric, "lost at most", "speed-up", "MB", "epochs", "s")
    rows = [
        [
            f"**{t.name}**" if t.name == promise.chosen else t.name,
            t.what,
            t.fate,
            value_text(t.metric, share=share),
            difference_text(t.drop_high, share=share),
            "–" if t.ratio is None else f"{t.ratio:.2f}x",
            "–" if t.size_bytes is None else f"{t.size_bytes / 1e6:.2f}",
            f"{t.epochs:.2g}",
            f"{t.seconds:.0f}",
        ]
        for t in promise.tried
    ]
    return [
        "## The contract",
        "\n".join(f"- {line}" for line in promise_text(promise, share=share).splitlines()),
        markdown_table(header, rows, texts=3),
        f"On {promise.validation_samples} samples of deciding data, where the teacher has "
        f"{value_text(promise.teacher, share=share)}. {DECIDING}",
    ]


def latency_section(report: Report) -> str:
    if not report.latency:
        return f"Not measured: {report.latency_reason or 'no reason given'}."
    rows = [latency_cells(row) for row in report.latency]
    return markdown_table(LATENCY_HEADER, rows, texts=2) + f"\n\n{report.conditions.protocol}"


def parity_section(report: Report) -> str:
    parity = report.parity
    coverage = percent(report.integer_coverage)
    if report.integer_coverage is None:
        coverage = f"not measured: {report.integer_coverage_reason or 'no reason given'}"
    lines = [f"Integer coverage (share of MACs in integer kernels): {coverage}.", ""]
    if parity is None:
        return "\n".join([*lines, f"Parity was not checked: {report.parity_reason or 'no reason given'}."])
    return "\n".join([*lines, contract(parity, is_share(report))])


def contract(parity: Parity, share: bool) -> str:
    """Whether the parity contract is met, and every layer's numbers."""
    if not parity.compared:
        return f"Of what is deployed and what was trained, {parity_text(parity, share=share)}."
    verdict = "met" if parity.passed else "broken"
    lines = [f"The contract is **{verdict}** ({parity_text(parity, share=share)})."]
    if parity.first_divergence:
        lines += ["", f"First divergence: {parity.first_divergence}."]
    rows = [parity_cells(layer) for layer in parity.layers]
    for row in rows:
        row[-1] = row[-1].replace(ACCUMULATORS[False], f"**{ACCUMULATORS[False]}**")
    return "\n".join([*lines, "", markdown_table(PARITY_HEADER, rows, texts=2)])


def fusion_section(report: Report) -> list[str]:
    """What `fuse` did; nothing where the recipe has none."""
    fusion = report.fusion
    if fusion is None:
        return []
    rows = [
        ["launches", str(fusion.launches_before), str(fusion.launches_after)],
        ["bytes moved", str(fusion.bytes_before), str(fusion.bytes_after)],
    ]
    rows_left_out = [[d.layer, d.reason] for d in fusion.left_out]
    return [
        "## Fusion",
        f"`student.pt2`, {fusion.size_bytes} bytes; counted for one sample, not timed.",
        markdown_table(("", "INT8 graph", "fused"), rows),
        *([markdown_table(("left out", "reason"), rows_left_out, texts=2)] if rows_left_out else []),
        *([contract(fusion.parity, is_share(report))] if fusion.parity != report.parity else []),
    ]


def diagnostics_section(report: Report) -> list[str]:
    """Whether distillation worked; nothing in reports of earlier versions."""
    diagnostics = report.diagnostics
    if diagnostics is None:
        return []
    parts = [
        "\n".join(f"- **Warning**: {text}." for text in diagnostics.warnings),
        "\n".join(f"- {text}" for text in findings(diagnostics)),
        _calibrations(diagnostics),
        "" if diagnostics.robustness is None else _robust(diagnostics.robustness),
        _controls(diagnostics),
        "\n".join(f"- No {name.replace('_', ' ')}: {why}." for name, why in gathered(diagnostics.reasons)),
    ]
    return ["## Diagnostics", *(part for part in parts if part)]


def _calibrations(diagnostics: Diagnostics) -> str:
    networks = calibrations(diagnostics)
    if not networks:
        return ""
    rows = [calibration_cells(name, c) for name, c in networks.items()]
    notes = [f"No temperature for the {name}: {c.reason}." for name, c in networks.items() if c.reason]
    return "\n\n".join([markdown_table(CALIBRATION_HEADER, rows), " ".join([CALIBRATION_NOTE, *notes])])


def _robust(robustness: Robustness) -> str:
    rows = robustness_rows(robustness)
    return f"{markdown_table(ROBUSTNESS_HEADER, rows, texts=2)}\n\n{robustness_note(robustness)}"


def _controls(diagnostics: Diagnostics) -> str:
    return markdown_table(CONTROL_HEADER, rows) if (rows := control_rows(diagnostics)) else ""


def declined_section(report: Report) -> str:
    if not report.declined:
        return "Nothing."
    rows = declined_rows((d.pass_name, d.layer, d.reason) for d in report.declined)
    return markdown_table(("pass", "layers", "reason"), rows, texts=3)
