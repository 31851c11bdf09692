"""The law of pruning, to which every group is held before it is cut: tracers are silent where they are wrong.

    Law: setting the pruned channels to zero where they are made and cutting them give the same output.

Where a layer norm reduces over the channels, zeros would still count in its mean and variance: there the reference is
the model whose norms take their statistics over the channels that stay; so it is with norms of the model's own make.

A group is tried by a spread quarter of its units, by a single one, and by random ones: in a spread quarter, what is cut
in one half of a projection is what is cut in its other half. Groups are tried together, since cuts that all obey the
law change the output as zeros do; where one does not, halving finds it.

Before training whole branches can be at zero, by a norm or a scale of theirs, and any cut in them would seem right. So
parameters that have one value everywhere have many in what is tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from pqk.copies import copy_of
from pqk.data.structures import tensors
from pqk.errors import InputError, Reason
from pqk.passes.prune.channel_group import ChannelGroup, Member, merge_cuts
from pqk.passes.prune.cuts import NORMS, Cut, cut_axis, cut_channels
from pqk.passes.prune.groups import TracedGroups, trace_groups
from pqk.passes.prune.scales import is_own_norm, over_kept

TOLERANCE = 1e-4
"""largest error of the law, relative to the largest output; a wrong mapping is off by whole channels"""
CLEAR = 0.1
"""share of it below which single precision is enough to tell that the law holds"""
PLAIN = (nn.Linear, _ConvNd, *NORMS)
PROBES = 3
"""parts of a group that are tried at least"""


@contextmanager
def masked(model: nn.Module, cuts: Iterable[Cut]) -> Iterator[nn.Module]:
    """`model` with the pruned output channels of these cuts zero at every layer that makes or normalizes them."""
    handles, saved, norms = [], [], {}
    scales: dict[nn.Module, dict[str, list[int]]] = {}
    for cut in cuts:
        if cut["dim"] == "values" and (layer := _own_norm(model, cut["module"])) is not None:
            scales.setdefault(layer, {})[cut["module"].rpartition(".")[2]] = kept_of(cut)
        elif cut["dim"] == "values":
            parameter = model.get_parameter(cut["module"])
            saved.append((parameter, parameter.detach().clone()))
            parameter.data[..., cut["indices"]] = 0
        elif cut["dim"] == "out":
            module = model.get_submodule(cut["module"])
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                norms[id(module.weight)] = kept_of(cut)
            else:
                handles.append(module.register_forward_hook(_zeroing(cut_axis(module), cut["indices"])))
    try:
        with _NormsOverKept(norms), ExitStack() as stack:
            for layer, kept in scales.items():
                stack.enter_context(over_kept(layer, kept))
            yield model
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in saved:
            parameter.data = value


class _NormsOverKept(TorchFunctionMode):
    """Runs layer norms, recognized by their weight, over the kept channels; the others come out as zero."""

    def __init__(self, norms: dict[int, list[int]]) -> None:
        super().__init__()
        self.norms = norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[2] if len(args) > 2 else kwargs.get("weight")
        kept = self.norms.get(id(weight)) if func is F.layer_norm else None
        if kept is None:
            return func(*args, **kwargs)
        values = dict(zip(("input", "normalized_shape", "weight", "bias", "eps"), args, strict=False)) | kwargs
        bias = None if values.get("bias") is None else values["bias"][kept]
        normalized = F.layer_norm(values["input"][..., kept], (len(kept),), weight[kept], bias, values.get("eps", 1e-5))
        output = torch.zeros_like(values["input"])
        output[..., kept] = normalized
        return output


def kept_of(cut: Cut) -> list[int]:
    """The channels that a cut leaves."""
    return [c for c in range(cut["of"]) if c not in set(cut["indices"])]


def _own_norm(model: nn.Module, parameter: str) -> nn.Module | None:
    layer = model.get_submodule(parameter.rpartition(".")[0])
    return layer if is_own_norm(layer) else None


def _zeroing(axis: int, indices: Sequence[int]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(axis, torch.tensor(indices, device=output.device), 0)

    return hook


class Law:
    """Tries cuts on copies of one model (unchanged), in eval mode, on one batch."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        self.model, self.example = model, example
        self.copies: dict[torch.dtype, _Copy | None] = {}

    def why_not_exact(self, cuts: Sequence[Cut]) -> Reason | None:
        """Why these cuts may not be made: by how much the law fails, or why the cut network does not run.

        Raises `InputError` where the model itself does not run.
        """
        reason: Reason | None = "prune: the model runs neither in single nor in double precision on the example inputs"
        for dtype, share in ((torch.float32, CLEAR), (torch.float64, 1.0), (torch.float32, 1.0)):
            if (copied := self._copy(dtype)) is not None:
                reason, off = copied.difference(cuts, share)
                if reason is None or off is None or share == 1:
                    return reason
        raise InputError(reason)

    def _copy(self, dtype: torch.dtype) -> _Copy | None:
        """The model in one precision; None where constants of another inside its forward do not mix with it."""
        if dtype not in self.copies:
            try:
                copied = copy_of(self.model, "student").eval()
                spread_constants(copied)
                self.copies[dtype] = _Copy(copied.to(dtype), _floats(self.example, dtype))
            except (RuntimeError, TypeError):
                self.copies[dtype] = None
        return self.copies[dtype]


