"""The rewrites of pruning: plain slicing of named layers and removal of whole blocks, from JSON alone.

torch-pruning finds what must be cut together; the plan keeps only the result, so that a rebuild needs no tracing. A
module of the user's takes part by defining `cut_channels(dim, indices)` with `in_channels` and `out_channels`.

Beside the channels of layers a cut may name the heads of an attention module, and the last axis of a bare parameter
(a table of positions, a class token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from pqk.core.program import Example, Rewrite
from pqk.errors import InputError
from pqk.passes.prune.heads import cut_heads
from pqk.passes.prune.low_rank import ranks_split, whole_layer
from pqk.passes.prune.scales import resize

Dim = Literal["out", "in", "heads", "values"]
"""a layer's outputs or inputs; the heads of an attention module; the last axis of a bare parameter"""


class Cut(TypedDict):
    """Remove `indices` of the `of` input or output channels of layer `module`, or heads of `size` channels.

    With `share`, groups of so many heads, which share keys and values.
    """

    module: str
    dim: Dim
    indices: list[int]
    of: int
    size: NotRequired[int]
    share: NotRequired[int]


class Skip(nn.Identity):
    """Stands where a block was removed: returns its first input, whatever else it is called with.

    `returns` is the length of the tuple that the block returned, of which all but the first were None; 0: a tensor. The
    plain values of the block, as the kind of its attention, are kept: who calls it may go by them.
    """

    def __init__(self, returns: int = 0, block: nn.Module | None = None) -> None:
        super().__init__()
        self.returns = returns
        for name, value in vars(block).items() if block is not None else ():
            if not name.startswith("_") and not hasattr(self, name) and type(value) in (str, int, float, bool):
                setattr(self, name, value)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (input, *[None] * (self.returns - 1)) if self.returns else input

    def extra_repr(self) -> str:
        return f"returns={self.returns}" if self.returns else ""


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one filter for each channel, so that inputs and outputs are the same channels."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels == module.out_channels


def channels_of(module: nn.Module, dim: Dim) -> int | None:
    """The number of a layer's input or output channels; None for a layer whose channels cannot be cut."""
    if isinstance(module, _ConvNd) or hasattr(module, "cut_channels"):
        return module.out_channels if dim == "out" else module.in_channels  # type: ignore[return-value]
    if isinstance(module, nn.Linear):
        return module.out_features if dim == "out" else module.in_features
    for kind, (count, _) in NORMS.items():
        if isinstance(module, kind):
            if isinstance(module, nn.LayerNorm):
                return module.normalized_shape[0] if len(module.normalized_shape) == 1 else None
            return getattr(module, count)
    return None


#: layers whose every parameter and buffer has one value (or one last-axis slice) for each channel: count, names
NORMS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    _BatchNorm: ("num_features", ("weight", "bias", "running_mean", "running_var")),
    _InstanceNorm: ("num_features", ("weight", "bias", "running_mean", "running_var")),
    nn.LayerNorm: ("normalized_shape", ("weight", "bias")),
    nn.GroupNorm: ("num_channels", ("weight", "bias")),
    nn.Embedding: ("embedding_dim", ("weight",)),
    nn.PReLU: ("num_parameters", ("weight",)),
}


def cut_axis(module: nn.Module) -> int:
    """The axis of a layer's output that holds its channels."""
    return -1 if isinstance(module, nn.Linear | nn.LayerNorm | nn.Embedding) else 1


def cut_channels(student: nn.Module, example: Example, *, cuts: Sequence[Cut]) -> nn.Module:
    """Rewrite: remove channels of layers, all indices counted before any of these cuts. Changes `student`.

    Layers that shared a weight share it afterwards. Raises `InputError` where a layer is not the one that the cut was
    made for.
    """
    shared = shared_weights(student)
    for cut in cuts:
        if cut["dim"] == "values":
            parent, _, name = cut["module"].rpartition(".")
            kept = [c for c in range(cut["of"]) if c not in set(cut["indices"])]
            _replace(student.get_submodule(parent), name, _select(-1, kept))
            resize(student.get_submodule(parent), cut["of"], len(kept))
        elif cut["dim"] == "heads":
            module, share = student.get_submodule(cut["module"]), cut.get("share", 1)
            cut_heads(module, cut["indices"], cut["of"], cut["size"], share)
        else:
            _cut_layer(student.get_submodule(cut["module"]), cut)
    for (first, name), *others in shared:
        for module, other in others:
            if getattr(module, other).shape == getattr(first, name).shape:
                setattr(module, other, getattr(first, name))
    return student


