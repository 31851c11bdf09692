"""Pools in ONNX that divide and end as torch's do, at the edges too.

ONNX has no divisor of one's own, and where the last window hangs over the edge (`ceil_mode`) it, ONNX Runtime and torch
each have another rule for how many windows there are and what they divide by. There, padding is written out and
windows are whole, so that no rule is left to be read in two ways; everywhere else a pool is one plain operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxscript import opset21 as op

Value = Any
"""a tensor of the ONNX graph that is being built"""


def average_pool(
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """`aten.avg_pool1d`, `2d` and `3d` on [N, C, …]."""
    sizes = spatial(x, len(kernel_size))
    axes = len(sizes)
    kernel, pads = per_axis(kernel_size, axes), per_axis(padding, axes)
    strides = per_axis(stride, axes) if len(stride) else kernel
    hangs = ceil_mode and overhangs(sizes, kernel, strides, pads)
    if not hangs and divisor_override is None:
        return op.AveragePool(
            x, count_include_pad=int(count_include_pad), kernel_shape=kernel, pads=pads * 2, strides=strides
        )
    extra = [overhang(k, s, p) if hangs else 0 for k, s, p in zip(kernel, strides, pads, strict=True)]
    padded = pad(x, pads, [p + e for p, e in zip(pads, extra, strict=True)], 0.0)
    mean = op.AveragePool(padded, kernel_shape=kernel, strides=strides)
    area = math.prod(kernel)
    if divisor_override is not None:
        return op.Mul(mean, constant(np.float32(area / divisor_override)))
    if all(isinstance(size, int) for size in sizes):
        shares = np.float32(1)
        for size, k, s, p, e in zip(sizes, kernel, strides, pads, extra, strict=True):
            counted = np.pad(np.ones(size), p, constant_values=float(count_include_pad))
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(counted, (0, e)), k)[::s]
            shares = np.multiply.outer(shares, k / windows.sum(1))
        return op.Mul(mean, constant(np.asarray(shares, np.float32)[None, None]))
    one, length = constant(np.ones(2, np.int64)), op.Shape(x, start=2)
    ones = op.ConstantOfShape(op.Concat(one, length, axis=0), value=onnx.numpy_helper.from_array(np.ones(1, "f4")))
    ones = pad(ones, pads, pads, float(count_include_pad))
    return op.Div(mean, op.AveragePool(pad(ones, [0] * axes, extra, 0.0), kernel_shape=kernel, strides=strides))


def max_pool(
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Value:
    """`aten.max_pool1d`, `2d` and `3d` on [N, C, …]."""
    sizes = spatial(x, len(kernel_size))
    axes = len(sizes)
    kernel, pads, dilations = (per_axis(v, axes) for v in (kernel_size, padding, dilation))
    strides = per_axis(stride, axes) if len(stride) else kernel
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if ceil_mode and overhangs(sizes, reach, strides, pads):
        ends = [p + overhang(k, s, p) for k, s, p in zip(reach, strides, pads, strict=True)]
        x, pads = pad(x, pads, ends, -math.inf), [0] * axes
    largest, _ = op.MaxPool(x, dilations=dilations, kernel_shape=kernel, pads=pads * 2, strides=strides)
    return largest


def spatial(x: Value, axes: int) -> list[Any]:
    """The sizes of the axes that are pooled: numbers, or symbols where they are free."""
    return [x.shape[len(x.shape) - axes + i] for i in range(axes)]


def per_axis(values: Sequence[int], axes: int) -> list[int]:
    return list(values) if len(values) == axes else [values[0]] * axes


def overhangs(sizes: Sequence[Any], kernel: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> bool:
    """Whether on any axis the last window may end behind the padding."""
    along = zip(sizes, kernel, strides, pads, strict=True)
    return any(not isinstance(size, int) or (size + 2 * p - k) % s for size, k, s, p in along)


def overhang(kernel: int, stride: int, padding: int) -> int:
    """What is padded besides so that the last window is whole; torch has none that starts behind the input."""
    return max(0, min(stride - 1, kernel - 1 - padding))


def pad(x: Value, begins: Sequence[int], ends: Sequence[int], value: float) -> Value:
    """`x` padded along its last axes; itself where nothing is added."""
    if not any(begins) and not any(ends):
        return x
    pads = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
    return op.Pad(x, constant(pads), constant(np.float32(value)))


def constant(value: NDArray[Any] | np.generic) -> Value:
    return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value)))
