"""Convolutions that torch computes by writing over other memory, computed in another way.

In the backward pass of a 1 x 1 convolution with a stride, oneDNN (3.12, in torch 2.13) first moves the pixels that
count into scratch memory. Where channels are the last axis in memory it books that by channels and fills it by whole
vectors, so that fewer channels than a vector holds are written behind its end: the heap is damaged, or gradients are
wrong without a word, or the process ends or never ends. A convolution without a stride on every second pixel is the
same function, has no such step, and is right in every layout and on every CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

VECTOR = 16
"""float32 values of the widest vector register (AVX-512, SVE): as many channels or more are never written too far"""
AXES = {"conv1d": 1, "conv2d": 2}
"""the functions, each with its spatial axes; oneDNN does not take that way in three dimensions"""


class UnitStrides(TorchFunctionMode):
    """A context in which 1 x 1 convolutions of few channels take no stride: they are given only the pixels that count.

    It sees every call of torch's `conv1d` and `conv2d`, whether of a module, a captured graph or anybody's code, and
    changes those alone that `strides_of_few` describes. Each kind of them is logged once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, tuple[int, ...]]] = set()
        """channels and strides of what was computed so"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        axes = AXES.get(getattr(func, "__name__", "").partition(".")[0])  # an overload is called `conv2d.default`
        if axes is None:
            return func(*args, **(kwargs or {}))
        call = _Call(*args, **(kwargs or {}))
        strides = strides_of_few(call.weight, call.stride, call.padding, call.groups, axes)
        if strides is None:
            return func(*args, **(kwargs or {}))
        self._note(call.weight.shape[1], strides)
        index: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in strides))
        pixels = call.input[index]
        padding = call.padding if call.padding == "valid" else _each(call.padding, axes)
        return func(pixels, call.weight, call.bias, (1,) * axes, padding, _each(call.dilation, axes), call.groups)

    def _note(self, channels: int, strides: tuple[int, ...]) -> None:
        if (channels, strides) in self.found:
            return
        self.found.add((channels, strides))
        log.info(
            "a 1 x 1 convolution of %d channels with stride %s is computed without a stride on the pixels that count: "
            "oneDNN's backward pass would write over other memory (pqk/training/README.md)",
            channels,
            " x ".join(map(str, strides)),
        )


class _Call:
    """The arguments of `torch.conv1d` and `torch.conv2d`, under the names that they have there."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        self.input, self.weight, self.bias, self.stride = input, weight, bias, stride
        self.padding, self.dilation, self.groups = padding, dilation, groups


def strides_of_few(weight: Tensor, stride: Any, padding: Any, groups: int, axes: int) -> tuple[int, ...] | None:
    """The strides of a convolution whose backward pass may write too far, one for each of `axes`; None for all others.

    Such a one has a `weight` [out, in, 1, …] of fewer than 16 input channels, a stride, one group and no padding. The
    layout of its input is not asked for: a network may change it. `stride` and `padding` are as torch takes them: a
    number, one for each of the `axes`, or (padding) "valid".
    """
    strides, paddings = _each(stride, axes), (0,) * axes if padding == "valid" else _each(padding, axes)
    pointwise = all(size == 1 for size in weight.shape[2:]) and not any(paddings)
    few = groups == 1 and weight.shape[1] < VECTOR
    return strides if pointwise and few and any(s > 1 for s in strides) else None


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    """A number, or a sequence of one or of `axes`, as a tuple of `axes`."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values