def shared_weights(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The parameters that several modules have, each as those modules and what they call it."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append((module, name))
    return [some for some in users.values() if len(some) > 1]


def shared_axis(module: nn.Module, dim: Dim) -> int | None:
    """The axis of a layer's weight that these channels are on; None where they are on all of its parameters' axes."""
    if isinstance(module, nn.Embedding):
        return 1
    return {"out": 0, "in": 1}[dim] if isinstance(module, nn.Linear) and dim in ("out", "in") else None


def drop_block(student: nn.Module, example: Example, *, block: str, returns: int = 0) -> nn.Module:
    """Rewrite: replace a residual block by its shortcut (see `Skip` for `returns`). Changes `student`."""
    parent, _, name = block.rpartition(".")
    setattr(student.get_submodule(parent), name, Skip(returns, student.get_submodule(block)))
    return student


def kept_channels(plan: Iterable[Rewrite], module: str, dim: Dim = "out") -> list[int] | None:
    """The teacher's output channels that layer `module` still has, in order; None where none was cut.

    With `dim="heads"` the heads of an attention. The outputs of a layer that was split are those of its second half.
    Raises `InputError` where a rewrite removed the block that holds it.
    """
    plan = tuple(plan)
    split = ranks_split(plan)
    whole = whole_layer(module, dim, split)
    kept: list[int] | None = None
    for step in plan:
        if step.function == drop_block.__name__:
            block = step.arguments["block"]
            if f"{module}.".startswith(f"{block}."):
                raise InputError(f'layer "{module}" is gone: pruning removed block "{block}"')
        for cut in step.arguments["cuts"] if step.function == cut_channels.__name__ else ():
            if cut["dim"] == dim and whole_layer(cut["module"], dim, split) == whole:
                before = [*range(cut["of"])] if kept is None else kept
                pruned = set(cut["indices"])
                kept = [c for i, c in enumerate(before) if i not in pruned]
    return kept


def _cut_layer(module: nn.Module, cut: Cut) -> None:
    dim, pruned, channels = cut["dim"], set(cut["indices"]), channels_of(module, cut["dim"])
    what = f'cutting {len(pruned)} {dim} channels of "{cut["module"]}" ({type(module).__name__})'
    if channels is None:
        raise InputError(f"{what}: this kind of layer has no channels that pqk can cut; put it in prune.ignore")
    if channels == cut["of"] and len(pruned) == channels:
        raise InputError(f"{what}: a layer keeps at least one of its {channels}")
    if channels != cut["of"] or not pruned < set(range(channels)):
        raise InputError(
            f"{what}: it has {channels} channels and the plan was made for {cut['of']}; is this the network that the "
            "compile began with?"
        )
    kept = [c for c in range(channels) if c not in pruned]
    with torch.no_grad():
        if isinstance(module, _ConvNd):
            _cut_conv(module, dim, kept, what)
        elif isinstance(module, nn.Linear):
            _cut_linear(module, dim, kept)
        elif hasattr(module, "cut_channels"):
            module.cut_channels(dim, sorted(pruned))  # type: ignore[operator]
        else:
            _cut_norm(module, kept, what)


def _replace(module: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = getattr(module, name, None)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(change(old.detach()).contiguous(), requires_grad=old.requires_grad))
    elif old is not None:
        setattr(module, name, change(old).contiguous())


def _select(axis: int, kept: Sequence[int]) -> Callable[[Tensor], Tensor]:
    return lambda t: t.index_select(axis, torch.tensor(kept, device=t.device))


def _cut_conv(conv: _ConvNd, dim: Dim, kept: Sequence[int], what: str) -> None:
    if is_depthwise(conv):
        conv.in_channels = conv.out_channels = conv.groups = len(kept)
        _replace(conv, "weight", _select(0, kept))
        _replace(conv, "bias", _select(0, kept))
        return
    channels = conv.out_channels if dim == "out" else conv.in_channels
    size = channels // conv.groups
    by_group = [[c - g * size for c in kept if c // size == g] for g in range(conv.groups)]
    if len({len(g) for g in by_group}) > 1:
        raise InputError(f"{what}: each of its {conv.groups} groups must lose as many channels as the others")
    # weight: [out, in / groups, …], transposed [in, out / groups, …]: the first axis lists all, the second one group's
    if (dim == "in") == conv.transposed:
        _replace(conv, "weight", _select(0, kept))
    else:
        parts = list(zip(conv.weight.chunk(conv.groups), by_group, strict=True))
        _replace(conv, "weight", lambda _: torch.cat([_select(1, inside)(part) for part, inside in parts]))
    if dim == "out":
        conv.out_channels = len(kept)
        _replace(conv, "bias", _select(0, kept))
    else:
        conv.in_channels = len(kept)


def _cut_linear(linear: nn.Linear, dim: Dim, kept: Sequence[int]) -> None:
    _replace(linear, "weight", _select(0 if dim == "out" else 1, kept))
    if dim == "out":
        linear.out_features = len(kept)
        _replace(linear, "bias", _select(0, kept))
    else:
        linear.in_features = len(kept)


def _cut_norm(norm: nn.Module, kept: Sequence[int], what: str) -> None:
    count, names = next(entry for kind, entry in NORMS.items() if isinstance(norm, kind))
    if isinstance(norm, nn.GroupNorm):
        size = norm.num_channels // norm.num_groups
        groups = [[c for c in kept if c // size == g] for g in range(norm.num_groups)]
        if any(len(g) not in (0, size) for g in groups):
            raise InputError(f"{what}: only whole normalization groups of {size} channels can go")
        norm.num_groups = sum(map(bool, groups))
    for name in names:
        _replace(norm, name, _select(-1, kept))
    setattr(norm, count, (len(kept),) if isinstance(norm, nn.LayerNorm) else len(kept))
