"""Data as batches whose order, augmentation and identity are functions of a seed.

`ArrayData` holds tensors and draws everything by key, so any epoch can be entered in the middle and a teacher's answer
to (sample, view) can be cached. `LoaderData` wraps whatever loader the user has and says what it cannot promise.
`TwoViews` shows teacher and student different sides of the same samples.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset, random_split

from pqk.data.checks import check_sizes
from pqk.data.structures import Inputs, leaves, map_tensors
from pqk.errors import InputError
from pqk.settings import in_words

ONE_NUMBER = (
    "one number for the whole batch, and the first axis of every input and target is the batch; give it once for every "
    "sample, or make it a constant of the model"
)


class Batch(NamedTuple):
    """Some samples of a `Data`."""

    inputs: Inputs
    """the model's inputs, each [B, …]"""
    targets: Any
    """the labels: a tensor [B, …], or a tuple or dict of them; None: there are none"""
    keys: Tensor | None
    """int64 [B], one for each (sample, view); None: answers to this batch cannot be kept"""
    teacher_inputs: Inputs | None = None
    """what the teacher sees of the same samples, where that is something else (`Task(views=…)`)"""

    def for_teacher(self) -> Batch:
        """The batch as the teacher sees it: with its inputs as `inputs`."""
        return self if self.teacher_inputs is None else Batch(self.teacher_inputs, self.targets, self.keys)


def _refuse_nan(t: Tensor, where: str) -> None:
    """Raises `InputError` naming the first sample of `t` [B, …] that is not finite."""
    if t.is_floating_point() and not bool(t.isfinite().all()):
        sample = int((~t.isfinite()).reshape(len(t), -1).any(1).nonzero()[0])
        raise InputError(f"data: {where} of sample {sample} is NaN or infinite; clean the data first")


def digest_of(head: object, items: Iterable[Tensor]) -> str:
    """Identifies tensors, as the `fingerprint` of a `Data` does.

    Args:
        head: what else tells them from others; its `repr` counts.
        items: the tensors; their shapes, dtypes and bytes count.

    Returns:
        The sha256 of all, in hexadecimal.
    """
    digest = hashlib.sha256(repr(head).encode())
    for t in items:
        digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Augment(Protocol):
    """A keyed augmentation: the same (ids, view) always gives the same result. Its `repr` identifies it."""

    def __call__(self, inputs: Inputs, ids: Tensor, view: int) -> Inputs:
        """Makes one view of some samples.

        Args:
            inputs: as stored, each [B, …].
            ids: which samples these are, int64 [B].
            view: the number of the view, from 0.

        Returns:
            The augmented inputs, each [B, …].
        """
        ...


class Data(ABC):
    """A finite set of samples in batches, whose order and content are functions of a seed.

    A subclass sets `samples` and gives `__len__`, `batches` and `fingerprint`.
    """

    samples: int
    """how many there are"""
    key_count: int | None = None
    """how many distinct keys batches carry; None: batches are not keyed, so answers cannot be cached"""
    unkeyed_reason: str = ""
    """why batches are not keyed, where they are not"""
    resume_reason: str | None = None
    """why an epoch cannot be entered in the middle; None where it can"""

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch."""

    @abstractmethod
    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        """Iterates over the batches of an epoch.

        Args:
            seed: decides the order; None: the stored order, un-augmented.
            epoch: the epoch's number, from 0, which decides the view of each sample.
            start: the number of the first batch to give.
            state: the state of torch's global generator to go on with once the skipped batches are behind.

        Returns:
            The batches from `start` on.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the data, so that a resumed run notices other data."""

    @property
    def in_memory(self) -> bool:
        """Whether reading all of it costs no more than looking at it: nothing is decoded, loaded or made."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether the first batch has targets."""
        return next(self.batches()).targets is not None


