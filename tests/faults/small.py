"""A compile of seconds: a network of two convolutions on 96 images of noise. The factories of `small.toml`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqk import Task
from pqk.data.data import ArrayData


class Small(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 4]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def teacher(width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small(width)


def task(data: object = None) -> Task:
    """Four classes of images whose mean says their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(96) % 4
    images = torch.randn(96, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    whole = ArrayData(images, labels, 16)
    train, evaluation, validation = (whole.subset(torch.arange(i, i + 32), augmented=False) for i in (0, 32, 64))
    return Task(train, evaluation, validation=validation)
