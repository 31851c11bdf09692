"""Fills the marked blocks of all READMEs from the committed results: `python tests/tools/readme.py`.

<!-- results -->          a line for every result, with the conditions of all
<!-- commands -->         how each result is made again
<!-- costs -->            what distillation and quantization-aware training cost: models/results/training_cost.json
<!-- table: NAME -->      the attribution table of models/results/NAME.json
<!-- recipe: NAME -->     models/NAME.toml
<!-- tokens: NAME -->     tokens a second of several files in turn: models/results/NAME.json
<!-- comparison: NAME --> both rounds of models/results/NAME.json, which `pqk compare` wrote
<!-- kernels -->          what `pqk kernels` found of the committed students and of all kernels' cases
<!-- families -->         which passes apply to which family of encoders: models/results/encoder_families.json
<!-- causal_families -->  the same of causal models: models/results/causal_families.json
<!-- encoder_decoders --> the same of encoder-decoders: models/results/encoder_decoder_families.json
<!-- sorting -->          what a compiled sorter of letters is worth: models/results/sorting.json
<!-- zoo -->              what became of every network of the zoo: tests/zoo/results.json
<!-- estimates -->        how near `pqk check` comes to what passes take: models/results/check_estimates.json
<!-- growth -->           how time and memory of a compile grow: models/results/compile_growth.json
<!-- shapes -->           how fast students of another shape are untrained: models/results/student_shapes*.json
<!-- allocation -->       how much better the table cuts than width alone: models/results/allocation.json
<!-- strangers -->        what became of models that no recipe knows: models/results/strangers.json, where it is there
<!-- promises -->         the same in a sentence
<!-- peers -->            the same models through other tools, from the same file
<!-- reasoning -->        what students of a teacher that reasons learn from: models/results/reasoning.json, if there
<!-- black_box -->        what a student of a teacher's texts alone reaches: models/results/black_box.json, likewise
<!-- terms -->            the distillation terms, with the first sentence of each
<!-- sources -->          where teachers come from, likewise
<!-- authors -->          who writes the answers of a training, likewise
<!-- passes -->           the passes of a recipe, likewise
<!-- order -->            the packages in the order of their imports, with what each answers
<!-- ops -->              the kernels, with the first sentence of each
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.cli.views import reference
from pqk.comparison.markdown import HEADER, notes_of, table_of
from pqk.files import read_json, write_whole
from pqk.kernels import KERNELS
from pqk.report.markdown import markdown_table
from pqk.report.schema import Report
from pqk.report.text import ATTRIBUTION_HEADER, attribution_cells, metric_text, percent
from pqk.strangers.rows import Row
from pqk.strangers.table import beside_peers, sentence
from pqk.strangers.table import markdown as strangers_table

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "support"))
import causal_tables  # noqa: E402
import seq2seq_tables  # noqa: E402
from families import table as families_table  # noqa: E402

FOLDERS = ("pqk", "passes", "kernels", "models", "tests")
RESULTS = ROOT / "models" / "results"
BLOCK = re.compile(r"(<!-- (\w+)(?:: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def readmes() -> list[Path]:
    """Every README of the repository, its own first."""
    return [ROOT / "README.md", *sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("README.md"))]


def filled(text: str) -> str:
    """`text` with every marked block made anew. Raises `KeyError` for a block that nothing makes."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{MAKERS[m[2]](*([] if m[3] is None else [m[3]]))}\n\n{m[4]}", text)


def table(name: str) -> str:
    report = Report.load(RESULTS / f"{name}.json")
    rows = [attribution_cells(report, row) for row in report.attribution if row.metric is not None]
    machine = report.machine
    threads = {row.threads for row in report.latency}
    conditions = (
        f"`models/results/{name}.json`: batch 1, {min(threads)} threads, {machine['cpu']} "
        f"({machine['target']}), student compiled for {report.target}, ratios measured in turn with the teacher in "
        f"ONNX Runtime FP32; metric on all {report.conditions.evaluation_samples:,} test samples through ONNX Runtime; "
        f"{report.conditions.training_epochs:g} epochs of training in all."
    )
    return f"{markdown_table(ATTRIBUTION_HEADER, rows)}\n\n{conditions}"


