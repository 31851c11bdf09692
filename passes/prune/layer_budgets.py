"""What layers spend of a budget with other channels: milliseconds by a table of the machine, MACs, or weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pqk.core.run_context import RunContext, WidthPair
from pqk.passes.prune.budget import Budget
from pqk.passes.prune.cuts import channels_of, is_depthwise
from pqk.passes.prune.width_search import journal_key


@dataclass(frozen=True)
class LayerBudgets:
    """What the layers of a network spend, in the budget's unit."""

    layers: dict[str, dict[WidthPair, float]]
    """layer -> channels -> what it spends with them"""
    rest: float
    """what everything else spends"""


def layers_of(model: nn.Module) -> dict[str, WidthPair]:
    """The convolutions and linear layers of a model, with their channels."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, _ConvNd | nn.Linear):
            read, made = channels_of(layer, "in"), channels_of(layer, "out")
            assert read is not None and made is not None
            found[path] = read, made
    return found


def layer_budgets(
    run: RunContext, budget: Budget, student: nn.Module, asked: Mapping[str, Sequence[WidthPair]], key: str
) -> LayerBudgets:
    """What the layers of `student` spend with the channels that are asked for. Latencies are journaled under `key`.

    In a rehearsal milliseconds are as MACs are: measuring a table takes a while. Layers that the deployed form does not
    have by that name spend nothing, and count to the rest.
    """
    if budget.kind != "latency" or run.rough:
        return _counted(budget, student, asked)

    def measure() -> dict[str, Any]:
        found = run.layer_times(student, asked, "prune.allocation")
        return {"layers": found.layers, "rest": found.rest}

    entry = run.decide(f"times/{key}/{journal_key(asked.items())}", measure)
    return LayerBudgets(
        {
            path: dict(zip(widths, entry["layers"].get(path, [0.0] * len(widths)), strict=True))
            for path, widths in asked.items()
        },
        entry["rest"],
    )


def _counted(budget: Budget, student: nn.Module, asked: Mapping[str, Sequence[WidthPair]]) -> LayerBudgets:
    """By the MACs of layers, or their weights, which are as their channels are."""
    spent = _weights(student) if budget.kind in ("parameters", "size") else _macs(student, budget.example)
    whole, all_layers = budget.value(student), sum(spent.values())
    scale = whole / max(1.0, all_layers) if budget.kind == "latency" else 1.0
    known = layers_of(student)

    def share(path: str, widths: WidthPair) -> float:
        read, made = (now / was for now, was in zip(widths, known[path], strict=True))
        return made if is_depthwise(student.get_submodule(path)) else read * made

    layers = {path: {w: scale * spent[path] * share(path, w) for w in widths} for path, widths in asked.items()}
    return LayerBudgets(layers, whole - scale * all_layers)


def _weights(model: nn.Module) -> dict[str, float]:
    return {path: float(_weight(model, path).numel()) for path in layers_of(model)}


def _weight(model: nn.Module, path: str) -> Tensor:
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def _macs(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, float]:
    """MACs of every layer for one sample: each value that it makes takes those of one filter."""
    layers = layers_of(model)
    made = dict.fromkeys(layers, 0.0)
    handles = []
    for path in layers:

        def observe(layer: nn.Module, args: Any, output: Tensor, path: str = path) -> None:
            made[path] += output.numel() / len(example[0])

        handles.append(model.get_submodule(path).register_forward_hook(observe))
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return {path: made[path] * _weight(model, path).numel() / layers[path][1] for path in layers}
