"""What the page says first: whether the promise was kept, what the student is worth, and what else was tried."""

from __future__ import annotations

from functools import partial

from pqk.report.html.elements import Markup, bullets, element, joined, paragraph, table
from pqk.report.html.pictures import metric_against_speed, networks, tried_students
from pqk.report.promise import Clause, Promise, TriedStudent
from pqk.report.schema import AttributionRow, Report
from pqk.report.text import (
    ATTRIBUTION_HEADER,
    CLAUSE_UNITS,
    DECIDING,
    attribution_cells,
    cascade_text,
    declined_rows,
    difference_text,
    is_share,
    metric_text,
    percent,
    reasons_of,
    scaled,
    texts_text,
    value_text,
)

CLAUSES = {
    "max_drop": ("loses at most", "of the metric"),
    "min_speedup": ("is at least", "as fast"),
    "max_latency_ms": ("takes at most", "a call"),
    "max_size_mb": ("has a file of at most", ""),
}
FREE = {"speed": "the fastest", "metric": "the one that loses least of the metric"}


def headline(report: Report) -> str:
    """The result in one sentence."""
    made = report.promise
    if made is None:
        return _worth(report)
    if not made.kept:
        return "The promise is not kept: this is the nearest student"
    if any(clause.held_on_evaluation is False for clause in made.clauses):
        return "The promise was kept on deciding data, but does not hold on evaluation data"
    return "The promise is kept"


def _worth(report: Report) -> str:
    """`4.61x as fast as its teacher; accuracy 92.95 %, and the teacher's 93.39 %`."""
    student, metric = _row(report, "student"), report.metric
    said = []
    if student is not None and student.ratio is not None:
        said.append(f"{student.ratio:.2f}x as fast as its teacher")
    if metric is not None and metric.student is not None:
        own = f"{metric.name} {metric_text(metric, metric.student)}"
        said.append(own if metric.teacher is None else f"{own}, the teacher's {metric_text(metric, metric.teacher)}")
    return "; ".join(said) or f"A student for {report.target}"


def _row(report: Report, variant: str) -> AttributionRow | None:
    return next((r for r in report.attribution if r.variant == variant), None)


def lead(report: Report) -> str:
    """How the student was chosen, and on which data, in two or three sentences."""
    made, samples = report.promise, report.conditions.evaluation_samples
    if made is None:
        return (
            f"No contract was given: the student is what the recipe makes. All numbers are of {samples:,} evaluation "
            "samples, which nothing was chosen by."
        )
    count = len(made.tried)
    if made.kept:
        best = f"{FREE.get(made.free, made.free)} of those that keep every clause"
        chosen = f"It is {best}, or as good and loses less, of {count} that were tried"
    else:
        chosen = f"None of the {count} that were tried keeps every clause; it is the nearest"
    said = f"The student is “{made.chosen}”. {chosen}, judged on {made.validation_samples:,} deciding samples"
    judged = f"by {made.metric} and by times measured here"
    return f"{said} {judged}. Evaluation data, {samples:,} samples, was looked at once, after the choice."


def numbers(report: Report) -> Markup:
    """The few numbers that decide."""
    student, teacher, metric = _row(report, "student"), _row(report, "teacher_fp32"), report.metric
    cards: list[tuple[str, str, str]] = []
    if metric is not None:
        below = f"teacher {metric_text(metric, metric.teacher)}, on evaluation data"
        cards.append((metric.name, metric_text(metric, metric.student), below))
    if student is not None and student.ratio is not None:
        span = "" if student.ratio_low is None else f"{student.ratio_low:.2f} to {student.ratio_high:.2f}, "
        cards.append(("speed-up", f"{student.ratio:.2f}x", f"{span}over the teacher in FP32"))
    if student is not None and student.latency_ms is not None:
        before = "" if teacher is None or teacher.latency_ms is None else f"teacher {teacher.latency_ms:.3f} ms"
        cards.append(("latency", f"{student.latency_ms:.3f} ms", before))
    size = "" if teacher is None or not teacher.size_bytes else f"teacher {scaled(teacher.size_bytes, 1e3, 'kB', 0)}"
    cards.append(("file", scaled(report.size_bytes, 1e3, "kB", 0), size))
    cards.append(("in integer kernels", percent(report.integer_coverage), "of all multiplications"))
    if report.parity is not None:
        if report.parity.compared:
            alike = f"{percent(report.parity.agreement)} decided alike"
            cards.append(("parity", "met" if report.parity.passed else "broken", alike))
        else:
            cards.append(("parity", "not compared", "another tool wrote the file"))
    groups = [
        element("div", element("dt", name), element("dd", value, element("small", below)))
        for name, value, below in cards
    ]
    return element("dl", *groups, class_="numbers")


def promise(report: Report) -> Markup:
    """The clauses, each with what was found; nothing where there was no contract."""
    made = report.promise
    if made is None:
        return Markup("")
    verdict = element("strong", "kept" if made.kept else "not kept", class_="kept" if made.kept else "broken")
    parts = [paragraph("On deciding data, by which the student was chosen, the promise is ", verdict, ".")]
    notes = []
    if made.obstacle:
        notes.append(f"What stands in the way: {made.obstacle}.")
    if made.ended:
        notes.append(f"{made.ended[0].upper()}{made.ended[1:]}.")
    if made.caution:
        notes.append(f"{made.caution[0].upper()}{made.caution[1:]}.")
    if made.dominated_by:
        notes.append(f"A row of the table below is better in metric and speed, for sure: {made.dominated_by}.")
    rows = [_clause_cells(clause, report) for clause in made.clauses]
    header = ("the student", "deciding data", "surely", "", "evaluation data", "")
    note = (
        "“Surely” is the end of the interval that has to keep the bound: one-sided 95 % for what is lost, two-sided "
        f"for times. {DECIDING} Budget {made.budget}; the search took {_clock(made.seconds)}."
    )
    return joined([*parts, bullets(notes), table(header, rows), paragraph(note, class_="note")])