def recipe(name: str) -> str:
    return f"```toml\n{(ROOT / 'models' / f'{name}.toml').read_text()}```"


def comparison(name: str) -> str:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    parts = []
    for part, title in (("confirm", "Confirmed on fresh seeds"), ("screen", "Screened")):
        if part in document:
            shown = [row[:1] + row[3:6] for row in table_of(document, part)]
            seeds = len(document[part]["seeds"])
            parts.append(f"{title}, {seeds} seeds:\n\n" + markdown_table(HEADER[:1] + HEADER[3:6], shown))
    notes = "\n".join(f"- {note}" for note in notes_of(document))
    return "\n\n".join([*parts, notes])


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
    return markdown_table(header, rows) + f"\n\n{note}{sweep()}"


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


def reports() -> dict[str, Report]:
    """The committed reports of compiles, by the recipe's name; models that continue texts have tables of their own."""
    paths = sorted(p for p in RESULTS.glob("*.json") if "attribution" in json.loads(p.read_text()))
    found = {path.stem: Report.load(path) for path in paths}
    return {name: report for name, report in found.items() if report.texts is None}


def tokens(name: str) -> str:
    """Tokens a second of several files in turn."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    rows = []
    for threads, contenders in document["threads"].items():
        for contender, found in contenders.items():
            ratios = (
                f"{ratio:.2f}x ({low:.2f} to {high:.2f})"
                for ratio, low, high in (found["token_ratio"], found["first_ratio"])
            )
            rows.append(
                [
                    contender.replace("_", " "),
                    threads,
                    f"{found['tokens_per_second']:.4g}",
                    *ratios,
                    f"{found['file_mb']:.4g} MB",
                    *([f"{found['kept_bytes']:,} B"] if "kept_bytes" in found else []),
                ]
            )
    header = ["file", "threads", "tokens a second", "beside the first", "time to the first token, likewise", "size"]
    header += ["kept of a token"] * (len(rows[0]) > len(header))
    said = document["conditions"]
    return (
        f"{markdown_table(header, rows)}\n\n`models/results/{name}.json`: {said['tokens']} tokens after a prompt of "
        f"{said['prompt']}, {said['rounds']} rounds in turn, {said['machine']['cpu']} ({said['machine']['target']})."
        f"{held_out(document.get('held_out', {}))}"
    )


def held_out(found: dict[str, Any]) -> str:
    """What files say of texts, beside the first of them."""
    if not found:
        return ""
    (name, first), *others = found.items()
    told = "; ".join(
        f"{other.replace('_', ' ')} {row['nats_per_token']:.3f}, and {1 - row['agreement']:.1%} of the likeliest "
        "tokens are others"
        for other, row in others
    )
    return (
        f" Nats a token on {first['tokens']:,} tokens of held-out texts, without training: {name} "
        f"{first['nats_per_token']:.3f}; {told}."
    )


def results() -> str:
    header = (
        "recipe", "FP32 teacher", "teacher, INT8 without training", "INT8 student", "latency of the student",
        "speed-up", "file", "training",
    )  # fmt: skip
    rows = []
    for name, report in reports().items():
        by_variant = {row.variant: row for row in report.attribution if row.runtime == "onnxruntime"}
        student, teacher = by_variant["student"], by_variant["teacher_fp32"]
        assert teacher.latency_ms and student.latency_ms and teacher.size_bytes and student.size_bytes
        ptq = max((r for v, r in by_variant.items() if v in POST_TRAINING and r.ratio), key=lambda r: r.ratio or 0)
        rows.append(
            [
                f"[{name}](models/{name}.toml)",
                metric_text(report.metric, teacher.metric),
                f"{metric_text(report.metric, ptq.metric)}, {ptq.ratio:.2f}x",
                metric_text(report.metric, student.metric),
                f"{teacher.latency_ms:.2f} to {student.latency_ms:.2f} ms",
                attribution_cells(report, student)[3],
                f"1/{teacher.size_bytes / student.size_bytes:.1f}",
                f"{report.conditions.training_epochs:g} epochs",
            ]
        )
    return f"{markdown_table(header, rows)}\n\n{conditions()}"


POST_TRAINING = ("teacher_ptq", "teacher_dynamic", "teacher_optimum_static", "teacher_optimum_dynamic")
"""variants that are the teacher quantized without training"""


def conditions() -> str:
    """Under which conditions all results hold, in sentences; raises where a sentence would not be true of all."""
    found = reports()
    machines: dict[str, list[str]] = {}
    for name, report in found.items():
        cores = report.machine["cores"]
        machines.setdefault(f"{report.machine['cpu']} with {cores} cores, {report.machine['target']}", []).append(name)
    parities = [report.parity for report in found.values()]
    (threads,) = {row.threads for report in found.values() for row in report.latency}
    (versions,) = {report.machine["versions"]["onnxruntime"] for report in found.values()}
    (target,) = {report.target for report in found.values()}
    assert all(report.integer_coverage == 1 for report in found.values())
    largest = max(row.parameters or 0 for report in found.values() for row in report.attribution)
    agreement = min(p.agreement or 0 for p in parities if p is not None and p.passed)
    assert None not in parities and all(p.passed for p in parities if p)
    where = "; ".join(f"{machine}: {', '.join(names)}" for machine, names in machines.items())
    return (
        f"Conditions: batch 1, {threads} threads, ONNX Runtime {versions} in every column; the baseline of every ratio "
        "is the teacher in ONNX Runtime FP32, measured in turn with it on the same machine, with a bootstrap 95 % "
        f"interval. Machines: {where}. Students are compiled for {target}; the largest teacher "
        f"has {largest / 1e6:.1f} million parameters. Metrics are on all evaluation data, through "
        "ONNX Runtime. INT8 without training is the fastest of ONNX Runtime's and optimum's INT8 forms of the teacher. "
        "All MACs of every student run in integer kernels, and at least "
        f"{percent(agreement)} of its decisions are those of the graph that was trained."
    )


def commands() -> str:
    lines = [f"pqk compress models/{name}.toml --data DATA --out out/{name}" for name in reports()]
    return "\n".join(["```", *lines, "```"])


def costs() -> str:
    measured = json.loads((RESULTS / "training_cost.json").read_text())
    steps = json.loads((RESULTS / "training_steps.json").read_text())["steps"]
    integers = ", ".join(f"{name} {step['ratio']:.2f}x" for name, step in steps.items())
    return (
        f"A distillation epoch with cached teacher logits costs {measured['cached_over_without']:.2f}x an epoch "
        f"without a teacher ({measured['live_over_without']:.2f}x with the live one), a fake-quantized step "
        f"{measured['fake_quantized_over_float']:.2f}x a float one. A step with another response term costs at "
        f"most {max(measured['response_over_kl'].values()):.2f}x one with plain KD, one with a relation term "
        f"beside it at most {max(measured['relation_over_kl'].values()):.2f}x: "
        "`python tests/tools/costs.py --data DATA`. Multiplying integers on the way forward, a quantization-aware step "
        f"takes less of a core ({integers} of one with float products): `python tests/tools/steps.py`."
    )


def estimates() -> str:
    """What `pqk check` estimates of three recipes beside what their passes took."""
    measured = json.loads((RESULTS / "check_estimates.json").read_text())
    said = [
        f"{row['estimated_s']:.0f} s for the {row['took_s']:.0f} s of `{name}` ({row['ratio']:.2f}x)"
        for name, row in measured["recipes"].items()
    ]
    return (
        f"Its estimate of the passes was {', '.join(said)}, in {measured['clock']}, the last two with fewer epochs: "
        "`python tests/tools/estimates.py --data DATA`."
    )


def shapes() -> str:
    """How fast students of another shape are before anything trains, on every machine that was met."""
    measured = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("student_shapes*.json"))]
    ratios = [{row["shape"]: row for row in document["shapes"]} for document in measured]
    known = {shape: row for rows in ratios for shape, row in rows.items()}

    def cell(row: dict[str, Any] | None) -> str:
        return "" if row is None else f"{row['ratio']:.1f}x ({row['low']:.1f} to {row['high']:.1f})"

    def isa(machine: dict[str, Any]) -> str:
        return "AVX512-VNNI" if "avx512_vnni" in machine["isa"] else "AVX512" if "avx512f" in machine["isa"] else "AVX2"

    rows = [
        [
            f"`{shape}`",
            f"{row['parameters'] / 1e3:.0f} k",
            f"{row['macs'] / 1e6:.1f}",
            *(cell(r.get(shape)) for r in ratios),
        ]
        for shape, row in known.items()
    ]
    conditions = [document["conditions"] for document in measured]
    machines = [c["machine"] for c in conditions]
    header = ("shape", "parameters", "million MACs", *(f"speed-up, {isa(machine)}" for machine in machines))
    named = "; ".join(f"{isa(m)}: {m['cpu']}, ONNX Runtime {m['versions']['onnxruntime']}" for m in machines)
    return (
        markdown_table(header, rows, texts=1)
        + f"\n\nINT8 with random weights (but for students), in turn with ResNet-56 in FP32: batch 1, "
        f"{conditions[0]['threads']} threads, target {conditions[0]['target']}. {named}. `python tests/tools/shapes.py "
        "--data DATA`. What a net can learn is another question."
    )


def growth() -> str:
    """Time and memory of a compile at three sizes of one thing."""
    measured = json.loads((RESULTS / "compile_growth.json").read_text())
    rows = [
        [
            name,
            f"{axis['unit']}: {', '.join(map(str, axis['sizes']))}",
            f"{axis['seconds_at_smallest']:.0f}",
            ", ".join(f"{ratio:.2f}" for ratio in axis["core_time"]),
            ", ".join(f"{ratio:.1f}" for ratio in axis["pass_time"]["distill"]),
            ", ".join(f"{size / 1e6:.0f}" for size in axis["more_bytes"]),
        ]
        for name, axis in measured["axes"].items()
    ]
    header = ("what grows", "sizes", "smallest, s", "time", "training", "more memory, MB")
    conditions = measured["conditions"]
    return (
        markdown_table(header, rows, texts=2)
        + f"\n\nA small residual network, for the length two layers of attention, compiled whole for "
        f"{conditions['target']} with one epoch of training, each in a process with one thread "
        f"({conditions['machine']['cpu']}, {conditions['isa']}). Times are ratios to the smallest, those of a core; "
        "memory is what a compile comes to hold beyond what was held with teacher and data in it: "
        "`python tests/tools/growth.py`."
    )


def zoo() -> str:
    """The outcomes counted, a row for each network, and the reasons of what did not compile."""
    document = json.loads((ROOT / "tests" / "zoo" / "results.json").read_text())
    found: dict[str, dict[str, Any]] = document["networks"]
    count = Counter(row["outcome"] for row in found.values())
    cut = [row["macs"][0] / row["macs"][1] for row in found.values() if row["outcome"] == "compiled"]
    goal = float(document["goal"])
    summary = (
        f"{len(found)} networks: {count['compiled']} compiled with parity, {count['refused']} refused in words before "
        f"training, {count['failed']} failed. {sum(c >= LEAST_CUT for c in cut)} are really pruned, "
        f"{sum(round(c, 2) >= goal for c in cut)} of them to the {goal:g}x that were asked for."
    )
    if document["not_run"]:
        names = ", ".join(f"`{name}`" for name in document["not_run"])
        summary += f"\n\n{len(document['not_run'])} further networks have not been run for this table: {names}."
    rows, reasons = [], []
    for name, row in found.items():
        if row["outcome"] == "compiled":
            parity, coverage = row["parity"], row["coverage"]
            cells = [
                f"{row['macs'][0] / 1e6:.1f}",
                f"{row['macs'][0] / row['macs'][1]:.2f}x",
                "–" if coverage is None else percent(coverage),
                f"{parity['layers']}",
                f"{100 * parity['least_exact']:.2f} %",
            ]
        else:
            reasons.append(f"- `{name}`, at {row['stage']}: {row['reason']}")
            cells = [f"{row['macs'][0] / 1e6:.1f}" if "macs" in row else "–", "–", "–", "–", "–"]
        check = row.get("check_seconds")
        seconds = [f"{row['seconds']:.0f}", "–" if check is None else f"{check:.0f}"]
        rows.append([f"`{name}`", row["family"], row["outcome"], *cells, *seconds])
    header = (
        "network",
        "family",
        "outcome",
        "MACs, millions",
        "cut",
        "in integers",
        "layers",
        "least equal",
        "s of a core",
        "`check`, s",
    )
    timed = sorted(row["check_seconds"] for row in found.values() if row.get("check_seconds") is not None)
    if timed:
        within = sum(seconds <= LONG_CHECK for seconds in timed) / len(timed)
        summary += (
            f"\n\n`check` of {len(timed)} of them, with two threads: {timed[len(timed) // 2]:.0f} s in the median, "
            f"{100 * within:.0f} % within {LONG_CHECK} s."
        )
    versions = ", ".join(f"{name} {version}" for name, version in document["conditions"]["versions"].items())
    return "\n\n".join(
        [
            summary,
            markdown_table(header, rows, texts=3),
            "Least equal: of all products, the smallest share of outputs that are those of the graph or of exact "
            f"arithmetic. Made with {versions}.",
            *(["\n".join(["Not compiled:", "", *reasons])] if reasons else []),
        ]
    )


def allocations() -> str:
    """How much better the table cuts than width alone, to the same measured latency."""
    found = json.loads((RESULTS / "allocation.json").read_text())
    conditions, said = found["conditions"], []
    for better in found["better"]:
        rows = [row for row in found["rows"] if row["goal"] == better["goal"]]
        speeds = {
            way: statistics.mean(row["ratio"] for row in rows if row["way"] == way)
            for way in (better["than"], better["way"])
        }
        said.append(
            f"{conditions['network']} to {better['goal']:g}x, {conditions['epochs']:g} epoch of {conditions['images']} "
            f"images for each, {len(better['points'])} seeds: {better['mean']:+.1f} points on the test images "
            f"({better['low']:.1f} to {better['high']:.1f}) over {better['than']} alone, at "
            f"{speeds[better['way']]:.2f}x and {speeds[better['than']]:.2f}x as measured afterwards"
        )
    return f"{'; '.join(said)} (`models/results/allocation.json`, `python tests/tools/allocation.py`)."


LEARNED_FROM = {
    "answers": "answers alone",
    "step by step": "answers, and rationales beside them (Step-by-Step)",
    "worked": "rationales, then the answer",
    "mixed": "a fifth of these, the others short (Mix Distillation)",
    "adaptive": "rationales where the answer alone is unlikely",
    "teacher's texts": "what the teacher writes (sequence level)",
    "on policy": "three quarters of the steps so, then GKD (on policy)",
}
"""as `tests/tools/reasoning.py` names ways -> in words"""


def of_seeds(found: dict[str, float], digits: int = 1) -> str:
    """A share and its interval, in percent, as far as shares go."""
    low, high = (100 * min(1.0, max(0.0, found[name])) for name in ("low", "high"))
    return f"{100 * found['mean']:.{digits}f} % ({low:.{digits}f} to {high:.{digits}f})"


def shares_of(found: list[dict[str, float]]) -> list[str]:
    return [f"{100 * each['mean']:.0f}" for each in found]


def reasoning_conditions(conditions: dict[str, Any]) -> str:
    teacher = conditions["teacher"]
    return (
        f"{len(conditions['seeds'])} seeds with 95 % intervals (Student's t), {conditions['held_out']} held-out "
        f"problems, {conditions['steps']} steps of {conditions['batch']} rows; a rate of "
        f"{', '.join(f'{rate:g}' for rate in conditions['rates'])} was chosen on {conditions['validation']} validation "
        f"problems. The teacher has {teacher['layers']} layers of {teacher['width']}"
    )


def where_measured(name: str, shown: Callable[[dict[str, Any]], str]) -> str:
    """What is shown of a result, or that there is none."""
    path = RESULTS / f"{name}.json"
    return shown(json.loads(path.read_text())) if path.exists() else "No run is committed yet."


def reasoning(found: dict[str, Any]) -> str:
    """The right answers of students by what they learned from, and where steps made them worse."""
    rows = [
        [row["student"], LEARNED_FROM[row["way"]], of_seeds(row["match"]), *shares_of(row["by_difficulty"]),
         f"{row['letters']:.0f}"]
        for row in found["rows"]
    ]  # fmt: skip
    header = ("student", "learns from", "right", "1", "2", "3", "4", "5", "letters")
    same = len({json.dumps(row["runs"]) for row in found["rows"]}) < len(found["rows"])
    equal = (
        " Rows with the same numbers learned from the same texts, or always write the same digit: a teacher that is "
        "always right writes the worked steps, and no answer alone was likely enough to go without them."
    )
    worse = [
        f"{row['student']}, {LEARNED_FROM[row['way']]}, difficulty {row['difficulty']}: "
        f"{100 * row['mean']:+.1f} points ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        for row in found["beside_answers_alone"]
        if row["high"] < 0
    ]
    said = f"Worse than answers alone, with an interval below 0: {'; '.join(worse)}." if worse else (
        "No way of these is worse than answers alone, at any difficulty, with an interval below 0."
    )  # fmt: skip
    return (
        markdown_table(header, rows, texts=2)
        + f"\n\n`models/results/reasoning.json`: {reasoning_conditions(found['conditions'])} and is right in "
        f"{100 * found['teacher']['match']:.1f} %. Columns 1 to 5 are percent right by operations; of one operation "
        "there are only 270 problems, which are learned from, too. Letters are those that a student writes for an "
        f"answer. {said}{equal if same else ''}"
    )


def black_box(found: dict[str, Any]) -> str:
    """What a student of texts reaches of the gain of one that sees probabilities, and what was asked for it."""
    conditions, asked, share = found["conditions"], found["asked"], found["share_of_gain"]
    words = {
        "data alone": f"{conditions['labelled']} worked problems, no teacher",
        "black box": f"{conditions['samples']} texts of the teacher for each of {asked['prompts']} problems",
        "white box": "the teacher's probabilities on the same texts",
    }
    rows = [
        [words[row["from"]], of_seeds(row["match"]), *shares_of(row["by_difficulty"]), f"{row['rate']:g}"]
        for row in found["rows"]
    ]
    reached = share["none"] if "none" in share else f"{of_seeds(share, 0)} of the white box's gain"
    return (
        markdown_table(("learns from", "right", "1", "2", "3", "4", "5", "rate"), rows, texts=1)
        + f"\n\n`models/results/black_box.json`: a student of {found['student']}; {asked['queries']} queries, of whose "
        f"answers {100 * asked['right']:.1f} % are right. The black box reaches {reached}. "
        f"{reasoning_conditions(conditions)}."
    )


def of_strangers(shown: Callable[[dict[str, Any]], str]) -> str:
    """A table of the benchmark on strangers, or that it is not committed."""
    path = RESULTS / "strangers.json"
    return shown(json.loads(path.read_text())) if path.exists() else "No run is committed yet."


def promises(document: dict[str, Any]) -> str:
    """What became of the strangers, in a sentence."""
    rows = [Row.read(row) for row in document["strangers"]]
    found = document["conditions"]
    begins = f"Models that no recipe knows, {found['budget']} each on {found['machine']['cores']} cores"
    return f"{begins} ({found['machine']['target']}): {sentence(rows)} [The table](pqk/strangers/README.md)."


def peers(document: dict[str, Any]) -> str:
    """The table beside other tools, where the run had any."""
    had = any(row["peers"] for row in document["strangers"])
    return beside_peers(document) if had else "The committed run had no other tools."


LONG_CHECK = 60
"""seconds that `check` of nine in ten of the zoo's networks is to take at most"""
LEAST_CUT = 1.1
"""times fewer MACs from which on a network counts as pruned"""


