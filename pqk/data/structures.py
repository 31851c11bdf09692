"""Nested inputs and outputs: tensors in dicts, tuples and lists, in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError

Inputs = tuple[Tensor, ...]
"""a model's inputs in order, each [B, …]"""


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` applied to its tensors, through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(function, v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    return type(value)([map_tensors(function, v) for v in value]) if isinstance(value, tuple | list) else value


Outputs = Any
"""what a model returns: a tensor, or a tuple or dict of tensors"""


def first_tensor(outputs: Outputs) -> Tensor:
    """Gives the first tensor of a model's outputs.

    Args:
        outputs: what the model returned: a tensor, or a tuple, list or dict of tensors, nested or not.

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
        outputs: what the model returned: a tensor, or a tuple, list or dict of tensors, nested or not.

    Returns:
        The tensors, in order.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    return [t for o in outputs for t in tensors(o)] if isinstance(outputs, tuple | list) else []


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
    if head is None:
        return None
    if isinstance(head, Tensor):
        return joined(parts, 0 if head.is_floating_point() or head.dtype == torch.bool else unlabelled)
    if isinstance(head, dict):
        return {k: concatenate([p[k] for p in parts], unlabelled) for k in head}
    if hasattr(head, "_fields"):
        return type(head)(*(concatenate([p[i] for p in parts], unlabelled) for i in range(len(head))))
    return type(head)(concatenate([p[i] for p in parts], unlabelled) for i in range(len(head)))


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
