"""W8A8 gated linear unit: the products of gate and up, what is done to each, and their product, in one launch.

    acc[m, j] = Σ_k centred(x)[m, k] * w[j, k] + bias[j]           int32, exact; j = 2 n: gate, j = 2 n + 1: up
    g[m, n]   = gate_steps(float32(acc[m, 2 n]) * scale[2 n])      SiLU, GELU, or a table of it
    u[m, n]   = up_steps(float32(acc[m, 2 n + 1]) * scale[2 n + 1])
    out[m, n] = steps(g[m, n] * u[m, n])                           see `epilogue`

SwiGLU and its kind: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202. Neither gate nor up is written:
their rows alternate in the weight (`interleaved`), so a pair is two neighbouring columns of the accumulator, which one
thread of the matrix units holds, and the block is multiplied as `int8_linear` does it, in its three shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels import int8_linear
from pqk.kernels.common.checks import allocate, check_scale, check_tensor, example
from pqk.kernels.common.configs import Config, chosen
from pqk.kernels.common.epilogue import INTEGERS, apply_steps, centred, encode, epilogue, exact_dtype, program, scaled
from pqk.kernels.common.gpu import gpu_of
from pqk.kernels.common.launch import TYPES, Launch, falls_back, output_of
from pqk.kernels.common.strides import row_stride, why_not_rows
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import check_plain_steps, example_steps
from pqk.kernels.int8_linear import block_of, counted_in, product


@dataclass(frozen=True)
class GatedLinear:
    """The arguments of `pqk::int8_gated_linear`, in their order.

    `x` [..., K] int8 or uint8, rows dense and evenly spaced; `weight` int8 [2 N, K], rows of gate and up in turn
    (`interleaved`), as in `bias` int32 [2 N], the zero point folded in, and `scale` float32 [2 N]. Three programs with
    their params, see `epilogue`, of which none reads a residual and the first two end in floats.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor
    gate_steps: str
    gate_params: Tensor
    up_steps: str
    up_params: Tensor
    steps: str
    params: Tensor
    out_dtype: torch.dtype

    @property
    def size(self) -> tuple[int, ...]:
        """The output's shape."""
        return (*self.x.shape[:-1], self.weight.shape[0] // 2)

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        x, device = self.x, self.x.device
        check_tensor("x", x, INTEGERS, contiguous=False)
        if x.ndim == 0:
            raise InputError("x: a scalar has no K to sum over")
        check_tensor("weight", self.weight, torch.int8, device=device, shape=(-1, x.shape[-1]))
        rows = self.weight.shape[0]
        if rows % 2:
            raise InputError(f"weight: {rows} rows; rows of gate and up come in pairs")
        check_tensor("bias", self.bias, torch.int32, device=device, shape=(rows,))
        check_scale("scale", self.scale, device=device, shape=(rows,))
        check_plain_steps(self.gate_steps, self.gate_params, torch.float32, device)
        check_plain_steps(self.up_steps, self.up_params, torch.float32, device)
        check_plain_steps(self.steps, self.params, self.out_dtype, device)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of `gate` [N, …] and of `up` in turn: [2 N, …]."""
    return torch.stack([gate, up], 1).flatten(0, 1)


def reference(a: GatedLinear) -> Tensor:
    """The formula, in plain torch. Raises `InputError`."""
    a.check()
    exact = exact_dtype(a.weight.shape[1])
    acc = torch.nn.functional.linear(centred(a.x).to(exact), a.weight.to(exact))
    gate, up = scaled(acc, a.bias, a.scale).unflatten(-1, (-1, 2)).unbind(-1)
    gate = apply_steps(gate, a.gate_steps, a.gate_params, None, torch.float32)
    up = apply_steps(up, a.up_steps, a.up_params, None, torch.float32)
    return apply_steps(gate * up, a.steps, a.params, None, a.out_dtype)


@jit
def _finish(  # type: ignore[no-untyped-def]
    acc, out_ptr, bias_ptr, scale_ptr, gate_params_ptr, up_params_ptr, params_ptr, m_0, n_0, M, N, stride_ym,
    GATE_STEPS: tl.constexpr, UP_STEPS: tl.constexpr, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias, scale, gate times up, epilogue and store of a block of accumulators, whose columns alternate."""
    j = tl.arange(0, BLOCK_N)
    present = n_0 + j < N
    acc += tl.load(bias_ptr + n_0 + j, mask=present, other=0)[None, :]
    y = acc.to(tl.float32) * tl.load(scale_ptr + n_0 + j, mask=present, other=0.0)[None, :]
    gate, up = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
    i = tl.arange(0, BLOCK_M)
    pairs = tl.arange(0, BLOCK_N // 2)
    mask = (i < M - m_0)[:, None] & (n_0 // 2 + pairs < N // 2)[None, :]
    offsets = i[:, None] * stride_ym + pairs[None, :]
    gate = epilogue(gate, GATE_STEPS, gate_params_ptr, None, offsets, mask)
    up = epilogue(up, UP_STEPS, up_params_ptr, None, offsets, mask)
    y = epilogue(gate * up, STEPS, params_ptr, None, offsets, mask)
    tl.store(out_ptr + m_0.to(tl.int64) * stride_ym + n_0 // 2 + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _gated(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, bias_ptr, scale_ptr, gate_params_ptr, up_params_ptr, params_ptr, M, N, K,
    stride_xm, stride_wn, stride_ym,
    GATE_STEPS: tl.constexpr, UP_STEPS: tl.constexpr, STEPS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiled, where the grid has a program a block; persistent, where it has fewer and each walks on."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        m_0, n_0 = block_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = product(x_ptr, w_ptr, m_0, n_0, M, N, 0, K, stride_xm, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
        _finish(
            acc, out_ptr, bias_ptr, scale_ptr, gate_params_ptr, up_params_ptr, params_ptr, m_0, n_0, M, N, stride_ym,
            GATE_STEPS, UP_STEPS, STEPS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@jit
def _gated_split_k(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, out_ptr, bias_ptr, scale_ptr, gate_params_ptr, up_params_ptr, params_ptr, sums_ptr, arrived_ptr,
    M, N, K, part, stride_xm, stride_wn, stride_ym,
    GATE_STEPS: tl.constexpr, UP_STEPS: tl.constexpr, STEPS: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Program (tile, s) adds the sum over [s * part, (s + 1) * part) to int32 `sums` [M, N], which starts at zero; the
    last to arrive sees all of them (as in `int8_linear`)."""
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
            total, out_ptr, bias_ptr, scale_ptr, gate_params_ptr, up_params_ptr, params_ptr, m_0, n_0, M, N, stride_ym,
            GATE_STEPS, UP_STEPS, STEPS, BLOCK_M, BLOCK_N,
        )  # fmt: skip


CONFIGS = int8_linear.CONFIGS
"""those of a linear layer with as many rows as gate and up together"""


def plan(a: GatedLinear, config: Config | None = None) -> Launch:
    """The launch; its output is [..., N]. The tensors may be on the `meta` device."""
    n, k = a.weight.shape
    m = a.x.numel() // k if k else a.x.shape[:-1].numel()
    gpu, shape = gpu_of(a.x.device), (m, n, k)
    key = f"m={m} n={n} k={k} {TYPES[a.x.dtype]}"
    if config is None:
        guess, among = (lambda: int8_linear.choose(*shape, gpu)), (lambda: int8_linear.candidates(*shape, gpu))
        config = chosen("int8_gated_linear", key, gpu, guess, among)
    y = allocate(a.size, a.out_dtype, a.x.device)
    args: dict[str, Any] = {
        "x_ptr": a.x, "w_ptr": a.weight, "out_ptr": y, "bias_ptr": a.bias, "scale_ptr": a.scale,
        "gate_params_ptr": a.gate_params, "up_params_ptr": a.up_params, "params_ptr": a.params, "M": m, "N": n, "K": k,
        "stride_xm": row_stride(a.x), "stride_wn": k, "stride_ym": n // 2,
    }  # fmt: skip
    constexprs: dict[str, Any] = {
        "GATE_STEPS": encode(a.gate_steps), "UP_STEPS": encode(a.up_steps), "STEPS": encode(a.steps),
        "EVEN_K": k % config.block_k == 0,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
    }  # fmt: skip
    return int8_linear.launch_of((_gated, _gated_split_k), shape, config, gpu, args, constexprs)


def run(a: GatedLinear, config: Config | None = None) -> Tensor:
    """The unit by its kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    a.check()
    if reason := why_not_supported(a):
        raise InputError(f"int8_gated_linear: {reason}")
    return output_of(plan(a, config))


def why_not_supported(a: GatedLinear) -> Reason | None:
    """Why the kernel cannot run these arguments, else None."""
    return int8_linear.why_not_supported(a.x, a.weight)


@torch.library.custom_op("pqk::int8_gated_linear", mutates_args=(), device_types="cpu")
def int8_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    gate_steps: str,
    gate_params: Tensor,
    up_steps: str,
    up_params: Tensor,
    steps: str,
    params: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `GatedLinear`. → `out_dtype` [..., N]. Raises `InputError`."""
    programs = (gate_steps, gate_params, up_steps, up_params, steps, params)
    return reference(GatedLinear(x, weight, bias, scale, *programs, out_dtype))


@int8_gated_linear.register_kernel("cuda")
def _(x: Tensor, *others: Any) -> Tensor:
    a = GatedLinear(x if why_not_rows("x", x) is None else x.contiguous(), *others)
    return reference(a) if falls_back("int8_gated_linear", x.device, why_not_supported(a)) else run(a)


@int8_gated_linear.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    a = GatedLinear(*arguments, **named)
    return a.x.new_empty(a.size, dtype=a.out_dtype)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced: `m` rows, `n` outputs of `k` inputs."""

    m: int
    n: int
    k: int
    x_dtype: torch.dtype = torch.int8
    gate_steps: str = "requantize,silu,requantize"
    up_steps: str = "requantize"
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8
    table: bool = False
    """the gate's function is looked up"""

    def arguments(self, device: str = "meta", seed: int = 0) -> GatedLinear:
        """Scales that let gate and up spread over a few units."""
        rows = 2 * self.n
        gate = "table" if self.table else self.gate_steps
        return GatedLinear(
            x=example((self.m, self.k), self.x_dtype, device, seed + 1),
            weight=example((rows, self.k), torch.int8, device, seed + 2),
            bias=example((rows,), torch.int32, device, seed + 3),
            scale=torch.full((rows,), 1.0 / (4096 * max(self.k, 1) ** 0.5)).to(device),
            gate_steps=gate, gate_params=_silu_table(device) if self.table else example_steps(gate, torch.int8, device),
            up_steps=self.up_steps, up_params=example_steps(self.up_steps, torch.int8, device),
            steps=self.steps, params=example_steps(self.steps, self.out_dtype, device), out_dtype=self.out_dtype,
        )  # fmt: skip


def _silu_table(device: str) -> Tensor:
    """`params` of one step that looks up the SiLU of 255 integers on a scale of 0.02."""
    x = torch.arange(-127, 128) * 0.02
    return program(("table", 0.02, 0, -127, 127), table=(x * torch.sigmoid(x)).tolist())[1].to(device)


CASES = (
    Case(1, 1536, 576, table=True),
    Case(16, 176, 64, torch.uint8, out_dtype=torch.uint8),
    Case(128, 768, 384, gate_steps="gelu_tanh", up_steps=""),
    Case(127, 33, 131, torch.uint8, "silu", "", "", torch.float32),
    Case(512, 1536, 576, table=True),
)
"""one token of a small language model and many, shapes that no block divides, GeGLU, and floats out"""


def specialize(case: Case, device: str = "meta", config: Config | None = None) -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device), config)
