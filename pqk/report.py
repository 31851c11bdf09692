"""What a compile says about itself: `report.json`, its JSON Schema, its page and its table.

Shares and accuracies are 0 to 1, milliseconds are per call, bytes are on disk, MACs are per sample. A number that was
not measured is null and its reason stands beside it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from pqk.errors import InputError

SCHEMA_PATH = Path(__file__).with_name("report.schema.json")

Variant = Literal["teacher_fp32", "teacher_ptq", "pruned", "pruned_distilled", "student_no_kd", "student"]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

TITLES = {
    "teacher_fp32": "teacher, FP32",
    "teacher_ptq": "teacher, INT8 by PTQ alone",
    "pruned": "pruned, float",
    "pruned_distilled": "pruned + distilled, float",
    "student_no_kd": "+ QAT without KD, INT8",
    "student": "student: + QAT with KD, INT8",
}


class Part(BaseModel):
    """Base of the report's parts: unknown fields are refused, docstrings are the schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Metric(Part):
    """The task's metric on the evaluation data."""

    name: str
    unit: str
    teacher: float | None
    student: float | None


class LatencyRow(Part):
    """One contender's time, measured in turn with the baseline: the teacher in ONNX Runtime FP32."""

    variant: Variant
    runtime: str
    """onnxruntime, torch, torch.compile, openvino, neural-compressor"""
    batch: Annotated[int, Field(gt=0)]
    threads: Annotated[int, Field(gt=0)]
    median_ms: Positive
    p05_ms: Positive
    p95_ms: Positive
    ratio: Positive | None
    """baseline's time over this one's, median over rounds: above 1 is faster than the baseline"""
    ratio_low: Positive | None
    """lower end of the bootstrap 95 % interval of `ratio`"""
    ratio_high: Positive | None
    spinning: bool = True
    """whether idle threads spin (ONNX Runtime's default); false is a row of its own"""
    significant: bool = False
    """whether the interval leaves 1 out"""

    @property
    def verdict(self) -> str:
        """`4.3x (4.2 to 4.4)`, or that there is no significant speed-up."""
        if self.ratio is None or self.ratio_low is None or self.ratio_high is None:
            return "not compared"
        if self.ratio == self.ratio_low == self.ratio_high == 1:
            return "1x (baseline)"
        span = f"{self.ratio:.2f}x ({self.ratio_low:.2f} to {self.ratio_high:.2f})"
        if not self.significant:
            return f"no significant speed-up: {span}"
        return span if self.ratio > 1 else f"slower: {span}"


class LayerParity(Part):
    """One layer, INT8 graph against ONNX Runtime (or the fused student) on the same integer inputs."""

    name: str
    op: str
    """the ONNX operators between the layer's integer inputs and its integer output, or the fused operator's name"""
    max_lsb: Annotated[float, Field(ge=0)] | None
    """largest difference in steps of the output; null for a float output"""
    exact: Share
    """share of outputs that are equal; without exact ties where the contract leaves them out"""
    accumulators: bool | None = None
    """whether the int32 accumulators are equal (ConvInteger / MatMulInteger twin); null where there are none"""
    max_relative: Annotated[float, Field(ge=0)] | None = None
    """largest relative difference, for a float output"""
    passed: bool


class Parity(Part):
    """The parity contract: fake-quant graph, INT8 graph and what is deployed (ONNX Runtime, fused student) agree."""

    passed: bool
    layers: tuple[LayerParity, ...]
    agreement: Share | None
    """share of evaluation samples with the same decision, fake-quant graph and what is deployed"""
    metric_delta: float | None
    """the metric of what is deployed less the fake-quant graph's"""
    first_divergence: str | None
    """the first layer that breaks the contract and by how much; null where none does"""
    samples: Count
    """evaluation samples compared end to end"""
    mode: Literal["optimized", "unoptimized", "reference"]
    """whether ONNX Runtime ran with its optimizations: without them where the target is not this machine;
    `reference`: the fused student ran instead, by the reference bodies of its operators"""


