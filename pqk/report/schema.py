"""What a compile says about itself: the document `report.json`, and its JSON Schema.

Shares and accuracies are 0 to 1, milliseconds are per call, bytes are on disk, MACs are per sample. A number that was
not measured is null and its reason stands beside it. `diagnostics.py` holds the part on distillation, `promise.py` that
on a contract, `layer_times.py` where the time goes; `text.py` has the words and the table for a terminal, `markdown.py`
the page `report.md`, `html` the page `report.html`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pqk.documents import parse_json, read_bytes
from pqk.errors import InputError
from pqk.report.base import Count, Part, Positive, Share
from pqk.report.cascade import CascadeResult
from pqk.report.diagnostics import ControlVariant, Diagnostics
from pqk.report.layer_times import LayerTimes
from pqk.report.promise import Promise
from pqk.report.texts import ContinuedTexts

SCHEMA_PATH = Path(__file__).with_name("report.schema.json")

VariantName = Literal[
    "teacher_fp32",
    "teacher_ptq",
    "teacher_dynamic",
    "teacher_blocks",
    "teacher_optimum_static",
    "teacher_optimum_dynamic",
    "given",
    "given_distilled",
    "pruned",
    "factorized",
    "pruned_distilled",
    ControlVariant,
    "student",
]

TITLES = {
    "teacher_fp32": "teacher, FP32",
    "teacher_ptq": "teacher, INT8 by PTQ alone",
    "teacher_dynamic": "teacher, INT8 by dynamic quantization",
    "teacher_blocks": "teacher, INT8 in blocks by ONNX Runtime",
    "teacher_optimum_static": "teacher, static INT8 by optimum",
    "teacher_optimum_dynamic": "teacher, dynamic INT8 by optimum",
    "given": "student of another shape, as given, float",
    "given_distilled": "student of another shape, distilled, float",
    "pruned": "pruned, float",
    "factorized": "split into low rank, float",
    "pruned_distilled": "pruned + distilled, float",
    "student_no_kd": "+ QAT without KD, INT8",
    "student_label_smoothing": "+ QAT with smoothed labels, INT8",
    "student_random_teacher": "+ QAT with an untrained teacher, INT8",
    "student_from_scratch": "the same size from scratch, INT8",
    "student": "student: + QAT with KD, INT8",
}


LEAST_AGREEMENT = 0.995
"""the share of decisions that two forms of one network must have in common; one sample may always differ"""


class MetricValues(Part):
    """The task's metric on the evaluation data."""

    name: str
    unit: str
    teacher: float | None
    student: float | None


class LatencyRow(Part):
    """One contender's time, measured in turn with the baseline: the teacher in ONNX Runtime FP32."""

    variant: VariantName
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
    inputs: str = ""
    """what the inputs are, where they are not the task's example"""
    spinning: bool = True
    """whether idle threads spin (ONNX Runtime's default); false is a row of its own"""
    significant: bool = False
    """whether the interval leaves 1 out"""
    agreement: Share | None = None
    """share of decisions that are those of the network that was trained or given, on the samples compared; null where
    it was not asked"""
    samples: Count = 0
    """samples that `agreement` is of"""

    @property
    def decides_otherwise(self) -> bool:
        """Whether its answers are too different for its time to be that of the network."""
        slack = 1e-12  # of shares in floating point
        return self.agreement is not None and self.agreement < min(LEAST_AGREEMENT, 1 - 1 / self.samples) - slack

    def without_ratio(self) -> LatencyRow:
        """The same times, where there is no baseline that they could be held against."""
        return self.model_copy(update={"ratio": None, "ratio_low": None, "ratio_high": None, "significant": False})

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
    """share of outputs that are equal, or of products as exact arithmetic has them; halves are left out"""
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
    """share of evaluation samples with the same decision, fake-quant graph and what is deployed; of texts, of tokens"""
    own_agreement: Share | None = None
    """share of tokens that the runtime decides as itself where it reads a text at once and one by one, which bounds
    what can be asked of `agreement`; null where that is not needed"""
    metric_delta: float | None
    """the metric of what is deployed less the fake-quant graph's"""
    first_divergence: str | None
    """the first layer that breaks the contract and by how much; null where none does"""
    samples: Count
    """evaluation samples compared end to end"""
    mode: Literal["optimized", "unoptimized", "reference"]
    """whether ONNX Runtime ran with its optimizations: without them where the target is not this machine;
    `reference`: the fused student ran instead, by the reference bodies of its operators"""

    @property
    def compared(self) -> bool:
        """Whether there was anything to compare: not of a file that another tool wrote."""
        return bool(self.layers) or self.samples > 0


class Declined(Part):
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
    left_out: tuple[Declined, ...]
    """layers that stay operators of torch, or end sooner than they might, and why"""
    parity: Parity
    """the fused student against the INT8 graph, by the reference bodies of its operators"""


class AttributionRow(Part):
    """What the network was worth after each step. A null number has its reason in `reasons`, by field name."""

    variant: VariantName
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
    reasons: dict[str, str] = Field(default_factory=dict)


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
    details: dict[str, Any] = Field(default_factory=dict)

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

    metric: MetricValues | None
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
    declined: tuple[Declined, ...]
    machine: dict[str, Any]
    target: str
    seed: int
    attribution: tuple[AttributionRow, ...]
    conditions: Conditions
    passes: tuple[PassRecord, ...] = ()
    diagnostics: Diagnostics | None = None
    """null in reports of earlier versions"""
    promise: Promise | None = None
    """null where no contract was given"""
    cascade: CascadeResult | None = None
    """null where the student answers everything"""
    texts: ContinuedTexts | None = None
    """null where the student continues none, or they were not asked for"""
    layer_times: LayerTimes | None = None
    """null where they were not measured, as in reports of earlier versions"""
    notes: tuple[str, ...] = ()
    """warnings and other things worth knowing"""

    @staticmethod
    def loads(text: str | bytes) -> Report:
        """Read `report.json`. Raises `InputError` naming the first field that does not fit."""
        try:
            report = Report.model_validate_json(text, strict=True)  # true is not 1, nor is "1"
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the document"
            raise InputError(f"report.json: {where}: {first['msg']} (got {str(first['input'])[:60]})") from error
        # What passes note is of any form, in which pydantic lets NaN through, to write null.
        parse_json(text.encode() if isinstance(text, str) else text, "report.json", finite=True)
        return report

    @staticmethod
    def load(path: Path | str) -> Report:
        """Read a report from a file. Raises `InputError`."""
        return Report.loads(read_bytes(Path(path)))

    def dumps(self) -> str:
        """JSON text, the same for the same report."""
        return self.model_dump_json(indent=2) + "\n"


def schema_text() -> str:
    """The JSON Schema of `report.json`, as committed in `report.schema.json`."""
    schema = Report.model_json_schema(mode="serialization", by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"
