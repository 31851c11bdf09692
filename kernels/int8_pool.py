"""int8_pool: max, average and global average pooling of quantized NHWC activations, accumulated in int32.

    max             y = (max_k q[k] - zero_point) * scale
    average         y = float32(Σ_k (q[k] - zero_point)) * scale / count
    global average  the same over all pixels of an image, count = H * W
    out = steps(y)                                                       see `epilogue`

`k` runs over the pixels of a window that lie in the image: padding never wins a maximum and adds nothing to a sum. The
sums are exact integers, so the float arithmetic begins with one rounding, whatever the order they were made in. One
launch takes the place of dequantize, pool and quantize, and of an activation between them. Window arithmetic is that
of torch's `max_pool2d` and `avg_pool2d`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, example
from pqk.kernels.common.epilogue import apply_steps, encode, epilogue
from pqk.kernels.common.gpu import gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, next_power_of_2, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import MAX_ROWS, blocks, check_plain_steps, check_values, example_steps

KINDS = ("max", "average", "global_average")
MAX_TERMS = ((1 << 31) - 1) // 255
"""pixels whose sum int32 holds"""


@dataclass(frozen=True)
class Pool:
    """The arguments of `pqk::int8_pool`, in their order. `x` is uint8 or int8 [N, H, W, C], contiguous.

    `kind`: one of `KINDS`. `kernel`, `stride`, `padding` (both sides), `dilation` (of max only): [along H, along W];
    a global average reads none of the four, nor the two flags after them. `count_include_pad`: whether an average
    divides by the window with its padding. `steps`, `params`, `out_dtype`: see `epilogue`; no step may read a
    residual.
    """

    x: Tensor
    params: Tensor
    steps: str
    kind: str
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    ceil_mode: bool
    count_include_pad: bool
    scale: float
    zero_point: int
    out_dtype: torch.dtype

    @property
    def axes(self) -> list[tuple[int, int, int, int, int, int]]:
        """(size, out size, kernel, stride, padding, dilation) along H and along W."""
        windows = zip(self.x.shape[1:3], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size, out_size(size, k, s, p, d, self.ceil_mode), k, s, p, d) for size, k, s, p, d in windows]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """(N, OH, OW, C); a global average keeps its axes."""
        images, _, _, channels = self.x.shape
        height, width = (1, 1) if self.kind == "global_average" else (axis[1] for axis in self.axes)
        return images, height, width, channels

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        device = self.x.device
        check_values("x", self.x, self.scale, self.zero_point, device=device, shape=(-1, -1, -1, -1))
        check_plain_steps(self.steps, self.params, self.out_dtype, device)
        if self.kind not in KINDS:
            raise InputError(f'kind: "{self.kind}" (known: {", ".join(KINDS)})')
        if min(self.x.shape[1:3]) < 1:
            raise InputError(f"x: shape {list(self.x.shape)} has images without pixels")
        if self.kind != "global_average":
            self._check_windows()

    def _check_windows(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) < least:
                raise InputError(f"{name}: {list(pair)}; must be two integers of at least {least}, along H and W")
        if self.kind == "average" and max(self.dilation) > 1:
            raise InputError(f"dilation: {list(self.dilation)}; average pooling has none, give [1, 1]")
        for axis in self.axes:
            size, out, kernel, _, padding, dilation = axis
            if out < 1 or 2 * padding > dilation * (kernel - 1) + 1:
                raise InputError(
                    f"kernel: a window of {kernel}, dilation {dilation}, and a padding of {padding} on {size} pixels; "
                    "it must fit the padded image and be at least twice the padding"
                )
            if (empty := empty_window(*axis)) is not None:
                raise InputError(f"padding: window {empty} of {out} holds no pixel of the image's {size}; pad less")


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """The number of windows that fit; in ceil mode the last may reach past the padded image, but begins in it."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (cdiv(room, stride) if ceil_mode else room // stride) + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


