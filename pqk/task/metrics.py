"""Metrics, losses and decisions, and a model's predictions on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from pqk.data.data import Data
from pqk.data.structures import Inputs, Outputs, concatenate, first_tensor, widened
from pqk.errors import InputError, nearest
from pqk.settings import CONFIG, in_words
from pqk.task.classes import IGNORED, axis_by_labels, shown

SAY_AXIS = "pass Task(class_axis=…): 1 for [B, C, H, W], 2 for [B, T, C]"


@in_words
@dataclass(frozen=True, config=CONFIG)
class Metric:
    """A number that says how good outputs are; higher is better."""

    name: str
    """what reports call it"""
    unit: str
    """what it counts; "share" means 0 to 1, shown as a percentage"""
    function: Callable[[Outputs, Any], float]
    """(outputs of all samples, targets of all samples) -> value; tensors are concatenated over batches"""


def check_labels(targets: Tensor, classes: int, what: str = "the", ignored: int = IGNORED) -> None:
    """Raises `InputError`, naming the data as `what`, where a label is outside 0 to `classes` - 1 and not `ignored`."""
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        targets = targets[targets != ignored]
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise InputError(
            f"{what} data: labels run from {int(targets.min())} to {int(targets.max())} and the model has {classes} "
            f"classes (0 to {classes - 1})"
        )


def accuracy(outputs: Outputs, targets: Tensor, axis: int | None = None, ignored: int = IGNORED) -> float:
    """The share of labels that are the class with the largest logit.

    Args:
        outputs: a model's outputs, of which the first tensor is logits: [B, C], or with further axes of positions.
        targets: labels int64, of the logits' shape without the axis of classes.
        axis: that of the classes; None: as the labels show.
        ignored: the label of what has none, which does not count.

    Returns:
        0 to 1.

    Raises:
        InputError: the axis cannot be told, or nothing is labelled.
    """
    logits = first_tensor(outputs)
    if axis is None and logits.dim() > 2:
        axis = _axis(logits, targets)
    right = argmax(outputs, axis) == targets
    labelled = targets != ignored
    if not bool(labelled.all()):
        right = right[labelled]
        if not right.numel():
            raise InputError(f"accuracy: all {targets.numel()} labels are {ignored}, the label of what has none")
    return float(right.double().mean())


METRICS = (Metric("accuracy", "share", accuracy),)


def cross_entropy(outputs: Outputs, targets: Tensor, axis: int | None = None, ignored: int = IGNORED) -> Tensor:
    """Computes the cross-entropy of each sample, the default loss.

    Args:
        outputs: a model's outputs, of which the first tensor is logits: [B, C], or with further axes of positions.
        targets: labels int64, of the logits' shape without the axis of classes.
        axis: that of the classes; None: as the labels show.
        ignored: the label of what has none: a sample's loss is the mean over its labelled positions.

    Returns:
        Losses [B], in float32 at least.

    Raises:
        InputError: a label is outside 0 to C - 1, labels do not fit, or the axis cannot be told.
    """
    logits = widened(first_tensor(outputs))
    if logits.dim() <= 2:
        check_labels(targets, logits.shape[1], ignored=ignored)
        return F.cross_entropy(logits, targets, reduction="none", ignore_index=ignored)
    axis = _axis(logits, targets) if axis is None else axis
    logits = logits.movedim(axis, 1)
    if targets.is_floating_point():  # a share of each class
        return F.cross_entropy(logits, targets.movedim(axis, 1), reduction="none").flatten(1).mean(1)
    if targets.shape != logits[:, 0].shape:
        raise InputError(
            f"task: with classes on axis {axis}, labels must be {shown(logits[:, 0].shape)}, and are "
            f"{shown(targets.shape)}"
        )
    check_labels(targets, logits.shape[1], ignored=ignored)
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=ignored).flatten(1)
    labelled = (targets != ignored).flatten(1)
    return losses.mean(1) if bool(labelled.all()) else losses.sum(1) / labelled.sum(1).clamp_min(1)


def _axis(logits: Tensor, targets: Tensor) -> int:
    axis = axis_by_labels(logits.shape, targets.shape)
    if isinstance(axis, str):
        raise InputError(f"task: {axis}; {SAY_AXIS}")
    return axis


def argmax(outputs: Outputs, axis: int | None = None) -> Tensor:
    """Decides for the class with the largest logit, the default decision.

    Args:
        outputs: a model's outputs, of which the first tensor is logits: [B, C], or with further axes of positions.
        axis: that of the classes; None: the last of [B, C].

    Returns:
        Classes int64, of the logits' shape without that axis.

    Raises:
        InputError: there are more axes than two, and none is named.
    """
    logits = first_tensor(outputs)
    if axis is None and logits.dim() > 2:
        raise InputError(f"task: an argmax of outputs {shown(logits.shape)} needs the axis of the classes; {SAY_AXIS}")
    return logits.argmax(-1 if axis is None else axis)


def named_metric(name: str) -> Metric:
    """The built-in metric of that name. Raises `InputError` naming the nearest known one."""
    for metric in METRICS:
        if metric.name == name:
            return metric
    raise InputError(f'task: unknown metric "{name}"{nearest(name, (m.name for m in METRICS))}')


Kept = Callable[[Outputs, Any], Outputs]
"""(outputs of a batch, its targets) -> what is kept of the outputs when all samples are judged"""


@runtime_checkable
class KeptOfModel(Protocol):
    """What is kept of a model's answers, which it asks itself, more than once."""

    def asked(self, model: Callable[..., Outputs], inputs: Inputs, targets: Any) -> Outputs:
        """What is kept of a batch."""


