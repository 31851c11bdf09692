"""Metrics, losses and decisions, and a model's predictions on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.data.data import Data
from pqk.data.structures import Outputs, concatenate, first_tensor, widened
from pqk.errors import InputError, nearest


@dataclass(frozen=True)
class Metric:
    """A number that says how good outputs are; higher is better."""

    name: str
    """what reports call it"""
    unit: str
    """what it counts; "share" means 0 to 1, shown as a percentage"""
    function: Callable[[Outputs, Any], float]
    """(outputs of all samples, targets of all samples) -> value; tensors are concatenated over batches"""


def check_labels(targets: Tensor, classes: int, what: str = "the") -> None:
    """Raises `InputError`, naming the data as `what`, where a label is outside 0 to `classes` - 1."""
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise InputError(
            f"{what} data: labels run from {int(targets.min())} to {int(targets.max())} and the model has {classes} "
            f"classes (0 to {classes - 1})"
        )


def _accuracy(outputs: Outputs, targets: Tensor) -> float:
    return float((first_tensor(outputs).argmax(-1) == targets).double().mean())


METRICS = (Metric("accuracy", "share", _accuracy),)


def cross_entropy(outputs: Outputs, targets: Tensor) -> Tensor:
    """Computes the cross-entropy of each sample, the default loss.

    Args:
        outputs: a model's outputs, of which the first tensor is logits [B, C].
        targets: labels int64 [B].

    Returns:
        Losses [B], in float32 at least.

    Raises:
        InputError: a label is outside 0 to C - 1.
    """
    logits = widened(first_tensor(outputs))
    check_labels(targets, logits.shape[1])
    return F.cross_entropy(logits, targets, reduction="none")


def argmax(outputs: Outputs) -> Tensor:
    """Decides for the class with the largest logit, the default decision.

    Args:
        outputs: a model's outputs, of which the first tensor is logits [B, …, C].

    Returns:
        Classes int64 [B, …].
    """
    return first_tensor(outputs).argmax(-1)


def named_metric(name: str) -> Metric:
    """The built-in metric of that name. Raises `InputError` naming the nearest known one."""
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise InputError(f'task: unknown metric "{name}"{nearest(name, (m.name for m in METRICS))}')


def predict(model: Callable[..., Outputs], data: Data, limit: int | None = None) -> tuple[Outputs, Any]:
    """Outputs and targets of all (or the first `limit`) samples, concatenated over batches, in the stored order."""
    outputs, targets, samples = [], [], 0
    with torch.inference_mode():
        for batch in data.batches():
            outputs.append(model(*batch.inputs))
            targets.append(batch.targets)
            samples += len(batch.inputs[0])
            if limit is not None and samples >= limit:
                break
    return concatenate(outputs), concatenate(targets)


def distance(outputs: Any, teacher: Any) -> float:
    """How far outputs are from the teacher's, on the first tensor: mean KL(teacher, student) in nats for logits
    [B, C], mean squared error otherwise."""
    got, want = first_tensor(outputs).float(), first_tensor(teacher).float()
    if want.ndim == 2 and want.shape[1] > 1:
        return float(F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="batchmean"))
    return float(F.mse_loss(got, want))
