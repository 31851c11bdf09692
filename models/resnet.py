"""CIFAR ResNets (He et al. 2015, arXiv:1512.03385, section 4.2): depth 6n + 2, stages of 16, 32 and 64 channels.

The shortcut between stages is their option A: no parameters, every second pixel, missing channels zero. Here it is a
module that knows which input channel lands on which output channel, so that each stage has a width of its own: a
channel cut on one side changes the mapping and not the other side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelPadShortcut(nn.Module):
    """Option A: `y[:, o] = x[:, source[o], ::stride, ::stride]`, zero where `source[o]` is -1.

    [B, in, H, W] -> [B, out, H/stride, W/stride]. While the mapping is one run of neighbours it is a slice and a pad;
    after an uneven cut it is a pad by one zero channel and a gather. Both only move values, so the quantization
    parameters of the input are those of the output.
    """

    index: Tensor

    def __init__(self, in_channels: int, source: Sequence[int], stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.register_buffer("index", None, persistent=False)
        self._map(in_channels, source)

    @staticmethod
    def centred(in_channels: int, out_channels: int, stride: int) -> ChannelPadShortcut:
        """The published shortcut: the input channels in the middle, as many zeros before as after them."""
        before = (out_channels - in_channels) // 2
        after = out_channels - in_channels - before
        return ChannelPadShortcut(in_channels, [-1] * before + [*range(in_channels)] + [-1] * after, stride)

    def _map(self, in_channels: int, source: Iterable[int]) -> None:
        self.in_channels, self.source = in_channels, tuple(source)
        self.out_channels = len(self.source)
        self.index = torch.tensor([in_channels if s < 0 else s for s in self.source], device=self._device())
        used = [o for o, s in enumerate(self.source) if s >= 0]
        run = range(used[0], used[-1] + 1) if used else range(0)
        first = self.source[run.start] if used else 0
        self.is_run = [*self.source[run.start : run.stop]] == [*range(first, first + len(run))]
        self.taken = slice(first, first + len(run))
        self.padding = (run.start, self.out_channels - run.stop)

    def _device(self) -> torch.device | None:
        return None if self.index is None else self.index.device

    def cut_channels(self, dim: str, indices: Sequence[int]) -> None:
        """Remove input (`dim="in"`) or output (`"out"`) channels; an output whose input is gone is zero."""
        doomed = set(indices)
        if dim == "out":
            self._map(self.in_channels, (s for o, s in enumerate(self.source) if o not in doomed))
            return
        place = {s: i for i, s in enumerate(c for c in range(self.in_channels) if c not in doomed)}
        self._map(len(place), (place.get(s, -1) for s in self.source))

    def trace_as(self) -> nn.Module:
        """A layer of the same shapes whose inputs and outputs are as independent: what a channel tracer should see."""
        return nn.Conv2d(self.in_channels, self.out_channels, 1, self.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        if not self.is_run:
            return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)
        if self.taken != slice(0, self.in_channels):
            x = x[:, self.taken]
        return F.pad(x, (0, 0, 0, 0, *self.padding))

    def extra_repr(self) -> str:
        how = "pad" if self.is_run else "gather"
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {how}"


class BasicBlock(nn.Module):
    """`relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`; [B, in, H, W] -> [B, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ChannelPadShortcut.centred(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """[B, 3, 32, 32] normalised float32 -> logits [B, classes]."""

    def __init__(self, blocks: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            out, layers = width << stage, []
            for i in range(count):
                layers.append(BasicBlock(channels, out, 2 if stage and not i else 1))
                channels = out
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(blocks: Sequence[int] = (9, 9, 9), width: int = 16, classes: int = 10) -> ResNet:
    """A CIFAR ResNet with `blocks[i]` residual blocks of `width * 2**i` channels in stage i."""
    return ResNet(blocks, width, classes)


def resnet20() -> ResNet:
    """ResNet-20 for CIFAR-10: 3 blocks a stage, 269,722 parameters, 41 MMAC."""
    return resnet((3, 3, 3))


def resnet56() -> ResNet:
    """ResNet-56 for CIFAR-10: 9 blocks a stage, 853,018 parameters, 126 MMAC."""
    return resnet((9, 9, 9))
