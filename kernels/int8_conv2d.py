"""int8_conv2d: a whole convolution layer in one launch, as an implicit matrix product (no patches are written).

    acc[p, n] = Σ_k s8(x)[pixel(p, k)] * weight[n, k]       k = (ky, kx, c), p = (image, oy, ox)
    pixel(p, k) = image, oy * stride - padding + ky * dilation, ox * … + kx * …, c of the group; outside: the zero point
    out = steps(float32(acc + bias[n]) * scale[n])           see `epilogue`

K = KH * KW * C / groups is one axis, cut into blocks wherever they fall: 3 channels of a first layer fill the tensor
cores as well as 64 do (27 of 32 products are real, not 27 of 9 * 32). Padding, strides and taps are constants of the
compiled kernel, so that `k → (ky, kx, c)` costs no division at run time. A 1x1 convolution of stride 1 is the linear
kernel. Source of the scheme: Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning", section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels import int8_linear
from pqk.kernels.common.checks import check_tensor
from pqk.kernels.common.configs import Config, fitting
from pqk.kernels.common.conv import Case, Conv, why_not_launched
from pqk.kernels.common.epilogue import epilogue, exact_dtype
from pqk.kernels.common.gpu import Gpu, gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, output_of
from pqk.kernels.common.strides import row_stride
from pqk.kernels.common.triton import jit, tl


def accumulate(conv: Conv) -> Tensor:
    """[N, OH, OW, O]: the sums of products, exact integers in a float dtype; one matrix product a tap and group."""
    dtype = exact_dtype(conv.terms)
    (out, kh, kw, inner), groups = conv.weight.shape, conv.groups
    weight = conv.weight.to(dtype).reshape(groups, out // groups, kh, kw, inner)
    acc = torch.zeros(groups, conv.rows, out // groups, dtype=dtype, device=conv.x.device)
    for ky, kx, pixels in conv.taps(dtype):
        acc.baddbmm_(pixels.reshape(-1, groups, inner).transpose(0, 1), weight[:, :, ky, kx].transpose(1, 2))
    return acc.transpose(0, 1).reshape(conv.out_shape)


def reference(conv: Conv) -> Tensor:
    """The layer in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    check(conv)
    return conv.finish(accumulate(conv))


