"""Columns of a shared buffer: launches that write their channels of a concatenation, so that nothing is copied there.

    buffer = concat_buffer(x, size)                 memory for [N, *size], not yet written: no launch
    int8_linear_into(buffer[..., a:b], …)           the launch of int8_linear, its output those columns
    int8_conv2d_into(buffer[..., b:c], …)           the launch of int8_conv2d, likewise
    int8_concat_into(buffer[..., c:d], q, …)        the launch of int8_concat for one input: requantized, written there

The three write to their first argument and return nothing, which `torch.export` keeps as it is: in the order of the
graph, since each names what it changes (`mutates_args`). Whoever reads the buffer comes after them.

Four ops in one file, against the rule of one op a file, because they are one mechanism: none has a kernel of its own,
the three are launches of other files with another output, and they share its check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels import int8_concat, int8_conv2d, int8_linear
from pqk.kernels.common import conv
from pqk.kernels.common.checks import allocate, check_tensor
from pqk.kernels.common.conv import Conv
from pqk.kernels.common.launch import Launch, falls_back, launch
from pqk.kernels.common.strides import check_disjoint, why_not_rows
from pqk.kernels.int8_concat import Concat

OPS = ("int8_linear_into", "int8_conv2d_into", "int8_concat_into")


def why_not_supported(out: Tensor) -> Reason | None:
    """Why a launch cannot write the columns `out`, else None."""
    return why_not_rows("out", out)


def check(out: Tensor, shape: Sequence[int], dtype: torch.dtype, inputs: dict[str, Tensor | None]) -> None:
    """Raise `InputError` unless `out` is columns of `shape` and `dtype` that no input lies in."""
    device = next(t.device for t in inputs.values() if t is not None)
    check_tensor("out", out, dtype, device=device, shape=shape, contiguous=False)
    if reason := why_not_supported(out):
        raise InputError(reason)
    check_disjoint("out", out, inputs)


@torch.library.custom_op("pqk::concat_buffer", mutates_args=())
def concat_buffer(x: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for [N, *size] on the device of `x` [N, …]; nothing is written."""
    return allocate((len(x), *size), dtype, x.device)


@concat_buffer.register_fake
def _(x: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], *size), dtype=dtype)


@torch.library.custom_op("pqk::int8_linear_into", mutates_args=("out",), device_types="cpu")
def int8_linear_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor,
    residual: Tensor | None, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """`int8_linear` of the same arguments, written to `out` [..., N]. Raises `InputError`."""
    check(out, (*x.shape[:-1], weight.shape[0]), out_dtype, {"x": x, "residual": residual})
    int8_linear.check(x, weight, bias, scale, steps, params, residual, out_dtype)
    out.copy_(int8_linear.reference(x, weight, bias, scale, steps, params, residual, out_dtype))


@int8_linear_into.register_kernel("cuda")
def _(out: Tensor, x: Tensor, weight: Tensor, *others: Any) -> None:
    x = x if why_not_rows("x", x) is None else x.contiguous()
    if falls_back("int8_linear_into", x.device, int8_linear.why_not_supported(x, weight)):
        out.copy_(int8_linear.reference(x, weight, *others))
    else:
        int8_linear.run(x, weight, *others, out=out)


@torch.library.custom_op("pqk::int8_conv2d_into", mutates_args=("out",), device_types="cpu")
def int8_conv2d_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, params: Tensor, residual: Tensor | None,
    steps: str, zero_point: int, stride: list[int], padding: list[int], dilation: list[int], groups: int,
    out_dtype: torch.dtype, residual_channels: Tensor | None = None, residual_stride: int = 1,
) -> None:  # fmt: skip
    """`int8_conv2d` of the same arguments, written to `out` [N, OH, OW, O]. Raises `InputError`."""
    window, shortcut = (stride, padding, dilation, groups), (residual_channels, residual_stride)
    conv = Conv(x, weight, bias, scale, params, residual, steps, zero_point, *window, out_dtype, *shortcut)
    result = int8_conv2d.reference(conv)
    check(out, conv.out_shape, out_dtype, {"x": x, "residual": residual})
    out.copy_(result)


@int8_conv2d_into.register_kernel("cuda")
def _(out: Tensor, *arguments: Any) -> None:
    conv = Conv(*arguments)
    if falls_back("int8_conv2d_into", conv.x.device, int8_conv2d.why_not_supported(conv)):
        out.copy_(int8_conv2d.reference(conv))
        return
    int8_conv2d.check(conv)
    check(out, conv.out_shape, conv.out_dtype, {"x": conv.x, "residual": conv.residual})
    int8_conv2d.run(conv, out=out)


@torch.library.custom_op("pqk::int8_concat_into", mutates_args=("out",), device_types="cpu")
def int8_concat_into(
    out: Tensor, x: Tensor, params: Tensor, steps: str, scale: float, zero_point: int, out_dtype: torch.dtype
) -> None:
    """`int8_concat` of `x` [..., C] alone, written to `out` [..., C]. Raises `InputError`."""
    check(out, x.shape, out_dtype, {"x": x})
    out.copy_(int8_concat.reference(Concat([x], params, steps, [scale], [zero_point], out_dtype)))


@int8_concat_into.register_kernel("cuda")
def _(
    out: Tensor, x: Tensor, params: Tensor, steps: str, scale: float, zero_point: int, out_dtype: torch.dtype
) -> None:
    concat = Concat([x], params, steps, [scale], [zero_point], out_dtype)
    concat.check()
    check(out, x.shape, out_dtype, {"x": x})
    if falls_back("int8_concat_into", x.device, int8_concat.why_not_supported(concat)):
        out.copy_(int8_concat.reference(concat))
    else:
        launch(int8_concat.plan(concat, out)[0])


for _op in (int8_linear_into, int8_conv2d_into, int8_concat_into):
    _op.register_fake(lambda *arguments, **named: None)


@dataclass(frozen=True)
class Case:
    """A case of int8_linear or int8_conv2d, written behind `before` columns of `width`."""

    layer: int8_linear.Case | conv.Case
    before: int
    width: int

    def columns(self, device: str = "meta") -> Tensor:
        """The columns of a wider tensor that the case is written to."""
        shape: tuple[int, ...]
        if isinstance(self.layer, conv.Case):
            shape, dtype = self.layer.conv("meta").out_shape, self.layer.conv("meta").out_dtype
        else:
            shape, dtype = (self.layer.m, self.layer.n), self.layer.out_dtype
        whole = allocate((*shape[:-1], self.width), dtype, device)
        return whole[..., self.before : self.before + shape[-1]]


CASES = (
    Case(conv.Case((1, 16, 16, 32), 32, epilogue="quantize"), 64, 128),
    Case(conv.Case((1, 7, 5, 8), 24, dtype=torch.int8, epilogue="residual"), 3, 40),
    Case(conv.Case((1, 8, 8, 64), 64, (1, 1), padding=(0, 0), epilogue="quantize"), 0, 96),
    Case(int8_linear.Case(128, 96, 64), 32, 128),
)
"""whole sectors and others, a pixel at a time, a linear layer"""


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    out = case.columns(device)
    if isinstance(case.layer, conv.Case):
        return int8_conv2d.plan(case.layer.conv(device), out=out)
    return int8_linear.plan(**case.layer.arguments(device), out=out)
