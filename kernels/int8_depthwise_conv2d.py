"""int8_depthwise_conv2d: a convolution of one input channel an output channel, in one launch.

    acc[p, n] = Σ_(ky, kx) s8(x)[pixel(p, ky, kx), n // M] * weight[n, ky, kx]       M = O / C outputs a channel
    out = steps(float32(acc + bias[n]) * scale[n])                                    see `epilogue`

It has KH * KW products an output, far too few for a tensor core to be worth filling: the layer is as fast as its
input is read. So products are ordinary int32 multiplications, a program reads whole runs of channels, and the taps
that neighbouring pixels share come out of the L1 cache. A weight [O, KH, KW, 1] whose memory has the taps first (made
by `taps_first`) is read in runs of channels too, sixteen bytes a load; one that is contiguous is read byte by byte.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.configs import Config, fitting
from pqk.kernels.common.conv import Case, Conv, why_not_launched
from pqk.kernels.common.epilogue import epilogue
from pqk.kernels.common.gpu import Gpu, gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, output_of
from pqk.kernels.common.triton import jit, tl


def taps_first(weight: Tensor) -> Tensor:
    """`weight` [O, KH, KW, 1], the same shape and values in the memory of a contiguous [KH, KW, O]."""
    return weight[..., 0].permute(1, 2, 0).contiguous().permute(2, 0, 1)[..., None]


def accumulate(conv: Conv) -> Tensor:
    """int32 [N, OH, OW, O]: the sums of products, a tap at a time."""
    each = conv.weight.shape[0] // conv.groups
    acc = torch.zeros(conv.out_shape, dtype=torch.int32, device=conv.x.device)
    for ky, kx, pixels in conv.taps(torch.int32):
        acc += pixels.repeat_interleave(each, 3) * conv.weight[:, ky, kx, 0]
    return acc


def reference(conv: Conv) -> Tensor:
    """The layer in plain torch, on any device. Raises `InputError` for arguments that do not fit."""
    check(conv)
    return conv.finish(accumulate(conv))


@jit
def int8_depthwise_conv2d_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, out_ptr,
    rows, height, width, out_height, out_width, zero_point, stride_wn, stride_wt,
    C: tl.constexpr, OUT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels x BLOCK_N output channels; offsets as in `int8_conv2d`."""
    blocks = tl.cdiv(OUT, BLOCK_N)
    row_0 = tl.program_id(0) // blocks * BLOCK_M
    size = out_height * out_width
    image_0 = row_0 // size
    i = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row = row_0 + i
    present = n < OUT
    mask = (row < rows)[:, None] & present[None, :]
    pixel = row % size
    top = pixel // out_width * SH - PH
    left = pixel % out_width * SW - PW
    corner = (((row // size - image_0) * height + top) * width + left) * C
    x_block = x_ptr + image_0.to(tl.int64) * height * width * C
    source = n // (OUT // C)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for ky in range(KH):
        inside_y = (top + ky * DH >= 0) & (top + ky * DH < height)
        for kx in tl.static_range(KW):
            inside = inside_y & (left + kx * DW >= 0) & (left + kx * DW < width)
            tap = corner + (ky * DH * width + kx * DW) * C
            x = tl.load(x_block + (tap[:, None] + source[None, :]), mask=mask & inside[:, None], other=zero_point)
            if x.dtype == tl.uint8:
                x = (x ^ 128).to(tl.int8, bitcast=True)
            w = tl.load(weight_ptr + (n * stride_wn + (ky * KW + kx) * stride_wt), mask=present, other=0)
            acc += x.to(tl.int32) * w.to(tl.int32)[None, :]
    acc += tl.load(bias_ptr + n, mask=present, other=0)[None, :]
    base = row_0.to(tl.int64) * OUT
    to = i[:, None] * OUT + n[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + base + to, acc, mask=mask)
    else:
        y = acc.to(tl.float32) * tl.load(scale_ptr + n, mask=present, other=0.0)[None, :]
        residual_block = residual_ptr
        if residual_ptr is not None:
            residual_block = residual_ptr + base
        y = epilogue(y, STEPS, params_ptr, residual_block, to, mask)
        tl.store(out_ptr + base + to, y.to(out_ptr.dtype.element_ty), mask=mask)


CONFIGS = (
    Config(128, 16, 1, num_warps=4, num_stages=1),
    Config(64, 32, 1, num_warps=8, num_stages=1),
    Config(32, 64, 1, num_warps=4, num_stages=1),
    Config(16, 128, 1, num_warps=4, num_stages=1),
    Config(16, 16, 1, num_warps=1, num_stages=1),
)
"""16 outputs a thread, or 8 where there are few or where four warps spilled (sm_90); channels first, so that a warp
reads whole sectors"""


def choose(conv: Conv, gpu: Gpu) -> Config:
    """The configuration that pads these shapes least, of equals the one that reads the longest runs of channels."""

    def cost(c: Config) -> tuple[int, int]:
        padded = cdiv(conv.rows, c.block_m) * c.block_m * cdiv(conv.out_shape[3], c.block_n) * c.block_n
        return padded, -c.block_n * c.num_warps

    return min(fitting(CONFIGS, gpu), key=cost)


def plan(conv: Conv, config: Config | None = None) -> Launch:
    """The launch; its output is `args["out_ptr"]`. The tensors may be on the `meta` device."""
    c = config or conv.chosen("int8_depthwise_conv2d", gpu_of(conv.x.device), choose, CONFIGS)
    channels, outputs = conv.x.shape[3], conv.out_shape[3]
    return Launch(
        kernel=int8_depthwise_conv2d_kernel,
        grid=(cdiv(conv.rows, c.block_m) * cdiv(outputs, c.block_n),),
        args={
            **conv.launch_args(conv.allocate()),
            "stride_wn": conv.weight.stride(0),
            "stride_wt": tap_stride(conv.weight),
        },
        constexprs={**conv.launch_constants(c), "C": channels, "OUT": outputs},
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )


def tap_stride(weight: Tensor) -> int:
    """Elements from a tap of [O, KH, KW, 1] to the next, row by row; -1 where taps are not evenly spaced."""
    _, kh, kw, _ = weight.shape
    rows, columns = weight.stride(1), weight.stride(2)
    if kw == 1:
        return rows
    return columns if kh == 1 or rows == kw * columns else -1


def why_not_supported(conv: Conv, transposed: bool = False) -> Reason | None:
    """Why the kernel cannot take this call, else None. The tensors may be on the `meta` device."""
    if transposed:
        return "a transposed convolution: its output pixels meet different taps; write it as resize and convolution"
    if conv.weight.shape[3] != 1 or conv.groups != conv.x.shape[3]:
        return f"{conv.groups} groups of {conv.weight.shape[3]} channels; depthwise is one channel a group"
    if conv.residual_channels is not None:
        return "a residual that is strided or padded as it is read; int8_conv2d does that"
    if tap_stride(conv.weight) < 0:
        return f"weight: strides {conv.weight.stride()}; taps must be evenly spaced, call .contiguous()"
    return why_not_launched(conv)


def check(conv: Conv) -> None:
    """Raise `InputError` for arguments that neither the reference nor the kernel takes."""
    conv.check()
    if reason := why_not_supported(conv):
        raise InputError(f"int8_depthwise_conv2d: {reason}")


def run(conv: Conv, config: Config | None = None) -> Tensor:
    """The layer by its kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    check(conv)
    return output_of(plan(conv, config))


@torch.library.custom_op("pqk::int8_depthwise_conv2d", mutates_args=(), device_types="cpu")
def int8_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    params: Tensor,
    residual: Tensor | None,
    steps: str,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`x` uint8 or int8 [N, H, W, C], `weight` int8 [O, KH, KW, 1], `groups` C → `out_dtype` [N, OH, OW, O].

    The arguments are those of `conv.Conv`; the weight may lie in memory taps first (`taps_first`). Raises `InputError`
    for arguments that do not fit each other and for activations that are not contiguous.
    """
    return reference(
        Conv(x, weight, bias, scale, params, residual, steps, zero_point, stride, padding, dilation, groups, out_dtype)
    )


@int8_depthwise_conv2d.register_kernel("cuda")
def _(*arguments: Any, **named: Any) -> Tensor:
    conv = Conv(*arguments, **named)
    return reference(conv) if falls_back("int8_depthwise_conv2d", conv.x.device) else run(conv)


@int8_depthwise_conv2d.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    return Conv(*arguments, **named).empty()


CASES = (
    Case((1, 16, 16, 32), 32, groups=32, epilogue="quantize"),
    Case((1, 16, 16, 96), 96, stride=(2, 2), groups=96, dtype=torch.int8, epilogue="hard_swish"),
    Case((1, 8, 8, 128), 128, (5, 5), padding=(2, 2), groups=128, epilogue="residual"),
    Case((1, 9, 11, 12), 24, (3, 3), (1, 2), (0, 1), groups=12),
    Case((2, 7, 7, 20), 20, (7, 7), padding=(6, 6), dilation=(2, 2), groups=20, epilogue="half"),
)
"""MobileNet and ConvNeXt layers, two outputs a channel, odd shapes"""


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case, its weight laid out as is best."""
    conv = case.conv(device)
    return plan(replace(conv, weight=taps_first(conv.weight)))
