"""What may befall an input on its way to a deployed network. Listed in `CORRUPTIONS`.

Strengths are relative to the sample itself, as model inputs come in any normalisation: those of images are about
severity 3 of Hendrycks and Dietterich (ICLR 2019).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pqk.data.structures import Inputs
from pqk.errors import Reason
from pqk.task.task import Task


class Corruption(ABC):
    """One way of spoiling inputs, drawn from a generator."""

    name: ClassVar[str]
    what: ClassVar[str]
    """what it does to a sample, in words"""

    @abstractmethod
    def why_not_corrupted(self, task: Task) -> Reason | None:
        """Why it does not apply to the task's inputs, else None."""

    @abstractmethod
    def __call__(self, task: Task, inputs: Inputs, generator: Generator) -> Inputs:
        """Spoiled inputs of the same shapes and dtypes; `inputs` stay as they are."""


class ImageCorruption(Corruption):
    """A corruption for tasks whose one input is a batch of images [B, C, H, W]."""

    def why_not_corrupted(self, task: Task) -> Reason | None:
        first = task.example[0]
        if len(task.example) == 1 and first.dim() == 4 and first.is_floating_point() and min(first.shape[2:]) > 1:
            return None
        return f"the inputs are no images [B, C, H, W]: {_shapes(task)}"

    def __call__(self, task: Task, inputs: Inputs, generator: Generator) -> Inputs:
        return (self.corrupt(inputs[0], generator),)

    @abstractmethod
    def corrupt(self, images: Tensor, generator: Generator) -> Tensor:
        """[B, C, H, W] -> the same."""


class Noise(ImageCorruption):
    name = "noise"
    what = "normal noise of 0.4 of the image's standard deviation"

    def corrupt(self, images: Tensor, generator: Generator) -> Tensor:
        drawn = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return images + 0.4 * images.std((1, 2, 3), keepdim=True) * drawn


class Blur(ImageCorruption):
    name = "blur"
    what = "a normal blur with a standard deviation of 1/32 of the shorter side"

    def corrupt(self, images: Tensor, generator: Generator) -> Tensor:
        sigma, channels = min(images.shape[2:]) / 32, images.shape[1]
        reach = max(1, round(3 * sigma))
        line = torch.exp(-(torch.arange(-reach, reach + 1, dtype=images.dtype) ** 2) / (2 * sigma**2))
        line = (line / line.sum()).expand(channels, 1, 1, -1)
        images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), line, groups=channels)
        return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="replicate"), line.mT, groups=channels)


class Contrast(ImageCorruption):
    name = "contrast"
    what = "0.4 of the contrast around the image's mean"

    def corrupt(self, images: Tensor, generator: Generator) -> Tensor:
        return torch.lerp(images.mean((2, 3), keepdim=True), images, 0.4)


class Shift(ImageCorruption):
    name = "shift"
    what = "moved down and to the right by 1/8 of the sides, the edges repeated"

    def corrupt(self, images: Tensor, generator: Generator) -> Tensor:
        height, width = images.shape[2:]
        down, right = max(1, height // 8), max(1, width // 8)
        return F.pad(images, (right, 0, down, 0), mode="replicate")[..., :height, :width]


class WordCorruption(Corruption):
    """A corruption for tasks whose first input is token ids int64 [B, T], with a mask of that shape among the others.

    The first and the last token of a text, which mark its ends, are left alone.
    """

    def why_not_corrupted(self, task: Task) -> Reason | None:
        first = task.example[0]
        if first.dim() == 2 and first.shape[1] > 2 and first.dtype == torch.int64 and _mask(task) is not None:
            return None
        return f"the inputs are no token ids [B, T] with a mask: {_shapes(task)}"

    def __call__(self, task: Task, inputs: Inputs, generator: Generator) -> Inputs:
        place = _mask(task)
        assert place is not None
        mask = inputs[place] != 0
        inner = torch.zeros_like(mask)
        inner[:, 1:-1] = mask[:, 1:-1] & mask[:, 2:]
        ids, mask = self.corrupt(inputs[0], mask, inner, generator)
        spoiled = {0: ids, place: mask.to(inputs[place].dtype)}
        return tuple(spoiled.get(i, t) for i, t in enumerate(inputs))

    @abstractmethod
    def corrupt(self, ids: Tensor, mask: Tensor, inner: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(ids int64, mask bool) -> the same; `inner` marks the words that may be touched. All [B, T]."""


class WordDrop(WordCorruption):
    name = "word drop"
    what = "each word is masked out with a probability of 0.15"

    def corrupt(self, ids: Tensor, mask: Tensor, inner: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return ids, mask & ~(inner & (torch.rand(ids.shape, generator=generator) < 0.15))


class WordSwap(WordCorruption):
    name = "word swap"
    what = "each pair of neighbouring words changes places with a probability of 0.3"

    def corrupt(self, ids: Tensor, mask: Tensor, inner: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        left = torch.arange(1, ids.shape[1] - 1, 2)
        chosen = inner[:, left] & inner[:, left + 1] & (torch.rand(len(ids), len(left), generator=generator) < 0.3)
        order = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        order[:, left] += chosen.long()
        order[:, left + 1] -= chosen.long()
        return ids.gather(1, order), mask


CORRUPTIONS: tuple[Corruption, ...] = (Noise(), Blur(), Contrast(), Shift(), WordDrop(), WordSwap())


def _mask(task: Task) -> int | None:
    """The number of the input that masks the first one."""
    shape = task.example[0].shape
    named = zip(task.input_names, task.example, strict=True)
    return next((i for i, (name, t) in enumerate(named) if i and "mask" in name and t.shape == shape), None)


def _shapes(task: Task) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype}" for name, t in zip(task.input_names, task.example, strict=True)
    )
