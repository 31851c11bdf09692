"""Channel groups: which channels of which layers must be cut together, and the numerical proof that they may be.

torch-pruning (Fang et al. 2023, arXiv:2301.12900) traces the dependencies. Its answer is not taken on trust: it is
silent where it is wrong, so every group is held to an invariant, the law of pruning, before it is cut.

    Law: setting the pruned channels to zero where they are made and cutting them give the same output.

Where a layer norm reduces over the channels, zeros would still count in its mean and variance: there the reference is
the model whose norms take their statistics over the channels that stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from pqk.copies import copy_of
from pqk.data.structures import tensors
from pqk.errors import InputError, Reason
from pqk.passes.prune.cuts import Cut, Dim, channels_of, cut_axis, cut_channels, is_depthwise
from pqk.passes.prune.heads import AttentionLayer, find_attention, find_whole_tables
from pqk.quiet import quiet

TOLERANCE = 1e-4
"""largest error of the law, relative to the largest output; a wrong mapping is off by whole channels"""


@dataclass(frozen=True)
class Member:
    """A layer of a group. `places[c]` are the layer's channels that stand for channel c of the group."""

    path: str
    dim: Dim
    of: int
    places: tuple[tuple[int, ...], ...]
    size: int = 1
    """channels of one head"""


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
                cuts.append(Cut(**cut, size=m.size))
            elif cut["indices"]:
                cuts.append(cut)
        return cuts


@dataclass(frozen=True)
class GroupCheck:
    """Whether one group obeys the law: `reason` says why not, None where it does."""

    name: str
    channels: int
    layers: tuple[str, ...]
    reason: str | None


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


def find_groups(model: nn.Module, example: tuple[Tensor, ...], ignore: Sequence[str] = ()) -> list[ChannelGroup]:
    """All channel groups of `model` (unchanged) in its layers' order; those that cannot be cut carry the reason.

    Raises `InputError` where torch-pruning cannot trace the model.
    """
    shadow = copy_of(model, "student").eval().requires_grad_(False)
    for path, module in list(shadow.named_modules()):
        if hasattr(module, "trace_as"):
            parent, _, name = path.rpartition(".")
            setattr(shadow.get_submodule(parent), name, module.trace_as())
    # tracing follows autograd, for which one integer input has no gradient and each layer needs one
    shadow.requires_grad_(True)
    graph = torch_pruning.DependencyGraph()
    try:
        with quiet(), torch.enable_grad():
            graph.build_dependency(shadow, list(example), lambda m, x: m(*x), output_transform=tensors, verbose=False)
            traced = list(graph.get_all_groups())
    except Exception as error:  # a tracer raises anything on a model that it does not know
        raise InputError(f"prune: torch-pruning cannot trace the model: {type(error).__name__}: {error}") from error
    names = {module: path for path, module in shadow.named_modules()}
    order = {path: i for i, path in enumerate(names.values())}
    attention = find_attention(model, example)
    whole = find_whole_tables(model, example)
    makers = {path for a in attention.values() for path in a.makers}
    groups = [_heads(path, a, model, ignore) for path, a in attention.items()]
    for group in traced:
        members, bare = _members(graph, group, names)
        if not any(m.dim == "out" and m.path in makers for m in members):
            members += _read_whole(members, whole, model)
            groups.append(_group(members + _around(members, attention), bare, model, ignore))
    return sorted(groups, key=lambda group: order[group.name])


