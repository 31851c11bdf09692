"""What a model is for: its example inputs, data, metric, loss and decision."""

from __future__ import annotations

from pqk.data.structures import Outputs, concatenate, first_tensor, tensors, widened
from pqk.task.metrics import METRICS, Metric, argmax, cross_entropy, named_metric, predict
from pqk.task.task import TWO_VIEWS, Task

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
