"""What the model is for: example inputs, data, metric, loss. Context for every pass; never changed by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pqk.data.data import Batch, Data, as_data, split
from pqk.data.structures import Inputs, Outputs, first_tensor, joined, map_tensors, tensors
from pqk.data.views import TeachersView, TwoViews, Views
from pqk.errors import InputError, nearest
from pqk.task.axes import BATCH, batch_axes
from pqk.task.checks import check_labels, check_views, try_forward
from pqk.task.metrics import Metric, argmax, cross_entropy, named_metric, predict

TWO_VIEWS = (
    "teacher and student see different views of the same samples: each row is evaluated on its own view, and what it "
    "costs to compute a view is in no latency"
)


class Task:
    """Data and judgement for one model.

    Args:
        train: a `DataLoader`, a list of batches or `ArrayData`; None: nothing can be trained, calibration still works.
        evaluation: touched by the final report only.
        validation: calibration, sensitivity, and every choice; split off `train` (`validation_share`) if None.
        metric: a `Metric` or the name of one ("accuracy").
        loss: (outputs, targets) -> per-sample loss [B]; cross-entropy by default.
        decision: outputs -> what the user acts on, compared for parity; argmax by default.
        example: example inputs (batch of at least 2); the first two samples of the evaluation data if None.
        input_names, output_names: names in `model.onnx`.
        dynamic_axes: names of free axes by input and axis, `{"input_ids": {0: "batch", 1: "sequence"}}`; the first
            axis is the batch, whether it is said or not, and the only free one by default.
        timed: name -> inputs of other sizes than the example's, at which teacher and student are timed, too.
        preprocessing: how to make model inputs from raw ones (JSON), written into the manifest.
        extra_files: student -> contents by name of what else belongs into the artifact, such as a tokenizer.
        notes: what the report should say of the data.
        views: what teacher and student see of a batch, where that differs; `example` is then as the student sees it.
    Raises `InputError` for empty or unusable data.
    """

    def __init__(
        self,
        train: Any,
        evaluation: Any,
        validation: Any = None,
        *,
        metric: Metric | str = "accuracy",
        loss: Callable[[Outputs, Any], Tensor] = cross_entropy,
        decision: Callable[[Outputs], Tensor] = argmax,
        example: Tensor | Inputs | None = None,
        input_names: tuple[str, ...] | None = None,
        output_names: tuple[str, ...] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
        timed: Mapping[str, Inputs] | None = None,
        preprocessing: dict[str, Any] | None = None,
        extra_files: Callable[[nn.Module], Mapping[str, bytes]] | None = None,
        notes: Sequence[str] = (),
        validation_share: float = 0.1,
        views: Views | None = None,
    ) -> None:
        self.train: Data | None = None if train is None else as_data(train, "task train")
        self.evaluation = as_data(evaluation, "task evaluation")
        if validation is not None:
            self.validation = as_data(validation, "task validation")
        elif self.train is not None:
            self.train, self.validation = split(self.train, validation_share)
        else:
            raise InputError(
                "task: neither training nor validation data; calibration needs some samples: pass validation=… "
                "(unlabelled inputs do). Without training data a recipe can prune by magnitude, capture, quantize and "
                "convert, but not distill"
            )
        self.views = views
        if views is not None:
            self.train = None if self.train is None else TwoViews(self.train, views)
            self.validation, self.evaluation = TwoViews(self.validation, views), TwoViews(self.evaluation, views)
        if not isinstance(metric, Metric | str):
            raise InputError(
                f"task: metric is a {type(metric).__name__}; pass its name, or Metric(name, unit, function)"
            )
        self.metric = metric if isinstance(metric, Metric) else named_metric(metric)
        self.loss, self.decision = loss, decision
        if example is None:
            example = _first_two(self.evaluation)
        self.example: Inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
        if any(len(t) < 2 for t in self.example):
            raise InputError(
                f"task: example inputs need a batch of at least 2, to show which axis is the batch; got shapes "
                f"{[tuple(t.shape) for t in self.example]}"
            )
        names = ("input",) if len(self.example) == 1 else tuple(f"input_{i}" for i in range(len(self.example)))
        self.input_names, self.output_names = tuple(input_names or names), output_names
        if len(self.input_names) != len(self.example) or len(set(self.input_names)) != len(self.example):
            raise InputError(f"task: input_names {self.input_names} must be {len(self.example)} names, all different")
        self.axes = _axes(self.example, self.input_names, dynamic_axes or {})
        self.timed = dict(timed or {})
        self.preprocessing, self.extra_files = preprocessing or {}, extra_files
        self.notes = tuple(notes) if views is None else (*notes, TWO_VIEWS)

    def need_train(self, where: str) -> Data:
        """The training data. Raises `InputError` where there is none."""
        if self.train is None:
            raise InputError(
                f"{where}: there is no training data. Without it a recipe can prune by magnitude or batch-norm scale, "
                "capture, quantize (post-training calibration) and convert: take the training passes out"
            )
        return self.train

    def teachers(self, data: Data) -> Data:
        """`data` as the teacher sees it: what to score or calibrate the teacher itself on."""
        return data if self.views is None else TeachersView(data)

    def calibration(self, limit: int, *, teacher: bool = False) -> Iterator[Inputs]:
        """Input tuples of at most `limit` validation samples, un-augmented, in a fixed order; `teacher`: its view."""
        data = self.teachers(self.validation) if teacher else self.validation
        for batch in data.batches():
            if limit <= 0:
                return
            yield tuple(t[:limit] for t in batch.inputs)
            limit -= len(batch.inputs[0])

    def sized(self, batch: int, name: str = "") -> Inputs:
        """The example inputs, or those timed under `name`, repeated or cut to `batch` samples."""
        inputs = self.timed[name] if name else self.example
        return tuple(torch.cat([t] * -(-batch // len(t)))[:batch] for t in inputs)

    def feeds(self, batch: int, name: str = "") -> dict[str, NDArray[Any]]:
        """`sized(batch, name)` as arrays by input name, as ONNX runtimes take them."""
        return {key: t.numpy() for key, t in zip(self.input_names, self.sized(batch, name), strict=True)}

    def score(self, model: Callable[..., Outputs], data: Data, limit: int | None = None) -> float:
        """The metric of `model` on (at most `limit` samples of) `data`."""
        outputs, targets = predict(model, data, limit)
        return self.metric.function(outputs, targets)

    def check(self, teacher: nn.Module) -> None:
        """Run the teacher once on the example and one batch of each data, and look at all labels that are judged on.

        Raises `InputError` where they do not fit.
        """
        outputs = try_forward(teacher, self.example, "example")
        for name, inputs in self.timed.items():
            try_forward(teacher, inputs, name)
        self._check_names(outputs)
        if not bool(first_tensor(outputs).isfinite().all()):
            raise InputError("teacher: its outputs on the example inputs are NaN or infinite")
        for what, data in (("train", self.train), ("validation", self.validation), ("evaluation", self.evaluation)):
            if data is None:
                continue
            batch = next(data.batches())
            check_views(what, batch)
            self._check_batch(what, teacher, batch.for_teacher())
            if self.loss is cross_entropy:
                self._labels_fit(what, data, first_tensor(outputs).shape[1])

    def _check_names(self, outputs: Outputs) -> None:
        names = self.output_names
        if names is None:
            return
        if len(names) != len(tensors(outputs)) or len({*names, *self.input_names}) != len(names) + len(self.example):
            raise InputError(
                f"task: output_names {names} must be {len(tensors(outputs))} names, all different, and none of the "
                f"inputs' ({', '.join(self.input_names)})"
            )

    @staticmethod
    def _labels_fit(what: str, data: Data, classes: int) -> None:
        """All labels, before any training; of a loader's training data the first batch: an epoch finds the others."""
        stored = getattr(data, "targets", None)
        batches: Iterator[Any] = (b.targets for b in data.batches()) if stored is None else iter([stored])
        for labels in itertools.islice(batches, 1 if what == "train" else None):
            if isinstance(labels, Tensor):
                check_labels(labels, classes, what)

    def _check_batch(self, what: str, teacher: nn.Module, batch: Batch) -> None:
        if len(batch.inputs) != len(self.example):
            raise InputError(
                f"{what} data: it gives {len(batch.inputs)} inputs and the example has {len(self.example)}"
            )
        for name, axes, t, e in zip(self.input_names, self.axes, batch.inputs, self.example, strict=True):
            fits = t.dim() == e.dim() and all(a or n == m for a, n, m in zip(axes, t.shape, e.shape, strict=True))
            if t.dtype != e.dtype or not fits:
                raise InputError(
                    f"{what} data: input {name} is {tuple(t.shape)} {t.dtype}, the example {tuple(e.shape)} {e.dtype}"
                )
        outputs = try_forward(teacher, tuple(t[:2] for t in batch.inputs), what)
        labelled = batch.targets is not None
        if not labelled and what != "evaluation":
            return
        targets = map_tensors(lambda t: t[:2], batch.targets) if labelled else None
        with torch.inference_mode():
            try:
                losses = self.loss(outputs, targets) if labelled else None
                value = self.metric.function(outputs, targets)
            except InputError:
                raise
            except Exception as error:
                why = error if labelled else f"it has no targets, and {self.metric.name} asked for them ({error})"
                raise InputError(f"{what} data: the task cannot score the teacher's output: {why}") from error
        if labelled and (not isinstance(losses, Tensor) or losses.dim() == 0):
            raise InputError("task: the loss must be per sample: a tensor [B]")
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise InputError(
                f"task: the metric {self.metric.name} must be a finite number; on {what} data it is {value}"
            )


def _axes(
    example: Inputs, names: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[tuple[str | None, ...], ...]:
    """For each input the names of its axes, None for one of a fixed size."""
    axes = {name: list(a) for name, a in zip(names, batch_axes(example), strict=True)}
    for name, named in dynamic.items():
        if name not in axes:
            raise InputError(f'task: dynamic_axes names an input "{name}"{nearest(name, axes)}')
        for axis, called in named.items():
            if not 0 <= axis < len(axes[name]) or (axis == 0) != (called == BATCH):
                raise InputError(
                    f'task: dynamic_axes calls axis {axis} of {name} "{called}"; axis 0 is the "{BATCH}", and {name} '
                    f"has {len(axes[name])} axes"
                )
            axes[name][axis] = called
    return tuple(tuple(a) for a in axes.values())


def _first_two(data: Data) -> Inputs:
    """The first two samples of `data`, from as many batches as that takes."""
    found: list[Inputs] = []
    for batch in data.batches():
        found.append(tuple(t[:2] for t in batch.inputs))
        if sum(len(f[0]) for f in found) >= 2:
            break
    return tuple(joined(list(parts))[:2].clone() for parts in zip(*found, strict=True))
