"""What a stranger is: a network, data, and the ordinary loop that trained it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pqk.errors import InputError
from pqk.task.task import Task


@dataclass(frozen=True)
class Samples:
    """Inputs [N, …] and labels int64 [N] for training, and others to judge by."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def first(self, count: int | None) -> Samples:
        """At most so many of each; None: all."""
        (x, y), (u, v) = self.train, self.test
        return Samples((x[:count], y[:count]), (u[:count], v[:count]))


@dataclass(frozen=True)
class Stranger:
    """A model that no recipe knows."""

    name: str
    what: str
    """the network and its data, in a line of the table"""
    network: Callable[[], nn.Module]
    """makes it, with random weights"""
    samples: Callable[[Path | None], Samples]
    """reads its data; raises `InputError` where the file is not in the folder"""
    epochs: int
    """that its teacher is trained for"""
    rate: float
    """the peak of the learning rate"""
    batch_size: int = 64
    labelled: bool = True
    """whether whoever compiles it has labels of the training data; the teacher always had them"""

    def teacher(self, samples: Samples, seed: int = 0) -> nn.Module:
        """The network, trained from scratch on all training samples, in eval mode: a function of samples and seed."""
        torch.manual_seed(seed)
        model = self.network().train()
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(*samples.train), self.batch_size, shuffle=True, generator=order)
        optimizer = torch.optim.AdamW(model.parameters(), self.rate, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, self.epochs * len(loader))
        for _ in range(self.epochs):
            for inputs, labels in loader:
                loss = F.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return model.eval()

    def task(self, samples: Samples) -> Task:
        """What its owner hands over: two loaders, and nothing beside."""
        inputs, labels = samples.train
        train = TensorDataset(inputs, labels) if self.labelled else TensorDataset(inputs)
        return Task(
            train=DataLoader(train, self.batch_size, shuffle=True),
            evaluation=DataLoader(TensorDataset(*samples.test), 250),
        )


def named(name: str, strangers: tuple[Stranger, ...]) -> Stranger:
    """The stranger of that name. Raises `InputError` with those that there are."""
    for stranger in strangers:
        if stranger.name == name:
            return stranger
    raise InputError(f'strangers: there is none named "{name}"; there are {", ".join(s.name for s in strangers)}')
