"""What the model is for: example inputs, data, metric, loss. Context for every pass; never changed by one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from pqk.data.data import ONE_NUMBER, Batch, Data, as_data, digest_of, split
from pqk.data.structures import Inputs, Outputs, first_tensor, joined, map_tensors, tensors
from pqk.data.views import TeachersView, TwoViews, Views
from pqk.errors import InputError, Reason
from pqk.settings import in_words
from pqk.task.checks import (
    TRAINED,
    UnfitInputs,
    check_arguments,
    check_batches,
    check_scores,
    check_views,
    try_forward,
)
from pqk.task.classes import ClassAxis, ignored_by
from pqk.task.decoder_form import DecoderForm
from pqk.task.directory import GeneratingFiles, ModelDirectory
from pqk.task.metrics import (
    SAY_AXIS,
    Kept,
    Metric,
    accuracy,
    argmax,
    cross_entropy,
    distance,
    named_metric,
    predict,
)
from pqk.task.retained import retained_data
from pqk.task.signature import Signature
from pqk.task.state import held_counters

TWO_VIEWS = (
    "teacher and student see different views of the same samples: each row is evaluated on its own view, and what it "
    "costs to compute a view is in no latency"
)


@in_words
class Task:
    """Data and judgement for one model.

    Inputs are tensors [B, …]. Nothing is changed by a compile, which may read the data in any order and many times.

    Args:
        train: a `DataLoader`, a list of batches or `ArrayData`; None: nothing can be trained, calibration still works.
        evaluation: likewise; touched by the final report only, but for a contract without `validation`: then half of
            it decides which student ships, and the report is about the other half.
        validation: calibration, sensitivity, and every choice; split off `train` (`validation_share`) if None. Best of
            samples that the teacher was not trained on.
        metric: a `Metric` or the name of one ("accuracy").
        loss: (outputs, targets) -> per-sample loss [B], float32; cross-entropy by default.
        decision: outputs -> what the user acts on, a tensor [B, …] compared for parity; argmax by default.
        class_axis: the axis of the outputs that classes are on, 1 for [B, C, H, W]; None: as the labels show, which
            are of the outputs' shape without it.
        example: example inputs (batch of at least 2); the first two samples of the evaluation data if None.
        input_names, output_names: names in `model.onnx`.
        dynamic_axes: names of free axes by input and axis, `{"input_ids": {0: "batch", 1: "sequence"}}`; the first
            axis is the batch, whether it is said or not, and the only free one by default.
        timed: name -> inputs of other sizes than the example's, at which teacher and student are timed, too.
        preprocessing: how to make model inputs from raw ones (JSON), written into the manifest.
        extra_files: student -> contents by name of what else belongs into the artifact, such as a tokenizer.
        kept: (outputs of a batch, its targets) -> what is kept of them where all samples are judged, such as each
            token's loss and choice instead of all scores; metric and decision must take that, too. All by default.
        generates: the model continues texts: `model.onnx` takes and gives what attention keeps of the tokens before,
            and times are those of the example's last token after the others.
        decoder_form: how the file of a model that generates is written, such as `{"logits": "last"}` (`DecoderForm`).
        directory: that of a Hugging Face tokenizer that the texts were read with, for passes that change it.
        seq2seq: the model generates a target from a source, by an encoder and a decoder: its last two inputs are ids
            and mask of the target, and it is deployed as two files.
        notes: what the report should say of the data.
        validation_share: share of `train` that is split off where `validation` is None, between 0 and 1.
        retained: data like `train` of what the model must not forget, with or without labels; `distill` can hold the
            student to an old model there (`retain`), and says how much was forgotten.
        retained_evaluation: the samples of it that this is measured on; split off `retained` (`validation_share`) if
            None.
        critic: (tokens of a prompt int64 [P], answers int64 [N] each) -> a number for each answer, higher is better and
            the same each time, for `answers = { by = "critic", critic = "task" }` of `distill`.
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
        class_axis: int | None = None,
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
        kept: Kept | None = None,
        generates: bool = False,
        decoder_form: DecoderForm | Mapping[str, Any] | None = None,
        directory: ModelDirectory | None = None,
        retained: Any = None,
        retained_evaluation: Any = None,
        critic: Callable[[Tensor, Sequence[Tensor]], Sequence[float]] | None = None,
        seq2seq: bool = False,
    ) -> None:
        check_arguments(
            {"loss": loss, "decision": decision, "extra_files": extra_files, "critic": critic},
            {"dynamic_axes": dynamic_axes, "timed": timed, "preprocessing": preprocessing},
            {"input_names": input_names, "output_names": output_names, "notes": notes},
        )
        if not isinstance(validation_share, int | float):
            raise InputError(f"task: validation_share={validation_share!r} must be a number between 0 and 1")
        if not isinstance(views, Views | None):
            raise InputError(f"task: views is a {type(views).__name__}; pass Views(teacher=…, student=…)")
        whole = None if train is None else as_data(train, "task train")
        self.evaluation = as_data(evaluation, "task evaluation")
        self.train, self.validation = _with_validation(whole, validation, validation_share)
        self.validation_is_split = validation is None
        """off the training data, which the teacher may have seen"""
        self.retained, self.retained_evaluation = retained_data(retained, retained_evaluation, validation_share)
        self.views = views
        if views is not None:
            self.train = None if self.train is None else TwoViews(self.train, views)
            self.validation, self.evaluation = TwoViews(self.validation, views), TwoViews(self.evaluation, views)
            self.retained, self.retained_evaluation = (
                None if data is None else TwoViews(data, views) for data in (self.retained, self.retained_evaluation)
            )
        if not isinstance(metric, Metric | str):
            raise InputError(
                f"task: metric is a {type(metric).__name__}; pass its name, or Metric(name, unit, function)"
            )
        self.metric = metric if isinstance(metric, Metric) else named_metric(metric)
        self.counts_classes = self.metric.function is accuracy
        if self.counts_classes:
            self.metric = dataclasses.replace(self.metric, function=self._accuracy)
        self._loss, self._decision, self.ignored = loss, decision, ignored_by(loss)
        self._classes = ClassAxis(class_axis, loss)
        self._undecided: tuple[str, ...] = ()
        inputs = _first_two(self.evaluation) if example is None else example
        inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        self.signature = Signature.of(inputs, input_names, output_names, dynamic_axes, timed)
        self.preprocessing, self.extra_files = preprocessing or {}, extra_files
        self._kept, self.directory, self.critic = kept, directory, critic
        self.generates, self.seq2seq = generates or seq2seq, seq2seq
        self.decoder_form = DecoderForm.of(decoder_form)
        if self.decoder_form != DecoderForm() and (seq2seq or not generates):
            raise InputError("task: decoder_form is of causal models, Task(generates=True), and this task is of none")
        self._notes = tuple(notes) if views is None else (*notes, TWO_VIEWS)

    def why_not_everywhere(self, student: nn.Module) -> Reason | None:
        """Why not every tool that takes such an artifact can run the student, else None; as `extra_files` knows it."""
        files = self.extra_files
        return files.why_not_everywhere(student) if isinstance(files, GeneratingFiles) else None

    @property
    def _tokens(self) -> int | None:
        """How many tokens the model of the texts' directory scores; None: they are of none."""
        return self.extra_files.tokens if isinstance(self.extra_files, GeneratingFiles) else None

    def with_evaluation(self, data: Data, note: str) -> Task:
        """The same task with other evaluation data, and a further note on it for the report."""
        other = copy.copy(self)
        other.evaluation, other._notes = data, (*self._notes, note)
        return other

    def noted(self, notes: Sequence[str]) -> Task:
        """The same task with further notes for the report."""
        other = copy.copy(self)
        other._notes = (*self._notes, *notes)
        return other

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should say of the data, and how it is known which axis of the outputs classes are on."""
        return (*self._notes, *self.decoder_form.notes, *self._classes.notes, *self._undecided)

    @property
    def decides_by_argmax(self) -> bool:
        """Whether the decision is the class with the largest logit."""
        return self._decision is argmax

    @property
    def learns_classes(self) -> bool:
        """Whether the loss is the cross-entropy."""
        return self._loss is cross_entropy

    @property
    def judgement(self) -> dict[str, Any]:
        """What the metric, the loss and the decision are called: as far as a function says what it computes."""
        functions = {"loss": self._loss, "decision": self._decision}
        named = {what: getattr(f, "__qualname__", type(f).__qualname__) for what, f in functions.items()}
        return {"metric": self.metric.name, "unit": self.metric.unit, **named}

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Computes the loss of each sample.

        Args:
            outputs: of a model.
            targets: as the data gives them.

        Returns:
            Losses [B], in float32 at least.

        Raises:
            InputError: labels are outside the classes, or it cannot be told which axis classes are on.
        """
        if not self.learns_classes:
            return self._loss(outputs, targets)
        output = first_tensor(outputs)
        if output.dim() <= 2:
            return cross_entropy(outputs, targets, ignored=self.ignored)
        return cross_entropy(outputs, targets, self._labelled_axis(output, targets), self.ignored)

    def decision(self, outputs: Outputs) -> Tensor:
        """Decides what a user acts on.

        Args:
            outputs: of a model.

        Returns:
            The decisions [B, …], which parity compares.

        Raises:
            InputError: it cannot be told which axis classes are on.
        """
        if not self.decides_by_argmax:
            return self._decision(outputs)
        output = first_tensor(outputs)
        if output.dim() <= 2 or self._why_not_classes(output) is not None:
            return output.argmax(-1)
        return argmax(outputs, self.class_axis_of(output))

    def _why_not_classes(self, output: Tensor) -> Reason | None:
        """Why an output is taken for something else than classes, else None.

        The task's own metric judges it, and no label is of its shape without an axis.
        """
        axis = self.class_axis_or_reason(output)
        if isinstance(axis, int) or self.counts_classes or output.dim() in self._classes.open:
            return None
        return axis

    def _accuracy(self, outputs: Outputs, targets: Tensor) -> float:
        output = first_tensor(outputs)
        axis = self._labelled_axis(output, targets) if output.dim() > 2 else None
        return accuracy(outputs, targets, axis, self.ignored)

    def _labelled_axis(self, output: Tensor, labels: Any) -> int:
        """The axis of the classes of an output that has labels, by which it may be found."""
        if isinstance(self._classes.of(output.shape), str):
            self._classes.learn(output, labels)
        return self.class_axis_of(output)

    def class_axis_of(self, output: Tensor) -> int:
        """Finds the axis that the classes of an output are on: the one given, or the one that the labels show.

        Args:
            output: a tensor of the model's outputs, [B, C] or with further axes of positions.

        Returns:
            The axis, counted from 0, the batch.

        Raises:
            InputError: it cannot be told.
        """
        axis = self.class_axis_or_reason(output)
        if isinstance(axis, str):
            raise InputError(f"task: {axis}; {SAY_AXIS}")
        return axis

    def class_axis_or_reason(self, output: Tensor) -> int | Reason:
        """The axis that the classes of an output are on, or why it cannot be told."""
        axis = self._classes.of(output.shape)
        if isinstance(axis, str) and output.dim() > 2 and output.dim() not in self._classes.doubts:
            for data in self._sources.values():  # `check` looks at outputs and labels of the same samples
                labels = tensors(next(data.batches()).targets)
                if labels and not labels[0].is_floating_point():
                    self._classes.learn_shapes(output.shape, labels[0].shape)
            axis = self._classes.of(output.shape)
            if isinstance(axis, str):  # data is not read again for the next output
                self._classes.doubts[output.dim()] = axis
        return axis

    def classes_last(self, output: Tensor) -> Tensor:
        """An output [B, …, C] with the axis of its classes moved to the end. Raises `InputError` as `class_axis_of`."""
        return output if output.dim() == 2 else output.movedim(self.class_axis_of(output), -1)

    def distance(self, outputs: Outputs, answers: Outputs, targets: Any = None) -> float:
        """How far outputs are from the teacher's: see `pqk.task.metrics.distance`.

        Args:
            outputs: of a student.
            answers: the teacher's, for the same inputs.
            targets: labels of theirs: where each position has one, those that are to be ignored do not count.

        Returns:
            The distance, 0 where there is none.
        """
        output = first_tensor(answers)
        axis = self.class_axis_or_reason(output) if output.dim() > 2 else None
        if isinstance(axis, str) or axis is None:
            return distance(outputs, answers)
        counted = None
        if isinstance(targets, Tensor) and targets.shape == output.select(axis, 0).shape:
            counted = targets != self.ignored
        return distance(outputs, answers, axis, counted)

    @property
    def _sources(self) -> dict[str, Data]:
        """All data, by what it is for."""
        named = {
            "train": self.train, "validation": self.validation, "evaluation": self.evaluation,
            "retained": self.retained, "retained evaluation": self.retained_evaluation,
        }  # fmt: skip
        return {what: data for what, data in named.items() if data is not None}

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
        """`sized(batch, name)` as arrays by input name, as ONNX runtimes take them.

        Where the model continues texts, those without a name hold the last token alone: the file keeps the ones before,
        and what is timed is one token after them.
        """
        found = self.signature.feeds(batch, name)
        if self.generates and not name:
            ids = self.input_names[-2]  # before their mask, which says how many there are
            found[ids] = found[ids][:, -1:]
        return found

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
        outputs, targets = self.predict(model, data, limit)
        return self.metric.function(outputs, targets)

    def predict(self, model: Callable[..., Outputs], data: Data, limit: int | None = None) -> tuple[Outputs, Any]:
        """Gives what is kept of a model's outputs, and the targets, of all samples.

        Args:
            model: inputs -> outputs, as the teacher.
            data: one of the task's.
            limit: the first so many samples only.

        Returns:
            Outputs and targets, concatenated over batches, in the stored order; outputs are padded by zeros where
            batches have other lengths, and integer targets by the label of what has none.
        """
        return predict(model, data, limit, self._kept)

    def check(self, teacher: nn.Module) -> None:
        """Runs the teacher on the example and one batch of each data, and looks at all labels that are judged on.

        Args:
            teacher: in eval mode; it is left as it was.

        Raises:
            InputError: data, labels, names, loss or metric do not fit it, or its answers depend on those before.
        """
        try:
            with held_counters(teacher, self.example):
                self._check(teacher)
        except UnfitInputs as error:
            if (tokens := self._tokens) is None:
                raise
            raise UnfitInputs(
                f"{error}. The task's texts are of {tokens} tokens: is the teacher of the same directory?"
            ) from error

    def _scores(self, teacher: nn.Module) -> Outputs:
        """The teacher's outputs on the example. Raises `InputError` where these are not of the texts' tokens."""
        tokens = self._tokens
        outputs = try_forward(teacher, self.example, "example")
        if tokens is not None and (scored := first_tensor(outputs).shape[-1]) != tokens:
            raise InputError(
                f"teacher: it scores {scored} tokens, and the task's texts are of a model of {tokens}: teacher and "
                "task are of different directories; give both the same one"
            )
        return outputs

    def _check(self, teacher: nn.Module) -> None:
        outputs = self._scores(teacher)
        for name, inputs in self.timed.items():
            try_forward(teacher, inputs, name)
        self.signature.check_outputs(outputs)
        if not bool(first_tensor(outputs).isfinite().all()):
            raise InputError("teacher: its outputs on the example inputs are NaN or infinite")
        judged: dict[str, tuple[Outputs, Any]] = {}
        for what, data in self._sources.items():
            batch = next(data.batches())
            if what not in TRAINED and digest_of(what, tensors(batch)) != digest_of(
                what, tensors(next(data.batches()))
            ):
                raise InputError(
                    f"{what} data: its first batch is another one each time it is read, so that outputs and targets of "
                    "two readings are not of the same samples; give it one order, or let torch shuffle, which pqk seeds"
                )
            check_views(what, batch)
            batch = batch.for_teacher()
            self.signature.check_inputs(f"{what} data", batch.inputs)
            few = map_tensors(lambda t: t[:2], Batch(batch.inputs, batch.targets, None))
            judged[what] = (try_forward(teacher, few.inputs, what), few.targets)
        for pair in judged.values():  # all of them first: one may tell what another leaves open
            self._classes.learn(*pair)
        for what, data in self._sources.items():
            check_scores(what, *judged[what], self.loss, self.metric)
            classes = None
            if self.learns_classes and judged[what][1] is not None and first_tensor(outputs).dim() >= 2:
                output = first_tensor(outputs)
                classes = output.shape[self.class_axis_of(output)]
            check_batches(what, data, self.signature.check_inputs, classes, self.ignored)
        output = first_tensor(outputs)
        if self.decides_by_argmax and output.dim() > 2 and (why := self._why_not_classes(output)) is not None:
            self._undecided = (
                f"decisions are the argmax over the last axis: {why}, and Task(decision=…) is not given",
            )
        decided = self.decision(outputs)
        if isinstance(decided, Tensor) and decided.is_floating_point():
            raise InputError(
                f"task: the decision is {decided.dtype}, which integers cannot give exactly; pass Task(decision=…) "
                "that returns integers or booleans, such as a rounded or a thresholded output"
            )


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
        if any(not t.ndim for t in batch.inputs):
            raise InputError(f"task: an input of the data is {ONE_NUMBER}")
        parts.append(tuple(t[:2] for t in batch.inputs))
        if sum(len(p[0]) for p in parts) >= 2:
            break
    return tuple(joined(list(each))[:2].clone() for each in zip(*parts, strict=True))
