"""The tables of a comparison, as text and as Markdown."""

from __future__ import annotations

from typing import Any

from pqk.report.markdown import markdown_table
from pqk.report.text import percent

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
