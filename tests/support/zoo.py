"""Small networks of every kind that pqk compiles: a teacher, the shapes of its inputs, and a task for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.data.structures import first_tensor
from pqk.task.metrics import Metric
from pqk.task.task import Task

IMAGE = (3, 12, 12)


def block(i: int, o: int, act: type[nn.Module] = nn.ReLU, **conv: Any) -> nn.Sequential:
    conv = {"kernel_size": 3, "padding": 1, "bias": False} | conv
    return nn.Sequential(nn.Conv2d(i, o, **conv), nn.BatchNorm2d(o), act())


class Head(nn.Sequential):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def plain() -> nn.Module:
    return nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 16), nn.AvgPool2d(2), Head(16))


class Residual(nn.Module):
    """A block around two convolutions, one with a shortcut of slices and a pad; two outputs, as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = block(3, 16), block(16, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.conv, self.linear, self.small = nn.Conv2d(16, 32, 3, 2, 1), Head(32), Head(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = F.relu(x + self.two(self.one(x)))
        y = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        return self.linear(y), self.small(x)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), Head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.norm(torch.cat([x, self.conv(x)], 1))))


class Separable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = block(3, 16, nn.ReLU6), block(16, 16, nn.ReLU6, groups=16)
        self.point, self.linear = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.linear(F.dropout(x + self.point(self.deep(x)), 0.2, self.training).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation as MobileNetV3 has it, with hard-swish and hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16, nn.Hardswish), Head(16)
        self.less, self.more = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * F.hardsigmoid(self.more(F.relu(self.less(F.adaptive_avg_pool2d(x, 1))))))


def silu() -> nn.Module:
    return nn.Sequential(block(3, 16, nn.SiLU), block(16, 16, nn.SiLU), Head(16))


def grouped() -> nn.Module:
    leaky = nn.Sequential(nn.Conv2d(32, 32, 3, padding="same"), nn.LeakyReLU(0.1))
    return nn.Sequential(block(3, 16), block(16, 32, groups=4), block(32, 32, dilation=2, padding=2), leaky, Head(32))


def transposed() -> nn.Module:
    up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(block(3, 16, stride=2), up, nn.Conv2d(8, 4, 3, padding=1))


class Several(nn.Module):
    """Two inputs; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fine, self.coarse = block(3, 8), block(1, 8), block(16, 16), Head(16), Head(16, 2)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        x = self.c(torch.cat([self.a(image), self.b(depth)], 1))
        return {"fine": self.fine(x), "coarse": self.coarse(x)}


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(12, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.one, self.two, self.out = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 5)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = self.one(x + self.o(mixed))
        return self.out(self.two(x + self.down(F.gelu(self.up(x))))[:, 0])


def linear() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5)
    )


def tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


@dataclass(frozen=True)
class Network:
    """How to build one, and what its inputs look like. `classes` is the axis of its first output's classes."""

    build: Callable[[], nn.Module]
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [IMAGE])
    classes: int = -1

    def teacher(self) -> nn.Module:
        """With weights and statistics of batch norm that are always the same."""
        torch.manual_seed(0)
        module = self.build()
        with torch.no_grad():
            for _ in range(3):
                module(*self.inputs(24, 1))
        return module.eval()

    def inputs(self, count: int, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(count, *shape, generator=generator) for shape in self.shapes)

    def task(self, teacher: nn.Module) -> Task:
        """32 samples to train on and 16 each to choose and to judge by, labelled by the teacher."""
        inputs = self.inputs(64)
        with torch.no_grad():
            labels = self.decision(teacher(*inputs))
        whole = ArrayData(inputs, labels, 8)
        parts = [whole.subset(torch.arange(*span), augmented=False) for span in ((0, 32), (32, 48), (48, 64))]
        accuracy = Metric("accuracy", "share", lambda o, t: float((self.decision(o) == t).double().mean()))
        return Task(parts[0], parts[1], parts[2], metric=accuracy, loss=self.loss, decision=self.decision)

    def decision(self, outputs: Any) -> Tensor:
        return first_tensor(outputs).argmax(self.classes)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits = first_tensor(outputs).movedim(self.classes, 1)
        return F.cross_entropy(logits, targets, reduction="none").reshape(len(targets), -1).mean(1)


NETWORKS = {
    "plain": Network(plain),
    "residual": Network(Residual),
    "dense": Network(Dense),
    "separable": Network(Separable),
    "gated": Network(Gated),
    "silu": Network(silu),
    "grouped": Network(grouped),
    "transposed": Network(transposed, classes=1),
    "several": Network(Several, [IMAGE, (1, 12, 12)]),
    "attention": Network(Attention, [(7, 12)]),
    "linear": Network(linear, [(20,)]),
    "tokens": Network(tokens, [(6, 20)]),
}
