"""Data as batches whose order, augmentation and identity are functions of a seed.

`ArrayData` holds tensors and draws everything by key, so any epoch can be entered in the middle and a teacher's answer
to (sample, view) can be cached. `LoaderData` wraps whatever loader the user has and says what it cannot promise.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, random_split

from pqk.errors import InputError

Inputs = tuple[Tensor, ...]


class Batch(NamedTuple):
    """`inputs` each [B, …]; `targets` a tensor or a structure of tensors; `keys` int64 [B], one for each (sample, view)."""

    inputs: Inputs
    targets: Any
    keys: Tensor | None


class Augment(Protocol):
    """A keyed augmentation: the same (ids, view) always gives the same result. Its `repr` identifies it."""

    def __call__(self, inputs: Inputs, ids: Tensor, view: int) -> Inputs: ...


class Data(ABC):
    """A finite set of samples in batches."""

    samples: int
    key_count: int | None = None
    """how many distinct keys batches carry; None: batches are not keyed, so answers cannot be cached"""
    unkeyed_reason: str = ""
    resume_reason: str | None = None
    """why an epoch cannot be entered in the middle; None where it can"""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; in the stored order, un-augmented, where `seed` is None.

        `state` is the state of torch's global generator to go on with once the skipped batches are behind.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of what the data is, so that a resumed run notices other data."""


