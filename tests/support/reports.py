"""Reports for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from pqk.report.diagnostics import ClassAccuracy, Diagnostics, Interval
from pqk.report.layer_times import LayerTime, LayerTimes, NetworkTimes
from pqk.report.promise import Clause, Promise, TriedStudent
from pqk.report.schema import (
    AttributionRow,
    Conditions,
    Declined,
    LatencyRow,
    LayerParity,
    MetricValues,
    Parity,
    PassRecord,
    Report,
)
from pqk.target.machine import machine_fingerprint


def a_report(**changes: Any) -> Report:
    teacher = LatencyRow(
        variant="teacher_fp32",
        runtime="onnxruntime",
        batch=1,
        threads=2,
        median_ms=2.0,
        p05_ms=1.9,
        p95_ms=2.2,
        ratio=1.0,
        ratio_low=1.0,
        ratio_high=1.0,
    )
    faster = {"median_ms": 0.5, "p05_ms": 0.4, "p95_ms": 0.6, "ratio": 4.0, "ratio_low": 3.9, "ratio_high": 4.1}
    student = teacher.model_copy(update={"variant": "student", "significant": True, **faster})
    pruned = AttributionRow(variant="pruned", metric=0.8, reasons={"latency_ms": "not asked for"})
    final = AttributionRow(
        variant="student",
        metric=0.91,
        latency_ms=0.5,
        ratio=4.0,
        ratio_low=3.9,
        ratio_high=4.1,
        size_bytes=120_000,
        parameters=100_000,
        macs=20_000_000,
        integer_coverage=1.0,
    )
    layer = LayerParity(name="conv1", op="Conv", max_lsb=1, exact=0.9999, accumulators=True, passed=True)
    fields: dict[str, Any] = {
        "metric": MetricValues(name="accuracy", unit="share", teacher=0.93, student=0.91),
        "latency": (teacher, student),
        "integer_coverage": 1.0,
        "parity": Parity(
            passed=True,
            layers=(layer,),
            agreement=0.999,
            metric_delta=-0.0001,
            first_divergence=None,
            samples=1000,
            mode="optimized",
        ),
        "size_bytes": 120_000,
        "parameters": 100_000,
        "macs": 20_000_000,
        "seconds": {"00-prune": 1.5},
        "declined": (Declined(pass_name="quantize", layer="softmax", reason="float | faster"),),
        "machine": machine_fingerprint(),
        "target": "x86-avx2",
        "seed": 0,
        "attribution": (AttributionRow(variant="teacher_fp32", metric=0.93, latency_ms=2.0, ratio=1.0), pruned, final),
        "conditions": Conditions(
            training_epochs=4,
            training_seconds=100.0,
            train_samples=45_000,
            validation_samples=5_000,
            evaluation_samples=10_000,
            protocol="in turn",
        ),
        "passes": (
            PassRecord(
                index=0,
                pass_name="prune",
                stage="MODULE",
                seconds=1.5,
                parameters=1,
                macs=1,
                size_bytes=4,
                metric=None,
                details={"kept": [1, 2]},
            ),
        ),
        "notes": ("a note",),
    }
    return Report(**{**fields, **changes})


def a_promise(**changes: Any) -> Promise:
    """Four networks were tried for at most one point and at least three times; the second keeps both, one fails."""

    def tried(name: str, metric: float, ratio: float, **more: Any) -> TriedStudent:
        fields: dict[str, Any] = {
            "name": name,
            "what": f"how {name} is made",
            "metric": metric,
            "drop": 0.93 - metric,
            "drop_high": 0.935 - metric,
            "ratio": ratio,
            "ratio_low": 0.97 * ratio,
            "ratio_high": 1.03 * ratio,
            "size_bytes": 120_000,
            "macs": 20_000_000,
            "epochs": 4.5,
            "seconds": 61.0,
        }
        return TriedStudent(**{**fields, **more})

    fields: dict[str, Any] = {
        "kept": True,
        "chosen": "narrow",
        "free": "speed",
        "metric": "accuracy",
        "teacher": 0.93,
        "clauses": (
            Clause(name="max_drop", bound=1.0, validation=0.31, certain=0.83, held=True),
            Clause(
                name="min_speedup", bound=3.0, validation=4.13, certain=4.01, held=True, evaluation=4.07,
                held_on_evaluation=True,
            ),
        ),
        "tried": (
            tried("static INT8", 0.931, 2.11, on_front=True, fate="breaks min_speedup"),
            tried("narrow", 0.9269, 4.13, on_front=True, fate="chosen"),
            tried("shallow", 0.87, 3.9, fate="breaks max_drop"),
            TriedStudent(name="odd", what="how odd is made", epochs=0, seconds=3.0, fate="does not compile"),
        ),
        "validation_samples": 5123,
        "budget": "15m",
        "seconds": 733.0,
    }  # fmt: skip
    return Promise(**{**fields, **changes})


def some_layer_times() -> LayerTimes:
    """Two layers of a teacher in float and of a student that has one of them, in integers."""

    def layer(name: str, operator: str, milliseconds: float, integer: bool) -> LayerTime:
        return LayerTime(layer=name, operators=(operator,), milliseconds=milliseconds, integer=integer)

    teacher = (layer("stem.conv", "Conv", 1.234, False), layer("block.conv", "Conv", 0.567, False))
    student = (layer("stem.conv", "QLinearConv", 0.321, True),)
    return LayerTimes(
        batch=1,
        threads=2,
        networks=(
            NetworkTimes(variant="teacher_fp32", layers=teacher, call_ms=2.0),
            NetworkTimes(variant="student", layers=student, call_ms=0.5),
        ),
        reasons={"teacher_ptq": "it was refused"},
        conditions="by a profiler",
    )


def some_diagnostics() -> Diagnostics:
    """Accuracy of two classes."""

    def row(label: int, teacher: float, student: float) -> ClassAccuracy:
        difference = Interval(mean=student - teacher, low=student - teacher - 0.01, high=student - teacher + 0.01)
        return ClassAccuracy(label=label, samples=997, teacher=teacher, student=student, difference=difference)

    return Diagnostics(samples=1994, accuracy_by_class=(row(0, 0.95, 0.9123), row(3, 0.91, 0.9234)))


def a_full_report(**changes: Any) -> Report:
    """A report that has every part that the page shows."""
    parts = {"promise": a_promise(), "layer_times": some_layer_times(), "diagnostics": some_diagnostics()}
    return a_report(**{**parts, **changes})


def with_texts(document: Any, text: str) -> Any:
    """A report's JSON in which every free text is `text`: names, reasons, notes, conditions."""
    if isinstance(document, dict):
        fixed = (*FIXED, "name") if "bound" in document else FIXED
        return {key: value if key in fixed else with_texts(value, text) for key, value in document.items()}
    if isinstance(document, list):
        return [with_texts(value, text) for value in document]
    return text if isinstance(document, str) else document


FIXED = ("variant", "mode", "unit", "runtime")
"""fields whose values are words of the schema"""
