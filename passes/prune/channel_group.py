"""Channels that must be cut together, and the layers that have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from pqk.passes.prune.cuts import Cut, Dim


@dataclass(frozen=True)
class Member:
    """A layer of a group. `places[c]` are the layer's channels that stand for channel c of the group."""

    path: str
    dim: Dim
    of: int
    places: tuple[tuple[int, ...], ...]
    size: int = 1
    """channels of one head"""
    share: int = 1
    """heads of a group of them"""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be cut together, named after the layer that makes them first."""

    name: str
    channels: int
    members: tuple[Member, ...]
    units: tuple[tuple[int, ...], ...] = ()
    """the channels in the portions in which they can go: one each, more with grouped convolutions"""
    reason: str | None = None
    """why it cannot be cut"""
    doubt: str | None = None
    """why the law may refuse it, as far as one pass shows"""

    @property
    def unit(self) -> int:
        """Channels that go at once."""
        return len(self.units[0])

    @property
    def producers(self) -> list[str]:
        """The layers that make these channels."""
        return [m.path for m in self.members if m.dim == "out"]

    def cuts(self, channels: Iterable[int]) -> list[Cut]:
        """The cuts that remove these channels of the group."""
        pruned = sorted(channels)
        cuts = []
        for m in self.members:
            cut = Cut(module=m.path, dim=m.dim, indices=sorted({p for c in pruned for p in m.places[c]}), of=m.of)
            if m.dim == "heads":  # its module is told also where its heads stay and only what is around them narrows
                cuts.append(Cut(**cut, size=m.size) if m.share == 1 else Cut(**cut, size=m.size, share=m.share))
            elif cut["indices"]:
                cuts.append(cut)
        return cuts


def merge_cuts(cuts: Iterable[Cut]) -> list[Cut]:
    """Cuts of several groups as one for each side of each layer (two groups can meet in one, as in a concatenation)."""
    merged: dict[tuple[str, Dim], Cut] = {}
    for cut in cuts:
        both = merged.setdefault((cut["module"], cut["dim"]), {**cut, "indices": []})
        both["indices"] = sorted({*both["indices"], *cut["indices"]})
    return list(merged.values())


def matches(path: str, patterns: Sequence[str]) -> str | None:
    """The first pattern (shell style, `layer1.*`) that names the layer or a module around it."""
    around = [path, *(path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1))]
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in around)), None)


def layer_of(model: nn.Module, path: str) -> nn.Module | None:
    """The layer of a member, the network itself for an empty path; None for a bare parameter."""
    parent, _, name = path.rpartition(".")
    layer = getattr(model.get_submodule(parent), name) if path else model
    return layer if isinstance(layer, nn.Module) else None
