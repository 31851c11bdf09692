"""W8A8 linear: integers in, one launch, integers (or floats) out.

    acc[m, n] = Σ_k centred(x)[m, k] * w[n, k] + bias[n]          int32, exact
    y[m, n]   = epilogue(float32(acc[m, n]) * scale[n])           see `epilogue`

`centred` reads int8 as it is and uint8 less 128; `bias` has the zero point folded in (`fold_bias`), and
`scale[n] = s_x * s_w[n]`. Both operands are read along K, as tensor cores want them for int8 (`mma.s8.s8.s32`; on
Hopper `wgmma`). Three shapes of the same arithmetic:

  tiled       a program a block of the output
  persistent  as many programs as processors, each walking blocks, so that one block's epilogue hides behind the next
              one's loads (Hopper and later, where there are several blocks a processor)
  split K     few rows: programs share a block, add their parts with integer atomics, which are exact in any order, and
              the last to arrive runs the epilogue (Osama et al. 2023, "Stream-K", section 3.2, fixed split)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_scale, check_tensor, example
from pqk.kernels.common.configs import Config, chosen, fitting
from pqk.kernels.common.epilogue import (
    INTEGERS,
    apply_steps,
    centred,
    check_steps,
    encode,
    epilogue,
    exact_dtype,
    reads_residual,
    scaled,
)
from pqk.kernels.common.gpu import Gpu, gpu_of
from pqk.kernels.common.launch import TYPES, Launch, cdiv, falls_back, output_of
from pqk.kernels.common.strides import MAX_STRIDE, check_disjoint, row_stride, why_not_rows
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import MAX_ROWS, example_steps

LARGEST_K = 1 << 15
"""with a bias of up to 2**30 steps, longer sums of 255 * 128 could leave int32"""


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor, residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The formula. `x` [..., K] int8 or uint8, `weight` [N, K] int8, `bias` [N] int32, `scale` [N] float32."""
    exact = exact_dtype(weight.shape[1])
    acc = torch.nn.functional.linear(centred(x).to(exact), weight.to(exact))
    if out_dtype == torch.int32:
        return (acc.to(torch.int64) + bias).to(torch.int32)
    return apply_steps(scaled(acc, bias, scale), steps, params, residual, out_dtype)