class DeclinedRow(Part):
    """What a pass left alone, and why."""

    pass_name: Annotated[str, Field(alias="pass")]
    layer: str
    reason: str

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


class Fusion(Part):
    """What `fuse` made of the INT8 graph: `student.pt2`. Launches and bytes are those of one sample."""

    launches_before: Count
    """operators of the INT8 graph that depend on the input and write memory"""
    launches_after: Count
    bytes_before: Count
    """inputs, weights and outputs of those operators, each tensor of an operator once"""
    bytes_after: Count
    size_bytes: Count
    """of `student.pt2`"""
    left_out: tuple[DeclinedRow, ...]
    """layers that stay operators of torch, or end sooner than they might, and why"""
    parity: Parity
    """the fused student against the INT8 graph, by the reference bodies of its operators"""


class AttributionRow(Part):
    """What the network was worth after each step. A null number has its reason in `reasons`, by field name."""

    variant: Variant
    runtime: str = "onnxruntime"
    label: str | None = None
    """what to call the row; the variant's usual title where null"""
    metric: float | None = None
    latency_ms: Positive | None = None
    ratio: Positive | None = None
    ratio_low: Positive | None = None
    ratio_high: Positive | None = None
    size_bytes: Count | None = None
    parameters: Count | None = None
    macs: Count | None = None
    integer_coverage: Share | None = None
    reasons: dict[str, str] = {}


class PassRecord(Part):
    """What the pipeline noted after one pass; `metric` is on validation data."""

    index: Count
    pass_name: Annotated[str, Field(alias="pass")]
    stage: str
    seconds: Annotated[float, Field(ge=0)]
    parameters: Count
    macs: Count
    size_bytes: Count
    metric: float | None
    peak_memory_bytes: Count = 0
    """the largest resident memory of the process so far"""
    details: dict[str, Any] = {}

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)


class Conditions(Part):
    """Under which conditions the numbers hold."""

    training_epochs: Annotated[float, Field(ge=0)]
    training_seconds: Annotated[float, Field(ge=0)]
    train_samples: Count
    validation_samples: Count
    evaluation_samples: Count
    peak_memory_bytes: Count = 0
    """the largest resident memory of the compile; 0 where the system does not say"""
    protocol: str
    """how latencies were measured"""