@jit
def int8_conv2d_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, channels_ptr, out_ptr,
    rows, height, width, out_height, out_width, zero_point, residual_height, residual_width, residual_c,
    C: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    RS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output pixels x BLOCK_N output channels of one group; C and OUT are channels of a group, WIDTH elements
    lie from one pixel of the output to the next.

    Neighbouring programs take the channel blocks of the same pixels, whose input they find in the L2 cache. Offsets are
    32 bits wide, from a 64-bit base: the image that the block starts in. Pixels and channels past the end read the
    last one again, and are not stored.
    """
    K: tl.constexpr = KH * KW * C
    blocks = tl.cdiv(OUT, BLOCK_N)
    row_0 = tl.program_id(0) // blocks * BLOCK_M
    n_0 = tl.program_id(0) % blocks * BLOCK_N
    group = tl.program_id(1)
    size = out_height * out_width
    image_0 = row_0 // size
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    row = tl.minimum(row_0 + i, rows - 1)
    pixel = row % size
    top = pixel // out_width * SH - PH
    left = pixel % out_width * SW - PW
    corner = (((row // size - image_0) * height + top) * width + left) * (GROUPS * C)
    x_block = x_ptr + image_0.to(tl.int64) * height * width * (GROUPS * C) + group * C
    w_block = weight_ptr + (group * OUT + n_0).to(tl.int64) * K
    w_row = tl.minimum(j, OUT - 1 - n_0) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        down = k // (KW * C) * DH
        along = k // C % KW * DW
        tap = (down * width + along) * (GROUPS * C) + k % C
        inside = (k < K)[None, :]
        if PH > 0:  # one comparison for both ends: below zero is a large unsigned number
            inside = inside & ((top[:, None] + down[None, :]).to(tl.uint32) < height.to(tl.uint32))
        if PW > 0:
            inside = inside & ((left[:, None] + along[None, :]).to(tl.uint32) < width.to(tl.uint32))
        x = tl.load(x_block + (corner[:, None] + tap[None, :]), mask=inside, other=zero_point)
        if x.dtype == tl.uint8:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        w = tl.load(w_block + (w_row[None, :] + k[:, None]), mask=(k < K)[:, None], other=0)
        acc = tl.dot(x, w, acc)
    n = group * OUT + n_0 + j
    present = n_0 + j < OUT
    mask = (i < rows - row_0)[:, None] & present[None, :]
    acc += tl.load(bias_ptr + n, mask=present, other=0)[None, :]
    base = row_0.to(tl.int64) * (GROUPS * OUT)
    to = i[:, None] * (GROUPS * OUT) + n[None, :]
    out_block = out_ptr + row_0.to(tl.int64) * WIDTH
    out_offsets = i[:, None] * WIDTH + n[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_block + out_offsets, acc, mask=mask)
    else:
        y = acc.to(tl.float32) * tl.load(scale_ptr + n, mask=present, other=0.0)[None, :]
        residual_block = residual_ptr
        at = to
        there = mask
        if channels_ptr is not None:  # a shortcut: every RS-th pixel, and channels that are somewhere else or nowhere
            source = tl.load(channels_ptr + n, mask=present, other=-1)
            down = (row // size - image_0) * residual_height + pixel // out_width * RS
            at = ((down * residual_width + pixel % out_width * RS) * residual_c)[:, None] + source[None, :]
            there = mask & (source >= 0)[None, :]
            residual_block = residual_ptr + image_0.to(tl.int64) * residual_height * residual_width * residual_c
        elif residual_ptr is not None:
            residual_block = residual_ptr + base
        y = epilogue(y, STEPS, params_ptr, residual_block, at, there)
        tl.store(out_block + out_offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


CONFIGS = (
    Config(128, 64, 64, num_warps=8, num_stages=3),
    Config(64, 64, 64, num_warps=4, num_stages=3),
    Config(128, 32, 64, num_warps=8, num_stages=3),
    Config(128, 16, 64, num_warps=8, num_stages=3),
    Config(64, 32, 64, num_warps=4, num_stages=3),
    Config(32, 32, 64, num_warps=4, num_stages=3),
    Config(16, 16, 64, num_warps=2, num_stages=3),
    Config(128, 64, 32, num_warps=8, num_stages=3),
    Config(64, 64, 32, num_warps=4, num_stages=3),
    Config(128, 32, 32, num_warps=4, num_stages=3),
    Config(128, 16, 32, num_warps=4, num_stages=3),
    Config(64, 16, 32, num_warps=4, num_stages=3),
    Config(16, 16, 32, num_warps=2, num_stages=3),
)
"""compiled for sm_80, sm_90 and sm_100 none spills a register, even where 3 channels are loaded byte by byte: at most
32 bytes of input a thread and step"""


def choose(conv: Conv, gpu: Gpu) -> Config:
    """The configuration whose busiest processor stages the fewest operand bytes.

    A model, for choosing only: programs run in waves of one a processor, each step of a program stages `block_m +
    block_n` rows of `block_k` bytes and waits as long as 16 bytes a row more would take. A measured choice is
    remembered (`configs`) or passed as `config=`.
    """
    outputs = conv.weight.shape[0] // conv.groups

    def cost(c: Config) -> tuple[int, int]:
        programs = cdiv(conv.rows, c.block_m) * cdiv(outputs, c.block_n) * conv.groups
        step = (c.block_m + c.block_n) * (c.block_k + 16)
        return cdiv(programs, gpu.processors) * cdiv(conv.terms, c.block_k) * step, programs

    return min(fitting(CONFIGS, gpu), key=cost)


def pointwise(conv: Conv) -> bool:
    """Whether this is a linear layer over pixels."""
    plain = conv.residual_channels is None and conv.groups == 1
    return plain and (*conv.kernel, *conv.stride, *conv.padding) == (1, 1, 1, 1, 0, 0)


def plan(conv: Conv, config: Config | None = None, out: Tensor | None = None) -> Launch:
    """The launch. The tensors may be on the `meta` device; `out` may be channels of a wider contiguous tensor."""
    if pointwise(conv):
        weight = conv.weight.flatten(1)
        after = (conv.steps, conv.params, conv.residual, conv.out_dtype)
        return int8_linear.plan(conv.x, weight, conv.bias, conv.scale, *after, out=out, config=config)
    gpu, y = gpu_of(conv.x.device), conv.allocate() if out is None else out
    c = config or conv.chosen("int8_conv2d", gpu, choose, CONFIGS)
    per_group = conv.out_shape[3] // conv.groups
    _, residual_height, residual_width, residual_c = (0, 1, 1, 1) if conv.residual is None else conv.residual.shape
    return Launch(
        kernel=int8_conv2d_kernel,
        grid=(cdiv(conv.rows, c.block_m) * cdiv(per_group, c.block_n), conv.groups),
        args={
            **conv.launch_args(y), "channels_ptr": conv.residual_channels,
            "residual_height": residual_height, "residual_width": residual_width, "residual_c": residual_c,
        },
        constexprs={
            **conv.launch_constants(c), "C": conv.weight.shape[3], "OUT": per_group, "GROUPS": conv.groups,
            "RS": conv.residual_stride, "WIDTH": row_stride(y), "BLOCK_K": c.block_k,
        },
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip


def why_not_supported(conv: Conv, transposed: bool = False) -> Reason | None:
    """Why the kernel cannot take this call, else None. The tensors may be on the `meta` device."""
    if transposed:
        return (
            "a transposed convolution: each output pixel of stride s meets one tap in s * s, so that one matrix "
            "product over all taps would multiply mostly zeros; write it as resize and convolution"
        )
    if pointwise(conv):
        return int8_linear.why_not_supported(conv.x, conv.weight.flatten(1))
    if conv.groups > 65535:
        return f"{conv.groups} groups; a grid has at most 65535 along its second axis"
    return why_not_launched(conv)


def check(conv: Conv) -> None:
    """Raise `InputError` for arguments that neither the reference nor the kernel takes."""
    conv.check()
    check_tensor("weight", conv.weight, torch.int8)


def run(conv: Conv, config: Config | None = None, out: Tensor | None = None) -> Tensor:
    """The layer by its kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`.

    `out` [N, OH, OW, O] is written in place of a new tensor: channels of a wider one.
    """
    check(conv)
    if reason := why_not_supported(conv):
        raise InputError(f"int8_conv2d: {reason}")
    return output_of(plan(conv, config, out))


@torch.library.custom_op("pqk::int8_conv2d", mutates_args=(), device_types="cpu")
def int8_conv2d(
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
    residual_channels: Tensor | None = None,
    residual_stride: int = 1,
) -> Tensor:
    """`x` uint8 or int8 [N, H, W, C] → `out_dtype` [N, OH, OW, O]; the arguments are those of `conv.Conv`.

    Raises `InputError` for arguments that do not fit each other and for tensors that are not contiguous.
    """
    window = (stride, padding, dilation, groups)
    shortcut = (residual_channels, residual_stride)
    return reference(Conv(x, weight, bias, scale, params, residual, steps, zero_point, *window, out_dtype, *shortcut))


@int8_conv2d.register_kernel("cuda")
def _(*arguments: Any, **named: Any) -> Tensor:
    conv = Conv(*arguments, **named)
    return reference(conv) if falls_back("int8_conv2d", conv.x.device, why_not_supported(conv)) else run(conv)


@int8_conv2d.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    return Conv(*arguments, **named).empty()


CASES = (
    Case((1, 32, 32, 3), 16),
    Case((8, 32, 32, 16), 16, epilogue="residual"),
    Case((1, 32, 32, 16), 32, stride=(2, 2)),
    Case((1, 16, 16, 32), 32, epilogue="residual"),
    Case((2, 8, 8, 64), 64, epilogue="residual"),
    Case((2, 8, 8, 64), 64, dtype=torch.int8, epilogue="residual"),
    Case((1, 16, 16, 32), 32, epilogue="residual", shortcut=True),
    Case((1, 56, 56, 3), 64, (7, 7), (2, 2), (3, 3), dtype=torch.int8),
    Case((1, 16, 16, 16), 32, (1, 1), (2, 2), (0, 0), epilogue="quantize"),
    Case((1, 16, 16, 32), 32, padding=(2, 2), dilation=(2, 2), groups=4, epilogue="hard_swish"),
    Case((1, 9, 11, 20), 24, (3, 5), (1, 2), (0, 2), epilogue="half"),
)
"""the layers of the CIFAR ResNets, one with rows enough for blocks of 64, a first layer of 7 x 7, a projection, groups,
odd shapes"""


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.conv(device))
