"""Attention over int8 queries, keys and values in one launch: QKᵀ, softmax and PV, nothing between them in memory.

    s   = (Σ_d (q - q_zero) (k - k_zero)) * score_scale + mask     exact int32 products; score_scale = s_q s_k / √D
    p   = rint(16256 * exp(s - m))                                 m: see below; p = 128 * high + low, two int8 digits
    y   = (Σ p w v / Σ p w - v_zero) * value_scale                 exact int32 products of high and low with v
    out = steps(y)                                                 see `epilogue`

Probabilities are rounded relative to the row's largest one, which is 127 * 128, and the weighted sum is divided by the
sum of the *rounded* weights: they sum to exactly 1, a zero point of the values drops out by one subtraction, and a
constant value passes through unchanged. One int8 digit (INT-FlashAttention, Chen et al. 2024) is too coarse: where a
row attends to one token that says little, as [CLS] and [SEP] do, the many small weights decide. On MiniLM's
activations, 128 tokens, the rounding of p alone left an SQNR of 28 dB with 127 levels, 34 dB with 255, and 72 dB with
two digits, while q, k and v in int8 leave 31 to 37 dB. The second product is hidden behind the exponentials.

Keys come in tiles of `KEYS`, by the online softmax of Milakov and Gimelshein 2018 ("Online normalizer calculation for
softmax", algorithm 3) in the form of FlashAttention-2 (Dao 2023, section 3.1): m is the largest score of this and all
earlier tiles, and w = exp(m - the row's largest score) rescales what earlier tiles left in the float32 accumulators.
The tile is part of the formula, the same on every device.

A row all of whose keys are masked, or that has no keys, gives 0 before `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_number, check_tensor, example
from pqk.kernels.common.configs import Config, chosen, fitting
from pqk.kernels.common.epilogue import INTEGERS, apply_steps, check_steps, encode, epilogue, reads_residual
from pqk.kernels.common.gpu import Gpu, gpu_of
from pqk.kernels.common.launch import TYPES, Launch, cdiv, falls_back, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import example_steps

HEADS = (32, 64, 128)
"""sizes of a head: what tiles of integer products come in"""
KEYS = 64
LEVELS = 127.0 * 128.0
LOG2E = 1.4426950408889634
MASKS = (torch.bool, torch.float32)
MASKED = -1e38
"""an additive mask that is not above this hides the key: -inf, float32's lowest value, which others use, and NaN"""


