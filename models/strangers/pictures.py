"""CIFAR-10 as strangers have it: part of the training images, and all test images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pqk.data.folders import data_folder
from pqk.models.cifar import load_split
from pqk.models.strangers.stranger import Samples

TRAIN, TEST = 12_000, 10_000


def raw(data: Path | None) -> Samples:
    """Images float32 [N, 3, 32, 32], 0 to 255 as they are in files."""
    folder = data_folder(data)
    (x, y), (u, v) = (load_split(folder / f"cifar10_{part}.npz", n) for part, n in (("train", TRAIN), ("test", TEST)))
    return Samples((x.float(), y), (u.float(), v))


def scaled(data: Path | None) -> Samples:
    """The same images, float32 [N, 3, 32, 32], -1 to 1."""
    samples = raw(data)

    def within_one(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return part[0] / 127.5 - 1, part[1]

    return Samples(within_one(samples.train), within_one(samples.test))
