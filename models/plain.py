"""Plain nets for small images, students that are not cut out of their teacher: 3x3 convolutions and nothing beside.

Four stages, each twice as wide as the one before and half its height and width, keep the MACs of all stages alike and
every layer wide enough for integer kernels. A chain has no sums, whose operands an integer runtime brings to one scale.

`branched` is the same net with the training-time branches of RepVGG (Ding et al. 2021, arXiv:2101.03697): beside each
3x3 convolution one of 1x1 and, where shapes are equal, the identity, each with a batch norm of its own. All three are
linear, so one 3x3 convolution computes their sum (section 3.3): `capture` deploys that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.errors import InputError

LayerFactory = Callable[[int, int, int], nn.Module]
"""(input channels, output channels, stride) -> a layer with its activation"""


def convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """`relu(bn(conv(x)))`, 3x3; [B, in, H, W] -> [B, out, ceil(H/stride), ceil(W/stride)]."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Branched(nn.Module):
    """`relu(bn3(conv3x3(x)) + bn1(conv1x1(x)) + bn(x))`, the last where input and output have one shape.

    [B, in, H, W] -> [B, out, ceil(H/stride), ceil(W/stride)], as `convolution`. What it knows of channels it reads off
    its layers, whose channels may be cut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.identity = nn.BatchNorm2d(out_channels) if same else None
        for conv in (self.conv3, self.conv1):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        return F.relu(y if self.identity is None else y + self.identity(x))

    def for_inference(self) -> nn.Module:
        """The layer that is deployed: one convolution with a bias, and the ReLU. `capture` asks for it."""
        return nn.Sequential(fused_branches(self), nn.ReLU())


@torch.no_grad()
def fused_branches(layer: Branched) -> nn.Conv2d:
    """The one 3x3 convolution that computes the sum of a layer's branches in eval mode, before its ReLU.

    A batch norm of running mean μ and variance σ² is `y -> g (y - μ) + β` with `g = γ / sqrt(σ² + ε)`: it scales a
    convolution's output channels by g, and adds `β - g μ`. A 1x1 kernel is a 3x3 one with zeros around it, and the
    identity a 1x1 kernel that is the unit matrix. Weight [out, in, 3, 3] and bias [out] are sums over branches.
    """
    conv = layer.conv3
    weight, bias = _scaled(layer.conv3.weight, layer.bn3)
    branches = [_scaled(F.pad(layer.conv1.weight, (1, 1, 1, 1)), layer.bn1)]
    if layer.identity is not None:
        unit = torch.eye(conv.out_channels, dtype=weight.dtype, device=weight.device)[..., None, None]
        branches.append(_scaled(F.pad(unit, (1, 1, 1, 1)), layer.identity))
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride[0], 1).to(weight)
    fused.weight.copy_(weight + sum(w for w, _ in branches))
    assert fused.bias is not None
    fused.bias.copy_(bias + sum(b for _, b in branches))
    return fused


def _scaled(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(weight, bias) of a convolution without a bias and the batch norm behind it, in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * gain[:, None, None, None], norm.bias - gain * norm.running_mean


class Staged(nn.Module):
    """A stem, stages of layers, and a linear layer on their mean: [B, channels, H, W] float32 -> logits [B, classes].

    Stages are modules `stage1`, `stage2`, …, whose outputs terms that compare features can name. Stage i, counted from
    0, has `width * 2**i` channels, and its first layer the stride of that number.
    """

    def __init__(
        self,
        stem: nn.Module,
        layer: LayerFactory,
        width: int,
        stages: Sequence[int],
        strides: Sequence[int],
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        wide = width
        for stage, (count, stride) in enumerate(zip(stages, strides, strict=True)):
            layers, out = [], width << stage
            for i in range(count):
                layers.append(layer(wide, out, 1 if i else stride))
                wide = out
            self.add_module(f"stage{stage + 1}", nn.Sequential(*layers))
        self.stages = len(stages)
        self.linear = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in range(self.stages):
            x = self.get_submodule(f"stage{stage + 1}")(x)
        return self.linear(x.mean((2, 3)))


def halving(stages: Sequence[int]) -> tuple[int, ...]:
    """The strides of stages of which each but the first has half the height and width of the one before."""
    return tuple(2 if stage else 1 for stage in range(len(stages)))


class Plain(Staged):
    """A stem and stages of one kind of layer: [B, channels, H, W] float32 -> logits [B, classes]."""

    def __init__(
        self, layer: LayerFactory, width: int, stages: Sequence[int], classes: int, channels: int, stem: int
    ) -> None:
        super().__init__(layer(channels, width, stem), layer, width, stages, halving(stages), classes)


def plain(
    width: int = 16, stages: Sequence[int] = (2, 2, 2, 2), classes: int = 10, channels: int = 3, stem: int = 1
) -> Plain:
    """A plain net of 3x3 convolutions; by default `width * (1, 1, 2, 2, 4, 4, 8, 8)` behind a stem.

    At width 16, for 3 channels of 32x32 and 10 classes: 297,626 parameters, 15.8 million MACs; at width 24: 667,618 and
    35.2 million.

    Args:
        width: channels of the stem and of the first stage; those of stage i, counted from 0, are `width * 2**i`.
        stages: layers of each stage.
        classes: logits.
        channels: of the images.
        stem: its stride: 2 for images of 64x64, 4 for those of 128x128.

    Returns:
        The net, with random weights.

    Raises:
        InputError: a number is below 1, or a stage has no layer.
    """
    _check(width, stages, classes, channels, stem)
    return Plain(convolution, width, stages, classes, channels, stem)


def branched(
    width: int = 16, stages: Sequence[int] = (2, 2, 2, 2), classes: int = 10, channels: int = 3, stem: int = 1
) -> Plain:
    """The net of `plain` with RepVGG's branches while it trains; captured, it is `plain` with biases for batch norms.

    Until then it counts as what it is: at width 16, 331,946 parameters and 17.5 million MACs.

    Args:
        width, stages, classes, channels, stem: as `plain` takes them.

    Returns:
        The net, with random weights.

    Raises:
        InputError: as `plain`.
    """
    _check(width, stages, classes, channels, stem)
    return Plain(Branched, width, stages, classes, channels, stem)


def _check(width: int, stages: Sequence[int], classes: int, channels: int, stem: int) -> None:
    if not stages or min(width, *stages, classes, channels, stem) < 1:
        raise InputError(
            f"plain: width={width}, stages={list(stages)}, classes={classes}, channels={channels} and stem={stem} must "
            "be 1 or more, in every stage"
        )
