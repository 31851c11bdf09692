"""Features by module path: from hooks in a module, from extra outputs in a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from pqk.core.calls import ModuleCall, watch
from pqk.data.structures import first_tensor, recast
from pqk.errors import InputError, nearest


class Tapped(nn.Module):
    """`forward(*inputs) -> (outputs, {path: feature})` over the module's own parameters.

    A feature is what the module returned, whatever is written over it later in the pass. It is copied where that
    happens, which the first pass in each mode finds out; elsewhere it costs nothing.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.model, self.points = model, [(path, _module_at(model, path)) for path in paths]
        self.overwritten: dict[tuple[bool, bool], set[str]] = {}
        """(training, with gradients) -> the points whose tensors are written to later in a pass"""

    def forward(self, *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        mode = (self.model.training, torch.is_grad_enabled())
        known = self.overwritten.get(mode)
        outputs, calls = self._pass(inputs, lambda path: known is None or path in known)
        missing = [path for path, _ in self.points if path not in calls]
        if missing:
            raise InputError(f'distill: module "{missing[0]}" was not called in a forward pass; choose another point')
        written = {path for path, call in calls.items() if call.output.overwritten}
        self.overwritten[mode] = written | (known or set())
        if known is not None and written - known:  # this pass took another way through the model than those before
            outputs, calls = self._pass(inputs, lambda path: True)
        return outputs, {path: first_tensor(calls[path].output.values) for path, _ in self.points}

    def _pass(self, inputs: tuple[Tensor, ...], copied: Callable[[str], bool]) -> tuple[Any, dict[str, ModuleCall]]:
        # Hooks of this call only: what is copied, captured or saved after the training carries none.
        with watch(dict(self.points), copied=copied) as calls:
            return self.model(*inputs), calls


class TappedGraph(nn.Module):
    """The same for a captured graph, whose modules are gone: the node that was the module's output is shown too."""

    def __init__(self, graph_module: fx.GraphModule, paths: Sequence[str]) -> None:
        super().__init__()
        points: dict[str, str] = graph_module.meta.get("points", {})
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(graph_module.graph, copied)
        by_name = {node.name: new for node, new in copied.items()}
        for path in paths:
            if points.get(path) not in by_name:
                raise InputError(f'distill: the captured student has no point "{path}"{nearest(path, points)}')
        graph.output((output, {path: by_name[points[path]] for path in paths}))
        self.graph = fx.GraphModule(graph_module, graph)
        self.structure = graph_module.meta.get("structure")

    def forward(self, *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
        outputs, features = self.graph(*inputs)
        return outputs if self.structure is None else recast(self.structure, outputs), features


def tap(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A module over `model`'s parameters that returns (outputs, features). Raises `InputError` for a missing path."""
    if isinstance(model, fx.GraphModule) and paths:
        return TappedGraph(model, paths)
    return Tapped(model, paths)


def _module_at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise InputError(f'distill: there is no module "{path}" (any more){nearest(path, names)}') from None