class _Copy:
    """A model that is cut in copies, and what it says uncut."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model, self.inputs = model, inputs
        with torch.no_grad():
            self.shapes = [[*t.shape] for t in tensors(model(*inputs))]

    def difference(self, cuts: Sequence[Cut], share: float) -> tuple[Reason | None, float | None]:
        """Why not to make these cuts, and by how much the outputs differ where that is why."""
        try:
            with torch.no_grad():
                cut = tensors(cut_channels(_copied(self.model), self.inputs, cuts=cuts)(*self.inputs))
        except Exception as error:  # whatever the user's forward raises when a shape is not what it expects
            message = " ".join(str(error).split())[:160]
            return f"the network does not run without them ({type(error).__name__}: {message})", None
        for before, after in zip(self.shapes, cut, strict=True):
            if before != [*after.shape]:
                return (
                    f"they are channels of the model's output, which would go from {before} to {[*after.shape]}",
                    None,
                )
        with torch.no_grad(), masked(self.model, cuts):
            zeroed = tensors(self.model(*self.inputs))
        for z, c in zip(zeroed, cut, strict=True):
            off, scale = (float(t.abs().max()) if t.numel() else 0.0 for t in (z - c, z))
            if not off <= share * TOLERANCE * scale:
                return f"zeroing and cutting them differ by {off:.3g} (largest output {scale:.3g})", off
        return None, None


def _copied(model: nn.Module) -> nn.Module:
    """A copy to cut, whose layers share their tensors with `model`: a cut replaces those, and writes to none.

    Only those of plain layers: modules that cut themselves, and parametrized ones, may write to theirs.
    """
    shared: list[Tensor] = []
    for module in model.modules():
        plain = isinstance(module, PLAIN) and not hasattr(module, "cut_channels") and not is_parametrized(module)
        shared += (*module.parameters(recurse=False), *module.buffers(recurse=False)) if plain else ()
    return copy_of(model, "student", shared)


@torch.no_grad()
def spread_constants(model: nn.Module) -> None:
    """Gives parameters that are constant other values, in place, always the same; statistics of batch norms, too.

    They become 0.5 to 1.5, biases and means -0.5 to 0.5, and matrices as large as their rows ask for.
    """
    draw = torch.Generator().manual_seed(0)
    statistics = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.named_buffers(recurse=False)]
    for name, tensor in [*model.named_parameters(), *statistics]:
        constant = tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())
        if constant and tensor.is_floating_point() and (tensor.numel() > 1 or not tensor.any()):
            values = torch.rand(tensor.shape, generator=draw)
            if max(tensor.shape, default=1) < tensor.numel():
                values = (4 * values - 2) / tensor[0].numel() ** 0.5
            else:
                values = values - 0.5 if name.endswith(("bias", "mean")) else values + 0.5
            tensor.copy_(values)


def _floats(example: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in example)


def why_not_exact(model: nn.Module, example: tuple[Tensor, ...], cuts: Sequence[Cut]) -> Reason | None:
    """Why these cuts may not be made: by how much the law fails, or why the cut network does not run.

    `model` is unchanged.
    """
    return Law(model, example).why_not_exact(cuts)


@dataclass(frozen=True)
class GroupCheck:
    """Whether one group obeys the law: `reason` says why not, None where it does."""

    name: str
    channels: int
    layers: tuple[str, ...]
    reason: str | None


def check_groups(model: nn.Module, example: tuple[Tensor, ...], ignore: Sequence[str] = ()) -> list[GroupCheck]:
    """Holds every channel group to the law, cutting parts of it on a copy.

    Raises `InputError` where the model does not run on `example`.
    """
    traced = trace_groups(model, example, ignore)
    groups, reasons, _ = exact_groups(model, example, traced)
    return [GroupCheck(g.name, g.channels, tuple(m.path for m in g.members), reasons[g.name]) for g in groups]


def exact_groups(
    model: nn.Module, example: tuple[Tensor, ...], traced: TracedGroups
) -> tuple[list[ChannelGroup], dict[str, Reason | None], list[str]]:
    """Holds the groups to the law: those to go by, by name why each cannot be cut, and the names of those replaced.

    A group that breaks the law makes way for those that one pass showed in its place, where one of them holds.
    """
    groups = traced.groups
    reasons = dict(zip((g.name for g in groups), check_each(model, example, groups), strict=True))
    taken = {(m.path, p) for g in groups if reasons[g.name] is None for m in g.members for p in _made(m)}
    broken = [name for name in traced.others if reasons.get(name) is not None]
    others = {o.name: o for name in broken for o in traced.others[name]}
    others = {n: o for n, o in others.items() if not taken & {(m.path, p) for m in o.members for p in _made(m)}}
    verdicts = dict(zip(others, check_each(model, example, [*others.values()]), strict=True))
    replaced = [
        name
        for name in broken
        if all(o.name in verdicts for o in traced.others[name])
        and any(verdicts[o.name] is None for o in traced.others[name])
    ]
    groups = traced.replaced(replaced)
    ours = {g.name: verdicts[g.name] if g is others.get(g.name) else reasons[g.name] for g in groups}
    return groups, ours, replaced


def _made(member: Member) -> set[int]:
    return {p for places in member.places for p in places} if member.dim == "out" else set()


def why_not_cut(model: nn.Module, example: tuple[Tensor, ...], group: ChannelGroup) -> Reason | None:
    """Why `group` cannot be cut; None where the law holds for the parts of it that are tried."""
    return check_each(model, example, [group])[0]


def check_each(model: nn.Module, example: tuple[Tensor, ...], groups: Sequence[ChannelGroup]) -> list[Reason | None]:
    """Why each of these groups of `model` cannot be cut; None where the law holds for the parts that are tried.

    Many are tried in a pass. A group that runs only because another one loses as many channels is found, as each is
    tried at least once without each other.
    """
    law = Law(model, example)
    reasons = [g.reason or ("its channels can only go all together" if len(g.units) < 2 else None) for g in groups]
    for probe in range(max(PROBES, (len(groups) - 1).bit_length())):

        def cuts(some: Sequence[int], probe: int = probe) -> list[Cut]:
            return merge_cuts(c for i in some for c in groups[i].cuts(_part(groups[i], probe)))

        free = [i for i, reason in enumerate(reasons) if reason is None]
        doubtful = [[i] for i in free if groups[i].doubt is not None]
        rest = [i for i in free if groups[i].doubt is None]
        for part in (*doubtful, [i for i in rest if i >> probe & 1], [i for i in rest if not i >> probe & 1]):
            for i, reason in _broken(law, part, cuts):
                reasons[i] = reason
    return reasons


def _broken(
    law: Law, groups: Sequence[int], cuts: Callable[[Sequence[int]], list[Cut]]
) -> Iterator[tuple[int, Reason]]:
    """Those of `groups` that break the law, and how, by halving those that do not obey it together."""
    reason = law.why_not_exact(cuts(groups)) if groups else None
    if reason is not None and len(groups) == 1:
        yield groups[0], reason
    elif reason is not None:
        half = len(groups) // 2
        yield from _broken(law, groups[:half], cuts)
        yield from _broken(law, groups[half:], cuts)


def _part(group: ChannelGroup, probe: int) -> list[int]:
    """The channels of the part that is tried: first a spread quarter of the units, then one of them, then any."""
    units, draw = range(len(group.units)), random.Random(f"{group.name} {probe}")
    chosen: Sequence[int] = units[1::4]
    if probe == 1:
        chosen = [draw.choice(units)]
    elif probe > 1:
        chosen = draw.sample(units, draw.randint(max(1, len(units) // 8), max(1, len(units) // 3)))
    return [c for unit in chosen for c in group.units[unit]]
