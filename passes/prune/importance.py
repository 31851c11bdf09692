"""The importance of channels, and the schedule of ever narrower networks that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pqk.copies import copy_of
from pqk.core.convolutions import UnitStrides
from pqk.errors import InputError, Reason
from pqk.passes.prune.channel_group import ChannelGroup, Member, layer_of, merge_cuts
from pqk.passes.prune.cuts import NORMS, Cut, Dim, is_depthwise
from pqk.task.task import Task

Importance = Literal["magnitude", "taylor", "activation", "bn_scale"]
WidthScope = Literal["global", "per_layer", "uniform"]


@dataclass(frozen=True)
class Narrowing:
    """One step of the schedule: `group` loses `units` and is `width` channels wide; `lost` is their importance."""

    group: ChannelGroup
    units: tuple[int, ...]
    width: int
    lost: float

    @property
    def cuts(self) -> list[Cut]:
        return self.group.cuts(c for u in self.units for c in self.group.units[u])


def cuts_of(narrowings: Sequence[Narrowing]) -> list[Cut]:
    """The cuts of several narrowings of one model's schedule, as one rewrite."""
    return merge_cuts(cut for narrowing in narrowings for cut in narrowing.cuts)


def gradients(model: nn.Module, task: Task, samples: int) -> dict[str, Tensor]:
    """Mean gradient of the task's loss for each parameter, over about `samples` validation samples.

    Raises `InputError` for data without labels.
    """
    model = copy_of(model, "student").eval().requires_grad_(True)
    count = 0
    if not task.validation.labelled:
        raise InputError('prune: importance = "taylor" needs labelled validation data; use "activation" or "magnitude"')
    with torch.enable_grad(), UnitStrides():
        for batch in task.validation.batches():
            task.loss(model(*batch.inputs), batch.targets).sum().backward()
            count += len(batch.inputs[0])
            if count >= samples:
                break
    return {name: p.grad / count for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def input_energies(model: nn.Module, task: Task, samples: int) -> dict[str, Tensor]:
    """Mean square of each channel that a convolution or linear layer reads, [C] by layer, over validation samples."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for path, layer in model.named_modules():
        if not isinstance(layer, _ConvNd | nn.Linear):
            continue

        def observe(layer: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            x = args[0].detach().float().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
            sums[path] = sums.get(path, torch.zeros(len(x))) + x.square().sum(1).cpu()
            counts[path] = counts.get(path, 0) + x.shape[1]

        hooks.append(layer.register_forward_pre_hook(observe))
    try:
        for inputs in task.calibration(samples):
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / counts[path] for path, total in sums.items()}


@dataclass(frozen=True)
class GroupLayers:
    """The layers that make, normalize or read the channels of a group, each with its place in it."""

    group: ChannelGroup
    weighted: list[tuple[Member, nn.Module]]
    """convolutions and linear layers"""
    norms: list[tuple[Member, nn.Module]]
    """those with a scale"""

    @classmethod
    def find(cls, model: nn.Module, group: ChannelGroup) -> GroupLayers:
        """The layers of `group` in `model`; its heads and bare parameters have no part in importance."""
        layers = [(m, layer_of(model, m.path)) for m in group.members if m.dim in ("out", "in")]
        present = [(m, layer) for m, layer in layers if layer is not None]
        return cls(
            group,
            weighted=[(m, layer) for m, layer in present if isinstance(layer, _ConvNd | nn.Linear)],
            norms=[(m, layer) for m, layer in present if isinstance(layer, tuple(NORMS)) and _has_weight(layer)],
        )

    def zeros(self) -> Tensor:
        return torch.zeros(self.group.channels)


def magnitude(layers: GroupLayers, measured: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of all weights that go with a channel, made or read (Fang et al. 2023, arXiv:2301.12900)."""
    scores = layers.zeros()
    for member, layer in layers.weighted:
        scores += _gather(member, _per_channel(layer, member.dim, _squares(layer)))
    return scores.sqrt()


def taylor(layers: GroupLayers, measured: Mapping[str, Tensor]) -> Tensor:
    """First-order change of the loss when the channel is zero: `|sum(weight * gradient)|`.

    At the norm after the layer where there is one (Molchanov et al. 2019, arXiv:1906.10771).
    """
    scores = layers.zeros()
    for member, maker in layers.norms or [(m, layer) for m, layer in layers.weighted if m.dim == "out"]:
        change = torch.zeros(member.of)
        for name, value in maker.named_parameters(recurse=False):
            effect = value.detach() * measured.get(f"{member.path}.{name}", torch.zeros_like(value))
            change += _per_channel(maker, member.dim, effect).cpu()
        scores += _gather(member, change).abs()
    return scores


def activation(layers: GroupLayers, measured: Mapping[str, Tensor]) -> Tensor | Reason:
    """The norm of what a channel adds to the layers that read it; needs no labels.

    Its root mean square times that of their weights (Sun et al. 2023, "Wanda", arXiv:2306.11695, section 3, for whole
    channels).
    """
    readers = [(m, layer) for m, layer in layers.weighted if m.dim == "in" and m.path in measured]
    if not readers:
        return 'no convolution or linear layer reads it, whose inputs importance = "activation" looks at'
    scores = layers.zeros()
    for member, layer in readers:
        scores += _gather(member, _per_channel(layer, "in", _squares(layer)).cpu() * measured[member.path])
    return scores.sqrt()


def bn_scale(layers: GroupLayers, measured: Mapping[str, Tensor]) -> Tensor | Reason:
    """Mean |scale| of the group's batch norms (Liu et al. 2017, arXiv:1708.06519)."""
    norms = [(m, layer) for m, layer in layers.norms if isinstance(layer, _BatchNorm)]
    if not norms:
        return 'it has no batch norm, whose scale importance = "bn_scale" reads'
    scores = layers.zeros()
    for member, norm in norms:
        scores += _gather(member, norm.weight.detach().abs()) / len(norms)
    return scores


@dataclass(frozen=True)
class ImportanceCriterion:
    """A way to tell what a channel is worth."""

    score: Callable[[GroupLayers, Mapping[str, Tensor]], Tensor | Reason]
    """the layers of a group and what was measured -> a score for each of its channels, or why there is none"""
    measure: Callable[[nn.Module, Task, int], dict[str, Tensor]] | None = None
    """what the criterion reads on about so many validation samples; None: it looks at weights alone"""


CRITERIA: dict[Importance, ImportanceCriterion] = {
    "magnitude": ImportanceCriterion(magnitude),
    "taylor": ImportanceCriterion(taylor, gradients),
    "activation": ImportanceCriterion(activation, input_energies),
    "bn_scale": ImportanceCriterion(bn_scale),
}


def unit_importance(
    model: nn.Module, group: ChannelGroup, kind: Importance, measured: Mapping[str, Tensor] | None = None
) -> Tensor | Reason:
    """Importance of each unit of a group, float32 [units], mean 1; or why it has none.

    `measured` is what the criterion's `measure` gave for this model.
    """
    scores = CRITERIA[kind].score(GroupLayers.find(model, group), measured or {})
    if not isinstance(scores, Tensor):
        return scores
    units = torch.stack([scores[list(unit)].sum() for unit in group.units])
    return units / units.mean().clamp_min(1e-30)


def _has_weight(layer: nn.Module) -> bool:
    return getattr(layer, "weight", None) is not None


def _squares(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().square()


def _gather(member: Member, scores: Tensor) -> Tensor:
    """Scores of a layer's channels summed into those of the group."""
    scores = scores.float().cpu()
    return torch.stack([scores[list(places)].sum() for places in member.places])


def _per_channel(layer: nn.Module, dim: Dim, values: Tensor) -> Tensor:
    """Sum values shaped like a conv's or linear's weight over all but the channels of one side."""
    if values.ndim == 1:
        return values
    if isinstance(layer, nn.Embedding):
        return values.sum(0)
    groups = layer.groups if isinstance(layer, _ConvNd) and not is_depthwise(layer) else 1
    transposed = isinstance(layer, _ConvNd) and layer.transposed
    values = values.flatten(2).sum(-1) if values.ndim > 2 else values
    if (dim == "in") == transposed or (isinstance(layer, _ConvNd) and is_depthwise(layer)):
        return values.sum(1)
    return values.unflatten(0, (groups, -1)).sum(1).flatten()


def narrowing_schedule(
    scored: Sequence[tuple[ChannelGroup, Tensor]],
    multiple: int,
    floors: Sequence[int],
    scope: WidthScope,
    member_floors: Sequence[Sequence[int]] | None = None,
) -> list[Narrowing]:
    """All narrowings in the order in which to make them: least important first (global), or all layers evenly.

    Widths on it are multiples of `multiple` (and of a group's unit), at least the group's floor. Each member of a group
    keeps at least as many of its channels as `member_floors` says; by default one.
    """
    keyed: list[tuple[float, Narrowing]] = []
    every = member_floors or [[1] * len(group.members) for group, _ in scored]
    for (group, importance), floor, floors_within in zip(scored, floors, every, strict=True):
        order = _removable(group, importance.argsort(stable=True).tolist(), floors_within)
        step, width = math.lcm(multiple, group.unit), group.channels
        lowest, cut = max(step, math.ceil(floor / step) * step), 0
        for narrower in range((width - 1) // step * step, lowest - 1, -step):
            count = (group.channels - narrower) // group.unit
            if count > len(order):
                break
            units = tuple(order[cut:count])
            lost = float(importance[list(units)].sum()) * group.unit
            key = lost / (len(units) * group.unit) if scope == "global" else _share_lost(narrower, group)
            keyed.append((key, Narrowing(group, units, narrower, lost)))
            cut = count
    # stable, and keys rise within a group: a group's narrowings stay in order
    return [narrowing for _, narrowing in sorted(keyed, key=lambda entry: entry[0])]


def even_counts(schedule: Sequence[Narrowing]) -> list[int]:
    """After how many narrowings of a schedule all groups of one width are as wide as each other, ascending."""
    shares = [_share_lost(n.width, n.group) for n in schedule]
    return [i for i in range(1, len(schedule) + 1) if i == len(schedule) or shares[i] != shares[i - 1]]


def _share_lost(width: int, group: ChannelGroup) -> float:
    return 1 - width / group.channels


def _removable(group: ChannelGroup, order: Sequence[int], floors: Sequence[int]) -> list[int]:
    """The units in `order` that can all go, passing over those that leave a member with less than its floor.

    Members may have a part of the group's channels only, as those that make one part of a concatenation.
    """
    present = [[sum(bool(m.places[c]) for c in unit) for unit in group.units] for m in group.members]
    left = [sum(units) for units in present]
    removable = []
    for unit in order:
        after = [n - units[unit] for n, units in zip(left, present, strict=True)]
        if all(a >= least or a == n for a, n, least in zip(after, left, floors, strict=True)):
            removable.append(unit)
            left = after
    return removable