def _heads(path: str, attention: AttentionLayer, model: nn.Module, ignore: Sequence[str]) -> ChannelGroup:
    """The channels of one attention, in portions of a head."""
    channels, size = attention.heads * attention.size, attention.size
    same = tuple((c,) for c in range(channels))
    members = [Member(maker, "out", channels, same) for maker in attention.makers]
    members += [Member(reader, "in", channels, same) for reader in attention.readers]
    reason = _why_not_free(members, [], model, ignore)
    members.append(Member(path, "heads", attention.heads, tuple((c // size,) for c in range(channels)), size))
    units = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(attention.heads))
    return ChannelGroup(members[0].path, channels, tuple(members), units, reason)


def _around(members: list[Member], attention: dict[str, AttentionLayer]) -> list[Member]:
    """The attentions whose inputs have these channels, as members none of whose heads goes."""
    read = {m.path for m in members if m.dim == "in"}
    nothing = tuple(() for _ in members[0].places)
    return [Member(p, "heads", a.heads, nothing, a.size) for p, a in attention.items() if read & {*a.makers}]


def _read_whole(members: list[Member], whole: dict[str, str], model: nn.Module) -> list[Member]:
    """The embeddings whose whole tables layers of this group read: never called, they are not seen by the tracer."""
    paths = {m.path for m in members}
    same = tuple((c,) for c in range(len(members[0].places)))
    tables = {table for layer, table in whole.items() if layer in paths} - paths
    return [Member(t, "out", channels_of(model.get_submodule(t), "out") or 0, same) for t in sorted(tables)]


def _members(graph: Any, group: Any, names: dict[nn.Module, str]) -> tuple[list[Member], list[str]]:
    """A torch-pruning group as members, and its bare parameters, which belong to no layer."""
    width = graph.get_out_channels(group[0].dep.target.module)
    places: dict[tuple[str, Dim], list[list[int]]] = {}
    bare, parameters = [], []
    for i in range(len(group)):
        item = group[i]
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name.get(module, "")
            if any(name.startswith(f"{path}.") for path in names.values() if path) and item.idxs == item.root_idxs:
                same = tuple((c,) for c in range(width))
                parameters.append(Member(name, "values", module.shape[-1] if module.ndim else 0, same))
            else:
                bare.append(name or "a parameter")
        elif module in names:
            dim: Dim = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            slots = places.setdefault((names[module], dim), [[] for _ in range(width)])
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                slots[root].append(index)
    modules = {path: module for module, path in names.items()}
    members = [
        Member(path, dim, channels_of(modules[path], dim) or 0, tuple(map(tuple, slots)))
        for (path, dim), slots in places.items()
    ]
    return members + parameters, bare


def _group(members: list[Member], bare: list[str], model: nn.Module, ignore: Sequence[str]) -> ChannelGroup:
    """The group of these members, with its units or the reason why it cannot be cut."""
    name, channels = members[0].path, len(members[0].places)
    reason = _why_not_free(members, bare, model, ignore)
    units: tuple[tuple[int, ...], ...] = tuple((c,) for c in range(channels))
    if reason is None:
        units, reason = _units(members, model, channels)
    return ChannelGroup(name, channels, tuple(members), units, reason)


def _why_not_free(members: list[Member], bare: list[str], model: nn.Module, ignore: Sequence[str]) -> Reason | None:
    if bare:
        return f"the bare parameter {bare[0]} has these channels and pqk cuts those of layers only"
    users: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(path)
    for member in members:
        pattern = matches(member.path, ignore)
        if pattern is not None:
            return f'"{member.path}" is kept by ignore = "{pattern}"'
        if member.dim in ("heads", "values"):
            if member.dim == "values" and member.of != len(member.places):
                return f'the bare parameter "{member.path}" has other channels on its last axis'
            continue
        module = model.get_submodule(member.path)
        if channels_of(module, member.dim) is None:
            return f'"{member.path}" is a {type(module).__name__}, whose channels pqk cannot cut'
        if any(place >= member.of for slots in member.places for place in slots):
            return (
                f'"{member.path}" has {member.of} channels and the tracer sees more: they are padded, sliced or joined '
                "on the way"
            )
        for parameter in module.parameters(recurse=False):
            if len(users[id(parameter)]) > 1:
                return f"a weight is shared by {', '.join(sorted(users[id(parameter)]))}"
    return None


def _units(members: list[Member], model: nn.Module, channels: int) -> tuple[tuple[tuple[int, ...], ...], str | None]:
    """Portions that keep every grouped layer even: the same place of each conv group, whole normalization groups."""
    one_each = tuple((c,) for c in range(channels))
    conv_groups, block = 1, 1
    for member in members:
        module = layer_of(model, member.path)
        if isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
            if member.places != one_each:
                return one_each, f'the grouped convolution "{member.path}" sees these channels in another order'
            conv_groups = math.lcm(conv_groups, module.groups)
        elif isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            if member.places != one_each:
                return one_each, f'the group norm "{member.path}" sees these channels in another order'
            block = math.lcm(block, module.num_channels // module.num_groups)
    if channels % (conv_groups * block):
        return one_each, f"{channels} channels do not divide into {conv_groups} groups of {block}"
    size = channels // conv_groups
    starts = range(0, size, block)
    return tuple(
        tuple(g * size + start + i for g in range(conv_groups) for i in range(block)) for start in starts
    ), None


def layer_of(model: nn.Module, path: str) -> nn.Module | None:
    """The layer of a member, the network itself for an empty path; None for a bare parameter."""
    parent, _, name = path.rpartition(".")
    layer = getattr(model.get_submodule(parent), name) if path else model
    return layer if isinstance(layer, nn.Module) else None


@contextmanager
def masked(model: nn.Module, cuts: Iterable[Cut]) -> Iterator[nn.Module]:
    """`model` with the pruned output channels of these cuts zero at every layer that makes or normalizes them."""
    handles, saved, norms = [], [], {}
    for cut in cuts:
        if cut["dim"] == "values":
            parameter = model.get_parameter(cut["module"])
            saved.append((parameter, parameter.detach().clone()))
            parameter.data[..., cut["indices"]] = 0
        elif cut["dim"] == "out":
            module = model.get_submodule(cut["module"])
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                norms[id(module.weight)] = [c for c in range(cut["of"]) if c not in set(cut["indices"])]
            else:
                handles.append(module.register_forward_hook(_zeroing(cut_axis(module), cut["indices"])))
    try:
        with _NormsOverKept(norms):
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


def _zeroing(axis: int, indices: Sequence[int]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(axis, torch.tensor(indices, device=output.device), 0)

    return hook


def why_not_exact(model: nn.Module, example: tuple[Tensor, ...], cuts: Sequence[Cut]) -> Reason | None:
    """Why these cuts may not be made: by how much the law fails, or why the cut network does not run.

    `model` is unchanged.
    """
    trial = copy_of(model, "student").eval()
    try:
        zeroed = _masked_outputs(trial.double(), inputs := _floats(example, torch.float64), cuts)
    except (RuntimeError, TypeError):  # constants in float32 inside a forward do not mix with float64
        zeroed = _masked_outputs(trial.float(), inputs := _floats(example, torch.float32), cuts)
    try:
        with torch.no_grad():
            cut = tensors(cut_channels(trial, inputs, cuts=cuts)(*inputs))
    except Exception as error:  # whatever the user's forward raises when a shape is not what it expects
        message = " ".join(str(error).split())[:160]
        return f"the network does not run without them ({type(error).__name__}: {message})"
    for z, c in zip(zeroed, cut, strict=True):
        if z.shape != c.shape:
            return f"they are channels of the model's output, which would go from {[*z.shape]} to {[*c.shape]}"
        off, scale = (float(t.abs().max()) if t.numel() else 0.0 for t in (z - c, z))
        if not off <= TOLERANCE * scale:
            return f"zeroing and cutting them differ by {off:.3g} (largest output {scale:.3g})"
    return None


def _floats(example: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in example)


def _masked_outputs(model: nn.Module, inputs: tuple[Tensor, ...], cuts: Sequence[Cut]) -> list[Tensor]:
    with torch.no_grad(), masked(model, cuts):
        return tensors(model(*inputs))


def check_groups(model: nn.Module, example: tuple[Tensor, ...], ignore: Sequence[str] = ()) -> list[GroupCheck]:
    """Holds every channel group to the law, cutting about a quarter of each on a copy.

    Raises `InputError` where torch-pruning cannot trace the model.
    """
    return [
        GroupCheck(g.name, g.channels, tuple(m.path for m in g.members), why_not_cut(model, example, g))
        for g in find_groups(model, example, ignore)
    ]


def why_not_cut(model: nn.Module, example: tuple[Tensor, ...], group: ChannelGroup) -> Reason | None:
    """Why `group` cannot be cut; None where the law holds for a spread quarter of its channels."""
    if group.reason is not None:
        return group.reason
    if len(group.units) < 2:
        return "its channels can only go all together"
    quarter = group.units[1::4]
    return why_not_exact(model, example, group.cuts(c for unit in quarter for c in unit))
