"""The report's diagnostics in words, and their rows as cells."""

from __future__ import annotations

from pqk.report.diagnostics import Calibration, Diagnostics, Interval, NegativeTransfer, Robustness, TokenDiagnostics
from pqk.report.schema import TITLES
from pqk.report.text import percent


def findings(diagnostics: Diagnostics) -> list[str]:
    """A sentence or two for each part that is a few numbers."""
    lines = []
    if (t := diagnostics.teacher) is not None:
        lines.append(f"Teacher: mean top probability {percent(t.top)}, entropy {percent(t.entropy)} of a guess's.")
    if (f := diagnostics.fidelity) is not None:
        churn = "" if f.lost is None else f"; {percent(f.lost)} only the teacher has right, {percent(f.won)} only it"
        lines.append(
            f"Student and teacher, {diagnostics.samples} samples: {percent(f.agreement)} decided alike, KL {f.kl:.4f}"
            f"{churn}. Least alike: {_least(f.agreement_per_class)}."
        )
    if (n := diagnostics.negative_transfer) is not None:
        lines.append(_mistakes(n, f"{n.samples} samples"))
    if (tokens := diagnostics.tokens) is not None:
        lines += _tokens_found(tokens)
    if (c := diagnostics.capacity_gap) is not None:
        lines.append(
            f"Gain of distillation: {span(c.gain)}, from a teacher of {c.teacher_parameters} parameters to a student "
            f"of {c.student_parameters}."
        )
    if (b := diagnostics.break_even) is not None:
        lines.append(
            f"The {b.compile_seconds:.0f} s of the passes have paid after {b.queries:,} queries, each "
            f"{b.saved_ms:.3f} ms shorter."
        )
    return lines


def _tokens_found(found: TokenDiagnostics) -> list[str]:
    return [
        f"Student and teacher, {found.tokens:,} next tokens: {percent(found.agreement)} decided alike; "
        f"{percent(found.lost)} only the teacher has right, {percent(found.won)} only it.",
        *(
            f"{name}: {percent(t.accuracy)} of next tokens right, {t.nats:.4f} nats a token; the first choice has "
            f"{percent(t.top)} of the probability on average, and an expected calibration error of {percent(t.ece)}."
            for name, t in (("Teacher", found.teacher), ("Student", found.student))
        ),
        _mistakes(found.negative_transfer, f"{found.negative_transfer.samples:,} tokens"),
    ]


def _mistakes(found: NegativeTransfer, where: str) -> str:
    alone = (
        f"no control: {found.control_reason}"
        if found.control is None
        else (f"without the teacher {percent(found.control)}")
    )
    return f"The teacher is wrong on {where}; the student says the same on {percent(found.copied)} of them ({alone})."


def span(interval: Interval | None) -> str:
    """A difference of shares in points, with its interval."""
    if interval is None:
        return "–"
    return f"{100 * interval.mean:+.2f} % ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"


def _least(shares: tuple[float | None, ...], most: int = 3) -> str:
    classes = sorted((share, label) for label, share in enumerate(shares) if share is not None)
    return ", ".join(f"class {label} ({percent(share)})" for share, label in classes[:most])


CALIBRATION_HEADER = ("", "accuracy", "ECE", "NLL", "best temperature", "ECE then", "NLL then")
CALIBRATION_NOTE = (
    "Temperatures are those of validation data; dividing the last layer's weights and biases by one applies it."
)


def calibrations(diagnostics: Diagnostics) -> dict[str, Calibration]:
    """Calibration of teacher and student, where there is one."""
    teacher = None if diagnostics.teacher is None else diagnostics.teacher.calibration
    both = {"teacher": teacher, "student": diagnostics.calibration}
    return {name: c for name, c in both.items() if c is not None}


def calibration_cells(name: str, c: Calibration) -> list[str]:
    return [name, percent(c.accuracy), percent(c.ece), f"{c.nll:.4f}", *_tempered(c)]


def _tempered(c: Calibration) -> list[str]:
    if c.temperature is None:
        return ["–"] * 3
    return [f"{c.temperature:.3f}", percent(c.ece_after), "–" if c.nll_after is None else f"{c.nll_after:.4f}"]


ROBUSTNESS_HEADER = (
    "corruption", "what", "teacher", "student", "teacher loses", "student loses", "more than the teacher",
)  # fmt: skip


def robustness_rows(robustness: Robustness) -> list[list[str]]:
    """Accuracy without corruption, and under each."""
    rows = [["none", "", percent(robustness.teacher), percent(robustness.student), "", "", ""]]
    for r in robustness.rows:
        drops = [span(r.teacher_drop), span(r.student_drop), span(r.excess)]
        rows.append([r.corruption, r.what, percent(r.teacher), percent(r.student), *drops])
    return rows


def robustness_note(robustness: Robustness) -> str:
    return f"On {robustness.samples} samples; losses are shares of the network's own accuracy."


CONTROL_HEADER = ("control", "accuracy", "the student has more")


def control_rows(diagnostics: Diagnostics) -> list[list[str]]:
    found = diagnostics.controls if diagnostics.tokens is None else diagnostics.tokens.controls
    return [[TITLES[c.variant], percent(c.accuracy), span(c.difference)] for c in found]
