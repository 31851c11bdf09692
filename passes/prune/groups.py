"""Channel groups of a model: which channels of which layers must be cut together.

torch-pruning traces the dependencies (see `dependencies`). A second tracer, which follows single channels through the
operators of a pass (see `follower`), says which channels of a group are one, as the halves of a gated projection are,
and takes over where torch-pruning has no answer. Neither is taken on trust: see `law`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pqk.errors import InputError, Reason, first_line
from pqk.passes.prune.attention_products import find_attention_products
from pqk.passes.prune.channel_group import ChannelGroup, Member, layer_of, matches
from pqk.passes.prune.cuts import Dim, channels_of, is_depthwise, shared_axis
from pqk.passes.prune.dependencies import SECONDS, Dependencies, trace_dependencies
from pqk.passes.prune.follower import trace_channels
from pqk.passes.prune.heads import AttentionLayer, find_attention, find_whole_tables
from pqk.passes.prune.labels import ChannelTrace, Joined, Key
from pqk.passes.prune.low_rank import LowRank, whole_layer

log = logging.getLogger(__name__)

Units = tuple[tuple[int, ...], ...]


@runtime_checkable
class Untraceable(Protocol):
    """A module that says why torch-pruning, which would not come back, is not asked about what it is in."""

    why_not_traced: Reason


@dataclass(frozen=True)
class TracedGroups:
    """The channel groups of a model in its layers' order, and others in place of some."""

    groups: list[ChannelGroup]
    others: dict[str, list[ChannelGroup]]
    """name of a group of torch-pruning's -> what one pass shows in its place, where that contradicts it"""

    def replaced(self, names: Collection[str]) -> list[ChannelGroup]:
        """The groups, with the others in place of those of these names."""
        groups = [group for group in self.groups if group.name not in names]
        for name in names:
            groups += [group for group in self.others[name] if not any(group is one for one in groups)]
        return groups


def find_groups(model: nn.Module, example: tuple[Tensor, ...], ignore: Sequence[str] = ()) -> list[ChannelGroup]:
    """All channel groups of `model` (unchanged) in its layers' order; those that cannot be cut carry the reason.

    Raises `InputError` where the model does not run on `example`.
    """
    return trace_groups(model, example, ignore).groups


def trace_groups(
    model: nn.Module, example: tuple[Tensor, ...], ignore: Sequence[str] = (), seconds: float = SECONDS
) -> TracedGroups:
    """As `find_groups`, with what the two tracers do not agree on. `seconds` are what torch-pruning may take.

    Raises `InputError` where the model does not run on `example`.
    """
    try:
        trace = trace_channels(model, example)
    except Exception as error:  # whatever the user's forward raises
        raise InputError(f"prune: the model does not run on the example inputs: {first_line(error)}") from error
    shown, untraceable = _components(trace, model), _why_not_traced(model)
    traced = untraceable or trace_dependencies(model, example, seconds)
    if isinstance(traced, Reason) and untraceable is None:
        log.warning("prune: %s; its channels are followed through one pass instead", traced)
    attention = _attentions(model, example)
    whole = find_whole_tables(model, example)
    makers = {path for a in attention.values() for path in a.makers}
    split = {path for path, module in model.named_modules() if isinstance(module, LowRank)}
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}

    def built(dependencies: Sequence[Dependencies], labelled: bool) -> list[ChannelGroup]:
        groups = []
        for group in dependencies:
            if not any(m.dim == "out" and m.path in makers for m in group.members):
                members = group.members + _read_whole(group.members, whole, model)
                members = _one_channel_each(members + _around(members, attention, split), trace)
                reason = _why_not_free(members, group.bare, model, ignore)
                groups.append(_group(members, reason, model, trace, labelled))
        return groups

    groups = [_heads(path, a, model, ignore) for path, a in attention.items()]
    others: dict[str, list[ChannelGroup]] = {}
    if isinstance(traced, Reason):
        groups += built(shown, labelled=True)
    else:
        groups += built(traced, labelled=False)
        contradictions = _contradictions(traced, shown, trace)
        instead = built([d for some in contradictions.values() for d in some], labelled=True)
        by_name = {group.name: group for group in instead}
        for name, some in contradictions.items():
            others[name] = [by_name[d.members[0].path] for d in some if d.members[0].path in by_name]
    return TracedGroups(sorted(groups, key=lambda group: order[group.name]), others)