class Report(Part):
    """`report.json`."""

    metric: Metric | None
    latency: tuple[LatencyRow, ...]
    latency_reason: str | None = None
    """why `latency` is empty"""
    integer_coverage: Share | None
    integer_coverage_reason: str | None = None
    """why `integer_coverage` is null"""
    parity: Parity | None
    parity_reason: str | None = None
    """why `parity` is null"""
    fusion: Fusion | None = None
    """null where the recipe does not fuse"""
    size_bytes: Count
    """of the student's deployed file"""
    parameters: Count
    macs: Count
    seconds: dict[str, float]
    """by pass"""
    declined: tuple[DeclinedRow, ...]
    machine: dict[str, Any]
    target: str
    seed: int
    attribution: tuple[AttributionRow, ...]
    conditions: Conditions
    passes: tuple[PassRecord, ...] = ()
    notes: tuple[str, ...] = ()
    """warnings and other things worth knowing"""

    @staticmethod
    def loads(text: str | bytes) -> Report:
        """Read `report.json`. Raises `InputError` naming the first field that does not fit."""
        try:
            return Report.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise InputError(f"report.json: {where}: {first['msg']} (got {str(first['input'])[:60]})") from error

    @staticmethod
    def load(path: Path | str) -> Report:
        """Read a report from a file. Raises `InputError`."""
        try:
            return Report.loads(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the report {path}: {error.strerror}") from error

    def dumps(self) -> str:
        """JSON text, the same for the same report."""
        return self.model_dump_json(indent=2) + "\n"


def schema_text() -> str:
    """The JSON Schema of `report.json`, as committed in `report.schema.json`."""
    schema = Report.model_json_schema(mode="serialization", by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def scaled(count: float | None, unit: float, suffix: str, digits: int = 1) -> str:
    return "–" if count is None else f"{count / unit:.{digits}f} {suffix}"


def metric_text(metric: Metric | None, value: float | None) -> str:
    """A metric in its unit; shares as percentages."""
    if metric is None or value is None:
        return "–"
    return percent(value) if metric.unit == "share" else f"{value:.4g} {metric.unit}".strip()


def attribution_cells(report: Report, row: AttributionRow) -> list[str]:
    latency = next((la for la in report.latency if same_measurement(la, row)), None)
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}x"
    if None not in (row.ratio_low, row.ratio_high) and row.variant != "teacher_fp32":
        ratio = latency.verdict if latency else f"{ratio} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
    return [
        row.label or TITLES[row.variant],
        metric_text(report.metric, row.metric),
        "–" if row.latency_ms is None else f"{row.latency_ms:.3f} ms",
        ratio,
        scaled(row.size_bytes, 1e3, "kB", 0),
        scaled(row.parameters, 1e3, "k", 0),
        scaled(row.macs, 1e6, "M"),
        percent(row.integer_coverage),
    ]


def same_measurement(latency: LatencyRow, row: AttributionRow) -> bool:
    named = (latency.variant, latency.runtime, latency.median_ms) == (row.variant, row.runtime, row.latency_ms)
    return named and (latency.ratio, latency.ratio_low) == (row.ratio, row.ratio_low)


ATTRIBUTION_HEADER = ("network", "metric", "latency", "speed-up", "size", "parameters", "MACs", "integer")


def attribution_table(report: Report) -> Table:
    """The table every compile ends in, for a terminal."""
    machine = report.machine
    threads = {la.threads for la in report.latency}
    caption = f"{report.target}; {machine.get('cpu', 'unknown CPU')}"
    if threads:
        count = "/".join(map(str, sorted(threads)))
        caption += f", {count} threads, batch 1; speed-up against the teacher in ONNX Runtime FP32"
    table = Table(title="Pass attribution", caption=caption)
    for index, header in enumerate(ATTRIBUTION_HEADER):
        table.add_column(header, justify="right" if index else "left", no_wrap=index not in (0, 3))
    for row in report.attribution:
        table.add_row(*attribution_cells(report, row), style="bold" if row.variant == "student" else None)
    return table


def to_text(report: Report, width: int = 120) -> str:
    """The attribution table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(attribution_table(report))
    return buffer.getvalue()


def markdown_table(header: tuple[str, ...], rows: list[list[str]], *, texts: int = 1) -> str:
    """`texts` leading columns are words and start on the left; the others are numbers."""
    escape = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *escape])


def to_markdown(report: Report) -> str:
    """`report.md`: attribution, latency, parity, coverage, what was declined, and the conditions of it all."""
    sections = [
        f"# Compressed for {report.target}",
        markdown_table(ATTRIBUTION_HEADER, [attribution_cells(report, row) for row in report.attribution]),
        *missing_numbers(report),
        "## Latency",
        latency_section(report),
        "## Parity",
        parity_section(report),
        *fusion_section(report),
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


def latency_section(report: Report) -> str:
    if not report.latency:
        return f"Not measured: {report.latency_reason or 'no reason given'}."
    header = ("network", "runtime", "batch", "threads", "median", "5 % to 95 %", "against the teacher")
    rows = [
        [
            TITLES[row.variant],
            row.runtime if row.spinning else f"{row.runtime}, no spinning",
            str(row.batch),
            str(row.threads),
            f"{row.median_ms:.3f} ms",
            f"{row.p05_ms:.3f} to {row.p95_ms:.3f} ms",
            row.verdict,
        ]
        for row in report.latency
    ]
    return markdown_table(header, rows, texts=2) + f"\n\n{report.conditions.protocol}"


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
    left = [[d.layer, d.reason] for d in fusion.left_out]
    return [
        "## Fusion",
        f"`student.pt2`, {fusion.size_bytes} bytes; counted for one sample, not timed.",
        markdown_table(("", "INT8 graph", "fused"), rows),
        *([markdown_table(("left out", "reason"), left, texts=2)] if left else []),
        *([contract(fusion.parity)] if fusion.parity != report.parity else []),
    ]


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
