"""Nested inputs and outputs: tensors in dicts, tuples, lists, named tuples and dataclasses, in one order.

`members` and `refilled` alone know what a container is; everything else that takes structures apart or puts them
together is made of the two, so that names, orders and shapes cannot disagree. None stands for an output that is not
there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason

Inputs = tuple[Tensor, ...]
"""a model's inputs in order, each [B, …]"""


def members(value: Any) -> list[tuple[str, Any]] | None:
    """Gives what a container holds, by name, in the order that `torch.export` takes it apart in.

    Args:
        value: anything; dicts, named tuples, dataclasses (`ModelOutput` is one), tuples and lists are containers.

    Returns:
        Keys, fields or positions, each with its value; None where `value` is no container.
    """
    if isinstance(value, dict):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(i), part) for i, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def refilled(value: Any, parts: Sequence[Any]) -> Any:
    """Makes a container of the kind of `value` that holds `parts` instead, in the order of `members`."""
    if type(value) is dict:
        return dict(zip(value, parts, strict=True))
    if isinstance(value, dict) and dataclasses.is_dataclass(value):
        return type(value)(**dict(zip(value, parts, strict=True)))
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, zip(value, parts, strict=True))
    if isinstance(value, dict):
        return type(value)(zip(value, parts, strict=True))
    if dataclasses.is_dataclass(value):
        new: Any = copy.copy(value)
        for field, part in zip(dataclasses.fields(value), parts, strict=True):
            object.__setattr__(new, field.name, part)  # frozen ones, too
        return new
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to its tensors, in order, through everything that has `members`."""
    if isinstance(value, Tensor):
        return function(value)
    inner = members(value)
    return value if inner is None else refilled(value, [map_tensors(function, part) for _, part in inner])


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Gives everything in a structure that is no container, in order, by its path: `boxes_0` for `{"boxes": [x]}`."""
    inner = members(value)
    if inner is None:
        return [(path, value)]
    return [leaf for name, part in inner for leaf in leaves(part, f"{path}_{name}" if path else name)]


def recast(like: Any, value: Any) -> Any:
    """`value` in containers of the kinds of `like`, which has as many members everywhere."""
    inner = members(like)
    if inner is None:
        return value
    pairs = zip(inner, members(value) or (), strict=True)
    return refilled(like, [recast(kind, part) for (_, kind), (_, part) in pairs])


def plain_structure(value: Any) -> Any:
    """A structure with dicts for everything whose members have names, and with tuples and lists."""
    inner = members(value)
    if inner is None:
        return value
    parts = [plain_structure(part) for _, part in inner]
    if isinstance(value, list):
        return parts
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(parts)
    return dict(zip(value if isinstance(value, dict) else dict(inner), parts, strict=True))


Outputs = Any
"""what a model returns: a tensor, or a structure of tensors and None"""


def first_tensor(outputs: Outputs) -> Tensor:
    """Gives the first tensor of a model's outputs.

    Args:
        outputs: what the model returned: a tensor, or a structure of tensors.

    Returns:
        The first one, in order.

    Raises:
        InputError: there is none.
    """
    parts = tensors(outputs)
    if not parts:
        raise InputError(f"teacher: its output is a {type(outputs).__name__} without tensors; pqk compares tensors")
    return parts[0]


def tensors(outputs: Outputs) -> list[Tensor]:
    """Gives all tensors of a model's outputs.

    Args:
        outputs: what the model returned: a tensor, or a structure of tensors.

    Returns:
        The tensors, in order.
    """
    return [leaf for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)]


def named_tensors(outputs: Outputs, taken: Iterable[str] = ()) -> dict[str, Tensor]:
    """Gives the tensors of a model's outputs by the names that they have in a file.

    Args:
        outputs: what the model returned.
        taken: names that something else has, such as the inputs.

    Returns:
        In order: `logits` for a lone tensor, else the path of each, which starts with `output` where it is a position
        in a tuple. Where a name is taken it is numbered.
    """
    if isinstance(outputs, Tensor):
        found = [("logits", outputs)]
    else:
        found = [(name, leaf) for name, leaf in leaves(outputs) if isinstance(leaf, Tensor)]
        found = [(f"output_{name}" if name[:1].isdigit() else name, leaf) for name, leaf in found]
    named: dict[str, Tensor] = {}
    used = set(taken)
    for name, leaf in found:
        free, count = name, 0
        while free in used:
            count += 1
            free = f"{name}_{count}"
        used.add(free)
        named[free] = leaf
    return named


def why_not_outputs(outputs: Outputs) -> Reason | None:
    """Why a model's outputs cannot be put into a file; None where they can: tensors with a batch, and None."""
    if not tensors(outputs):
        return f"its output is a {type(outputs).__name__} without tensors; pqk compares tensors"
    for path, leaf in leaves(outputs):
        where = f"its output {path}"
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            return f"{where} is one number for the whole batch; every output needs the batch as its first axis"
        if leaf is not None and not isinstance(leaf, Tensor):
            return f"{where} is of type {type(leaf).__name__}; a model returns tensors (or None) only, in any structure"
    return None


def restructured(like: Outputs, values: Iterator[Tensor]) -> Outputs:
    """`values` in the structure of `like`, in the order of `tensors`."""
    return map_tensors(lambda _: next(values), like)


def widened(t: Tensor) -> Tensor:
    """Casts a tensor for a loss, which is never computed in half precision.

    Args:
        t: of any dtype.

    Returns:
        `t` in float32, or in float64 where it was.
    """
    return t if t.dtype == torch.float64 else t.float()


def concatenate(parts: list[Any], unlabelled: int = 0) -> Any:
    """A list of equal structures of tensors [B, …] as one structure of tensors [N, …].

    Tensors whose other axes differ are padded: those of integers by `unlabelled`, others by 0.
    """
    head = parts[0]
    if isinstance(head, Tensor):
        return joined(parts, 0 if head.is_floating_point() or head.dtype == torch.bool else unlabelled)
    if members(head) is None:
        return head
    by_name = [dict(members(p) or ()) for p in parts]  # targets may be dicts in several orders
    return refilled(head, [concatenate([named[name] for named in by_name], unlabelled) for name in by_name[0]])


def joined(parts: list[Tensor], padding: int = 0) -> Tensor:
    """Tensors [B, …] as one; where their other axes differ (texts of several lengths), padded to the longest."""
    longest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    if all(list(p.shape[1:]) == longest for p in parts):
        return torch.cat(parts)
    joined = parts[0].new_full((sum(map(len, parts)), *longest), padding)
    start = 0
    for p in parts:
        joined[(slice(start, start + len(p)), *map(slice, p.shape[1:]))] = p
        start += len(p)
    return joined
