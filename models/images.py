"""Keyed image augmentation: random crop after padding, and horizontal flip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.data.structures import Inputs


@dataclass(frozen=True)
class CropFlip:
    """Pads images [B, C, H, W] with black, crops them back at a random place, and flips half of them.

    The offsets are drawn from (seed, view) for all `samples` at once and looked up by id.
    """

    samples: int
    pad: int = 4
    flip: bool = True
    seed: int = 0

    def __call__(self, inputs: Inputs, ids: Tensor, view: int) -> Inputs:
        (images,) = inputs
        offsets, flips = _draw(self, view)
        b, c, h, w = images.shape
        padded = F.pad(images, (self.pad,) * 4)
        y, x = offsets[ids, 0], offsets[ids, 1]
        columns = torch.arange(w).expand(b, w)
        if self.flip:
            columns = torch.where(flips[ids, None], w - 1 - columns, columns)
        rows = (y[:, None] + torch.arange(h))[:, None, :, None]
        columns = (x[:, None] + columns)[:, None, None, :]
        return (padded[torch.arange(b)[:, None, None, None], torch.arange(c)[None, :, None, None], rows, columns],)


@lru_cache(maxsize=2)
def _draw(augment: CropFlip, view: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(augment.seed * 1_000_003 + view)
    offsets = torch.randint(0, 2 * augment.pad + 1, (augment.samples, 2), generator=generator)
    return offsets, torch.rand(augment.samples, generator=generator) < 0.5


@dataclass(frozen=True)
class Normalize:
    """uint8 images [B, C, H, W] -> float32, (x / 255 - mean) / std per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, inputs: Inputs) -> Inputs:
        (images,) = inputs
        mean, std = torch.tensor(self.mean).view(-1, 1, 1), torch.tensor(self.std).view(-1, 1, 1)
        return ((images.float() / 255 - mean) / std,)
