"""Tasks: what is held out, what is scored, and what does not fit is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pqk.data.data import ArrayData
from pqk.data.structures import concatenate, tensors, widened
from pqk.errors import InputError
from pqk.task.metrics import Metric, cross_entropy, predict
from pqk.task.task import Task


def data(samples: int = 12, labels: Tensor | None = None, **options: Any) -> ArrayData:
    x = torch.linspace(-1, 1, samples * 3).view(samples, 3)
    return ArrayData(x, torch.arange(samples) % 4 if labels is None else labels, 4, **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 4).eval()


def test_validation_is_split_off_train_where_there_is_none() -> None:
    task = Task(data(20), data(6), validation_share=0.25)
    assert task.train is not None and (task.train.samples, task.validation.samples) == (15, 5)
    assert task.example[0].shape == (2, 3) and task.input_names == ("input",)
    task.check(net())


def test_calibration_is_at_most_so_many_samples_as_stored() -> None:
    task = Task(None, data(6), validation=data(12))
    found = torch.cat([x for (x,) in task.calibration(7)])
    assert torch.equal(found, data(12).inputs[0][:7])
    with pytest.raises(InputError, match=r"distill: there is no training data.*take the training passes out"):
        task.need_train("distill")


def test_an_example_comes_from_as_many_batches_as_it_takes() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0)[:, None], torch.arange(6)), batch_size=1)
    assert Task(None, loader, validation=loader).example[0].tolist() == [[0.0], [1.0]]


def test_the_score_is_over_all_samples() -> None:
    """Not the mean of batch means: the last batch is smaller."""
    task = Task(None, data(10), validation=data(10))
    model = net()
    outputs, targets = predict(model, task.evaluation)
    assert outputs.shape == (10, 4)
    assert task.score(model, task.evaluation) == float((outputs.argmax(1) == targets).double().mean())
    assert predict(model, task.evaluation, limit=5)[0].shape[0] == 8  # whole batches


def test_cross_entropy_is_per_sample_in_at_least_float32() -> None:
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y, reduction="none"))
    assert cross_entropy(z, y).dtype == torch.float64
    assert cross_entropy({"logits": z.half()}, y).dtype == torch.float32
    assert widened(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_structures_of_outputs_are_joined() -> None:
    one, two = torch.ones(2, 3), torch.zeros(1, 3)
    assert concatenate([Pair(one, one), Pair(two, two)]).b.shape == (3, 3)
    assert concatenate([{"a": one}, {"a": two}])["a"].shape == (3, 3)
    assert len(tensors({"a": (one, [two])})) == 2


class Two(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "text"


@pytest.mark.parametrize(
    ("make", "teacher", "message"),
    [
        (lambda: Task(None, data()), None, "neither training nor validation data.*unlabelled inputs do"),
        (lambda: Task(data(), data(), metric="acuracy"), None, 'unknown metric "acuracy".*"accuracy"'),
        (lambda: Task(data(), data(1)), None, r"batch of at least 2.*\[\(1, 3\)\]"),
        (lambda: Task(data(), data(), example=torch.zeros(2, 5)), net(), r"example inputs \(\(2, 5\) float32\)"),
        (lambda: Task(data(), ArrayData(torch.zeros(4, 5), None)), net(), "do not fit it"),
        (lambda: Task(data(), data(), example=torch.zeros(2, 3, dtype=torch.float64)), net(), "do not fit|the example"),
        (lambda: Task(data(), data(), example=(torch.zeros(2, 3),) * 2), net(), "do not fit"),
        (lambda: Task(data(labels=torch.arange(12)), data()), net(), r"labels run from 0 to 11.*4 classes \(0 to 3\)"),
        (
            lambda: Task(data(), data(), validation=data(labels=-(torch.arange(12) == 11).long())),
            net(),
            "labels run from -1",
        ),
        (lambda: Task(data(), data()), Two(), "output is a str without tensors"),
        (lambda: Task(data(), data(), loss=lambda o, y: cross_entropy(o, y).mean()), net(), "per sample"),
        (lambda: Task(data(), data(), metric=Metric("m", "share", lambda o, y: 1 / 0)), net(), "cannot score"),
        (lambda: Task(data(labels=torch.rand(12)), data()), net(), "cannot score|labels"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Task], teacher: nn.Module | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        task = make()
        assert teacher is not None
        task.check(teacher)


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    model = net()
    with torch.no_grad():
        model.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        Task(data(), data()).check(model)


def loader(*batches: Any) -> list[Any]:
    return list(batches)


class NotFinite(list[Any]):
    """Batches that are fine when they are first looked at; a value of the third goes wrong later."""

    looked = 0

    def __iter__(self) -> Any:
        self.looked += 1
        for number, (x, y) in enumerate(super().__iter__()):
            yield (
                (torch.where(torch.arange(4)[:, None] == 1, torch.nan, x) if number == 2 and self.looked > 1 else x),
                y,
            )


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.mean(1) - targets) ** 2


MEAN = Metric("mean", "points", lambda y, t: float(y.mean()))
X, Y = torch.linspace(-1, 1, 12).view(4, 3), torch.tensor([0, 1, 2, 3])
TENSORS = DataLoader(TensorDataset(torch.randn(12, 3), torch.arange(12) % 10), batch_size=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Task(None, loader((X, Y), (X, Y - 1)), validation=loader((X, Y))), "evaluation data: labels run from"),
        (
            lambda: Task(None, loader((X, Y), (X.double(), Y)), validation=loader((X, Y))),
            r"evaluation data: batch 1: input input is \(4, 3\) torch.float64",
        ),
        (
            lambda: Task(None, loader((X, Y)), validation=loader((X, Y), (X[:, :2], Y))),
            r"validation data: batch 1: input input is \(4, 2\)",
        ),
        (
            lambda: Task(loader((X, Y), (X, Y), (X[:, :2], Y)), loader((X, Y)), validation=loader((X, Y))),
            r"train data: batch 2: input input is \(4, 2\)",
        ),
        (lambda: Task(TENSORS, loader((X, Y)), validation=loader((X, Y))), "train data: labels run from 4 to 7"),
        (
            lambda: Task(None, NotFinite([(X, Y)] * 3), validation=loader((X, Y))),
            "evaluation data: batch 2: input 0 of sample 1 is NaN or infinite",
        ),
        (
            lambda: Task(None, loader((X, Y), (X, Y.float())), validation=loader((X, Y))),
            "evaluation data: batch 1: its targets are float32 with 1 axes, and those of batch 0 int64 with 1 axes",
        ),
        (
            lambda: Task(
                None, loader((X, Y / 3), (X, Y / 0)), validation=loader((X, Y / 3)), loss=squares, metric=MEAN
            ),
            "evaluation data: batch 1: a target is NaN or infinite",
        ),
        (lambda: Task(None, loader(X, X), validation=loader((X, Y))), "evaluation data.*has no targets, and accuracy"),
        (lambda: Task(None, data(), validation=data(), example=torch.zeros(2, 4)), "fit"),
        (lambda: Task(None, data(), validation=data(), output_names=("a", "b")), "must be 1 names"),
        (lambda: Task(None, data(), validation=data(), output_names=("input",)), "none of the inputs"),
        (lambda: Task(None, data(), validation=data(), input_names=("a", "b")), "must be 1 names"),
        (lambda: Task(None, data(), validation=data(), metric=lambda y, t: 1.0), "Metric\\(name, unit, function"),
        (
            lambda: Task(None, data(), validation=data(), metric=Metric("odd", "share", lambda y, t: float("nan"))),
            "odd must be a finite number",
        ),
        (lambda: Task(None, data(), validation=data(), loss=lambda y, t: 1.0), "per sample"),
        (lambda: ArrayData((X, torch.tensor(0.7)), Y), "input 1 is one number for the whole batch"),
        (lambda: ArrayData(X, torch.tensor(1)), "the target is one number for the whole batch"),
        (lambda: Task(None, loader((X, torch.tensor(0.7), Y)), validation=data()), "is one number for the whole"),
        (
            lambda: Task(None, data(), validation=data(), example=(torch.zeros(2, 3), torch.tensor(0.7))),
            "the example of input_1 is one number for the whole batch",
        ),
        (
            lambda: Task(
                None, data(), validation=data(), example=torch.zeros(2, 1), dynamic_axes={"input": {1: "time"}}
            ),
            'calls axis 1 of input "time", and the example has size 1 there',
        ),
    ],
)
def test_what_would_fail_late_is_refused_before_anything_runs(make: Callable[[], Task], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make().check(net())


def test_data_of_another_size_than_the_example_is_refused() -> None:
    class Any2(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1, keepdim=True).expand(-1, 4)

    task = Task(None, data(), validation=data(), example=torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"input input is \(.*3\).*the example \(2, 5\)"):
        task.check(Any2())


def test_a_decision_in_float_is_refused_before_anything_runs() -> None:
    data = ArrayData(torch.randn(20, 3), torch.randn(20, 1), 10)
    given = Task(
        data,
        data,
        validation=data,
        loss=lambda o, t: (o - t).square().sum(1),
        decision=lambda o: o,
        metric=Metric("m", "m", lambda o, t: -float((o - t).square().mean())),
    )
    with pytest.raises(InputError, match="decision is torch.float32, which integers cannot give exactly"):
        given.check(nn.Linear(3, 1).eval())


class Restless:
    """A loader whose order is its own, another one each time."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.read += 1
        yield torch.arange(12.0).roll(self.read).reshape(4, 3), torch.arange(4) % 3


@pytest.mark.parametrize("what", ["validation", "evaluation", "train"])
def test_data_that_is_judged_on_has_one_order(what: str) -> None:
    data = ArrayData(torch.randn(20, 3), torch.arange(20) % 3, 10)
    given = Task(**{"train": data, "validation": data, "evaluation": data, what: Restless()})
    if what == "train":  # its order may be another one each time
        given.check(nn.Linear(3, 3).eval())
        return
    with pytest.raises(InputError, match=f"{what} data: its first batch is another one each time"):
        given.check(nn.Linear(3, 3).eval())
