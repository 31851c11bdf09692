"""Channels followed through one forward pass by labels: what torch-pruning's walk over autograd is checked against.

Every channel that a layer makes has a number of its own, and each tensor of the pass has beside it a tensor of the same
shape with the numbers of its elements. Operators that only move values move the numbers in the same way, whatever they
are: views, splits, flips, shuffles, concatenations. Where two channels meet in one element they must go together, where
one meets a constant it must stay, and an operator that is not known keeps what goes into it, and only that.

What an element-wise operator joins is one channel in two places. What a split into equal parts joins, or a grouped
convolution, are channels of which each part must lose as many: they are portions of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

from pqk.core.modes import evaluating, fused_layers
from pqk.data.structures import tensors
from pqk.passes.prune.cuts import Dim, channels_of, is_depthwise
from pqk.passes.prune.labels import ChannelTrace, along, narrowed, varies
from pqk.passes.prune.numbering import Numbering
from pqk.passes.prune.operator_rules import OperatorRules
from pqk.passes.prune.scales import is_own_norm

OPAQUE = (nn.RNNBase, nn.RNNCellBase)
"""modules that mix what they read; their parameters are not cut"""


def trace_channels(model: nn.Module, example: tuple[Tensor, ...]) -> ChannelTrace:
    """Follows the channels of `model` (unchanged) through one forward pass on `example`, in eval mode."""
    numbers = _numbering(model)
    follower = _Follower(numbers)
    # one operator for a whole encoder layer would show no channels
    with fused_layers(False), evaluating(model), torch.no_grad(), follower.watching(model), follower:
        outputs = tensors(model(*example))
    for output in outputs:
        numbers.keep(numbers.of(output), "they are channels of the model's output")
    trace = numbers.trace
    # channels that are one belong to one unit
    trace.portions.join((n, trace.same.root(n)) for n in list(trace.same.parent))
    return trace


def _numbering(model: nn.Module) -> Numbering:
    """No tensor has numbers yet, but for the parameters of `model`, by whom they are of."""
    layers = {p: m for p, m in model.named_modules() if p and channels_of(m, "out") is not None}
    opaque = [p for p, m in model.named_modules() if isinstance(m, OPAQUE)]
    owners: dict[int, str] = {}
    bare: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        owner = next((p for p in (*layers, *opaque) if name.startswith(f"{p}.")), None)
        if owner is None:
            bare[id(parameter)] = name
        elif owner in layers:
            owners[id(parameter)] = owner
    return Numbering(layers, owners, bare)


class _Follower(TorchDispatchMode):
    """Moves the numbers of channels as the operators of a pass move the values.

    Layers with channels are seen at their hooks, whatever they compute inside; everything else operator by operator.
    """

    def __init__(self, numbers: Numbering) -> None:
        super().__init__()
        self.numbers, self.rules = numbers, OperatorRules(numbers)
        self.inside = 0
        """layers that are being called, whose operators are their own matter"""
        self.norms: set[str] = set()
        """norms of the model's own make"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self.inside:
            self.rules.apply(func, args, kwargs, output)
        return output

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module of `model`, within the context."""
        handles = []
        self.norms = {path for path, m in model.named_modules() if path not in self.numbers.layers and is_own_norm(m)}
        for path, module in model.named_modules():
            layer = path in self.numbers.layers or path in self.norms or isinstance(module, OPAQUE)
            handles.append(module.register_forward_pre_hook(self._entering(path, layer)))
            leaving = self._leaving(path, layer)
            handles.append(module.register_forward_hook(leaving, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str, layer: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.numbers.calls.append(path)
            self.inside += layer

        return enter

    def _leaving(self, path: str, layer: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.inside -= layer
            if layer and not self.inside and output is not None:
                read = tensors([*args, *kwargs.values()])
                try:
                    known = path in self.numbers.layers or path in self.norms
                    if not known or not read or not isinstance(output, Tensor):
                        raise TypeError("no layer from a tensor to a tensor")
                    (self._norm if path in self.norms else self._layer)(path, module, read[0], output)
                except Exception:  # a layer that is called as none of its kind is
                    what = f'they are read by the {type(module).__name__} "{path}", whose channels pqk cannot cut'
                    for x in read:
                        self.numbers.keep(self.numbers.of(x), what)
            self.numbers.calls.pop()

        return leave

    def _layer(self, path: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A layer was called: numbers of its own come out, those of its input where it keeps channels in place."""
        if isinstance(module, nn.Embedding):
            return self.numbers.put(output, along(self.numbers.made(path, "out", module.embedding_dim), output, -1))
        linear = isinstance(module, nn.Linear)
        if (isinstance(module, _ConvNd) and not is_depthwise(module)) or linear or hasattr(module, "cut_channels"):
            axis = -1 if linear else -len(module.kernel_size) - 1 if isinstance(module, _ConvNd) else 1
            return self._weighted(path, module, x, output, axis)
        labels = self.numbers.of(x)
        if labels is None:
            return None
        axis = -1 if isinstance(module, nn.LayerNorm) else 1
        if isinstance(module, nn.LayerNorm) and x.shape[-1] != channels_of(module, "out"):
            axis = 1  # a norm that first moves its channels to the last axis
        if isinstance(module, nn.LayerNorm) and x.ndim > 1 and x.shape[1] == channels_of(module, "out"):
            axis = axis if varies(labels, axis) else 1
        if x.ndim > 1 and x.shape[axis] == channels_of(module, "out"):
            self._read(path, "out", module, labels, axis)
            if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
                self.numbers.even(self.numbers.trace.places[path, "out"].view(module.num_groups, -1).T)
        elif channels_of(module, "out") != 1:
            self.numbers.keep(
                labels, f'the {type(module).__name__} "{path}" reads them on another axis than its channels'
            )
        return self.numbers.put(output, labels.clone()) if output.shape == x.shape else self.rules.spatial(x, output)

    def _norm(self, path: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        """A norm of the model's own make was called: what it scales is one with its scales."""
        labels = self.numbers.of(x)
        if labels is None:
            return None
        for name, parameter in module.named_parameters(recurse=False):
            made = self.numbers.made(f"{path}.{name}", "values", len(parameter))
            self.numbers.meet(labels, along(made, x, -1))
        return self.numbers.put(output, labels.clone())

    def _weighted(self, path: str, module: nn.Module, x: Tensor, output: Tensor, axis: int) -> None:
        """A layer that reads channels along `axis` and makes others."""
        labels = self.numbers.of(x)
        made = self.numbers.made(path, "out", channels_of(module, "out") or 0)
        if labels is not None and not varies(labels, axis) and labels.any() and isinstance(module, nn.Linear):
            rows = labels[..., :1]  # it is applied to positions, and rows of them are the channels
            if any(varies(rows, a) for a in range(rows.ndim - 1)):
                self.numbers.keep(made, f'"{path}" is applied to each channel of other layers')
                return self.numbers.put(output, rows.expand(output.shape).clone())
        self._read(path, "in", module, labels, axis)
        if isinstance(module, _ConvNd) and module.groups > 1:
            for key in ((path, "in"), (path, "out")):
                self.numbers.even(self.numbers.trace.places[key].view(module.groups, -1))
        return self.numbers.put(output, along(made, output, axis))

    def _read(self, path: str, dim: Dim, module: nn.Module, labels: Tensor | None, axis: int) -> None:
        """A layer reads these channels: all that come in one place are one channel."""
        count = channels_of(module, dim) or 0
        place = torch.zeros(count, dtype=torch.int32)
        if labels is not None:
            (narrow,) = narrowed([labels.movedim(axis, 0)], first=1)
            rows = narrow.reshape(count, -1)
            place = rows.amax(1)
            self.numbers.same(place[:, None].expand_as(rows)[rows != 0], rows[rows != 0])
        before = self.numbers.trace.places.get((path, dim))
        if before is not None:
            self.numbers.meet(before, place)
            place = torch.maximum(before, place)
        self.numbers.trace.places[path, dim] = place
