"""What a model is for: its example inputs, data, metric, loss and decision."""

from __future__ import annotations

from pqk.task.task import (
    METRICS,
    TWO_VIEWS,
    Metric,
    Outputs,
    Task,
    argmax,
    concatenate,
    cross_entropy,
    first_tensor,
    named_metric,
    predict,
    tensors,
    widened,
)

__all__ = [
    "METRICS",
    "TWO_VIEWS",
    "Metric",
    "Outputs",
    "Task",
    "argmax",
    "concatenate",
    "cross_entropy",
    "first_tensor",
    "named_metric",
    "predict",
    "tensors",
    "widened",
]