def cascade(report: Report) -> Markup:
    """Who answers how much of a cascade; nothing where the student answers everything."""
    return _sentences(cascade_text(report))


def texts(report: Report) -> Markup:
    """Where continued texts leave the teacher's, and how fast they come; nothing where there are none."""
    return _sentences(texts_text(report))


def _sentences(text: str) -> Markup:
    lines = text.splitlines()
    return bullets([f"{line[0].upper()}{line[1:]}." for line in lines]) if lines else Markup("")


def _clause_cells(clause: Clause, report: Report) -> list[str]:
    before, after = CLAUSES[clause.name]
    said = f"{before} {_quantity(clause, clause.bound, report)} {after}".strip()
    found, sure = (_quantity(clause, value, report) for value in (clause.validation, clause.certain))
    later = "–" if clause.evaluation is None else _quantity(clause, clause.evaluation, report)
    return [said, found, sure, _held(clause.held), later, _held(clause.held_on_evaluation)]


def _quantity(clause: Clause, value: float, report: Report) -> str:
    share = is_share(report)
    unit = CLAUSE_UNITS.get(clause.name) or ("" if not share else " point" if value == 1 else " points")
    return f"{value:.4g}{unit}"


def _held(held: bool | None) -> str:
    if held is None:
        return "–"
    return element("span", "holds" if held else "broken", class_="kept" if held else "broken")


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def front(report: Report) -> Markup:
    """What the search chose from, and what the table's networks are worth on evaluation data."""
    parts = [] if report.promise is None else _search(report.promise, report)
    points, metric = networks(report), report.metric
    if len(points) > 1 and metric is not None:
        caption = (
            "On evaluation data, which nothing was chosen by. Numbers are the rows' below; bars are 95 % intervals of "
            "the speed-up. Filled: no other is better in both."
        )
        parts.append(metric_against_speed("networks", points, metric.name, metric.unit == "share", caption))
    rows = [[f"{i}", *attribution_cells(report, row)] for i, row in enumerate(report.attribution, 1)]
    marked = {i for i, row in enumerate(report.attribution) if row.variant == "student"}
    parts.append(table(("", *ATTRIBUTION_HEADER), rows, texts=2, marked=marked))
    return joined([*parts, bullets(reasons_of(report.attribution))])


def _search(made: Promise, report: Report) -> list[Markup]:
    """The picture of everything that was tried, where more than one could be timed."""
    points = tried_students(made)
    if len(points) < 2:
        return []
    caption = (
        f"All that was tried, on {made.validation_samples:,} deciding samples. Numbers are the rows' under “What was "
        "tried”; bars are 95 % intervals. Filled: on the front, no other is better in both. Broken lines: what the "
        "contract asks for."
    )
    picture = metric_against_speed("search", points, made.metric, is_share(report), caption, made)
    return [element("h3", "The search"), picture, element("h3", "The student and its baselines")]


TRIED_HEADER = (
    "", "network", "how it is made", "what became of it", "metric", "lost", "at most", "speed-up", "file", "MACs",
    "epochs", "time",
)  # fmt: skip


def tried(report: Report) -> Markup:
    """Every network of the search with its fate, every pass of the recipe, and what passes left alone."""
    parts = []
    if (made := report.promise) is not None:
        rows = [_tried_cells(i, t, is_share(report)) for i, t in enumerate(made.tried, 1)]
        marked = {i for i, t in enumerate(made.tried) if t.name == made.chosen}
        parts += [element("h3", "The search"), table(TRIED_HEADER, rows, texts=4, marked=marked)]
    passes = [
        [r.pass_name, _clock(r.seconds), "–" if r.metric is None else metric_text(report.metric, r.metric),
         scaled(r.parameters, 1e3, "k", 0), scaled(r.macs, 1e6, "M")]
        for r in report.passes
    ]  # fmt: skip
    if passes:
        header = ("pass", "time", "metric on validation data", "parameters", "MACs")
        parts += [element("h3", "Passes of the student that ships"), table(header, passes)]
    if report.declined:
        left = declined_rows((d.pass_name, d.layer, d.reason) for d in report.declined)
        parts += [element("h3", "Left alone, and why"), table(("pass", "layers", "reason"), left, texts=3)]
    return joined(parts)


def _tried_cells(number: int, t: TriedStudent, share: bool) -> list[str]:
    lost = partial(difference_text, share=share)
    speed = "–" if t.ratio is None else f"{t.ratio:.2f}x"
    if t.ratio_low is not None and t.ratio_high is not None:
        speed += f" ({t.ratio_low:.2f} to {t.ratio_high:.2f})"
    return [
        f"{number}", t.name, t.what, t.fate, value_text(t.metric, share=share), lost(t.drop), lost(t.drop_high), speed,
        scaled(t.size_bytes, 1e3, "kB", 0), scaled(t.macs, 1e6, "M"), f"{t.epochs:g}", _clock(t.seconds),
    ]  # fmt: skip
