"""Whether training data shows the same samples in every epoch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from pqk.data.data import ArrayData, Data, LoaderData
from pqk.data.structures import tensors
from pqk.data.views import TwoViews
from pqk.errors import Reason

LOOKED_AT, DRAWS = 4, 3
"""samples that are compared, and how often each is drawn"""
CHANNELS, LEAST = (1, 3, 4), 16
"""of [B, C, H, W]: grey, colour, colour with transparency; pixels of a side of an image"""

UNAUGMENTED = "the training data is not augmented"
WHY = (
    "every epoch shows the same images; random crops, and flips where a mirrored image means the same, usually help a "
    "student"
)


def why_not_augmented(data: Data) -> Reason | None:
    """Why images to train on are the same in every epoch, else None: other inputs, or no sign that they are.

    Some samples are drawn again and compared. Whatever is drawn, no generator of torch, numpy or Python is changed.
    Nothing is said of data whose samples cannot be asked for one by one, such as those of a generator.
    """
    while isinstance(data, TwoViews):
        data = data.data
    with _untouched_generators():
        draw = _draws_of(data)
        if draw is None:
            return None
        try:
            draws = [draw(number) for number in range(DRAWS)]
        except Exception:  # the user's dataset; where it is read in earnest, it is told what is wrong with it
            return None
    if not any(_is_image(t) for t in draws[0]):
        return None
    same = all(len(d) == len(draws[0]) and all(map(torch.equal, d, draws[0])) for d in draws[1:])
    return f"{UNAUGMENTED}: {WHY}" if same else None


def _is_image(t: Tensor) -> bool:
    return t.dim() == 4 and t.shape[1] in CHANNELS and min(t.shape[2:]) >= LEAST


def _draws_of(data: Data) -> Callable[[int], list[Tensor]] | None:
    """What draws the inputs of some samples, the same ones each time, by the number of the epoch; None: nothing can."""
    if isinstance(data, ArrayData):
        return lambda epoch: [t[:LOOKED_AT] for t in next(data.batches(0, epoch)).inputs]
    loader = data.loader if isinstance(data, LoaderData) else None
    if isinstance(loader, list | tuple):  # in one order, so that the seed decides what is drawn
        return lambda epoch: [t[:LOOKED_AT] for t in next(data.batches(epoch)).inputs]
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    return lambda epoch: _collated(loader, epoch)


def _collated(loader: DataLoader[Any], epoch: int) -> list[Tensor]:
    """The inputs of the first samples of a dataset, in a draw of their own."""
    torch.manual_seed(epoch)
    random.seed(epoch)
    np.random.seed(epoch)
    dataset: Any = loader.dataset
    samples = [dataset[i] for i in range(min(LOOKED_AT, len(dataset)))]
    batch = (loader.collate_fn or default_collate)(samples)
    return tensors(batch[:-1] if isinstance(batch, tuple | list) else batch)


@contextmanager
def _untouched_generators() -> Iterator[None]:
    ours, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(arrays)