def first_sentence(documentation: str) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(documentation.strip().partition("\n\n")[0].split())


def listed(kind: str, header: tuple[str, str]) -> str:
    entries = reference()[kind]
    rows = [[f"`{e['name']}`", first_sentence(e["documentation"])] for e in entries]
    return markdown_table(header, rows, texts=2)


def pass_list() -> str:
    rows = [
        [f"`{p['name']}`", " or ".join(p["consumes"]), p["produces"] or "the same", first_sentence(p["documentation"])]
        for p in reference()["passes"]
    ]
    return markdown_table(("pass", "takes a student in", "leaves it in", "what it does"), rows, texts=4)


def import_order() -> tuple[tuple[str, ...], ...]:
    """`ORDER` of tests/test_house.py, which need not run for it."""
    body = ast.parse((ROOT / "tests" / "test_house.py").read_text()).body
    values = (node.value for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER")
    found: Any = ast.literal_eval(next(values))
    return found


def order() -> str:
    """The packages level by level, from `ORDER` of tests/test_house.py, with the first sentence of each."""
    rows = []
    for level, packages in enumerate(import_order(), 1):
        for package in packages:
            folder = ROOT / package if package in FOLDERS else ROOT / "pqk" / package
            path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            said = ast.get_docstring(ast.parse(path.read_text())) or ""
            rows.append([str(level), f"`{package}`", first_sentence(said)])
    return markdown_table(("level", "package", "what is in it"), rows, texts=3)


def ops() -> str:
    rows = []
    for module in KERNELS:
        name = module.__name__.rpartition(".")[2]
        rows.append([f"`{name}.py`", first_sentence(module.__doc__ or "").removeprefix(f"{name}: ")])
    return markdown_table(("kernel", "what one launch computes"), rows, texts=2)


MAKERS: dict[str, Callable[..., str]] = {
    "table": table,
    "tokens": tokens,
    "recipe": recipe,
    "comparison": comparison,
    "results": results,
    "commands": commands,
    "costs": costs,
    "kernels": kernels,
    "families": families_table,
    "zoo": zoo,
    "estimates": estimates,
    "growth": growth,
    "shapes": shapes,
    "allocation": allocations,
    "reasoning": lambda: where_measured("reasoning", reasoning),
    "black_box": lambda: where_measured("black_box", black_box),
    "causal_families": causal_tables.families_table,
    "encoder_decoders": lambda: seq2seq_tables.families_table(read_json(RESULTS / "encoder_decoder_families.json")),
    "sorting": lambda: where_measured("sorting", seq2seq_tables.generation_table),
    "strangers": lambda: of_strangers(strangers_table),
    "promises": lambda: of_strangers(promises),
    "peers": lambda: of_strangers(peers),
    "terms": lambda: listed("terms", ("term", "what it compares")),
    "sources": lambda: listed("sources", ("source", "who teaches")),
    "authors": lambda: listed("authors", ("by", "who answers")),
    "passes": pass_list,
    "order": order,
    "ops": ops,
}


def main() -> None:
    for path in readmes():
        text = filled(path.read_text())
        if text != path.read_text():
            write_whole(path, lambda p, text=text: p.write_text(text))


if __name__ == "__main__":
    main()
