"""What a contract is decided on: data that the teacher has not seen, and that the report does not look at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pqk import ArrayData, Contract, Task
from pqk.data.data import Data
from pqk.data.structures import concatenate
from pqk.search.deciding import deciding


def data(count: int, start: float, *, labelled: bool = True) -> ArrayData:
    """Samples that say which they are: `start`, `start + 1`, …"""
    numbers = start + torch.arange(count)[:, None].float()
    return ArrayData(numbers.expand(count, 2), torch.zeros(count, dtype=torch.int64) if labelled else None, 64)


def numbers(source: Data) -> list[float]:
    rows: Tensor = concatenate([batch.inputs[0] for batch in source.batches()])
    return rows[:, 0].tolist()


def test_validation_data_that_was_given_decides_and_all_evaluation_data_is_reported_on() -> None:
    task = Task(data(50, 0), data(700, 1000), validation=data(40, 500))
    found = deciding(task, Contract())
    assert found.data is task.validation and found.task is task and found.caution is None


def test_without_it_half_of_the_evaluation_data_decides_and_the_report_has_the_other() -> None:
    task = Task(data(50, 0), data(701, 1000))
    found = deciding(task, Contract())
    taken, left = numbers(found.data), numbers(found.task.evaluation)
    assert len(taken) == 350 == found.data.samples and len(left) == 351 == found.task.evaluation.samples
    assert sorted(taken + left) == numbers(task.evaluation)
    assert found.caution is None
    assert any("350 of the 701 evaluation samples" in note for note in found.task.notes)
    assert not task.notes and task.evaluation.samples == 701  # the user's own is as it was
    again = deciding(task, Contract())
    assert again.data.fingerprint() == found.data.fingerprint() != found.task.evaluation.fingerprint()


@pytest.mark.parametrize(("points", "joined"), [(1.0, True), (2.0, False), (0.5, True)])
def test_where_half_is_too_few_what_was_split_off_the_training_data_decides_too(points: float, joined: bool) -> None:
    task = Task(data(400, 0), data(500, 1000), validation_share=0.25)
    found = deciding(task, Contract(max_drop=points))
    assert found.data.samples == 250 + 100 * joined
    assert (found.caution is not None) == joined
    if joined:
        assert found.caution is not None and "it is better there than on new data" in found.caution
        assert sorted(numbers(found.data))[:100] == sorted(numbers(task.validation))


def test_data_without_labels_is_not_joined_to_data_with_labels() -> None:
    task = Task(data(400, 0, labelled=False), data(20, 1000))
    assert deciding(task, Contract()).data.samples == 10