def predict(
    model: Callable[..., Outputs], data: Data, limit: int | None = None, kept: Kept | None = None
) -> tuple[Outputs, Any]:
    """Outputs and targets of all (or the first `limit`) samples, concatenated over batches, in the stored order.

    Where batches have other lengths, outputs are padded by zeros, and integer targets by the label of what has none.
    `kept` makes less of each batch's outputs first; by default they are kept whole.
    """
    outputs, targets, samples = [], [], 0
    with torch.no_grad():  # not inference mode: what a module keeps of this call must be fit for training
        for batch in data.batches():
            if isinstance(kept, KeptOfModel):
                outputs.append(kept.asked(model, batch.inputs, batch.targets))
            else:
                found = model(*batch.inputs)
                outputs.append(found if kept is None else kept(found, batch.targets))
            targets.append(batch.targets)
            samples += len(batch.inputs[0])
            if limit is not None and samples >= limit:
                break
    return concatenate(outputs), concatenate(targets, IGNORED)


ROWS = 1024
"""positions whose divergences are computed at once, where some do not count: each has a score for every class"""


def distance(outputs: Any, teacher: Any, axis: int | None = None, counted: Tensor | None = None) -> float:
    """How far outputs are from the teacher's, on the first tensor: mean KL(teacher, student) in nats for logits
    [B, C], or with classes on `axis`, over all positions, or those `counted`; mean squared error otherwise."""
    got, want = first_tensor(outputs).float(), first_tensor(teacher).float()
    if counted is not None and axis is not None:
        places = counted.flatten().nonzero().squeeze(1)
        got, want = (t.movedim(axis, -1).flatten(0, -2) for t in (got, want))
        total = sum(_divergence(got[some], want[some], "sum") for some in places.split(ROWS))
        return total / max(1, len(places))
    if want.ndim > 2 and axis is not None:
        got, want = (t.movedim(axis, -1).flatten(0, -2) for t in (got, want))
    if want.ndim == 2 and want.shape[1] > 1:
        return _divergence(got, want, "batchmean")
    return float(F.mse_loss(got, want))


def _divergence(got: Tensor, want: Tensor, reduction: str) -> float:
    return float(F.kl_div(got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction=reduction))