@dataclass(frozen=True)
class Attention:
    """The arguments of `pqk::int8_attention`, in their order.

    `q` [B, Sq, heads, D], `k`, `v` [B, Sk, heads, D]: all int8 or all uint8, D one of `HEADS` with stride 1, all other
    strides free, so that views of one packed [B, S, 3 * heads * D] will do (`unpack`). `mask` [B, Sk]: boolean (True
    is attended to), or float32 below +inf that is added to the scores (`MASKED` and less hides). `score_scale` is
    s_q * s_k / √D. `steps`, `params`, `out_dtype`: see `epilogue`; no step may read a residual.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    params: Tensor
    steps: str
    score_scale: float
    value_scale: float
    q_zero_point: int
    k_zero_point: int
    v_zero_point: int
    out_dtype: torch.dtype

    @property
    def zero_points(self) -> tuple[int, int, int]:
        return self.q_zero_point, self.k_zero_point, self.v_zero_point

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        if (reason := why_not_supported(self)) is not None:
            raise InputError(f"int8_attention: {reason}")
        device = self.q.device
        for name in ("q", "k", "v", "mask"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, tensor.dtype, device=device, contiguous=False)
        check_number("score_scale", self.score_scale)
        check_number("value_scale", self.value_scale)
        limits = torch.iinfo(self.q.dtype)
        for name, zero_point in zip("qkv", self.zero_points, strict=True):
            if not limits.min <= zero_point <= limits.max:
                raise InputError(f"{name}_zero_point: {zero_point} is not in [{limits.min}, {limits.max}]")
        check_steps(self.steps, self.params, None, self.q.shape, self.out_dtype, device)


def reference(a: Attention) -> Tensor:
    """The formula in three plain steps over the whole matrix of scores, on any device. Raises `InputError`."""
    a.check()
    # Exact: |x - zero| ≤ 255, so a sum of 128 products is below 2**24.
    queries, keys, values = (t.float() - zero for t, zero in zip((a.q, a.k, a.v), a.zero_points, strict=True))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * queries.new_tensor(a.score_scale * LOG2E)
    if a.mask is not None:
        plain = a.mask.dtype == torch.bool
        visible, added = (a.mask, 0.0) if plain else (a.mask > MASKED, a.mask[:, None, None] * LOG2E)
        scores = torch.where(visible[:, None, None], scores + added, -torch.inf)
    top = _running_maximum(scores)
    weights = torch.round(torch.exp2(scores - _finite(top)) * LEVELS) * torch.exp2(top - _finite(top[..., -1:]))
    total = weights.sum(-1).permute(0, 2, 1)[..., None]
    y = torch.einsum("bhqk,bkhd->bqhd", weights, values) / torch.where(total == 0, 1, total)
    return apply_steps(y * queries.new_tensor(a.value_scale), a.steps, a.params, None, a.out_dtype).contiguous()


def _running_maximum(scores: Tensor) -> Tensor:
    """For every key the largest score of its tile and all earlier ones, shaped as `scores`."""
    keys = scores.shape[-1]
    if keys == 0:
        return scores
    tiles = torch.nn.functional.pad(scores, (0, -keys % KEYS), value=-torch.inf).unflatten(-1, (-1, KEYS))
    return tiles.amax(-1).cummax(-1).values.repeat_interleave(KEYS, -1)[..., :keys]


def _finite(top: Tensor) -> Tensor:
    """A maximum that can be subtracted: 0 where all keys so far are masked."""
    return torch.where(top == -torch.inf, 0, top)


@jit
def _signed(x, UNSIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """uint8 less 128 as int8; int8 as it is."""
    return (x ^ 128).to(tl.int8, bitcast=True) if UNSIGNED else x


@jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, mask_ptr, params_ptr, out_ptr, queries, keys, heads,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, mask_batch, mask_key,
    score_scale, value_scale, q_zero, k_zero, v_zero,
    HEAD: tl.constexpr, UNSIGNED: tl.constexpr, AFFINE: tl.constexpr, MASK: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_M` queries of one head of one sample, over all its keys. `*_batch`, `*_row`, `*_head` are
    strides; zero points are those of the signed values; `score_scale` is for exp2. `MASK`: 1 boolean, 2 additive."""
    blocks = tl.cdiv(queries, BLOCK_M)
    pair = tl.program_id(0) // blocks
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    depth = tl.arange(0, HEAD)
    inside = (rows < queries)[:, None]
    q_tile = q_ptr + batch * q_batch + head * q_head + rows[:, None] * q_row + depth[None, :]
    q = _signed(tl.load(q_tile, mask=inside, other=0), UNSIGNED)
    if AFFINE:
        shift = HEAD * q_zero * k_zero - k_zero * tl.sum(q.to(tl.int32), axis=1)
    k_head_ptr = k_ptr + batch * k_batch + head * k_head
    v_head_ptr = v_ptr + batch * v_batch + head * v_head
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for first in range(0, keys, BLOCK_N):
        columns = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        seen = columns < keys
        k_tile = k_head_ptr + columns[None, :] * k_row + depth[:, None]
        k = _signed(tl.load(k_tile, mask=seen[None, :], other=0), UNSIGNED)
        products = tl.dot(q, k)
        if AFFINE:
            products += shift[:, None] - q_zero * tl.sum(k.to(tl.int32), axis=0)[None, :]
        scores = products.to(tl.float32) * score_scale
        if MASK == 1:
            seen = seen & (tl.load(mask_ptr + batch * mask_batch + columns * mask_key, mask=seen, other=0) != 0)
        if MASK == 2:
            added = tl.load(mask_ptr + batch * mask_batch + columns * mask_key, mask=seen, other=0.0)
            seen = seen & (added > -1e38)
            scores += (tl.where(seen, added, 0.0) * 1.4426950408889634)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        # 1.5 * 2**23 leaves no bit for a fraction: the sum is rounded to an integer, half to even.
        p = (tl.exp2(scores - finite_top[:, None]) * 16256.0 + 12582912.0) - 12582912.0
        digits = p.to(tl.int32)
        v_tile = v_head_ptr + columns[:, None] * v_row + depth[None, :]
        v = _signed(tl.load(v_tile, mask=(columns < keys)[:, None], other=0), UNSIGNED)
        earlier = tl.exp2(top - finite_top)
        total = total * earlier + tl.sum(p, axis=1)
        weighted = tl.dot((digits >> 7).to(tl.int8), v) * 128
        weighted = tl.dot((digits & 127).to(tl.int8), v, weighted)
        sums = sums * earlier[:, None] + weighted.to(tl.float32)
        top = new_top
    some = (total > 0.0)[:, None]
    y = (tl.div_rn(sums, tl.where(some, total[:, None], 1.0)) - v_zero) * value_scale
    out_offsets = ((batch * queries + rows[:, None]) * heads + head) * HEAD + depth[None, :]
    y = epilogue(tl.where(some, y, 0.0), STEPS, params_ptr, None, out_offsets, inside)
    tl.store(out_ptr + out_offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


CONFIGS: tuple[Config, ...] = (
    Config(128, KEYS, 128, 8, 2),
    Config(64, KEYS, 128, 4, 2),
    Config(32, KEYS, 128, 4, 2),
    Config(16, KEYS, 128, 4, 2),
)
"""rows of queries, keys, the longest head, warps, stages; the keys are part of the formula and do not vary"""


def fits(config: Config, head: int, shared_memory: int) -> bool:
    """Whether a program's queries, probabilities, and tiles of keys and values in flight fit in so many bytes."""
    return config.block_m * (head + 2 * KEYS) + 2 * KEYS * head * config.num_stages <= shared_memory


def candidates(head: int, gpu: Gpu) -> list[Config]:
    """The configurations that fit the GPU."""
    return fitting(CONFIGS, gpu, lambda config, shared: fits(config, head, shared))


def choose(queries: int, pairs: int, head: int, gpu: Gpu) -> Config:
    """The configuration for `pairs` (samples times heads) of `queries` rows; by reasoning, not by measurement.

    Large blocks read the keys less often, but most of their rows should be used, and every processor should have a
    program.
    """
    configs = candidates(head, gpu)
    for config in configs[:-1]:
        busy = config.block_m <= 32 or pairs * cdiv(queries, config.block_m) >= gpu.processors
        if busy and 2 * queries > config.block_m:
            return config
    return configs[-1]


def plan(a: Attention, config: Config | None = None) -> Launch:
    """The launch; its output is [B, Sq, heads, D], contiguous. The tensors may be on the `meta` device."""
    batch, queries, heads, head = a.q.shape
    gpu, key = gpu_of(a.q.device), f"{batch}x{queries}x{heads}x{head} keys={a.k.shape[1]} {TYPES[a.q.dtype]}"
    if config is None:
        work = (queries, batch * heads, head)
        config = chosen("int8_attention", key, gpu, lambda: choose(*work, gpu), lambda: candidates(head, gpu))
    shift = 128 if a.q.dtype == torch.uint8 else 0  # the kernel reads uint8 less 128
    q_zero, k_zero, v_zero = (zero_point - shift for zero_point in a.zero_points)
    mask = a.mask.view(torch.uint8) if a.mask is not None and a.mask.dtype == torch.bool else a.mask
    strides = {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in (("q", a.q), ("k", a.k), ("v", a.v))
        for i, axis in enumerate(("batch", "row", "head"))
    }
    return Launch(
        attention_kernel,
        (batch * heads * cdiv(queries, config.block_m),),
        {
            "q_ptr": a.q, "k_ptr": a.k, "v_ptr": a.v, "mask_ptr": mask, "params_ptr": a.params,
            "out_ptr": allocate(a.q.shape, a.out_dtype, a.q.device),
            "queries": queries, "keys": a.k.shape[1], "heads": heads, **strides,
            "mask_batch": 0 if mask is None else mask.stride(0), "mask_key": 0 if mask is None else mask.stride(1),
            "score_scale": float(a.score_scale * LOG2E), "value_scale": float(a.value_scale),
            "q_zero": q_zero, "k_zero": k_zero, "v_zero": v_zero,
        },
        {
            "HEAD": head, "UNSIGNED": a.q.dtype == torch.uint8, "AFFINE": q_zero != 0 or k_zero != 0,
            "MASK": 0 if a.mask is None else 1 + MASKS.index(a.mask.dtype), "STEPS": encode(a.steps),
            "BLOCK_M": config.block_m, "BLOCK_N": KEYS,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def run(a: Attention, config: Config | None = None) -> Tensor:
    """The attention by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    a.check()
    return output_of(plan(a, config))


def why_not_supported(a: Attention) -> Reason | None:
    """Why the kernel cannot run these arguments, else None. Values are not looked at."""
    q, k, v = a.q, a.k, a.v
    if {q.ndim, k.ndim, v.ndim} != {4}:
        return f"queries, keys and values have {q.ndim}, {k.ndim} and {v.ndim} axes; they are [B, S, heads, D]"
    if q.dtype not in INTEGERS or not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}; all must be int8, or all uint8"
    batch, _, heads, head = q.shape
    if head not in HEADS:
        return f"heads of size {head}; the kernel has {', '.join(map(str, HEADS))}"
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, head):
        return f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit together"
    if any(t.stride(3) != 1 for t in (q, k, v)):
        return f"strides {q.stride()}, {k.stride()}, {v.stride()}: the values of a head must lie side by side"
    if a.mask is not None and (a.mask.dtype not in MASKS or tuple(a.mask.shape) != (batch, k.shape[1])):
        return f"the mask is {a.mask.dtype} {list(a.mask.shape)}; bool or float32 [{batch}, {k.shape[1]}] is needed"
    if reads_residual(a.steps):
        return f'steps "{a.steps}" read a residual; attention has none'
    return None


@torch.library.custom_op("pqk::int8_attention", mutates_args=(), device_types="cpu")
def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    params: Tensor,
    steps: str,
    score_scale: float,
    value_scale: float,
    q_zero_point: int,
    k_zero_point: int,
    v_zero_point: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `Attention`. → `out_dtype` [B, Sq, heads, D], contiguous. Raises `InputError`."""
    zero_points = (q_zero_point, k_zero_point, v_zero_point)
    return reference(Attention(q, k, v, mask, params, steps, score_scale, value_scale, *zero_points, out_dtype))


@int8_attention.register_kernel("cuda")
def _(*arguments: Any, **named: Any) -> Tensor:
    a = Attention(*arguments, **named)
    return reference(a) if falls_back("int8_attention", a.q.device) else run(a)


@int8_attention.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    a = Attention(*arguments, **named)
    return a.q.new_empty(a.q.shape, dtype=a.out_dtype)


def unpack(packed: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k, v [B, S, heads, D] that a packed [B, S, 3 * heads * D] holds, as views."""
    q, k, v = packed.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced; q, k, v are views of one packed buffer."""

    batch: int
    length: int
    heads: int
    head: int
    dtype: torch.dtype = torch.int8
    mask: torch.dtype | None = None
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8

    def arguments(self, device: str = "meta", seed: int = 0) -> Attention:
        shape = (self.batch, self.length, 3 * self.heads * self.head)
        q, k, v = unpack(example(shape, self.dtype, device, seed), self.heads)
        mask = None if self.mask is None else example(q.shape[:2], torch.float32, device, seed + 1)
        if mask is not None and self.mask == torch.bool:
            mask = mask > -1
        params = example_steps(self.steps, self.out_dtype, device)
        zero_points = (131, 120, 125) if self.dtype == torch.uint8 else (0, 0, 0)
        score_scale = 0.02**2 / self.head**0.5
        return Attention(q, k, v, mask, params, self.steps, score_scale, 0.02, *zero_points, self.out_dtype)


CASES = (
    Case(1, 128, 12, 32, mask=torch.bool),
    Case(1, 16, 12, 32, torch.uint8, torch.float32, out_dtype=torch.uint8),
    Case(2, 77, 2, 64, torch.uint8, torch.bool),
    Case(1, 200, 1, 128, torch.uint8, torch.float32, "", torch.float16),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))
