"""The tables of a benchmark on strangers, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqk.report.markdown import markdown_table
from pqk.report.text import percent
from pqk.strangers.contest import Standing
from pqk.strangers.rows import TEACHER, Row, summary

HEADER = (
    "stranger", "what it is", "end", "student", "teacher", "student's", "drop", "held", "speed-up",
    "without training", "beaten by", "trained", "seconds",
)  # fmt: skip
WORDS = 160
"""characters of an error that a table has"""


def rows_of(document: dict[str, Any]) -> list[Row]:
    """The rows of a benchmark's JSON."""
    return [Row.read(values) for values in document["strangers"]]


def markdown(document: dict[str, Any]) -> str:
    """Every stranger's row, what the refused ones were told, and the summary with its conditions."""
    rows = rows_of(document)
    told = [f"- `{row.name}`, {row.end}: {shortened(row.words)}" for row in rows if row.words]
    parts = [sentence(rows), markdown_table(HEADER, [cells(row) for row in rows], texts=4), conditions(document)]
    return "\n\n".join([*parts, *(["\n".join(told)] if told else [])])


def shortened(words: str) -> str:
    """An error in one line of a page."""
    line = " ".join(words.split()).replace("|", "/")
    return line if len(line) <= WORDS else f"{line[:WORDS].rsplit(' ', 1)[0]} …"


def cells(row: Row) -> list[str]:
    """One stranger's row of the table."""
    student, best = row.student, row.best_untrained
    drop = None if student is None else row.drop(student)
    form = "FP32, 1x" if best is TEACHER else f"{best.name}: {percent(best.metric)}, {best.ratio:.2f}x"
    return [
        f"`{row.name}`",
        row.what,
        row.end,
        row.chosen or "–",
        percent(row.teacher),
        "–" if student is None else percent(student.metric),
        "–" if drop is None else f"{drop:+.2f}",
        "–" if row.end == "refused" else "yes" if row.held else "**no**",
        speed(student),
        form,
        "; ".join(s.name for s in row.dominating) or "–",
        {None: "–", False: "no", True: "yes"}[row.trained],
        f"{row.seconds:.0f}",
    ]


def speed(standing: Standing | None) -> str:
    """`2.31x (2.20 to 2.40)`, or a dash where nothing was timed."""
    if standing is None or standing.ratio is None:
        return "–"
    return f"{standing.ratio:.2f}x ({standing.low:.2f} to {standing.high:.2f})"


def sentence(rows: Sequence[Row]) -> str:
    """The summary in words."""
    found = summary(rows)
    gain = ""
    if found["gain"] is not None:
        gain = (
            f" Of the {found['trained']} that shipped a trained student, its speed is {found['gain']:.2f}x (geometric "
            "mean) that of the best form without training that keeps the contract, too."
        )
    return (
        f"{found['strangers']} strangers: the promise holds on evaluation data or is refused in words in "
        f"{found['held_or_refused']} of them (kept in {found['kept']}); {found['dominated']} beaten by the teacher "
        f"quantized without training.{gain}"
    )


def conditions(document: dict[str, Any]) -> str:
    """Under which conditions the numbers hold."""
    found = document["conditions"]
    machine = found["machine"]
    return (
        f"Conditions: the default contract, at most one point lost, in {found['budget']} each on {machine['cores']} "
        f"cores; batch 1, {found['threads']} threads, {machine['cpu']} ({machine['target']}), ONNX Runtime "
        f"{machine['versions']['onnxruntime']}, torch {machine['versions']['torch']}; speed-ups are measured in turn "
        "with the teacher in ONNX Runtime FP32, with a 95 % interval; metrics are accuracies on evaluation data, "
        "through ONNX Runtime. Without training: the fastest form that loses at most a point, of ONNX Runtime's static "
        "and dynamic quantization and pqk's own; FP32 where none is faster."
    )


def beside_peers(document: dict[str, Any]) -> str:
    """pqk's student and what other tools make of each stranger, in one table; cells that pqk loses say so."""
    rows = rows_of(document)
    names = list(dict.fromkeys(peer.name for row in rows for peer in row.peers))
    lost, words, body = 0, [], []
    for row in rows:
        named = {peer.name: peer for peer in row.peers}
        line = [f"`{row.name}`", percent(row.teacher), _cell(row.student)]
        for name in names:
            peer = named.get(name, Standing(name))
            loses = beaten_by(row, peer)
            lost += loses
            line.append(f"**{_cell(peer)}**" if loses else _cell(peer))
            if peer.reason is not None:
                words.append(f"- `{row.name}`, {name}: {shortened(peer.reason)}")
        body.append(line)
    versions = ", ".join(f"{name} {version}" for name, version in document["conditions"].get("peers", {}).items())
    cells = len(names) * sum(bool(row.peers) for row in rows)
    verdict = (
        f"pqk loses {lost} of {cells} cells, in bold: there the other tool keeps the contract, and pqk does not, or is "
        "slower beyond both intervals. Each tool had the teacher, its training data with the labels and "
        f"{document['conditions']['budget']} of training, at its documented defaults ({versions}); all files are "
        "judged alike."
    )
    table = markdown_table(("stranger", "teacher", "pqk", *names), body)
    return "\n\n".join([verdict, table, *(["\n".join(words)] if words else [])])


def beaten_by(row: Row, peer: Standing) -> bool:
    """Whether a peer keeps the contract where pqk does not, or faster than pqk beyond both intervals."""
    if not row.keeps(peer) or peer.low is None:
        return False
    if row.student is None or not row.keeps(row.student) or row.student.high is None:
        return peer.low > 1  # what is not faster than the teacher is no better than keeping it
    return peer.low > row.student.high


def _cell(standing: Standing | None) -> str:
    """`86.20 %, 2.31x`, or that there is nothing."""
    if standing is None or standing.metric is None or standing.ratio is None:
        return "–"
    return f"{percent(standing.metric)}, {standing.ratio:.2f}x"
