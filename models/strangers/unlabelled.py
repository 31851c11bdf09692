"""A classifier whose training labels are gone: whoever compiles it has images alone, and labels to judge by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqk.models.strangers.pictures import scaled
from pqk.models.strangers.stranger import Stranger


class Dense(nn.Module):
    """Stages whose layers read all before them, joined; leaky ReLU, average pooling: images -> logits [B, 10]."""

    def __init__(self, growth: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.stages = nn.ModuleList()
        channels = 24
        for _ in range(3):
            stage = nn.ModuleList()
            for _ in range(layers):
                conv = nn.Conv2d(channels, growth, 3, padding=1)
                stage.append(nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.1), conv))
                channels += growth
            self.stages.append(stage)
        self.pool = nn.AvgPool2d(2)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = torch.cat([x, layer(x)], dim=1)
            x = self.pool(x)
        return self.head(self.norm(x).relu().mean((2, 3)))


UNLABELLED = Stranger(
    "unlabelled", "densely joined CNN, training images without labels; CIFAR-10", Dense, scaled, epochs=9, rate=4e-3,
    labelled=False,
)  # fmt: skip