@cache
def empty_window(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> int | None:
    """The first window along an axis of which no tap lies in the image, else None."""
    if padding == 0 and (out - 1) * stride < size:
        return None
    for window in range(out):
        first = window * stride - padding
        if not any(0 <= first + tap * dilation < size for tap in range(kernel)):
            return window
    return None


def counts(axis: tuple[int, int, int, int, int, int], include_pad: bool) -> Tensor:
    """float32 [out]: what average windows along an axis divide by; a product of the two axes' counts is exact."""
    size, out, kernel, stride, padding, _ = axis
    first = torch.arange(out) * stride - padding
    last = (first + kernel).clamp(max=size + padding if include_pad else size)
    return (last - (first if include_pad else first.clamp(min=0))).to(torch.float32)


def reference(pool: Pool) -> Tensor:
    """The formula in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    pool.check()
    q, scale = pool.x.to(torch.float64) - pool.zero_point, pool.params.new_tensor(pool.scale)
    if pool.x.numel() == 0:
        y = torch.zeros(pool.out_shape, device=q.device)
    elif pool.kind == "global_average":
        total = q.sum((1, 2), keepdim=True).to(torch.float32)
        y = total * scale / total.new_tensor(float(q.shape[1] * q.shape[2]))
    else:
        y = _windows(pool, q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(torch.float32) * scale
        if pool.kind == "average":
            high, wide = (counts(axis, pool.count_include_pad).to(y.device) for axis in pool.axes)
            y = y / (high[:, None] * wide)[:, :, None]
    return apply_steps(y, pool.steps, pool.params, None, pool.out_dtype).contiguous()


def _windows(pool: Pool, q: Tensor) -> Tensor:
    """The maximum or the exact sum of each window of float64 [N, C, H, W]."""
    kernel, stride, padding = list(pool.kernel), list(pool.stride), list(pool.padding)
    if pool.kind == "max":
        return max_pool2d(q, kernel, stride, padding, list(pool.dilation), pool.ceil_mode)
    return avg_pool2d(q, kernel, stride, padding, pool.ceil_mode, divisor_override=1)


@jit
def int8_pool_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, params_ptr, rows, height, width, channels, out_height, out_width, scale, zero_point,
    MAX: tl.constexpr, INCLUDE_PAD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R windows x BLOCK_C channels."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    image = (row // (out_height * out_width)).to(tl.int64)
    top = row // out_width % out_height * SH - PH
    left = row % out_width * SW - PW
    acc = tl.full((BLOCK_R, BLOCK_C), -2147483648 if MAX else 0, tl.int32)
    count = tl.zeros((BLOCK_R,), tl.int32)
    for tap in range(KH * KW):
        y = top + tap // KW * DH
        x = left + tap % KW * DW
        there = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        take = inside & there[:, None]
        start = ((image * height + y) * width + x) * channels
        q = tl.load(x_ptr + start[:, None] + channel[None, :], mask=take, other=0).to(tl.int32)
        if MAX:
            acc = tl.where(take & (q > acc), q, acc)
        else:
            acc += tl.where(take, q - zero_point, 0)
            if INCLUDE_PAD:
                there = (y < height + PH) & (x < width + PW)
            count += there.to(tl.int32)
    if MAX:
        value = (acc - zero_point).to(tl.float32) * scale
    else:
        value = tl.div_rn(acc.to(tl.float32) * scale, tl.maximum(count, 1).to(tl.float32)[:, None])
    to = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = epilogue(value, STEPS, params_ptr, None, to, inside)
    tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def int8_global_pool_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, params_ptr, pixels, channels, scale, zero_point,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of one image, whose pixels are summed BLOCK_P at a time."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_P)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for first in range(0, pixels, BLOCK_P):
        at = first + pixel
        take = (at < pixels)[:, None] & (channel < channels)[None, :]
        offset = (image * pixels + at)[:, None] * channels + channel[None, :]
        q = tl.load(x_ptr + offset, mask=take, other=0).to(tl.int32)
        acc += tl.where(take, q - zero_point, 0)
    value = tl.div_rn(
        tl.sum(acc, axis=0).to(tl.float32) * scale, pixels * 1.0
    )  # a float, also where 1 pixel is a constant
    to = image * channels + channel
    value = epilogue(value, STEPS, params_ptr, None, to, channel < channels)
    tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=channel < channels)


def plan(pool: Pool) -> Launch:
    """The launch; its output is `args["out_ptr"]`. The tensors may be on the `meta` device."""
    out = allocate(pool.out_shape, pool.out_dtype, pool.x.device)
    if pool.kind == "global_average":
        return _plan_global(pool, out)
    images, out_height, out_width, channels = pool.out_shape
    rows = images * out_height * out_width
    height, width, warps = blocks(rows, channels, gpu_of(pool.x.device).processors)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = pool.kernel, pool.stride, pool.padding, pool.dilation
    return Launch(
        int8_pool_kernel,
        (cdiv(rows, height), cdiv(channels, width)),
        {
            "x_ptr": pool.x, "out_ptr": out, "params_ptr": pool.params, "rows": rows,
            "height": pool.x.shape[1], "width": pool.x.shape[2], "channels": channels,
            "out_height": out_height, "out_width": out_width,
            "scale": float(pool.scale), "zero_point": pool.zero_point,
        },
        {
            "MAX": pool.kind == "max", "INCLUDE_PAD": pool.count_include_pad, "KH": kh, "KW": kw, "SH": sh, "SW": sw,
            "PH": ph, "PW": pw, "DH": dh, "DW": dw, "STEPS": encode(pool.steps), "BLOCK_R": height, "BLOCK_C": width,
        },
        num_warps=warps,
    )  # fmt: skip


def _plan_global(pool: Pool, out: Tensor) -> Launch:
    images, height, width, channels = pool.x.shape
    across = min(max(next_power_of_2(channels), 16), 32)  # a program reads whole 32-byte sectors, and there are many
    down = max(16, min(64, next_power_of_2(height * width)))
    return Launch(
        int8_global_pool_kernel,
        (images, cdiv(channels, across)),
        {
            "x_ptr": pool.x, "out_ptr": out, "params_ptr": pool.params, "pixels": height * width, "channels": channels,
            "scale": float(pool.scale), "zero_point": pool.zero_point,
        },
        {"STEPS": encode(pool.steps), "BLOCK_P": down, "BLOCK_C": across},
    )  # fmt: skip


def run(pool: Pool) -> Tensor:
    """The pooling by its kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    pool.check()
    if reason := why_not_supported(pool):
        raise InputError(f"int8_pool: {reason}")
    return output_of(plan(pool))


def why_not_supported(pool: Pool) -> Reason | None:
    """Why the kernel cannot run these arguments, else None."""
    images, height, width, _ = pool.out_shape
    terms = math.prod(pool.x.shape[1:3] if pool.kind == "global_average" else pool.kernel)
    if pool.kind != "max" and terms > MAX_TERMS:
        return f"a sum of {terms} pixels could overflow int32; at most {MAX_TERMS} cannot"
    if (rows := images * height * width) > MAX_ROWS:
        return f"{rows} output pixels do not fit a 32-bit index; split the batch"
    if pool.kind != "global_average" and max(out * s + k * d for _, out, k, s, _, d in pool.axes) > MAX_ROWS:
        return f"pixel coordinates do not fit 32 bits: {list(pool.x.shape)} with a stride of {list(pool.stride)}"
    return None


@torch.library.custom_op("pqk::int8_pool", mutates_args=(), device_types="cpu")
def int8_pool(
    x: Tensor,
    params: Tensor,
    steps: str,
    kind: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    scale: float,
    zero_point: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `Pool`. → `out_dtype` [N, OH, OW, C]. Raises `InputError`."""
    window = (kernel, stride, padding, dilation, ceil_mode, count_include_pad)
    return reference(Pool(x, params, steps, kind, *window, scale, zero_point, out_dtype))


@int8_pool.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    pool = Pool(*arguments)
    pool.check()
    return reference(pool) if falls_back("int8_pool", pool.x.device, why_not_supported(pool)) else run(pool)


@int8_pool.register_fake
def _(*arguments: Any) -> Tensor:
    pool = Pool(*arguments)
    return pool.x.new_empty(pool.out_shape, dtype=pool.out_dtype)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, int, int, int]
    """N, H, W, C"""
    kind: str = "global_average"
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    count_include_pad: bool = True
    dtype: torch.dtype = torch.uint8
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.uint8

    def arguments(self, device: str = "meta", seed: int = 0) -> Pool:
        window = (self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode, self.count_include_pad)
        x = example(self.shape, self.dtype, device, seed)
        params = example_steps(self.steps, self.out_dtype, device)
        zero_point = 103 if self.dtype == torch.uint8 else 0
        return Pool(x, params, self.steps, self.kind, *window, 0.017, zero_point, self.out_dtype)


CASES = (
    Case((2, 8, 8, 64)),
    Case((2, 8, 8, 64), dtype=torch.int8, out_dtype=torch.int8),
    Case((1, 7, 7, 129), dtype=torch.int8, steps="", out_dtype=torch.float32),
    Case((1, 56, 56, 64), "max", (3, 3), (2, 2), (1, 1)),
    Case((2, 9, 11, 5), "max", (2, 3), (1, 2), (1, 0), (2, 1), True, steps="relu,quantize", out_dtype=torch.int8),
    Case((1, 16, 16, 48), "average", (2, 2), (2, 2), dtype=torch.int8, out_dtype=torch.int8),
    Case((2, 10, 7, 20), "average", (3, 3), (2, 2), (1, 1), steps="hard_swish,quantize"),
    Case((1, 11, 8, 33), "average", (4, 3), (3, 2), (2, 1), (1, 1), True, False, torch.int8, "", torch.float16),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: its input and its output, once."""
    return math.prod(case.shape) + math.prod(case.arguments().out_shape) * case.out_dtype.itemsize
