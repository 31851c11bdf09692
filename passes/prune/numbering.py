"""The numbers of channels that the tensors of one forward pass hold, element by element (see `follower`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from pqk.errors import Reason
from pqk.passes.prune.cuts import Dim, channels_of
from pqk.passes.prune.labels import ChannelTrace, along, narrowed, pairs_of

OWN = [f"{__package__}.{name}" for name in ("numbering", "operator_rules", "follower")]
PADDED = "they are padded, sliced or joined with values that are no channels"


@dataclass
class Numbering:
    """Numbers of the elements of each tensor, and what became known of channels where tensors met."""

    layers: Mapping[str, nn.Module]
    """the layers with channels, by path"""
    owners: Mapping[int, str]
    """id of a layer's parameter -> the path of the layer"""
    bare: Mapping[int, str]
    """id of a parameter that is of no layer -> its name"""
    trace: ChannelTrace = field(default_factory=ChannelTrace)
    labels: dict[int, Tensor] = field(default_factory=dict)
    """id of a tensor -> its numbers"""
    alive: list[Tensor] = field(default_factory=list)
    """the tensors with numbers: an id belongs to one object only as long as that lives"""
    next: int = 1
    """the next channel's number"""
    calls: list[str] = field(default_factory=list)
    """the modules that are being called, the innermost last"""

    def of(self, tensor: Tensor) -> Tensor | None:
        """The numbers of a tensor's elements; None where none is a channel's."""
        if id(tensor) in self.bare:
            name = self.bare[id(tensor)]
            if tensor.ndim == 0 or tensor.shape[-1] == 1:
                return None
            return along(self.made(name, "values", tensor.shape[-1]), tensor, -1)
        if (path := self.owners.get(id(tensor))) is not None:
            return self._outside(path, tensor)
        return self.labels.get(id(tensor))

    def _outside(self, path: str, weight: Tensor) -> Tensor | None:
        """The parameter of a layer is read by something else than its own call."""
        module = self.layers[path]
        made = self.made(path, "out", channels_of(module, "out") or 0)
        if isinstance(module, nn.Embedding):
            return along(made, weight, -1)
        self.keep(made, f'a parameter of "{path}" is read outside of its own call{self.where()}')
        return None

    def or_zeros(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor's elements, 0 where there is no channel."""
        labels = self.of(tensor)
        return torch.zeros_like(tensor, dtype=torch.int32) if labels is None else labels

    def made(self, path: str, dim: Dim, count: int) -> Tensor:
        """The numbers of the channels that a layer, or a bare parameter, makes."""
        if (path, dim) not in self.trace.places:
            self.trace.places[path, dim] = torch.arange(self.next, self.next + count, dtype=torch.int32)
            self.trace.makers.add((path, dim))
            self.next += count
        return self.trace.places[path, dim]

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Gives a tensor its numbers."""
        if labels is not None:
            self.labels[id(tensor)] = labels
            self.alive.append(tensor)

    def keep(self, labels: Tensor | None, reason: Reason) -> None:
        """None of these channels can go."""
        if labels is not None:
            (labels,) = narrowed([labels])
            for number in labels.unique().tolist():
                if number:
                    self.trace.kept.setdefault(number, reason)

    def meet(self, one: Tensor, other: Tensor) -> None:
        """Elements meet: channels are one, and one that meets something else must stay."""
        one, other = narrowed([one, other])
        both = (one != 0) & (other != 0)
        self.same(one[both], other[both])
        alone = torch.where(both, 0, torch.maximum(one, other))
        if alone.any():
            self.keep(alone, PADDED + self.where())

    def same(self, one: Tensor, other: Tensor) -> None:
        """Channels in the same place of both are one."""
        self.trace.same.join(pairs_of(one, other))

    def even(self, parts: Tensor) -> None:
        """Each row of `parts` must lose as many: [rows, places]."""
        for part in parts[1:]:
            both = (part != 0) & (parts[0] != 0)
            self.trace.portions.join(pairs_of(parts[0][both], part[both]))

    def where(self) -> str:
        """The module that is being called, and the line of its code."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _of_a_tracer(frame):
            frame = frame.f_back
        path = next((p for p in reversed(self.calls) if p), "")
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else ""
        return f' (in "{path}", {line})' if path else f" ({line})"


def _of_a_tracer(frame: FrameType) -> bool:
    """Whether torch runs here, or what follows it, and not the model."""
    file = frame.f_code.co_filename
    return file.startswith((str(Path(torch.__file__).parent), "<")) or frame.f_globals.get("__name__") in OWN
