"""A small residual CNN with batch norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pqk.models.strangers.pictures import scaled
from pqk.models.strangers.stranger import Stranger


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, C, H, W] -> [B, D, H / stride, W / stride]."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResidual(nn.Module):
    """Six residual blocks of 24, 48 and 64 channels: images [B, 3, 32, 32] -> logits [B, 10]; 12 M MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(24, 24, 1),
            ResidualBlock(24, 24, 1),
            ResidualBlock(24, 48, 2),
            ResidualBlock(48, 48, 1),
            ResidualBlock(48, 64, 2),
            ResidualBlock(64, 64, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


RESIDUAL = Stranger("residual", "residual CNN with batch norm; CIFAR-10", SmallResidual, scaled, epochs=7, rate=4e-3)
