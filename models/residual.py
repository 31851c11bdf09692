"""Residual nets for small images that shrink early, students that are not cut out of their teacher.

A ResNet for CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2) spends its time on many narrow layers, which integer
kernels barely speed up. These have few blocks, twice as wide from stage to stage: the MACs of all stages are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import InputError
from pqk.models.plain import Staged, convolution, halving


class WideningBlock(nn.Module):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`; [B, in, H, W] -> [B, out, ceil(H/stride), ceil(W/stride)].

    Both convolutions are 3x3. The shortcut is a 1x1 convolution where shapes differ, else the identity (option B of He
    et al., section 4.1).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Residual(Staged):
    """A stem and stages of residual blocks: [B, channels, H, W] float32 -> logits [B, classes]."""

    def __init__(
        self, width: int, stages: Sequence[int], strides: Sequence[int], classes: int, channels: int, stem: int
    ) -> None:
        super().__init__(convolution(channels, width, stem), WideningBlock, width, stages, strides, classes)


def residual(
    width: int = 24,
    stages: Sequence[int] = (1, 1, 1, 1),
    strides: Sequence[int] | None = None,
    classes: int = 10,
    channels: int = 3,
    stem: int = 1,
) -> Residual:
    """A residual net of a few blocks that shrinks early; by default one block each of 24, 48, 96 and 192 channels.

    By default, for 3 channels of 32x32 and 10 classes: 692,482 parameters and 36.1 million MACs. `residual(32,
    (1, 1, 1), (2, 2, 2))` has blocks of 32, 64 and 128 channels: 309,738 parameters and 13.2 million.

    Args:
        width: channels of the stem and of the first stage; those of stage i, counted from 0, are `width * 2**i`.
        stages: blocks of each stage.
        strides: of the first block of each stage; None: 1 for the first stage and 2 for all others.
        classes: logits.
        channels: of the images.
        stem: its stride: 2 for images of 64x64, 4 for those of 128x128.

    Returns:
        The net, with random weights.

    Raises:
        InputError: a number is below 1, a stage has no block, or strides are not one a stage.
    """
    chosen = halving(stages) if strides is None else tuple(strides)
    if not stages or min(width, *stages, *chosen, classes, channels, stem) < 1 or len(chosen) != len(stages):
        raise InputError(
            f"residual: width={width}, stages={list(stages)}, strides={list(chosen)}, classes={classes}, "
            f"channels={channels} and stem={stem} must be 1 or more, in every stage, with one stride a stage"
        )
    return Residual(width, stages, chosen, classes, channels, stem)