@jit
def product(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, m_0, n_0, M, N, k_begin, k_end, stride_xm, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_M, BLOCK_N]: the sum over [k_begin, k_end) of the block at (m_0, n_0).

    A 64-bit base a block and 32-bit offsets within it: half the registers of 64-bit pointers. Rows past the end read
    the last row again, and are not stored.
    """
    i = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m_0)
    j = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n_0)
    k = tl.arange(0, BLOCK_K)
    x_block = x_ptr + m_0.to(tl.int64) * stride_xm + k_begin
    w_block = w_ptr + n_0.to(tl.int64) * stride_wn + k_begin
    x_offsets = i[:, None] * stride_xm + k[None, :]
    w_offsets = j[None, :] * stride_wn + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for at in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_block + x_offsets)
            w = tl.load(w_block + w_offsets)
        else:
            inside = k < k_end - at
            x = tl.load(x_block + x_offsets, mask=inside[None, :], other=0)
            w = tl.load(w_block + w_offsets, mask=inside[:, None], other=0)
        if x_ptr.dtype.element_ty == tl.uint8:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        acc = tl.dot(x, w, acc)
        x_block += BLOCK_K
        w_block += BLOCK_K
    return acc


@jit
def _finish(  # type: ignore[no-untyped-def]
    acc, out_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, m_0, n_0, M, N, stride_ym, stride_rm,
    STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, scale, epilogue and store of one block; an int32 output is left as accumulators."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    present = n_0 + j < N
    mask = (i < M - m_0)[:, None] & present[None, :]
    acc += tl.load(bias_ptr + n_0 + j, mask=present, other=0)[None, :]
    y_block = out_ptr + m_0.to(tl.int64) * stride_ym + n_0
    y_offsets = i[:, None] * stride_ym + j[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(y_block + y_offsets, acc, mask=mask)
    else:
        y = acc.to(tl.float32) * tl.load(scale_ptr + n_0 + j, mask=present, other=0.0)[None, :]
        residual_block = residual_ptr
        if residual_ptr is not None:
            residual_block = residual_ptr + m_0.to(tl.int64) * stride_rm + n_0
        y = epilogue(y, STEPS, params_ptr, residual_block, i[:, None] * stride_rm + j[None, :], mask)
        tl.store(y_block + y_offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def block_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where block `tile` starts: down GROUP_M row blocks first, then across."""
    down = tl.cdiv(M, BLOCK_M)
    across = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * across)
    first = group * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    within = tile % (GROUP_M * across)
    return (first + within % height) * BLOCK_M, (within // height) * BLOCK_N


@jit
def _linear(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, M, N, K,
    stride_xm, stride_wn, stride_ym, stride_rm,
    STEPS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiled, where the grid has a program a block; persistent, where it has fewer and each walks on."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m_0, n_0 = block_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = product(x_ptr, w_ptr, m_0, n_0, M, N, 0, K, stride_xm, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
        _finish(
            acc, out_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, m_0, n_0, M, N, stride_ym, stride_rm,
            STEPS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@jit
def counted_in(acc, sums, mask, arrived):  # type: ignore[no-untyped-def]
    """Adds a program's part to the sums of its block, and says how many had arrived before it.

    The barrier puts every thread's additions before the one thread that counts this program in.
    """
    tl.atomic_add(sums, acc, mask=mask, sem="relaxed")
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel")


@jit
def _linear_split_k(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, sums_ptr, arrived_ptr,
    M, N, K, part, stride_xm, stride_wn, stride_ym, stride_rm,
    STEPS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (tile, s) adds the sum over [s * part, (s + 1) * part) to int32 `sums` [M, N], which starts at zero; who
    is counted in last sees them all, and reads past the first-level cache."""
    tile = tl.program_id(0)
    m_0, n_0 = block_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    begin = tl.program_id(1) * part
    acc = product(
        x_ptr, w_ptr, m_0, n_0, M, N, begin, tl.minimum(begin + part, K), stride_xm, stride_wn,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
    )  # fmt: skip
    i = tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_N)[None, :]
    mask = (i < M - m_0) & (j < N - n_0)
    sums = sums_ptr + m_0.to(tl.int64) * N + n_0 + i * N + j
    if counted_in(acc, sums, mask, arrived_ptr + tile) == SPLIT_K - 1:
        total = tl.load(sums, mask=mask, other=0, cache_modifier=".cg")
        _finish(
            total, out_ptr, bias_ptr, scale_ptr, params_ptr, residual_ptr, m_0, n_0, M, N, stride_ym, stride_rm,
            STEPS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


SKINNY = (Config(16, 32, 128, 4, 4), Config(16, 64, 128, 4, 4), Config(16, 128, 128, 4, 3))
"""for up to 16 rows, which is as few as `mma` takes"""
TILED = (
    Config(32, 32, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(64, 128, 64, 4, 4),
    Config(128, 128, 64, 8, 4),
)
"""from small to large"""
HOPPER = (
    Config(64, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 4),
    Config(128, 128, 128, 8, 3),
)
"""at least 64 rows, which is what `wgmma` takes"""
CONFIGS = (*SKINNY, *TILED, *HOPPER)


def blocks(config: Config, m: int, n: int) -> int:
    """Blocks of an [m, n] output."""
    return cdiv(m, config.block_m) * cdiv(n, config.block_n)


def candidates(m: int, n: int, k: int, gpu: Gpu) -> list[Config]:
    """The configurations worth trying for a shape, from small to large blocks, each in the variant that suits it."""
    hopper = gpu.capability >= (9, 0) and m >= 64
    table = SKINNY if m <= 16 else HOPPER if hopper else TILED
    return [_variant(c, hopper, m, n, k, gpu.processors) for c in fitting(table, gpu)]


def _variant(config: Config, hopper: bool, m: int, n: int, k: int, processors: int) -> Config:
    """Persistent where there are several blocks a processor (Hopper), K split where there are few rows."""
    if hopper and k % 16:
        config = replace(config, num_warps=8)  # loads of single bytes keep more addresses than four warps have room for
    if hopper and blocks(config, m, n) >= 2 * processors:
        return replace(config, persistent=True)
    if m > 64:
        return config
    parts = processors // max(1, blocks(config, m, n))
    return replace(config, split_k=max(1, min(parts, k // (4 * config.block_k), 16)))


def choose(m: int, n: int, k: int, gpu: Gpu) -> Config:
    """The largest blocks that still give every processor one; failing that the smallest.

    A guess from the shape: a measured choice is remembered (`configs`) or passed as `config=`.
    """
    configs = candidates(m, n, k, gpu)
    busy = [c for c in configs if blocks(c, m, n) >= gpu.processors]
    return busy[-1] if busy else configs[0]


def plan(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor, residual: Tensor | None,
    out_dtype: torch.dtype, *, out: Tensor | None = None, config: Config | None = None,
) -> Launch:  # fmt: skip
    """The launch; its output is [..., N]. `out` may be columns of a wider contiguous tensor."""
    n, k = weight.shape
    m = x.numel() // k if k else x.shape[:-1].numel()
    gpu, shape = gpu_of(x.device), (m, n, k)
    key = f"m={m} n={n} k={k} {TYPES[x.dtype]}"
    if config is None:
        config = chosen("int8_linear", key, gpu, lambda: choose(*shape, gpu), lambda: candidates(*shape, gpu))
    y = allocate((*x.shape[:-1], n), out_dtype, x.device) if out is None else out
    args: dict[str, Any] = {
        "x_ptr": x, "w_ptr": weight, "out_ptr": y, "bias_ptr": bias, "scale_ptr": scale, "params_ptr": params,
        "residual_ptr": residual, "M": m, "N": n, "K": k,
        "stride_xm": row_stride(x), "stride_wn": weight.stride(0), "stride_ym": row_stride(y),
        "stride_rm": 0 if residual is not None and residual.ndim < y.ndim else n,
    }  # fmt: skip
    constexprs: dict[str, Any] = {
        "STEPS": encode(steps), "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    return launch_of((_linear, _linear_split_k), shape, config, gpu, args, constexprs)


def launch_of(
    kernels: tuple[Any, Any], shape: tuple[int, int, int], config: Config, gpu: Gpu, args: dict[str, Any],
    constexprs: dict[str, Any],
) -> Launch:  # fmt: skip
    """The launch of a product [M, K] by [N, K] whose arguments begin with `x_ptr`: of the first kernel, which sums over
    K in one program, or of the second, which splits K and takes `part`, `sums_ptr`, `arrived_ptr` and SPLIT_K, too."""
    m, n, k = shape
    parts, part = parts_of(k, config)
    tiles = blocks(config, m, n)
    if parts == 1 or tiles == 0:
        grid = min(tiles, gpu.processors) if config.persistent else tiles
        return Launch(kernels[0], (grid,), args, constexprs, config.num_warps, config.num_stages)
    scratch = torch.zeros(m * n + tiles, dtype=torch.int32, device=args["x_ptr"].device)
    args |= {"part": part, "sums_ptr": scratch[: m * n], "arrived_ptr": scratch[m * n :]}
    constexprs["SPLIT_K"] = parts
    return Launch(kernels[1], (tiles, parts), args, constexprs, config.num_warps, config.num_stages)


def parts_of(k: int, config: Config) -> tuple[int, int]:
    """`(parts, part)`: how many programs share a block, and how much of K each of them sums."""
    parts = min(config.split_k, cdiv(k, config.block_k)) or 1
    part = cdiv(cdiv(k, parts), config.block_k) * config.block_k
    return cdiv(k, part) if k else 1, part


def why_not_supported(x: Tensor, weight: Tensor) -> Reason | None:
    """Why these operands cannot be multiplied, else None."""
    if x.dtype not in INTEGERS or weight.dtype != torch.int8:
        return f"it multiplies int8 or uint8 by int8, not {x.dtype} by {weight.dtype}"
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        return f"x {list(x.shape)} and weight {list(weight.shape)} do not share K"
    if weight.shape[1] > LARGEST_K:
        return f"K is {weight.shape[1]}; beyond {LARGEST_K} an int32 sum could overflow"
    if x.shape[:-1].numel() > MAX_ROWS or weight.shape[0] >= MAX_STRIDE:
        return f"x {list(x.shape)} by weight {list(weight.shape)}: more than {MAX_ROWS} rows or {MAX_STRIDE} outputs"
    return why_not_rows("x", x) or why_not_rows("weight", weight)


def check(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor, residual: Tensor | None,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Raise `InputError` for what neither the reference nor the kernel can do."""
    check_tensor("x", x, INTEGERS, contiguous=False)
    if x.ndim == 0:
        raise InputError("x: a scalar has no K to sum over")
    check_tensor("weight", weight, torch.int8, device=x.device, shape=(-1, x.shape[-1]), contiguous=False)
    n = weight.shape[0]
    check_tensor("bias", bias, torch.int32, device=x.device, shape=(n,))
    check_scale("scale", scale, device=x.device, shape=(n,))
    if out_dtype != torch.int32:
        every_row = residual is not None and residual.ndim == 1
        check_steps(steps, params, residual, (n,) if every_row else (*x.shape[:-1], n), out_dtype, x.device)
    elif steps:
        raise InputError(f'out_dtype int32 gives the accumulators as they are; steps must be empty, not "{steps}"')


def run(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor, residual: Tensor | None,
    out_dtype: torch.dtype, *, out: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The layer by its kernel. Raises `InputError`, with the reason of `why_not_supported`, where it cannot run.

    `out` [..., N] is written in place of a new tensor: columns of a wider one, which is how a concatenation costs
    nothing. It may share memory with no input.
    """
    check(x, weight, bias, scale, steps, params, residual, out_dtype)
    if reason := why_not_supported(x, weight):
        raise InputError(f"int8_linear: {reason}")
    if out is not None:
        check_tensor("out", out, out_dtype, device=x.device, shape=(*x.shape[:-1], weight.shape[0]), contiguous=False)
        if reason := why_not_rows("out", out):
            raise InputError(f"int8_linear: {reason}")
        check_disjoint("out", out, {"x": x, "weight": weight, "bias": bias, "scale": scale, "residual": residual})
    return output_of(plan(x, weight, bias, scale, steps, params, residual, out_dtype, out=out, config=config))


@torch.library.custom_op("pqk::int8_linear", mutates_args=(), device_types="cpu")
def int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, steps: str, params: Tensor, residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`x` [..., K] int8 or uint8 times `weight` [N, K] int8 → [..., N] of `out_dtype`. Raises `InputError`.

    `bias` [N] int32 has the zero point folded in (`fold_bias`), `scale` [N] float32 is s_x * s_w; `steps`, `params` and
    `residual` are the epilogue's: [..., N], or [N] for the same in every row. `out_dtype` int32 with no steps gives the
    accumulators, bias added.
    """
    check(x, weight, bias, scale, steps, params, residual, out_dtype)
    return reference(x, weight, bias, scale, steps, params, residual, out_dtype)


@int8_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    x = x if why_not_rows("x", x) is None else x.contiguous()
    if falls_back("int8_linear", x.device, why_not_supported(x, weight)):
        check(x, weight, *others)
        return reference(x, weight, *others)
    return run(x, weight, *others)


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=others[-1])


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced: `m` rows, `n` outputs of `k` inputs."""

    m: int
    n: int
    k: int
    x_dtype: torch.dtype = torch.int8
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8
    every_row: bool = False
    """the residual is one row, the same for all"""

    def arguments(self, device: str = "meta") -> dict[str, Any]:
        """The op's arguments, with scales that let the outputs fill their grid."""
        rows = () if self.every_row else (self.m,)
        return {
            "x": example((self.m, self.k), self.x_dtype, device, 1),
            "weight": example((self.n, self.k), torch.int8, device, 2),
            "bias": example((self.n,), torch.int32, device, 3),
            "scale": torch.full((self.n,), 1.0 / (4096 * max(self.k, 1) ** 0.5)).to(device),
            "steps": self.steps, "params": example_steps(self.steps, self.out_dtype, device),
            "residual": example((*rows, self.n), torch.int8, device, 4) if reads_residual(self.steps) else None,
            "out_dtype": self.out_dtype,
        }  # fmt: skip


CASES = (
    Case(1, 10, 64, torch.uint8, "", torch.float32),
    Case(1, 1536, 384, torch.int8, "requantize,gelu,quantize"),
    Case(1, 384, 1536, torch.int8, "requantize,add", torch.float32),
    Case(16, 1000, 512, torch.int8, "", torch.float16),
    Case(128, 384, 384, torch.uint8, "quantize", torch.uint8),
    Case(128, 1536, 384, torch.int8, "requantize,gelu_tanh,quantize"),
    Case(127, 65, 131, torch.uint8, "requantize,relu,requantize,add,requantize,relu6,quantize", torch.uint8),
    Case(2048, 1024, 128, torch.int8, "requantize,gelu,quantize"),
    Case(16, 1152, 384, torch.uint8, "requantize,add,quantize", torch.uint8, every_row=True),
)
"""a ResNet's head, an encoder's layers for one token and for 128, a shape no block divides, one with many blocks,
queries, keys and values whose zero points differ"""


def specialize(case: Case, device: str = "meta", config: Config | None = None) -> Launch:
    """The launch of a case."""
    return plan(**case.arguments(device), config=config)
