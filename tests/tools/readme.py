"""Fill the README's marked blocks from the committed results: `python tests/tools/readme.py`.

<!-- table: NAME -->     the attribution table of models/results/NAME.json
<!-- recipe: NAME -->    models/NAME.toml
<!-- results -->         one line for every result, and the training costs
<!-- comparison: NAME --> both rounds of models/results/NAME.json, which `pqk compare` wrote
<!-- kernels -->         what `pqk kernels` found of the committed students and of all kernels' cases
<!-- families -->        which passes apply to which family of encoders: models/results/encoder_families.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from pqk.comparison.markdown import HEADER, notes_of, table_of
from pqk.files import write_whole
from pqk.report.markdown import markdown_table
from pqk.report.schema import Report
from pqk.report.text import ATTRIBUTION_HEADER, attribution_cells, metric_text, percent

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "support"))
from families import table as families_table  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "models" / "results"
BLOCK = re.compile(
    r"(<!-- (table|recipe|results|comparison|kernels|families)(?:: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def filled(text: str) -> str:
    """`text` with every marked block made anew."""
    makers = {
        "table": table,
        "recipe": recipe,
        "comparison": comparison,
        "results": lambda _: results(),
        "kernels": lambda _: kernels(),
        "families": lambda _: f"\n{families_table()}\n\n",
    }
    return BLOCK.sub(lambda m: m[1] + makers[m[2]](m[3]) + m[4], text)


def table(name: str) -> str:
    report = Report.load(RESULTS / f"{name}.json")
    rows = [attribution_cells(report, row) for row in report.attribution if row.metric is not None]
    machine = report.machine
    threads = {row.threads for row in report.latency}
    conditions = (
        f"`models/results/{name}.json`: batch 1, {min(threads)} threads of a {machine['cpu']} "
        f"({machine['target']}), student compiled for {report.target}, ratios measured in turn with the teacher in "
        f"ONNX Runtime FP32; metric on all {report.conditions.evaluation_samples:,} test samples through ONNX Runtime; "
        f"{report.conditions.training_epochs:g} epochs of training in all."
    )
    return f"\n{markdown_table(ATTRIBUTION_HEADER, rows)}\n\n{conditions}\n\n"


def recipe(name: str) -> str:
    return f"\n```toml\n{(ROOT / 'models' / f'{name}.toml').read_text()}```\n\n"


def comparison(name: str) -> str:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    parts = []
    for part, title in (("confirm", "Confirmed on fresh seeds"), ("screen", "Screened")):
        if part in document:
            shown = [row[:1] + row[3:6] for row in table_of(document, part)]
            seeds = len(document[part]["seeds"])
            parts.append(f"{title}, {seeds} seeds:\n\n" + markdown_table(HEADER[:1] + HEADER[3:6], shown))
    notes = "\n".join(f"- {note}" for note in notes_of(document))
    return "\n" + "\n\n".join([*parts, notes]) + "\n\n"


def kernels() -> str:
    header = ("compiled", "for", "kinds of launch", "integer matrix code", "registers", "spills", "traffic")
    rows = []
    for path in sorted(RESULTS.glob("kernels_*.json")):
        found = json.loads(path.read_text())
        what = "all kernels' cases" if found["artifact"] is None else f"`{Path(found['artifact']).name}`"
        for arch in found["predictions_assume"]:
            on = [layer["on"][arch["name"]] for layer in found["layers"] if arch["name"] in layer["on"]]
            launches = [launch for at in on for launch in at["launches"] if launch["reason"] is None]
            ratios = [at["traffic"]["ratio"] for at in on if at["traffic"]]
            rows.append(
                [
                    what,
                    arch["name"],
                    str(len(launches)),
                    str(sum(bool(launch["integer"]) for launch in launches)),
                    f"at most {max(launch['registers'] for launch in launches)}",
                    str(sum(launch["spills"] for launch in launches)),
                    f"at most {max(ratios):.2f}x",
                ]
            )
    note = "Traffic: 32-byte sectors touched over each layer's inputs, weights and outputs once; the bar is 1.1x."
    return "\n" + markdown_table(header, rows) + f"\n\n{note}{sweep()}\n\n"


def sweep() -> str:
    """What the exhaustive sweep under the interpreter found, where it is committed."""
    path = RESULTS / "interpreter_sweep.json"
    if not path.exists():
        return ""
    document = json.loads(path.read_text())
    counts = Counter[str]()
    for found in document["tests"].values():
        counts.update(found)
    said = ", ".join(f"{n:,} {outcome}" for outcome, n in counts.items())
    return (
        "\n\nUnder the interpreter, every kernel against its reference, over all cases, dtypes and epilogues, and "
        f"drawn shapes and strides: {said} (`{path.relative_to(ROOT)}`; part of `make test-full`)."
    )


def results() -> str:
    header = ("recipe", "teacher", "student", "speed-up", "size", "integer MACs", "parity", "training")
    rows, lines = [], []
    for path in sorted(p for p in RESULTS.glob("*.json") if "attribution" in json.loads(p.read_text())):
        report = Report.load(path)
        by_variant = {row.variant: row for row in report.attribution if row.runtime == "onnxruntime"}
        student, teacher = by_variant["student"], by_variant["teacher_fp32"]
        parity = report.parity
        assert parity is not None and teacher.size_bytes and student.size_bytes
        rows.append(
            [
                f"`models/{path.stem}.toml`",
                metric_text(report.metric, teacher.metric),
                metric_text(report.metric, student.metric),
                attribution_cells(report, student)[3],
                f"1/{teacher.size_bytes / student.size_bytes:.1f}",
                percent(report.integer_coverage),
                f"{percent(parity.agreement)} agree" if parity.passed else "broken",
                f"{report.conditions.training_epochs:g} epochs, {report.conditions.training_seconds / 60:.0f} min",
            ]
        )
        lines.append(f"pqk compress models/{path.stem}.toml --data DATA --out out/{path.stem}")
    text = "\n" + markdown_table(header, rows) + "\n\n```\n" + "\n".join(lines) + "\n```\n\n"
    costs = RESULTS / "training_cost.json"
    if costs.exists():
        measured = json.loads(costs.read_text())
        text += (
            f"A distillation epoch with cached teacher logits costs {measured['cached_over_without']:.2f}x an epoch "
            f"without a teacher ({measured['live_over_without']:.2f}x with the live one), a fake-quantized step "
            f"{measured['fake_quantized_over_float']:.2f}x a float one. A step with another response term costs at "
            f"most {max(measured['response_over_kl'].values()):.2f}x one with plain KD, one with a relation term "
            f"beside it at most {max(measured['relation_over_kl'].values()):.2f}x: "
            "`python tests/tools/costs.py --data DATA`.\n\n"
        )
    return text


def main() -> None:
    text = filled(README.read_text())
    write_whole(README, lambda p: p.write_text(text))


if __name__ == "__main__":
    main()