@in_words
class ArrayData(Data):
    """Tensors in memory.

    As stored, a sample that is augmented in training is none of its views and has no key.

    Args:
        inputs: a tensor [N, …], or a tuple of them.
        targets: a tensor [N, …], such as labels int64 [N]; None: unlabelled.
        batch_size: samples in a batch; the last one may be smaller.
        augment: what makes the views of a sample in training (`Augment`).
        views: how many distinct ones: epoch e shows view e mod views, so that the teacher's answers can be kept; None:
            a fresh one each epoch.
        prepare: turns stored inputs into model inputs, such as normalisation, after augmentation.
        ids: the rows that belong to this data, int64 [samples]; None: all.

    Raises:
        InputError: the data is empty, has NaN or lengths that differ, or the batch size or views are below 1.
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
        for what, t in (*((f"input {i}", t) for i, t in enumerate(self.inputs)), ("the target", targets)):
            if t is not None and not isinstance(t, Tensor):
                raise InputError(f"data: {what} is a {type(t).__name__} and must be a tensor [N, …]")
            if t is not None and not t.ndim:
                raise InputError(f"data: {what} is {ONE_NUMBER}")
        lengths = [len(t) for t in (*self.inputs, *([] if targets is None else [targets]))]
        if len(set(lengths)) != 1:
            raise InputError(f"data: inputs and targets have different lengths: {lengths}")
        check_sizes("data", batch_size=batch_size, **({} if views is None else {"views": views}))
        for i, t in enumerate(self.inputs):
            _refuse_nan(t, f"input {i}")
        if targets is not None:
            _refuse_nan(targets, "the target")
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
            keyed = self.views is not None and (seed is not None or self.augment is None)
            keys = ids * (self.views or 1) + view if keyed else None
            yield Batch(inputs, None if self.targets is None else self.targets[ids], keys)

    def with_targets(self, targets: Tensor) -> ArrayData:
        """The same samples with other targets [N, …], of all that are in memory."""
        return ArrayData(
            self.inputs, targets, self.batch_size, augment=self.augment, views=self.views, prepare=self.prepare,
            ids=self.ids,
        )  # fmt: skip

    def subset(self, ids: Tensor, *, augmented: bool) -> ArrayData:
        """The samples with these ids, sharing memory and keys."""
        augment = self.augment if augmented else None
        return ArrayData(
            self.inputs, self.targets, self.batch_size, augment=augment, views=self.views, prepare=self.prepare, ids=ids
        )

    def fingerprint(self) -> str:
        targets = [] if self.targets is None else [self.targets]
        return digest_of((self.augment, self.views, self.batch_size), (*self.inputs, *targets, self.ids))


@in_words
class LoaderData(Data):
    """Any re-iterable loader, such as torch's `DataLoader` or a list of batches.

    Shuffling follows torch's global generator, which pqk seeds per (seed, pass, epoch); without a seed, a shuffling
    loader gives one fixed order. A loader with a generator of its own cannot be entered in the middle of an epoch.

    Args:
        loader: batches are tuples or lists `(inputs…, target)` of tensors [B, …], or of one input without a
            target, or bare input tensors.

    Raises:
        InputError: it is a one-shot iterator, has no length, is empty, or a batch is something else.
    """

    unkeyed_reason = "a user's loader does not say which sample and augmentation an input is; use pqk.data.ArrayData"

    def __init__(self, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise InputError("data: a one-shot iterator can be read only once; pass a DataLoader or a list of batches")
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            kind = type(getattr(loader, "dataset", loader)).__name__
            raise InputError(f"data: {kind} has no length; pqk plans schedules by epochs") from None
        if batches == 0:
            raise InputError("data: the loader is empty (0 batches)")
        self.loader = loader
        sampled = getattr(loader, "batch_sampler", None) is not None  # else an item of the dataset is a batch
        if sampled and isinstance(loader.sampler, Sized):  # type: ignore[attr-defined]
            self.samples = len(loader.sampler)  # type: ignore[attr-defined]
            size = getattr(loader, "batch_size", None)
            if getattr(loader, "drop_last", False) and size:
                self.samples -= self.samples % size
        else:
            self.samples = sum(len(self._unpack(b, i)[0][0]) for i, b in enumerate(loader))
        outer = getattr(loader, "batch_sampler", None)
        owners = (loader, getattr(loader, "sampler", None), outer, getattr(outer, "sampler", None))
        self.generators = [g for o in owners if (g := getattr(o, "generator", None)) is not None]
        if self.generators:
            self.resume_reason = (
                "the DataLoader has a generator of its own, whose state pqk cannot restore; leave `generator` unset "
                "(pqk seeds torch's global generator for every epoch)"
            )

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def in_memory(self) -> bool:
        source: Any = self.loader
        while isinstance(source, DataLoader | Subset):
            source = source.dataset
        return isinstance(source, list | tuple | TensorDataset)

    @staticmethod
    def _unpack(item: Any, number: int) -> tuple[Inputs, Any]:
        if isinstance(item, Tensor):
            inputs, targets = (item,), None
        elif isinstance(item, tuple | list) and len(item) == 1 and isinstance(item[0], Tensor):
            inputs, targets = (item[0],), None  # as a `TensorDataset` of inputs alone gives them
        elif isinstance(item, tuple | list) and len(item) >= 2 and all(isinstance(t, Tensor) for t in item[:-1]):
            inputs, targets = tuple(item[:-1]), item[-1]
        else:
            raise InputError(
                f"data: batch {number} is a {type(item).__name__}; expected (inputs…, target) with tensors"
            )
        for i, t in enumerate(inputs):
            _refuse_nan(t, f"batch {number}: input {i}")
        other = next((leaf for _, leaf in leaves(targets) if not isinstance(leaf, Tensor | None)), None)
        if other is not None:
            raise InputError(
                f"data: batch {number}: the target has a {type(other).__name__}; targets are tensors [B, …], or tuples "
                "or dicts of them"
            )
        return inputs, targets

    def batches(
        self, seed: int | None = None, epoch: int = 0, start: int = 0, state: Tensor | None = None
    ) -> Iterator[Batch]:
        if seed is None:
            with torch.random.fork_rng(devices=[]), self._fixed_generators():
                torch.manual_seed(0)
                stored = enumerate(self.loader)
                items = itertools.chain([next(stored)], stored)  # a sampler draws its order with the first batch
        else:
            torch.manual_seed(seed)
            items = itertools.chain(enumerate(self.loader))
        for _ in range(start):
            next(items)
        if state is not None:
            torch.set_rng_state(state)
        for number, item in items:
            yield Batch(*self._unpack(item, number), None)

    @contextmanager
    def _fixed_generators(self) -> Iterator[None]:
        states = [g.get_state() for g in self.generators]
        for g in self.generators:
            g.manual_seed(0)
        yield
        for g, state in zip(self.generators, states, strict=True):
            g.set_state(state)

    def fingerprint(self) -> str:
        """Identifies the data by its first batch in the order of a fixed seed, its length and its sample count.

        A loader shows no more than that without being read to its end.
        """
        batch = next(self.batches())
        first: list[Tensor] = []
        map_tensors(first.append, (batch.inputs, batch.targets))
        return digest_of((len(self), self.samples), first)


def as_data(source: Any, what: str) -> Data:
    """`source` as `Data`. Raises `InputError`, naming `what`, for something that is neither data nor a loader."""
    if isinstance(source, Data):
        return source
    if isinstance(source, Iterable):
        return LoaderData(source)
    raise InputError(f"{what}: a {type(source).__name__} is no data; pass a DataLoader, a list of batches or ArrayData")


def split(data: Data, share: float, seed: int = 0) -> tuple[Data, Data]:
    """(rest, held-out share) of training data, by a fixed permutation.

    The held-out part of `ArrayData` is not augmented; that of a `DataLoader` is what its dataset gives. Raises
    `InputError` for data that is too small, or that cannot be split without changing what the user meant.
    """
    if not 0 < share < 1:
        raise InputError(f"data: the share held out for validation is {share}; it must be between 0 and 1")
    count = max(1, round(data.samples * share))
    if count >= data.samples:
        raise InputError(f"data: {data.samples} samples are too few to hold out {share:.0%} for validation")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, ArrayData):
        order = data.ids[torch.randperm(data.samples, generator=generator)]
        held, rest = order[:count].sort().values, order[count:].sort().values
        return data.subset(rest, augmented=True), data.subset(held, augmented=False)
    loader = data.loader if isinstance(data, LoaderData) else None
    # A sampler of the user's own (a subset, weights) says which samples count: it cannot be carried over to a part.
    known = (RandomSampler, SequentialSampler)
    if isinstance(loader, DataLoader) and type(loader.sampler) in known and loader.batch_size is not None:
        whole_count = len(loader.dataset)  # type: ignore[arg-type]
        rest_set, held_set = random_split(loader.dataset, [whole_count - count, count], generator=generator)
        shuffle = isinstance(loader.sampler, RandomSampler)
        whole = _same_loader(loader, rest_set, shuffle=shuffle, drop_last=loader.drop_last)
        return LoaderData(whole), LoaderData(_same_loader(loader, held_set))
    raise InputError("task: no validation data, and this training data cannot be split; pass validation=…")


def _same_loader(loader: DataLoader[Any], dataset: Subset[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        **options,
    )
