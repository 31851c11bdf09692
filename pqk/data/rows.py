"""Data out of other data: some of its samples, and two of them one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pqk.data.data import Batch, Data, digest_of
from pqk.data.structures import map_tensors
from pqk.errors import InputError


class Rows(Data):
    """Some samples of another data, as that stores them.

    Batches are those of the other data without the samples that are left out, so they differ in size.

    Args:
        data: whose samples they are.
        rows: numbers of samples in its stored order, int64 [samples], ascending.

    Raises:
        InputError: there are none.
    """

    def __init__(self, data: Data, rows: Tensor) -> None:
        if not len(rows):
            raise InputError(f"data: no sample is left of {data.samples}")
        self.data, self.rows, self.samples = data, rows, len(rows)
        self.unkeyed_reason = "some samples of other data, which are judged on and not trained on, have no keys"

    def __len__(self) -> int:
        return len(self.data)

    @property
    def in_memory(self) -> bool:
        return self.data.in_memory

    @property
    def labelled(self) -> bool:
        return self.data.labelled

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        """Iterates over the samples in their stored order.

        Raises `InputError` with a seed: another order has other numbers.
        """
        if seed is not None:
            raise InputError("data: samples that were picked by number have one order; pass no seed")
        begin = 0
        for number, batch in enumerate(self.data.batches()):
            count = len(batch.inputs[0])
            rows = self.rows[(self.rows >= begin) & (self.rows < begin + count)] - begin
            begin += count
            if number >= start and len(rows):
                everything = (batch.inputs, batch.targets, batch.teacher_inputs)
                inputs, targets, teachers = map_tensors(partial(_rows_of, rows), everything)
                yield Batch(inputs, targets, None, teachers)

    def fingerprint(self) -> str:
        return digest_of(self.data.fingerprint(), (self.rows,))


def _rows_of(rows: Tensor, t: Tensor) -> Tensor:
    return t[rows]


class JoinedData(Data):
    """The samples of one data and then those of another, as they are stored."""

    def __init__(self, first: Data, second: Data) -> None:
        self.parts = (first, second)
        self.samples = first.samples + second.samples
        self.unkeyed_reason = "data that is judged on and not trained on has no keys"

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def in_memory(self) -> bool:
        return all(part.in_memory for part in self.parts)

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        """Iterates over the batches of both. Raises `InputError` with a seed: they are not mixed."""
        if seed is not None:
            raise InputError("data: two parts one after the other have one order; pass no seed")
        numbered = enumerate(batch for part in self.parts for batch in part.batches())
        return (batch._replace(keys=None) for number, batch in numbered if number >= start)

    def fingerprint(self) -> str:
        return digest_of(tuple(part.fingerprint() for part in self.parts), ())


def halves(data: Data, seed: int = 0) -> tuple[Rows, Rows]:
    """Two halves of data, drawn by a seed; the second one has the sample that is over.

    Raises `InputError` for a single sample.
    """
    order = torch.randperm(data.samples, generator=torch.Generator().manual_seed(seed))
    count = data.samples // 2
    return Rows(data, order[:count].sort().values), Rows(data, order[count:].sort().values)
