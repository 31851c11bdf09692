"""What the model is for: example inputs, data, metric, loss. Context for every pass; never changed by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from pqk.data.data import Data, as_data, split
from pqk.data.structures import Inputs, Outputs, first_tensor, joined
from pqk.data.views import TeachersView, TwoViews, Views
from pqk.errors import InputError
from pqk.task.checks import check_all_labels, check_scores, check_views, try_forward
from pqk.task.metrics import Metric, argmax, cross_entropy, named_metric, predict
from pqk.task.signature import Signature

TWO_VIEWS = (
    "teacher and student see different views of the same samples: each row is evaluated on its own view, and what it "
    "costs to compute a view is in no latency"
)


class Task:
    """Data and judgement for one model.

    Inputs are tensors [B, …]. Nothing is changed by a compile, which may read the data in any order and many times.

    Args:
        train: a `DataLoader`, a list of batches or `ArrayData`; None: nothing can be trained, calibration still works.
        evaluation: likewise; touched by the final report only.
        validation: calibration, sensitivity, and every choice; split off `train` (`validation_share`) if None.
        metric: a `Metric` or the name of one ("accuracy").
        loss: (outputs, targets) -> per-sample loss [B], float32; cross-entropy by default.
        decision: outputs -> what the user acts on, a tensor [B, …] compared for parity; argmax by default.
        example: example inputs (batch of at least 2); the first two samples of the evaluation data if None.
        input_names, output_names: names in `model.onnx`.
        dynamic_axes: names of free axes by input and axis, `{"input_ids": {0: "batch", 1: "sequence"}}`; the first
            axis is the batch, whether it is said or not, and the only free one by default.
        timed: name -> inputs of other sizes than the example's, at which teacher and student are timed, too.
        preprocessing: how to make model inputs from raw ones (JSON), written into the manifest.
        extra_files: student -> contents by name of what else belongs into the artifact, such as a tokenizer.
        notes: what the report should say of the data.
        validation_share: share of `train` that is split off where `validation` is None, between 0 and 1.
        views: what teacher and student see of a batch, where that differs; `example` is then as the student sees it.

    Raises:
        InputError: data is missing, empty or unusable; a metric, name or axis does not fit.
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
        whole = None if train is None else as_data(train, "task train")
        self.evaluation = as_data(evaluation, "task evaluation")
        self.train, self.validation = _with_validation(whole, validation, validation_share)
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
        inputs = _first_two(self.evaluation) if example is None else example
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        self.signature = Signature.of(inputs, input_names, output_names, dynamic_axes, timed)
        self.preprocessing, self.extra_files = preprocessing or {}, extra_files
        self.notes = tuple(notes) if views is None else (*notes, TWO_VIEWS)

    @property
    def example(self) -> Inputs:
        """The example inputs, each [B, …] with B at least 2."""
        return self.signature.example

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs' names in `model.onnx`."""
        return self.signature.input_names

    @property
    def output_names(self) -> tuple[str, ...] | None:
        """The outputs' names in `model.onnx`; None: those of the model's own structure."""
        return self.signature.output_names

    @property
    def axes(self) -> tuple[tuple[str | None, ...], ...]:
        """For each input the names of its axes; None: of a fixed size."""
        return self.signature.axes

    @property
    def timed(self) -> Mapping[str, Inputs]:
        """Name -> inputs of other sizes, at which teacher and student are timed, too."""
        return self.signature.timed

    def sized(self, batch: int, name: str = "") -> Inputs:
        """The example inputs, or those timed under `name`, repeated or cut to `batch` samples."""
        return self.signature.sized(batch, name)

    def feeds(self, batch: int, name: str = "") -> dict[str, NDArray[Any]]:
        """`sized(batch, name)` as arrays by input name, as ONNX runtimes take them."""
        return self.signature.feeds(batch, name)

    def need_train(self, where: str) -> Data:
        """Gives the training data, for what cannot do without.

        Args:
            where: who needs it, for the message.

        Returns:
            The data.

        Raises:
            InputError: there is none.
        """
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

    def score(self, model: Callable[..., Outputs], data: Data, limit: int | None = None) -> float:
        """The metric of `model` on (at most `limit` samples of) `data`."""
        outputs, targets = predict(model, data, limit)
        return self.metric.function(outputs, targets)

    def check(self, teacher: nn.Module) -> None:
        """Runs the teacher once on the example and one batch of each data, and looks at all labels that are judged on.

        Args:
            teacher: in eval mode.

        Raises:
            InputError: data, labels, names, loss or metric do not fit it.
        """
        outputs = try_forward(teacher, self.example, "example")
        for name, inputs in self.timed.items():
            try_forward(teacher, inputs, name)
        self.signature.check_outputs(outputs)
        if not bool(first_tensor(outputs).isfinite().all()):
            raise InputError("teacher: its outputs on the example inputs are NaN or infinite")
        for what, data in (("train", self.train), ("validation", self.validation), ("evaluation", self.evaluation)):
            if data is None:
                continue
            batch = next(data.batches())
            check_views(what, batch)
            batch = batch.for_teacher()
            self.signature.check_inputs(what, batch.inputs)
            check_scores(what, teacher, batch, self.loss, self.metric)
            if self.loss is cross_entropy:
                check_all_labels(what, data, first_tensor(outputs).shape[1])


def _with_validation(train: Data | None, validation: Any, share: float) -> tuple[Data | None, Data]:
    """(training data, validation data), the second split off the first where none is given."""
    if validation is not None:
        return train, as_data(validation, "task validation")
    if train is None:
        raise InputError(
            "task: neither training nor validation data; calibration needs some samples: pass validation=… "
            "(unlabelled inputs do). Without training data a recipe can prune by magnitude, capture, quantize and "
            "convert, but not distill"
        )
    return split(train, share)


def _first_two(data: Data) -> Inputs:
    """The first two samples of `data`, from as many batches as that takes."""
    parts: list[Inputs] = []
    for batch in data.batches():
        parts.append(tuple(t[:2] for t in batch.inputs))
        if sum(len(p[0]) for p in parts) >= 2:
            break
    return tuple(joined(list(each))[:2].clone() for each in zip(*parts, strict=True))
