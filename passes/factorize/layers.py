"""Which layers can be split into two of low rank, into which ranks, and why others cannot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pqk.core.calls import watch
from pqk.core.program import Example
from pqk.data.structures import tensors
from pqk.errors import InputError, Reason, first_line, nearest
from pqk.passes.prune.channel_group import matches
from pqk.passes.prune.low_rank import SPLITTABLE, LowRank, WeightedLayer, empty_halves, weighted_layer

LARGEST = 8192
"""outputs of a layer up to which its responses are taken apart, which takes their cube of operations"""
SAME = 1e-3
"""largest difference of two forms of one model, over its largest output: that of sums in another order"""


@dataclass(frozen=True)
class SplitLayer:
    """A layer that can be split. Those of one signature compute the same with other weights."""

    path: str
    signature: str
    ranks: tuple[int, ...]
    """the ranks that are tried, falling"""


def find_layers(
    model: nn.Module, example: Example, patterns: Sequence[str], shares: Sequence[float], multiple: int
) -> tuple[list[SplitLayer], dict[str, Reason]]:
    """The layers of `model` that match and can be split, in the order of their calls, and why others that match cannot.

    A rank is the multiple of `multiple` below a share of the one at which both halves together multiply as often as the
    layer does. Raises `InputError` for a pattern that names no linear or convolution layer.
    """
    kinds = {p: m for p, m in model.named_modules(remove_duplicate=False) if p and isinstance(m, WeightedLayer)}
    if not kinds:
        return [], {"*": "the student has no linear or convolution layer"}
    for pattern in patterns:
        if not any(matches(path, (pattern,)) for path in kinds):
            raise InputError(
                f'factorize: layers = "{pattern}" names no linear or convolution layer{nearest(pattern, kinds)}'
            )
    named = {path: layer for path, layer in kinds.items() if matches(path, patterns)}
    reasons = {path: why_not_split(model, layer) for path, layer in named.items()}
    able = {path: named[path] for path, reason in reasons.items() if reason is None}
    with torch.no_grad(), watch(able, copied=lambda path: False) as calls:
        model(*example)
    refused: dict[str, Reason] = {path: reason for path, reason in reasons.items() if reason is not None}
    refused |= {path: "the model does not call it on the example" for path in able if path not in calls}
    layers = []
    for path, call in calls.items():
        ranks = ranks_of(able[path], shares, multiple)
        if not ranks:
            refused[path] = f"it is too small: no rank that is a multiple of {multiple} would multiply less often"
            continue
        shapes = [tuple(t.shape[1:]) for t in tensors(call.output.structure)]
        layers.append(SplitLayer(path, f"{able[path]!r} {shapes} {call.times}", ranks))
    return layers, refused


def why_not_split(model: nn.Module, layer: WeightedLayer) -> Reason | None:
    """Why a linear or convolution layer of `model` is not two of low rank, whatever it costs."""
    if type(layer) not in SPLITTABLE:
        return f"it is a {type(layer).__name__}, which may compute something else than a plain layer does"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks, which would not be called"
    places = Counter(
        id(t) for m in model.modules() for t in m._parameters.values() if t is not None
    )  # each module once: a layer that is called from two places is one layer
    homes = [p for p, m in model.named_modules(remove_duplicate=False) if m is layer]
    if len(homes) > 1:
        return f"it is one layer under {len(homes)} names: {', '.join(homes)}"
    if any(places[id(t)] > 1 for t in layer.parameters()):
        return "its weight or bias is another layer's as well, and would have to be kept beside the two halves"
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return f"it is a convolution of {layer.groups} groups, whose filters see few channels as it is"
    if layer.weight.shape[0] > LARGEST:
        return f"it has {layer.weight.shape[0]} outputs; up to {LARGEST} are taken apart"
    return None


def ranks_of(layer: WeightedLayer, shares: Sequence[float], multiple: int) -> tuple[int, ...]:
    """The ranks to try for a layer, falling; none where it is too small."""
    outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
    even = inputs * outputs / (inputs + outputs)
    ranks = {math.floor(share * even / multiple) * multiple for share in shares}
    return tuple(sorted((r for r in ranks if 0 < r < min(inputs, outputs)), reverse=True))


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """`model` with other modules at these paths, within the context."""
    before = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            _put(model, path, layer)
        yield model
    finally:
        for path, layer in before.items():
            _put(model, path, layer)


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@torch.no_grad()
def reasons_against(model: nn.Module, example: Example, halves: Mapping[str, LowRank]) -> dict[str, Reason]:
    """The layers that are not their two halves to the model: it does more with them than to call them.

    It reads a weight, say, to compute with it by itself. The model with the halves must answer what it does with the
    layers whose weight is the product of the halves'.
    """
    wholes = {path: product_of(weighted_layer(model, path), h) for path, h in halves.items()}

    def why_not_same(paths: Sequence[str]) -> Reason | None:
        with replaced(model, {p: wholes[p] for p in paths}):
            want = tensors(model(*example))
        try:
            with replaced(model, {p: halves[p] for p in paths}):
                got = tensors(model(*example))
        except Exception as error:  # whatever the user's forward raises where a layer lacks what it reads
            return f"the model does more with it than to call it: {first_line(error)}"
        if all(close(g, w) for g, w in zip(got, want, strict=True)):
            return None
        return "the model does more with it than to call it, and answers otherwise when it is two layers"

    if not halves or why_not_same([*halves]) is None:
        return {}
    reasons = {path: why_not_same([path]) for path in halves}
    return {path: reason for path, reason in reasons.items() if reason is not None}


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are equal but for rounding."""
    if one.shape != other.shape or not other.is_floating_point() or not other.numel():
        return one.shape == other.shape and (not other.numel() or torch.equal(one, other))
    return float((one - other).abs().max()) <= SAME * float(other.abs().max()) + 1e-12


@torch.no_grad()
def product_of(layer: WeightedLayer, halves: LowRank) -> WeightedLayer:
    """The one layer that computes what two halves do, beside `layer`, whose settings it has."""
    reduce, expand = halves.reduce, halves.expand
    rank = expand.weight.shape[1]
    whole = empty_whole(layer)
    weight = expand.weight.double().flatten(1) @ reduce.weight.double().reshape(rank, -1)
    whole.weight.copy_(weight.view(layer.weight.shape))
    assert whole.bias is not None and expand.bias is not None
    whole.bias.copy_(expand.bias)
    return whole


def empty_whole(layer: WeightedLayer) -> WeightedLayer:
    """A layer of the kind and settings of `layer`, with a bias, to be filled in."""
    outputs = layer.weight.shape[0]
    whole = empty_halves(layer, outputs).reduce
    whole.bias = nn.Parameter(layer.weight.new_zeros(outputs))
    return whole
