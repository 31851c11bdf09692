"""`report.md`: the page of a report."""

from __future__ import annotations

from pqk.report.diagnostics import Calibration, Diagnostics, Interval, Robustness
from pqk.report.promise import Promise
from pqk.report.schema import TITLES, Parity, Report
from pqk.report.text import (
    ATTRIBUTION_HEADER,
    LATENCY_HEADER,
    attribution_cells,
    latency_cells,
    percent,
    promise_text,
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
        *([] if report.promise is None else promise_section(report.promise)),
        "## Latency",
        latency_section(report),
        "## Parity",
        parity_section(report),
        *fusion_section(report),
        *diagnostics_section(report),
        "## Declined",
        declined_section(report),
        "## Conditions",
        conditions_section(report),
    ]
    if report.notes:
        sections += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(sections) + "\n"


def missing_numbers(report: Report) -> list[str]:
    """One bullet for every reason of a null in the attribution table; nothing where there is none."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in report.attribution:
        for field, why in row.reasons.items():
            reasons.setdefault((row.label or TITLES[row.variant], why), []).append(field)
    lines = [f"- {who}: no {', '.join(fields)}: {why}" for (who, why), fields in reasons.items()]
    return ["\n".join(lines)] if lines else []


def promise_section(promise: Promise) -> list[str]:
    """Whether the contract is kept, and everything that was tried for it."""
    header = ("tried", "how", "fate", promise.metric, "lost at most", "speed-up", "MB", "epochs", "s")
    rows = [
        [
            f"**{t.name}**" if t.name == promise.chosen else t.name,
            t.what,
            t.fate,
            _number(t.metric),
            _number(t.drop_high),
            "–" if t.ratio is None else f"{t.ratio:.2f}x",
            "–" if t.size_bytes is None else f"{t.size_bytes / 1e6:.2f}",
            f"{t.epochs:.2g}",
            f"{t.seconds:.0f}",
        ]
        for t in promise.tried
    ]
    return [
        "## The contract",
        "\n".join(f"- {line}" for line in promise_text(promise).splitlines()),
        markdown_table(header, rows, texts=3),
        f"On {promise.validation_samples} validation samples, where the teacher has {promise.teacher:.4g}.",
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


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
    return "\n".join([*lines, contract(parity)])


def contract(parity: Parity) -> str:
    """Whether the parity contract is met, and every layer's numbers."""
    agreement = percent(parity.agreement)
    delta = "–" if parity.metric_delta is None else f"{parity.metric_delta:+.4f}"
    deployed = "fused student, reference bodies" if parity.mode == "reference" else f"{parity.mode} ONNX Runtime"
    lines = [
        f"The contract is **{'met' if parity.passed else 'broken'}** ({deployed}): "
        f"{agreement} of {parity.samples} samples decided alike, metric differs by {delta}.",
    ]
    if parity.first_divergence:
        lines += ["", f"First divergence: {parity.first_divergence}."]
    header = ("layer", "operators", "max LSB", "exact", "accumulators")
    told = {True: "equal", False: "**differ**", None: "–"}
    rows = [
        [la.name, la.op, "–" if la.max_lsb is None else f"{la.max_lsb:g}", percent(la.exact), told[la.accumulators]]
        for la in parity.layers
    ]
    return "\n".join([*lines, "", markdown_table(header, rows, texts=2)])


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
        *([contract(fusion.parity)] if fusion.parity != report.parity else []),
    ]


def diagnostics_section(report: Report) -> list[str]:
    """Whether distillation worked; nothing in reports of earlier versions."""
    diagnostics = report.diagnostics
    if diagnostics is None:
        return []
    parts = [
        "\n".join(f"- **Warning**: {text}." for text in diagnostics.warnings),
        "\n".join(_findings(diagnostics)),
        _calibrations(diagnostics),
        "" if diagnostics.robustness is None else _robust(diagnostics.robustness),
        _controls(diagnostics),
        "\n".join(f"- No {name.replace('_', ' ')}: {why}." for name, why in _gathered(diagnostics.reasons)),
    ]
    return ["## Diagnostics", *(part for part in parts if part)]


