"""Tables of encoder-decoder models for the READMEs, made of committed results."""

from __future__ import annotations

from typing import Any

NAMES = {
    "t5": "T5", "flan": "Flan-T5", "marian": "Marian", "bart": "BART", "mbart": "mBART", "pegasus": "Pegasus",
    "whisper": "Whisper",
}  # fmt: skip
NETWORKS = {
    "teacher": "teacher, FP32 with cache",
    "dynamic": "teacher, dynamic INT8 by ONNX Runtime",
    "student": "student, INT8",
}
STEP = "a token after others"


def families_table(rows: dict[str, dict[str, str]]) -> str:
    """A line for each family: layers at parity and products in integers, dynamic and static."""
    kinds = ("dynamic", "static")
    lines = [
        "| family | dynamic: layers at parity | integer products | static: layers at parity | integer products |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family, name in NAMES.items():
        cells = [rows[f"{family} {kind}"][key] for kind in kinds for key in ("layers", "integer")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def generation_table(found: dict[str, Any]) -> str:
    """A line for each network: targets to the letter, nats, bytes, and times with their ratios to the teacher's."""
    conditions = found["conditions"]
    source = next(key for key in found["networks"]["teacher"] if key.startswith("a source"))
    lines = [
        f"| network | exact match | nats per token | size | {STEP} | {source} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, name in NETWORKS.items():
        if (row := found["networks"].get(key)) is not None:
            cells = (
                f"{100 * row['exact_match']:.1f} %", f"{row['log_likelihood']:.4f}", f"{row['bytes'] / 1e6:.1f} MB",
                *(_time(row[what], key == "teacher") for what in (STEP, source)),
            )  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
    threads = "one thread" if conditions["threads"] == 1 else f"{conditions['threads']} threads"
    told = (
        f"{conditions['machine']['cpu']}, {threads}, batch {conditions['batch']}; {conditions['held_out']} words held "
        f"out, {conditions['kept_tokens']} tokens kept; {conditions['beside']}."
    )
    return "\n".join([*lines, "", told])


def _time(row: dict[str, float], baseline: bool) -> str:
    said = f"{row['ms']:.3f} ms"
    return said if baseline else f"{said}, {row['ratio']:.2f}x ({row['low']:.2f} to {row['high']:.2f})"