def _why_not_traced(model: nn.Module) -> Reason | None:
    """Why torch-pruning need not be asked about this model, as a module of it says."""
    return next((m.why_not_traced for m in model.modules() if isinstance(m, Untraceable)), None)


def _attentions(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, AttentionLayer]:
    """The attentions of a model by path: as views of heads show them, or as products do where more is seen so."""
    attentions = find_attention(model, example)
    for path, attention in find_attention_products(model, example).items():
        if path not in attentions or {*attentions[path].makers} != {*attention.makers}:
            attentions[path] = attention
    return attentions


def _heads(path: str, attention: AttentionLayer, model: nn.Module, ignore: Sequence[str]) -> ChannelGroup:
    """The channels of one attention, in portions of a head, or of a group of heads."""
    sides: list[tuple[str, Dim]] = [(maker, "out") for maker in attention.makers]
    sides += [(reader, "in") for reader in attention.readers]
    size = min((len(p[0]) for p in attention.places.values()), default=attention.size)
    members = []
    for side in sides:
        of = channels_of(model.get_submodule(side[0]), side[1]) or 0
        plain = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(attention.heads))
        spread = [g[j::size] for g in attention.places.get(side, plain) for j in range(size)]
        members.append(Member(*side, of, tuple(spread)))
    reason = _why_not_free(members, [], model, ignore)
    channels = attention.heads * size
    places = tuple((c // size,) for c in range(channels))
    members.append(Member(path, "heads", attention.heads, places, attention.size, attention.share))
    units = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(attention.heads))
    return ChannelGroup(members[0].path, channels, tuple(members), units, reason)


def _around(members: list[Member], attention: dict[str, AttentionLayer], split: set[str]) -> list[Member]:
    """The attentions whose inputs have these channels, as members none of whose heads goes.

    Of layers that were `split` into two the first half reads the inputs and the second makes the heads.
    """
    read = {whole_layer(m.path, "in", split) for m in members if m.dim == "in"}
    nothing = tuple(() for _ in members[0].places)
    makers = {path: {whole_layer(m, "out", split) for m in a.makers} for path, a in attention.items()}
    around = [(path, a) for path, a in attention.items() if read & makers[path]]
    return [Member(path, "heads", a.heads, nothing, a.size, a.share) for path, a in around]


def _read_whole(members: list[Member], whole: dict[str, str], model: nn.Module) -> list[Member]:
    """The embeddings whose whole tables layers of this group read: never called, they are not seen by the tracer."""
    paths = {m.path for m in members}
    same = tuple((c,) for c in range(len(members[0].places)))
    tables = {table for layer, table in whole.items() if layer in paths} - paths
    return [Member(t, "out", channels_of(model.get_submodule(t), "out") or 0, same) for t in sorted(tables)]


def _contradictions(
    traced: Sequence[Dependencies], shown: Sequence[Dependencies], trace: ChannelTrace
) -> dict[str, list[Dependencies]]:
    """By name the groups of torch-pruning that the pass contradicts, and what that shows of their layers instead.

    Where the pass meets an operator that it cannot follow, or something that keeps channels, it contradicts nothing.
    """
    kept = trace.reasons()
    owners = {(m.path, m.dim): group for group in shown for m in group.members if (m.path, m.dim) in trace.makers}
    found = {}
    for group in traced:
        others = [*{id(owners[key]): owners[key] for m in group.members if (key := (m.path, m.dim)) in owners}.values()]
        known = others and not any(n in kept for other in others for n in _numbers(other.members, trace))
        right = _mapping(*(other.members for other in others))
        if known and _mapping(_one_channel_each(group.members, trace)) != right:
            found[group.members[0].path] = others
    return found


def _mapping(*groups: Sequence[Member]) -> set[frozenset[tuple[str, str, int]]]:
    """For each channel of these groups, where it is."""
    return {
        frozenset((m.path, m.dim, place) for m in members for place in m.places[channel])
        for members in groups
        for channel in range(len(members[0].places))
    }


def _components(trace: ChannelTrace, model: nn.Module) -> list[Dependencies]:
    """The groups that the labels alone show: all layers that have channels of one another, or portions of a unit."""
    classes = {key: trace.classes(key) or [] for key in trace.places}
    layers = Joined()  # of sides, by their place in the pass
    first: dict[int, int] = {}
    for side, key in enumerate(classes):
        for number in {trace.unit(n) for n in classes[key] if n} if key in trace.makers else ():
            layers.join([(first.setdefault(number, side), side)])
    groups: dict[int, list[Key]] = {}
    for side, key in enumerate(classes):
        if key in trace.makers:
            groups.setdefault(layers.root(side), []).append(key)
    found = []
    for makers in groups.values():
        root = next((key for key in makers if key[1] == "out"), None)
        if root is not None:
            numbers = list(dict.fromkeys(n for key in (root, *makers) for n in classes[key]))
            readers = [key for key in classes if key not in makers and {*numbers} & {*classes[key]}]
            keys = [root, *(key for key in (*makers, *readers) if key != root)]
            found.append(Dependencies([_member(key, classes[key], numbers, model) for key in keys], []))
    return found


def _member(key: Key, classes: list[int], numbers: list[int], model: nn.Module) -> Member:
    places: dict[int, list[int]] = {}
    for place, number in enumerate(classes):
        places.setdefault(number, []).append(place)
    return Member(*key, len(classes), tuple(tuple(places.get(n, ())) for n in numbers))


def _one_channel_each(members: list[Member], trace: ChannelTrace) -> list[Member]:
    """`members` with channels that are one channel in several places, as in the halves of a gate, put together."""
    numbers = _numbers(members, trace)
    together: dict[int, list[int]] = {}
    for channel, number in enumerate(numbers):
        together.setdefault(number or -1 - channel, []).append(channel)
    if len(together) == len(numbers):
        return members
    return [
        Member(
            m.path,
            m.dim,
            m.of,
            tuple(tuple(sorted({p for c in cs for p in m.places[c]})) for cs in together.values()),
            m.size,
            m.share,
        )
        for m in members
    ]


def _numbers(members: list[Member], trace: ChannelTrace) -> list[int]:
    """The number of each of a group's channels in the pass; 0 where the pass did not show it."""
    numbers = [0] * len(members[0].places)
    for member in members:
        classes = None if all(numbers) or member.dim == "in" else trace.classes((member.path, member.dim))
        for channel, places in enumerate(member.places if classes else ()):
            if not numbers[channel] and places and places[0] < len(classes or ()):
                numbers[channel] = (classes or [])[places[0]]
    return numbers


def _group(
    members: list[Member], reason: Reason | None, model: nn.Module, trace: ChannelTrace, labelled: bool
) -> ChannelGroup:
    """The group of these members, with its units or the reason why it cannot be cut."""
    channels, numbers, kept = len(members[0].places), _numbers(members, trace), trace.reasons()
    doubt = next((kept[n] for n in numbers if n in kept), None)
    units: Units = tuple((c,) for c in range(channels))
    if reason is None and labelled:
        reason = doubt
    elif reason is None:
        units, reason = _units(members, model, channels)
    if reason is None:
        units = _portions(units, [trace.unit(n) for n in numbers])
        sizes = sorted({len(unit) for unit in units})
        if len(sizes) > 1:
            reason = f"its channels can only go in portions of {sizes[0]} to {sizes[-1]}, and pqk cuts in even ones"
    return ChannelGroup(members[0].path, channels, tuple(members), units, reason, doubt)


def _portions(units: Units, numbers: list[int]) -> Units:
    """`units`, those put together that have channels of one number. 0 is of none."""
    together = Joined()
    first: dict[int, int] = {}
    for i, unit in enumerate(units):
        together.join([(first.setdefault(numbers[c], i), i) for c in unit if numbers[c]])
    parts: dict[int, list[int]] = {}
    for i, unit in enumerate(units):
        parts.setdefault(together.root(i), []).extend(unit)
    return units if len(parts) == len(units) else tuple(tuple(sorted(part)) for part in parts.values())


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
            if len(users[id(parameter)]) > 1 and not _shared_alike(users[id(parameter)], members, model):
                return f"a weight is shared by {', '.join(sorted(users[id(parameter)]))}"
    return None


def _shared_alike(users: set[str], members: list[Member], model: nn.Module) -> bool:
    """Whether all layers with one weight lose the same of it, as a token table and the head that is tied to it do."""
    sides = [m for m in members if m.path in users]
    axes = {shared_axis(model.get_submodule(m.path), m.dim) for m in sides}
    alike = len({m.places for m in sides}) == 1 and len(axes) == 1 and None not in axes
    return alike and {m.path for m in sides} == users


def _units(members: list[Member], model: nn.Module, channels: int) -> tuple[Units, Reason | None]:
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
