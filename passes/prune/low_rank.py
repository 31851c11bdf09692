"""A layer as two of low rank, and where the channels of the one layer are in the two.

It is here, and not with the pass that decides on it, since what cuts channels afterwards, or asks which are left, must
know that the outputs of a split layer are those of its second half and its inputs those of its first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import skip_init

from pqk.core.program import Example, Rewrite
from pqk.errors import InputError

REDUCE, EXPAND = "reduce", "expand"
"""the names of the two halves"""
WeightedLayer = nn.Linear | _ConvNd
SPLITTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""what can be split: these classes, and none that is derived from them, which may compute something else"""


class Split(TypedDict):
    """Let `layer` be two layers with `rank` channels between them."""

    layer: str
    rank: int


class LowRank(nn.Sequential):
    """`expand(reduce(x))`, in the place of one linear or convolution layer: the shapes are that layer's.

    `reduce` has its kernel, stride and padding and makes `rank` channels; `expand` is linear or 1x1 and has the bias.
    """

    reduce: WeightedLayer
    expand: WeightedLayer

    def __init__(self, reduce: WeightedLayer, expand: WeightedLayer) -> None:
        super().__init__(OrderedDict([(REDUCE, reduce), (EXPAND, expand)]))


def split_layers(student: nn.Module, example: Example, *, splits: Sequence[Split]) -> nn.Module:
    """Rewrite: make two layers of low rank of each of these, all of whose weights are zero until they are filled in.

    Changes `student`. Raises `InputError` where a layer is not the one that the split was made for.
    """
    for split in splits:
        parent, _, name = split["layer"].rpartition(".")
        layer = student.get_submodule(split["layer"])
        if type(layer) not in SPLITTABLE or split["rank"] < 1:
            raise InputError(
                f'splitting "{split["layer"]}" ({type(layer).__name__}) into rank {split["rank"]}: only a plain linear '
                "or convolution layer can be; is this the network that the compile began with?"
            )
        assert isinstance(layer, WeightedLayer)
        setattr(student.get_submodule(parent), name, empty_halves(layer, split["rank"]))
    return student


def empty_halves(layer: WeightedLayer, rank: int) -> LowRank:
    """The two layers that take the place of `layer`, on its device and of its dtype, with all weights zero."""
    own = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        reduce = skip_init(nn.Linear, layer.in_features, rank, bias=False, **own)
        expand = skip_init(nn.Linear, rank, layer.out_features, **own)
    else:
        where = {"padding_mode": layer.padding_mode, "stride": layer.stride, "padding": layer.padding}
        size = {"kernel_size": layer.kernel_size, "dilation": layer.dilation}
        reduce = skip_init(type(layer), layer.in_channels, rank, bias=False, **size, **where, **own)
        expand = skip_init(type(layer), rank, layer.out_channels, kernel_size=1, **own)
    halves = LowRank(reduce, expand)
    with torch.no_grad():
        for parameter in halves.parameters():
            parameter.zero_().requires_grad_(layer.weight.requires_grad)
    return halves.train(layer.training)


def weighted_layer(model: nn.Module, path: str) -> WeightedLayer:
    """The linear or convolution layer at `path`, which is one."""
    layer = model.get_submodule(path)
    assert isinstance(layer, WeightedLayer)
    return layer


def whole_layer(path: str, dim: str, split: Iterable[str]) -> str:
    """The layer whose outputs (`dim` "out") or inputs ("in") are those of the layer at `path`.

    That is the layer itself, but for the outer side of a half of one of the layers that were `split`.
    """
    layer, _, half = path.rpartition(".")
    return layer if half == {"out": EXPAND, "in": REDUCE}.get(dim) and layer in split else path


def ranks_split(plan: Iterable[Rewrite]) -> dict[str, int]:
    """The layers that rewrites of a plan split, with the channels that were between their halves then."""
    splits = (s for r in plan if r.function == split_layers.__name__ for s in r.arguments["splits"])
    return {s["layer"]: s["rank"] for s in splits}


def original_layer(origin: nn.Module, path: str) -> nn.Module | None:
    """The layer of the network that a plan began with whose outputs the layer at `path` makes; None: there was none."""
    modules = dict(origin.named_modules(remove_duplicate=False))
    return modules[path] if path in modules else modules.get(whole_layer(path, "out", modules))
