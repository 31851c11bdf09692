"""A recipe's factories: small teachers, and tasks with every fault that data can have. Written beside test recipes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pqk import Task
from pqk.data.data import ArrayData


class Plain(nn.Module):
    """[B, 1, 8, 8] -> logits [B, 4]; `output` spoils what it returns, `branch` makes it impossible to capture."""

    def __init__(self, width: int, output: str, branch: bool, weighed: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 4)
        self.output, self.branch, self.weighed, self.width = output, branch, weighed, width

    def forward(self, x: Tensor) -> object:
        x = self.second(self.first(x))
        if self.branch and x.sum() > 0:
            x = x + 1
        if self.weighed:  # against the others, channels at zero among them
            x = x * x.softmax(1)
        logits = self.head(x.mean((2, 3)))
        return {"tensor": logits, "text": "no tensor", "nan": logits * float("nan")}[self.output]


def teacher(width: int = 32, output: str = "tensor", branch: bool = False, weighed: bool = False) -> nn.Module:
    print("a factory that talks")
    torch.manual_seed(0)
    return Plain(width, output, branch, weighed)


def task(data: object = None, fault: str = "", train: bool = True, size: int = 8) -> object:
    """Four classes of 8 x 8 patterns; `fault` is one of those that `test_cli.py` lists."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    images = torch.randn(256, 1, size, size, generator=generator) + labels.view(-1, 1, 1, 1)
    if fault == "labels":
        labels = labels + 1
    if fault == "late label":
        labels[200] = 9
    if fault == "nan":
        images[17, 0, 3, 3] = float("nan")
    if fault == "empty":
        return Task(train=[], evaluation=[(images, labels)])
    if fault == "no task":
        return "a task"
    part = ArrayData(images, labels, 32)
    example = torch.zeros(2, 3, 8, 8) if fault == "example" else None
    validation = part.subset(torch.arange(64), augmented=False)
    evaluation = part.subset(torch.arange(64, 128), augmented=False)
    return Task(
        train=part.subset(torch.arange(128, 256), augmented=True) if train else None,
        evaluation=evaluation,
        validation=validation,
        example=example,
    )
