"""What a model is for: its example inputs, data, metric, loss and decision."""

from __future__ import annotations

from pqk.data.structures import first_tensor, tensors, widened
from pqk.task.metrics import Metric, argmax, cross_entropy
from pqk.task.task import Task

__all__ = ["Metric", "Task", "argmax", "cross_entropy", "first_tensor", "tensors", "widened"]
