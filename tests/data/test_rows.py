"""Some samples of other data, and two data one after the other."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pqk import ArrayData
from pqk.data.data import as_data
from pqk.data.rows import JoinedData, Rows, halves
from pqk.data.structures import concatenate
from pqk.data.views import TwoViews, Views
from pqk.errors import InputError

INPUTS, LABELS = torch.arange(20.0).reshape(10, 2), torch.arange(10)


@pytest.mark.parametrize("loader", [False, True])
def test_rows_are_the_samples_with_these_numbers_and_what_belongs_to_them(loader: bool) -> None:
    whole = (
        as_data(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=3), "x")
        if loader
        else ArrayData(INPUTS, LABELS, 3)
    )
    rows = Rows(whole, torch.tensor([0, 4, 5, 9]))
    batches = list(rows.batches())
    assert [len(b.inputs[0]) for b in batches] == [1, 2, 1]  # the third batch has none of them
    assert torch.equal(concatenate([b.targets for b in batches]), torch.tensor([0, 4, 5, 9]))
    assert torch.equal(concatenate([b.inputs[0] for b in batches]), INPUTS[[0, 4, 5, 9]])
    assert all(b.keys is None for b in batches) and rows.samples == 4 and rows.labelled
    with pytest.raises(InputError, match="pass no seed"):
        next(rows.batches(seed=1))
    with pytest.raises(InputError, match="no sample is left of 10"):
        Rows(whole, torch.tensor([], dtype=torch.int64))


def test_rows_of_two_views_are_of_both() -> None:
    viewed = TwoViews(ArrayData(INPUTS, LABELS, 4), Views(lambda i: (i[0] * 2,), lambda i: (i[0] + 1,)))
    batch = next(Rows(viewed, torch.tensor([1, 2])).batches())
    assert torch.equal(batch.inputs[0], INPUTS[1:3] + 1)
    assert batch.teacher_inputs is not None and torch.equal(batch.teacher_inputs[0], INPUTS[1:3] * 2)


def test_halves_share_no_sample_and_have_all() -> None:
    first, second = halves(ArrayData(INPUTS[:9], LABELS[:9], 4))
    assert (first.samples, second.samples) == (4, 5)
    assert sorted([*first.rows.tolist(), *second.rows.tolist()]) == list(range(9))
    assert first.fingerprint() != second.fingerprint()


def test_joined_data_is_one_after_the_other() -> None:
    joined = JoinedData(ArrayData(INPUTS[:3], LABELS[:3], 2), ArrayData(INPUTS[3:], LABELS[3:], 4))
    targets = [b.targets.tolist() for b in joined.batches()]
    assert targets == [[0, 1], [2], [3, 4, 5, 6], [7, 8, 9]]
    assert len(joined) == len(targets) and joined.samples == 10
