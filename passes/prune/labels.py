"""Numbers of channels: which belong together, and tensors of them beside those of a pass (see `follower`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqk.errors import Reason
from pqk.passes.prune.cuts import Dim

Key = tuple[str, Dim]


@dataclass
class Joined:
    """Which numbers belong together (a union-find)."""

    parent: dict[int, int] = field(default_factory=dict)

    def root(self, number: int) -> int:
        """The smallest number that belongs to `number`."""
        path = []
        while (above := self.parent.get(number, number)) != number:
            path.append(number)
            number = above
        for below in path:
            self.parent[below] = number
        return number

    def join(self, pairs: Iterable[Sequence[int]]) -> None:
        """Puts the numbers of each pair together."""
        for one, other in pairs:
            low, high = sorted((self.root(one), self.root(other)))
            if low != high:
                self.parent[high] = low


@dataclass
class ChannelTrace:
    """Where each channel of a model appears. A channel is a number from 1 on; 0 stands for what is none."""

    places: dict[Key, Tensor] = field(default_factory=dict)
    """layer and side -> the number in each of its places, in the order of the pass"""
    makers: set[Key] = field(default_factory=set)
    """those whose numbers are their own"""
    same: Joined = field(default_factory=Joined)
    """numbers of one channel"""
    portions: Joined = field(default_factory=Joined)
    """numbers that must go together with others so that parts stay even"""
    kept: dict[int, Reason] = field(default_factory=dict)
    """number -> why it cannot go"""

    def classes(self, key: Key) -> list[int] | None:
        """The channel in each place of a side, 0 where there is none; None where the pass did not show that side."""
        places = self.places.get(key)
        return None if places is None else [self.same.root(n) if n else 0 for n in places.tolist()]

    def unit(self, number: int) -> int:
        """What the channel `number` can only go together with, by its smallest number."""
        return self.portions.root(number)

    def reasons(self) -> dict[int, Reason]:
        """Why channels must stay, each by its smallest number."""
        reasons: dict[int, Reason] = {}
        for number, reason in self.kept.items():
            reasons.setdefault(self.same.root(number), reason)
        return reasons


def along(numbers: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """Numbers of an axis of `tensor` for all its elements."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    labels = torch.empty_like(tensor, dtype=torch.int32)
    return labels.copy_(numbers.view(shape).expand(tensor.shape))


def varies(labels: Tensor, axis: int) -> bool:
    """Whether numbers change along an axis; not where there is none."""
    if not -labels.ndim <= axis < labels.ndim or labels.shape[axis] < 2:
        return False
    first = labels.select(axis, 0)  # two places mostly tell, and all are only compared where they do not
    return not torch.equal(first, labels.select(axis, 1)) or not torch.equal(
        labels, first.unsqueeze(axis).expand_as(labels)
    )


def every(axis: int, step: int) -> tuple[slice, ...]:
    """The index of each `step`-th place of an axis."""
    return (*[slice(None)] * axis, slice(None, None, step))


def narrowed(labels: Sequence[Tensor], first: int = 0) -> list[Tensor]:
    """The same numbers, each axis along which none of these changes taken once, from axis `first` on."""
    narrow = [*labels]
    for axis in reversed(range(first, narrow[0].ndim)):
        if all(t.shape[axis] > 0 for t in narrow) and not any(varies(t, axis) for t in narrow):
            narrow = [t.narrow(axis, 0, 1) for t in narrow]
    return narrow


def pairs_of(one: Tensor, other: Tensor) -> list[list[int]]:
    pairs = (one.long() << 32 | other.long())[one != other].unique()
    return torch.stack([pairs >> 32, pairs & 0xFFFFFFFF], 1).tolist()


def padded(labels: Tensor, pad: Sequence[int]) -> Tensor:
    """Padded along an axis that numbers do not depend on, they are the same there too; else there is no channel."""
    for i in range(0, len(pad), 2):
        axis, (low, high) = -1 - i // 2, pad[i : i + 2]
        spread = not varies(labels, axis)
        edge = labels.narrow(axis, 0, 1) if spread else torch.zeros_like(labels.narrow(axis, 0, 1))
        shape = [*labels.shape]
        sides = []
        for count in (low, high):
            shape[axis] = max(count, 0)
            sides.append(edge.expand(shape))
        start, stop = max(0, -low), labels.shape[axis] - max(0, -high)
        labels = torch.cat([sides[0], labels.narrow(axis, start, stop - start), sides[1]], axis)
    return labels
