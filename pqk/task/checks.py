"""Checks of a task's data before anything is trained."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pqk.data.data import Batch, Data
from pqk.data.structures import Inputs, Outputs, tensors
from pqk.errors import InputError
from pqk.task.metrics import Metric, check_labels

QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
"""where the modules are that torch's own quantization leaves"""
TRAINED = ("train", "retained")
"""data that is trained on alone, which may be another each time it is read"""


def check_arguments(functions: Mapping[str, object], tables: Mapping[str, object], names: Mapping[str, object]) -> None:
    """Raises `InputError`, naming it, for an argument that is not None and not of the kind that it is given as.

    `functions` can be called, `tables` are mappings, and `names` are sequences of texts, not one text.
    """
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise InputError(f"task: {name} is a {type(value).__name__} and must be a function")
    for name, value in tables.items():
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"task: {name} is a {type(value).__name__} and must be a dict")
    for name, value in names.items():
        texts = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
        if value is not None and not texts:
            raise InputError(f"task: {name} is {value!r} and must be texts in a tuple")


def check_module(model: object, whose: str = "teacher") -> None:
    """Raises `InputError` for what is no float32 module of torch's that could be rewritten, and says what to pass.

    `whose` it is, "teacher" or "student", begins the message.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"{whose}: a {type(model).__name__} is no torch module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{whose}: a scripted module cannot be rewritten; pass the module that it was scripted from")
    half = next((n for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise InputError(f"{whose}: {half} is in half precision; pass {whose}.float(), pqk quantizes from float32")
    for path, module in model.named_modules():
        if type(module).__module__.startswith(QUANTIZED):
            raise InputError(
                f"{whose}: {path or 'it'} is a {type(module).__name__} of {type(module).__module__}: it is quantized "
                "already; pass the float32 module that it was made from, pqk quantizes it"
            )
    strange = next((n for n, t in model.state_dict().items() if not isinstance(t, Tensor)), None)
    if strange is not None:
        raise InputError(
            f"{whose}: its state has {strange}, which is no tensor, and the artifact keeps tensors alone; take "
            "get_extra_state out of the module"
        )


def check_views(what: str, batch: Batch) -> None:
    """Raises `InputError` where teacher and student see inputs of other shapes."""
    sides = [[(tuple(t.shape), t.dtype) for t in x] for x in (batch.for_teacher().inputs, batch.inputs)]
    if sides[0] != sides[1]:
        raise InputError(
            f"{what} data: the teacher's view is {sides[0]} and the student's {sides[1]}; both are compared and "
            "timed on inputs of the same shapes: bring the cheaper view to them (repeat, enlarge, pad)"
        )


class UnfitInputs(InputError):
    """A model cannot take the inputs of its task."""


def try_forward(model: nn.Module, inputs: Inputs, what: str, whose: str = "teacher") -> Outputs:
    """The outputs of a model. Raises `UnfitInputs` where it cannot take the inputs: whatever its own code raised.

    `whose` it is, "teacher" or "student", begins the message.
    """
    if by_name := _only_by_name(model):
        raise InputError(
            f"{whose}: {type(model).__name__}.forward takes {', '.join(by_name)} by keyword alone, and pqk passes "
            "all inputs by position, in the order of the task's example: wrap it in a module whose forward takes them "
            f"so, such as `def forward(self, x, {by_name[0]}): return self.model(x, {by_name[0]}={by_name[0]})`"
        )
    try:
        with torch.no_grad():  # not inference mode: what a module keeps of this call must be fit for training
            return model(*inputs)
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in inputs)
        raise UnfitInputs(f"{whose}: the {what} inputs ({shapes}) do not fit it: {error}") from error


def _only_by_name(model: nn.Module) -> list[str]:
    """The inputs that `forward` needs and takes by keyword alone."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def check_batches(
    what: str, data: Data, check_inputs: Callable[[str, Inputs], None], classes: int | None, ignored: int
) -> None:
    """Raises `InputError`, naming data and batch, for inputs or labels that the first batch does not show.

    Inputs must be as `check_inputs` wants them, targets as those of the first batch but for free sizes, all of them
    finite, and labels one of `classes`, or `ignored`. A training loader that reads its samples from elsewhere is looked
    at in its first batch alone; what is in memory, and data that choices and the report are made on, as a whole.
    """
    stored = getattr(data, "targets", None)
    if stored is not None:  # tensors, whose shapes are one and whose values were looked at
        if classes is not None and isinstance(stored, Tensor):
            check_labels(stored, classes, what, ignored)
        return
    whole = what not in TRAINED or data.in_memory
    first: Batch | None = None
    for number in itertools.count():
        try:
            if number == 0:
                batches = data.batches()
            batch = next(batches, None)
        except InputError as error:  # what a loader gives is looked at where it is read
            raise InputError(f"{what} {error}" if str(error).startswith("data: ") else str(error)) from error
        if batch is None or (number and not whole):
            return
        first = first or batch
        check_inputs(f"{what} data: batch {number}", batch.inputs)
        _check_targets(f"{what} data: batch {number}", batch.targets, first.targets)
        if classes is not None and isinstance(batch.targets, Tensor):
            check_labels(batch.targets, classes, what, ignored)


def _check_targets(where: str, targets: Any, first: Any) -> None:
    """Raises `InputError` where targets are of another kind than those of the first batch, or not finite."""
    got, want = tensors(targets), tensors(first)
    kinds = [[(t.dtype, t.dim()) for t in side] for side in (got, want)]
    if kinds[0] != kinds[1]:
        shown = [" and ".join(f"{t.dtype} with {t.dim()} axes" for t in side) or "none" for side in (got, want)]
        raise InputError(f"{where}: its targets are {shown[0]}, and those of batch 0 {shown[1]}".replace("torch.", ""))
    for t in got:
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise InputError(f"{where}: a target is NaN or infinite; clean the data first")


def check_scores(
    what: str, outputs: Outputs, targets: Any, loss: Callable[[Outputs, Any], Tensor], metric: Metric
) -> None:
    """Raises `InputError` where loss and metric cannot judge outputs of some samples.

    Unlabelled data is judged by its metric alone, and only for evaluation.
    """
    labelled = targets is not None
    if not labelled and what != "evaluation":
        return
    with torch.inference_mode():
        try:
            losses = loss(outputs, targets) if labelled else None
            value = metric.function(outputs, targets)
        except InputError:
            raise
        except Exception as error:
            why = error if labelled else f"it has no targets, and {metric.name} asked for them ({error})"
            raise InputError(f"{what} data: the task cannot score the teacher's output: {why}") from error
    if labelled and (not isinstance(losses, Tensor) or losses.dim() == 0):
        raise InputError("task: the loss must be per sample: a tensor [B]")
    if not isinstance(value, float | int) or not math.isfinite(value):
        raise InputError(f"task: the metric {metric.name} must be a finite number; on {what} data it is {value}")
