"""Images that are the same in every epoch are told from those that are drawn anew, and from other inputs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pqk.data.augmentation import UNAUGMENTED, why_not_augmented
from pqk.data.data import ArrayData, Data, as_data
from pqk.data.views import Take, TwoViews, Views
from pqk.models.images import CropFlip

IMAGES = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class Drawn(Dataset[Any]):
    """Images that are shifted by a number drawn of one of the three generators that users draw from."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draws = {
            "torch": lambda: int(torch.randint(0, 8, ())),
            "numpy": lambda: int(np.random.randint(0, 8)),
            "python": lambda: random.randrange(8),
            "none": lambda: 0,
        }
        return IMAGES[index].roll(draws[self.source](), -1), LABELS[index]


def noisy(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images = torch.stack([image for image, _ in samples])
    return images + 0.1 * torch.randn_like(images), torch.stack([label for _, label in samples])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(IMAGES, LABELS, strict=True))

    def __len__(self) -> int:
        return len(IMAGES)


def loader(dataset: Dataset[Any], **options: Any) -> Data:
    return as_data(DataLoader(dataset, batch_size=8, **options), "train")


SAME = {
    "arrays": ArrayData(IMAGES, LABELS, 8),
    "one view": ArrayData(IMAGES, LABELS, 8, augment=CropFlip(len(IMAGES)), views=1),
    "list": as_data([(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])], "train"),
    "tensors": loader(TensorDataset(IMAGES, LABELS), shuffle=True),
    "dataset": loader(Drawn("none"), shuffle=True),
    "views": TwoViews(ArrayData((IMAGES, IMAGES), LABELS, 8), Views(teacher=Take(0), student=Take(1))),
    "grey": ArrayData(IMAGES[:, :1], LABELS, 8),
}
OTHERS = {
    "two views": ArrayData(IMAGES, LABELS, 8, augment=CropFlip(len(IMAGES)), views=2),
    "fresh views": ArrayData(IMAGES, LABELS, 8, augment=CropFlip(len(IMAGES)), views=None),
    "torch": loader(Drawn("torch"), shuffle=True),
    "numpy": loader(Drawn("numpy")),
    "python": loader(Drawn("python")),
    "collated": loader(TensorDataset(IMAGES, LABELS), collate_fn=noisy),
    "stream": loader(Stream()),
    "text": ArrayData(torch.randint(0, 9, (24, 16)), LABELS, 8),
    "table": ArrayData(torch.rand(24, 16), LABELS, 8),
    "signal": ArrayData(torch.rand(24, 3, 64), LABELS, 8),
    "features": ArrayData(torch.rand(24, 12, 16, 16), LABELS, 8),
}


@pytest.mark.parametrize("name", SAME)
def test_images_that_are_the_same_in_every_epoch_are_told(name: str) -> None:
    reason = why_not_augmented(SAME[name])
    assert reason is not None and reason.startswith(f"{UNAUGMENTED}: every epoch shows the same images")


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_is_said_of_what_is_drawn_anew_or_is_no_image(name: str) -> None:
    assert why_not_augmented(OTHERS[name]) is None


def test_looking_draws_nothing_of_the_user_s_generators() -> None:
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    for data in (SAME["dataset"], OTHERS["torch"], OTHERS["numpy"], OTHERS["python"]):
        why_not_augmented(data)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # type: ignore[index]


def test_a_dataset_that_cannot_be_read_is_told_where_it_is_read_in_earnest() -> None:
    class Broken(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            raise OSError("no such image")

    assert why_not_augmented(loader(Broken())) is None