def _findings(diagnostics: Diagnostics) -> list[str]:
    """A line for each part that is a few numbers."""
    lines = []
    if (t := diagnostics.teacher) is not None:
        lines.append(f"- Teacher: mean top probability {percent(t.top)}, entropy {percent(t.entropy)} of a guess's.")
    if (f := diagnostics.fidelity) is not None:
        churn = "" if f.lost is None else f"; {percent(f.lost)} only the teacher has right, {percent(f.won)} only it"
        lines.append(
            f"- Student and teacher, {diagnostics.samples} samples: {percent(f.agreement)} decided alike, KL {f.kl:.4f}"
            f"{churn}. Least alike: {_least(f.agreement_per_class)}."
        )
    if (n := diagnostics.negative_transfer) is not None:
        alone = f"no control: {n.control_reason}" if n.control is None else f"without the teacher {percent(n.control)}"
        lines.append(
            f"- The teacher is wrong on {n.samples} samples; the student says the same on {percent(n.copied)} of them "
            f"({alone})."
        )
    if (c := diagnostics.capacity_gap) is not None:
        lines.append(
            f"- Gain of distillation: {span(c.gain)}, from a teacher of {c.teacher_parameters} parameters to a student "
            f"of {c.student_parameters}."
        )
    if (b := diagnostics.break_even) is not None:
        lines.append(
            f"- The {b.compile_seconds:.0f} s of the passes have paid after {b.queries:,} queries, each "
            f"{b.saved_ms:.3f} ms shorter."
        )
    return lines


def span(interval: Interval | None) -> str:
    """A difference of shares in points, with its interval."""
    if interval is None:
        return "–"
    return f"{100 * interval.mean:+.2f} % ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"


def _least(shares: tuple[float | None, ...], most: int = 3) -> str:
    classes = sorted((share, label) for label, share in enumerate(shares) if share is not None)
    return ", ".join(f"class {label} ({percent(share)})" for share, label in classes[:most])


def _gathered(reasons: dict[str, str]) -> list[tuple[str, str]]:
    """Names that have the same reason, together."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [(", ".join(group), why) for why, group in names.items()]


def _calibrations(diagnostics: Diagnostics) -> str:
    teacher = None if diagnostics.teacher is None else diagnostics.teacher.calibration
    both = {"teacher": teacher, "student": diagnostics.calibration}
    networks = {name: c for name, c in both.items() if c is not None}
    if not networks:
        return ""
    header = ("", "accuracy", "ECE", "NLL", "best temperature", "ECE then", "NLL then")
    rows = [[name, percent(c.accuracy), percent(c.ece), f"{c.nll:.4f}", *_tempered(c)] for name, c in networks.items()]
    notes = [f"No temperature for the {name}: {c.reason}." for name, c in networks.items() if c.reason]
    note = "Temperatures are those of validation data; dividing the last layer's weights and biases by one applies it."
    return "\n\n".join([markdown_table(header, rows), " ".join([note, *notes])])


def _tempered(c: Calibration) -> list[str]:
    if c.temperature is None:
        return ["–"] * 3
    return [f"{c.temperature:.3f}", percent(c.ece_after), "–" if c.nll_after is None else f"{c.nll_after:.4f}"]


def _robust(robustness: Robustness) -> str:
    header = ("corruption", "what", "teacher", "student", "teacher loses", "student loses", "more than the teacher")
    rows = [["none", "", percent(robustness.teacher), percent(robustness.student), "", "", ""]]
    for r in robustness.rows:
        drops = [span(r.teacher_drop), span(r.student_drop), span(r.excess)]
        rows.append([r.corruption, r.what, percent(r.teacher), percent(r.student), *drops])
    note = f"On {robustness.samples} samples; losses are shares of the network's own accuracy."
    return f"{markdown_table(header, rows, texts=2)}\n\n{note}"


def _controls(diagnostics: Diagnostics) -> str:
    if not diagnostics.controls:
        return ""
    rows = [[TITLES[c.variant], percent(c.accuracy), span(c.difference)] for c in diagnostics.controls]
    return markdown_table(("control", "accuracy", "the student has more"), rows)


def declined_section(report: Report) -> str:
    if not report.declined:
        return "Nothing."
    rows = [[d.pass_name, d.layer, d.reason] for d in report.declined]
    return markdown_table(("pass", "layer", "reason"), rows, texts=3)


def conditions_section(report: Report) -> str:
    conditions, machine = report.conditions, report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"- Training: {conditions.training_epochs:g} epochs, {conditions.training_seconds:.0f} s; "
        f"{conditions.train_samples} training, {conditions.validation_samples} validation, "
        f"{conditions.evaluation_samples} evaluation samples; seed {report.seed}; at most "
        f"{conditions.peak_memory_bytes / 1e9:.2f} GB of memory.",
        f"- Machine: {machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('os')}, "
        f"instruction sets {' '.join(machine.get('isa', [])) or 'unknown'} ({machine.get('target')}).",
        f"- Versions: Python {machine.get('python')}, {versions}.",
        f"- Student: {report.size_bytes} bytes, {report.parameters} parameters, {report.macs} MACs.",
    ]
    lines += [f"- {name}: {seconds:.1f} s." for name, seconds in report.seconds.items()]
    return "\n".join(lines)
