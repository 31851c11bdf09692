"""Convolutions that torch computes by writing over other memory, computed in another way.

In the backward pass of a 1 x 1 convolution with a stride, oneDNN (3.12, in torch 2.13) first moves the pixels that
count into scratch memory. Where channels are the last axis in memory, it books as many channels as there are, but
begins each later part of an image as if there were a whole vector of them: with fewer, it writes behind the end. The
heap is damaged, gradients are wrong without a word, or the process ends or never ends. A convolution without a stride,
of the pixels that count, is the same function, takes no such step, and is right in every layout and on every CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

VECTOR = 16
"""float32 values of the widest vector register (AVX-512, SVE): from as many channels on nothing is written too far"""


class UnitStrides(TorchFunctionMode):
    """A context in which 1 x 1 convolutions of few channels take no stride: they are given only the pixels that count.

    It sees every call of torch's `conv2d` and `conv_transpose2d`, whether of a module, a captured graph or anybody's
    code, and changes those alone that `strides_of_few` describes. Each kind of them is logged once. (`conv1d` lays its
    input out anew, and in three dimensions oneDNN does not take that step.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, tuple[int, int]]] = set()
        """channels and strides of what was computed so"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        form = FORMS.get(getattr(func, "__name__", "").partition(".")[0])  # an overload is called `conv2d.default`
        if form is None:
            return func(*args, **kwargs)
        call = form(*args, **kwargs)
        strides = strides_of_few(call.weight, call.stride, call.padding, call.groups)
        if strides is None:
            return func(*args, **kwargs)
        self._note(call.weight.shape[1], strides)
        return call.of_unit_stride(func, strides)

    def _note(self, channels: int, strides: tuple[int, int]) -> None:
        if (channels, strides) in self.found:
            return
        self.found.add((channels, strides))
        log.info(
            "a 1 x 1 convolution of %d channels with stride %d x %d is computed without a stride on the pixels that "
            "count: oneDNN's backward pass would write over other memory (pqk/training/README.md)",
            channels,
            *strides,
        )


@dataclass
class ConvolutionCall:
    """The arguments that `torch.conv2d` and `torch.conv_transpose2d` begin with."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0


@dataclass
class Convolution(ConvolutionCall):
    """A call of `torch.conv2d`, by its arguments."""

    dilation: Any = 1
    groups: int = 1

    def of_unit_stride(self, function: Callable[..., Tensor], strides: tuple[int, int]) -> Tensor:
        """Its result by `function`, which is torch's, on every pixel that a stride steps on."""
        return function(self.input[..., :: strides[0], :: strides[1]], self.weight, self.bias)


@dataclass
class TransposedConvolution(ConvolutionCall):
    """A call of `torch.conv_transpose2d`, by its arguments."""

    output_padding: Any = 0
    groups: int = 1
    dilation: Any = 1

    def of_unit_stride(self, function: Callable[..., Tensor], strides: tuple[int, int]) -> Tensor:
        """Its result: what `function` makes of every pixel, with the bias alone between them."""
        pixels = function(self.input, self.weight)
        sizes = [
            (size - 1) * stride + 1 + more
            for size, stride, more in zip(pixels.shape[-2:], strides, pair(self.output_padding), strict=True)
        ]
        result = pixels.new_zeros(*pixels.shape[:-2], *sizes)
        result[..., :: strides[0], :: strides[1]] = pixels
        return result if self.bias is None else result + self.bias.to(result.dtype)[:, None, None]


FORMS: dict[str, type[Convolution] | type[TransposedConvolution]] = {
    "conv2d": Convolution,
    "conv_transpose2d": TransposedConvolution,
}


def strides_of_few(weight: Tensor, stride: Any, padding: Any, groups: int) -> tuple[int, int] | None:
    """The strides of a convolution whose backward pass may write too far; None for all others.

    Such a one has a `weight` [out, in, 1, 1] of fewer than 16 input channels (transposed: [in, out, 1, 1] and output
    channels), a stride, one group and no padding. The layout of its input is not asked for: a network may change it.
    `stride` and `padding` are as torch takes them: a number, one or two of them, or (padding) "valid".
    """
    pointwise = tuple(weight.shape[2:]) == (1, 1) and (padding == "valid" or not any(pair(padding)))
    strides = pair(stride)
    return strides if pointwise and groups == 1 and weight.shape[1] < VECTOR and max(strides) > 1 else None


def pair(value: Any) -> tuple[Any, Any]:
    """A number, or a sequence of one or two, as a pair."""
    first, *rest = value if isinstance(value, list | tuple) else (value,)
    return (first, *rest) if rest else (first, first)
