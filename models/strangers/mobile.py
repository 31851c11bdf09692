"""A MobileNet-like net: depthwise convolutions, squeeze-and-excite, hard-swish."""

from __future__ import annotations

from torch import Tensor, nn

from pqk.models.strangers.pictures import scaled
from pqk.models.strangers.stranger import Stranger


class SqueezeExcite(nn.Module):
    """Scales each channel by what the means of all say: [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project (Howard et al. 2019, arXiv:1905.02244, section 4)."""

    def __init__(self, channels: int, hidden: int, out: int, stride: int, kernel: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.same = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.same else y


class Mobile(nn.Module):
    """Seven inverted residuals: images [B, 3, 32, 32] -> logits [B, 10]; 2.1 M MACs."""

    ROWS = ((16, 32, 16, 1, 3), (16, 64, 24, 2, 3), (24, 96, 24, 1, 3), (24, 96, 40, 2, 5), (40, 160, 40, 1, 5),
            (40, 160, 64, 2, 5), (64, 256, 64, 1, 5))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.Sequential(*(InvertedResidual(*row) for row in self.ROWS))
        self.head = nn.Sequential(nn.Linear(64, 160), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(160, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


MOBILE = Stranger("mobile", "depthwise, squeeze-and-excite, hard-swish; CIFAR-10", Mobile, scaled, epochs=7, rate=4e-3)