class ArrayData(Data):
    """Tensors in memory.

    `inputs`: tensor(s) [N, …]; `targets`: [N, …] or None. `augment` is keyed; `views` bounds the distinct views of a
    sample (epoch e shows view e mod views), which is what makes the teacher's answers cacheable: None draws a fresh
    one each epoch. `prepare` turns stored inputs into model inputs (such as normalisation) after augmentation.
    Raises `InputError` for empty data, NaN, or lengths that differ.
    """

    def __init__(
        self,
        inputs: Tensor | Inputs,
        targets: Tensor | None,
        batch_size: int = 128,
        *,
        augment: Augment | None = None,
        views: int | None = 1,
        prepare: Callable[[Inputs], Inputs] | None = None,
        ids: Tensor | None = None,
    ) -> None:
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.targets = targets
        lengths = [len(t) for t in (*self.inputs, *([] if targets is None else [targets]))]
        if len(set(lengths)) != 1:
            raise InputError(f"data: inputs and targets have different lengths: {lengths}")
        for i, t in enumerate(self.inputs):
            if t.is_floating_point() and not bool(t.isfinite().all()):
                where = int((~t.isfinite()).flatten(1).any(1).nonzero()[0])
                raise InputError(f"data: input {i} of sample {where} is NaN or infinite; clean the data first")
        self.ids = torch.arange(lengths[0]) if ids is None else ids
        self.samples, self.batch_size = len(self.ids), batch_size
        if self.samples == 0:
            raise InputError("data: no samples")
        self.augment, self.prepare = augment, prepare
        self.views = 1 if augment is None else views
        if self.views is None:
            self.unkeyed_reason = "the augmentation draws a fresh view each epoch; set views=N to bound them"
        else:
            self.key_count = lengths[0] * self.views

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        if state is not None:
            torch.set_rng_state(state)
        order, view = self.ids, 0
        if seed is not None:
            order = order[torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))]
            view = epoch if self.views is None else epoch % self.views
        for i in range(start, len(self)):
            ids = order[i * self.batch_size : (i + 1) * self.batch_size]
            inputs = tuple(t[ids] for t in self.inputs)
            if seed is not None and self.augment is not None:
                inputs = self.augment(inputs, ids, view)
            if self.prepare is not None:
                inputs = self.prepare(inputs)
            keys = None if self.views is None else ids * self.views + view
            yield Batch(inputs, None if self.targets is None else self.targets[ids], keys)

    def subset(self, ids: Tensor, *, augmented: bool) -> ArrayData:
        """The samples with these ids, sharing memory and keys."""
        augment = self.augment if augmented else None
        return ArrayData(
            self.inputs, self.targets, self.batch_size, augment=augment, views=self.views, prepare=self.prepare, ids=ids
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.augment, self.views, self.batch_size)).encode())
        for t in (*self.inputs, *([] if self.targets is None else [self.targets]), self.ids):
            digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
            digest.update(t.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class LoaderData(Data):
    """Any re-iterable loader of `(inputs…, target)` tuples or lists, or of bare input tensors (no targets).

    Shuffling follows torch's global generator, which pqk seeds per (seed, pass, epoch). A loader with a generator of
    its own cannot be entered in the middle of an epoch.
    """

    unkeyed_reason = "a user's loader does not say which sample and augmentation an input is; use pqk.data.ArrayData"

    def __init__(self, loader: Iterable[Any]) -> None:
        if iter(loader) is loader:
            raise InputError("data: a one-shot iterator can be read only once; pass a DataLoader or a list of batches")
        if not hasattr(loader, "__len__"):
            raise InputError(f"data: {type(loader).__name__} has no length; pqk plans schedules by epochs")
        if len(loader) == 0:
            raise InputError("data: the loader is empty (0 batches)")
        self.loader = loader
        dataset = getattr(loader, "dataset", None)
        self.samples = len(dataset) if hasattr(dataset, "__len__") else sum(len(self._unpack(b, 0)[0][0]) for b in loader)
        samplers = (loader, getattr(loader, "sampler", None))
        if any(getattr(s, "generator", None) is not None for s in samplers):
            self.resume_reason = (
                "the DataLoader has a generator of its own, whose state pqk cannot restore; leave `generator` unset "
                "(pqk seeds torch's global generator for every epoch)"
            )

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @staticmethod
    def _unpack(item: Any, number: int) -> tuple[Inputs, Any]:
        if isinstance(item, Tensor):
            inputs, targets = (item,), None
        elif isinstance(item, tuple | list) and len(item) >= 2 and all(isinstance(t, Tensor) for t in item[:-1]):
            inputs, targets = tuple(item[:-1]), item[-1]
        else:
            raise InputError(f"data: batch {number} is a {type(item).__name__}; expected (inputs…, target) with tensors")
        for i, t in enumerate(inputs):
            if t.is_floating_point() and not bool(t.isfinite().all()):
                raise InputError(f"data: input {i} of batch {number} has NaN or infinite values; clean the data first")
        return inputs, targets

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        if seed is not None:
            torch.manual_seed(seed)
        items = enumerate(self.loader)
        for _ in range(start):
            next(items)
        if state is not None:
            torch.set_rng_state(state)
        for number, item in items:
            yield Batch(*self._unpack(item, number), None)

    def fingerprint(self) -> str:
        """Of the first batch in global-seed order, the length and the sample count: a loader has no more to show."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inputs, _ = self._unpack(next(iter(self.loader)), 0)
        digest = hashlib.sha256(repr((len(self), self.samples)).encode())
        for t in inputs:
            digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
            digest.update(t.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def as_data(source: Any, what: str) -> Data:
    """`source` as `Data`. Raises `InputError`, naming `what`, for something that is neither data nor a loader."""
    if isinstance(source, Data):
        return source
    if isinstance(source, Iterable):
        return LoaderData(source)
    raise InputError(f"{what}: a {type(source).__name__} is no data; pass a DataLoader, a list of batches or ArrayData")


def split(data: Data, share: float, seed: int = 0) -> tuple[Data, Data]:
    """(rest, held-out share) of training data, by a fixed permutation; the held-out part is never augmented."""
    count = max(1, round(data.samples * share))
    if count >= data.samples:
        raise InputError(f"data: {data.samples} samples are too few to hold out {share:.0%} for validation")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, ArrayData):
        order = data.ids[torch.randperm(data.samples, generator=generator)]
        held, rest = order[:count].sort().values, order[count:].sort().values
        return data.subset(rest, augmented=True), data.subset(held, augmented=False)
    loader = data.loader if isinstance(data, LoaderData) else None
    if isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__") and loader.batch_size is not None:
        rest_set, held_set = random_split(loader.dataset, [data.samples - count, count], generator=generator)
        return LoaderData(_same_loader(loader, rest_set, shuffle=True)), LoaderData(_same_loader(loader, held_set))
    raise InputError("task: no validation data, and this training data cannot be split; pass validation=…")


def _same_loader(loader: DataLoader[Any], dataset: Subset[Any], shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
