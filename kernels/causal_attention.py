"""Causal attention behind a cache, in floats, in one launch: grouped heads, padding, packed texts, a window.

    s[i, j] = Σ_d q[i, d] k[j, d] * scale                where query i, the token P + i of T = P + S, sees key j
    y[i]    = Σ_j exp(s[i, j] - m_i) v[j] / Σ_j exp(s[i, j] - m_i)
    out     = steps(y)                                   see `epilogue`

Query i sees key j if j ≤ P + i, mask[j] > 0, with a window P + i - j < window, and, where `texts`,
mask[j] = mask[P + i] or mask[P + i] = 0: numbers in the mask tell packed texts apart, and 0 is padding. P keys and
values of earlier tokens may be none (Pope et al. 2023, "Efficiently Scaling Transformer Inference", arXiv:2211.05102,
section 2.1).

The heads of a group are rows of one product with its keys (Ainslie et al. 2023, "GQA", arXiv:2305.13245), one token
after the other, so that keys are read once for all of them and tiles of keys that no row of a block sees are left out,
at both ends. Keys come in tiles by the online softmax of Milakov and Gimelshein 2018 (algorithm 3) in the form of
FlashAttention-2 (Dao 2023, section 3.1); sums are float32, and so are products of float32 (no TF32). A row that sees no
key, as padding before a text, gives the mean of all T values before `steps`: what a finite number added to every score
leaves of them, so that padding is what it is in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_number, check_tensor, example
from pqk.kernels.common.configs import Config, chosen, fitting
from pqk.kernels.common.epilogue import apply_steps, check_steps, encode, epilogue, reads_residual
from pqk.kernels.common.gpu import Gpu, gpu_of
from pqk.kernels.common.launch import TYPES, Launch, cdiv, falls_back, next_power_of_2, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import example_steps

FLOATS = (torch.float32, torch.float16)
"""what queries, keys and values may be; Triton's interpreter does not multiply bfloat16, so nothing would prove it"""
LARGEST_HEAD = 128
"""channels of a head: a row is one block"""
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class CausalAttention:
    """The arguments of `pqk::causal_attention`, in their order.

    `q` [B, H, S, D], `k` [B, G, T, D] and `v` [B, G, T, E], keys and values of all tokens, the new ones last: all of
    one of `FLOATS`, channels with stride 1, all other strides free; G divides H, and D and E are at most
    `LARGEST_HEAD`. `mask` int64 [B, T], or None: no padding, one text. `window` 0: none. `steps`, `params`,
    `out_dtype`: see `epilogue`; no step may read a residual.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    texts: bool
    window: int
    scale: float
    params: Tensor
    steps: str
    out_dtype: torch.dtype

    @property
    def size(self) -> tuple[int, int, int, int]:
        """The output's shape: [B, S, H, E]."""
        batch, heads, queries, _ = self.q.shape
        return batch, queries, heads, self.v.shape[-1]

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        if (reason := why_not_supported(self)) is not None:
            raise InputError(f"causal_attention: {reason}")
        device = self.q.device
        for name in ("q", "k", "v", "mask"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, tensor.dtype, device=device, contiguous=False)
        check_number("scale", self.scale)
        check_steps(self.steps, self.params, None, self.size, self.out_dtype, device)


def visible(mask: Tensor | None, queries: int, keys: int, window: int, texts: bool, device: torch.device) -> Tensor:
    """Which of `keys` each of the last `queries` tokens sees: boolean [B, S, T], or [1, S, T] without a mask."""
    order = torch.arange(keys, device=device)
    own = order[keys - queries :, None]
    seen = order <= own
    if window:
        seen = seen & (own - order < window)
    if mask is None:
        return seen[None]
    seen = seen & (mask > 0)[:, None]
    if texts:
        of_query = mask[:, keys - queries :, None]
        seen = seen & ((mask[:, None] == of_query) | (of_query == 0))
    return seen


def reference(a: CausalAttention) -> Tensor:
    """The formula over the whole matrix of scores, in float32, on any device. Raises `InputError`."""
    a.check()
    queries = a.q.shape[2]
    groups, keys = a.k.shape[1:3]
    q, k, v = (t.to(torch.float32) for t in (a.q, a.k, a.v))
    scores = torch.einsum("bgsqd,bgkd->bgsqk", q.unflatten(1, (groups, -1)), k) * a.scale
    seen = visible(a.mask, queries, keys, a.window, a.texts, a.q.device)[:, None, None]
    none = ~seen.any(-1, keepdim=True)
    scores = torch.where(seen, scores, -torch.inf).masked_fill(none, 0.0)
    y = torch.einsum("bgsqk,bgkd->bgsqd", scores.softmax(-1), v)
    y = y.flatten(1, 2).transpose(1, 2).contiguous()
    return apply_steps(y, a.steps, a.params, None, a.out_dtype)


@jit
def causal_attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, mask_ptr, params_ptr, out_ptr, queries, keys, groups, share, width, value_width, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_key, scale,
    TEXTS: tl.constexpr, WINDOW: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one group of one sample, over the keys that they see. A row is a token and one of
    the `share` heads of the group; `*_batch`, `*_head`, `*_row` are strides; `scale` is for exp2."""
    rows = queries * share
    blocks = tl.cdiv(rows, BLOCK_M)
    pair = tl.program_id(0) // blocks
    batch, group = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    first_row = tl.program_id(0) % blocks * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    there = row < rows
    place = (row // share).to(tl.int64)
    head = group * share + (row % share).to(tl.int64)
    own = keys - queries + place
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, VALUE_WIDTH)
    q_tile = q_ptr + batch * q_batch + (head * q_head + place * q_row)[:, None] + d[None, :]
    q = tl.load(q_tile, mask=there[:, None] & (d < width)[None, :], other=0.0)
    k_group = k_ptr + batch * k_batch + group * k_head
    v_group = v_ptr + batch * v_batch + group * v_head
    if TEXTS:
        text = tl.load(mask_ptr + batch * mask_batch + own * mask_key, mask=there, other=0)
    end = keys - queries + tl.minimum(first_row + BLOCK_M - 1, rows - 1) // share + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(keys - queries + first_row // share - window + 1, 0) // BLOCK_N * BLOCK_N
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, VALUE_WIDTH), tl.float32)
    for first in range(begin, end, BLOCK_N):
        column = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
        within = column < end
        k_tile = k_group + column[None, :] * k_row + d[:, None]
        k = tl.load(k_tile, mask=within[None, :] & (d < width)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        seen = within[None, :] & (column[None, :] <= own[:, None])
        if WINDOW:
            seen = seen & (own[:, None] - column[None, :] < window)
        if mask_ptr is not None:
            of_key = tl.load(mask_ptr + batch * mask_batch + column * mask_key, mask=within, other=0)
            seen = seen & (of_key > 0)[None, :]
            if TEXTS:
                seen = seen & ((of_key[None, :] == text[:, None]) | (text == 0)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores - finite_top[:, None])
        v_tile = v_group + column[:, None] * v_row + e[None, :]
        v = tl.load(v_tile, mask=within[:, None] & (e < value_width)[None, :], other=0.0)
        earlier = tl.exp2(top - finite_top)
        total = total * earlier + tl.sum(p, axis=1)
        sums = sums * earlier[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    none = there & (total == 0.0)
    y = tl.div_rn(sums, tl.where(total == 0.0, 1.0, total)[:, None])
    if tl.max(none.to(tl.int32), axis=0) > 0:
        every = tl.zeros((VALUE_WIDTH,), tl.float32)
        for first in range(0, keys, BLOCK_N):
            column = (first + tl.arange(0, BLOCK_N)).to(tl.int64)
            v_tile = v_group + column[:, None] * v_row + e[None, :]
            v = tl.load(v_tile, mask=(column < keys)[:, None] & (e < value_width)[None, :], other=0.0)
            every += tl.sum(v.to(tl.float32), axis=0)
        y = tl.where(none[:, None], tl.div_rn(every, keys * 1.0)[None, :], y)
    heads = groups * share
    out_offsets = (((batch * queries + place) * heads + head) * value_width)[:, None] + e[None, :]
    inside = there[:, None] & (e < value_width)[None, :]
    y = epilogue(y, STEPS, params_ptr, None, out_offsets, inside)
    tl.store(out_ptr + out_offsets, y.to(out_ptr.dtype.element_ty), mask=inside)


CONFIGS: tuple[Config, ...] = (
    Config(64, 64, LARGEST_HEAD, 8, 2),
    Config(32, 64, LARGEST_HEAD, 4, 2),
    Config(16, 64, LARGEST_HEAD, 4, 2),
    Config(16, 32, LARGEST_HEAD, 4, 2),
)
"""rows, keys, the longest head, warps, stages"""


MOST_PRODUCTS = 1 << 16
"""products of float32 in a tile: no matrix unit takes them, and operands of more do not stay in registers"""


def fits(config: Config, width: int, itemsize: int, shared_memory: int) -> bool:
    """Whether a program's queries, weights, and tiles of keys and values in flight fit in so many bytes; and, of
    float32, its products in registers."""
    if itemsize == 4 and config.block_m * config.block_n * width > MOST_PRODUCTS:
        return False
    rows, keys = config.block_m * (width + config.block_n), 2 * config.block_n * width * (config.num_stages - 1)
    return (rows + keys) * itemsize <= shared_memory


def candidates(width: int, itemsize: int, gpu: Gpu) -> list[Config]:
    """The configurations that fit the GPU, for heads of `width`, a power of two."""
    return fitting(CONFIGS, gpu, lambda config, shared: fits(config, width, itemsize, shared))


def choose(rows: int, pairs: int, width: int, itemsize: int, gpu: Gpu) -> Config:
    """The configuration for `pairs` (samples times groups) of `rows`; by reasoning, not by measurement.

    Large blocks read the keys less often, but most of their rows should be used, and every processor should have a
    program.
    """
    configs = candidates(width, itemsize, gpu)
    for config in configs[:-1]:
        busy = config.block_m <= 16 or pairs * cdiv(rows, config.block_m) >= gpu.processors
        if busy and 2 * rows > config.block_m:
            return config
    return configs[-1]


def plan(a: CausalAttention, config: Config | None = None) -> Launch:
    """The launch; its output is [B, S, H, E], contiguous. The tensors may be on the `meta` device."""
    batch, heads, queries, width = a.q.shape
    groups, keys = a.k.shape[1:3]
    share = heads // groups if groups else 0
    wide, value_wide = (max(16, next_power_of_2(t.shape[-1])) for t in (a.q, a.v))
    gpu, item = gpu_of(a.q.device), a.q.element_size()
    if config is None:
        key = f"{batch}x{groups}x{share}x{queries}x{wide} keys={keys} {TYPES[a.q.dtype]}"
        work = (queries * share, batch * groups, max(wide, value_wide), item, gpu)
        config = chosen("causal_attention", key, gpu, lambda: choose(*work), lambda: candidates(*work[2:]))
    strides = {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in (("q", a.q), ("k", a.k), ("v", a.v))
        for i, axis in enumerate(("batch", "head", "row"))
    }
    return Launch(
        causal_attention_kernel,
        (batch * groups * cdiv(queries * share, config.block_m) if a.v.shape[-1] else 0,),
        {
            "q_ptr": a.q, "k_ptr": a.k, "v_ptr": a.v, "mask_ptr": a.mask, "params_ptr": a.params,
            "out_ptr": allocate(a.size, a.out_dtype, a.q.device),
            "queries": queries, "keys": keys, "groups": groups, "share": share, "width": width,
            "value_width": a.v.shape[-1], "window": a.window, **strides,
            "mask_batch": 0 if a.mask is None else a.mask.stride(0),
            "mask_key": 0 if a.mask is None else a.mask.stride(1), "scale": float(a.scale * LOG2E),
        },
        {
            "TEXTS": a.texts and a.mask is not None, "WINDOW": a.window > 0, "STEPS": encode(a.steps),
            "WIDTH": wide, "VALUE_WIDTH": value_wide, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def run(a: CausalAttention, config: Config | None = None) -> Tensor:
    """The attention by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    a.check()
    return output_of(plan(a, config))


def why_not_supported(a: CausalAttention) -> Reason | None:
    """Why neither the kernel nor the reference can run these arguments, else None. Values are not looked at."""
    q, k, v = a.q, a.k, a.v
    if {q.ndim, k.ndim, v.ndim} != {4}:
        return f"queries, keys and values have {q.ndim}, {k.ndim} and {v.ndim} axes; they are [B, heads, S, D]"
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}; all must be float32, or all float16"
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    fit = k.shape[:3] == v.shape[:3] and k.shape[0] == batch and k.shape[3] == width and queries <= keys
    if not fit or (heads % groups if groups else heads):
        return f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not fit together"
    if max(width, v.shape[3]) > LARGEST_HEAD:
        return f"heads of size {max(width, v.shape[3])}; the kernel takes up to {LARGEST_HEAD}"
    if any(t.stride(3) != 1 and t.shape[3] > 1 for t in (q, k, v)):
        return f"strides {q.stride()}, {k.stride()}, {v.stride()}: the values of a head must lie side by side"
    if a.mask is not None and (a.mask.dtype != torch.int64 or tuple(a.mask.shape) != (batch, keys)):
        return f"the mask is {a.mask.dtype} {list(a.mask.shape)}; int64 [{batch}, {keys}] is needed"
    if a.window < 0:
        return f"a window of {a.window} tokens; 0 is none"
    return f'steps "{a.steps}" read a residual; attention has none' if reads_residual(a.steps) else None


@torch.library.custom_op("pqk::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    texts: bool,
    window: int,
    scale: float,
    params: Tensor,
    steps: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `CausalAttention`. → `out_dtype` [B, S, H, E], contiguous. Raises `InputError`."""
    return reference(CausalAttention(q, k, v, mask, texts, window, scale, params, steps, out_dtype))


@causal_attention.register_kernel("cuda")
def _(*arguments: Any, **named: Any) -> Tensor:
    a = CausalAttention(*arguments, **named)
    return reference(a) if falls_back("causal_attention", a.q.device) else run(a)


@causal_attention.register_fake
def _(*arguments: Any, **named: Any) -> Tensor:
    a = CausalAttention(*arguments, **named)
    return a.q.new_empty(a.size, dtype=a.out_dtype)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced: `queries` new tokens behind `past` others."""

    batch: int
    queries: int
    past: int
    heads: int
    groups: int
    head: int
    dtype: torch.dtype = torch.float32
    masked: bool = True
    texts: bool = False
    window: int = 0
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8

    def arguments(self, device: str = "meta", seed: int = 0) -> CausalAttention:
        """Queries and keys as the rotary embedding leaves them, values in the packed product; the first text is padded
        in front, and where there are texts the last one is two."""
        keys = self.past + self.queries
        q = example((self.batch, self.heads, self.queries, self.head), self.dtype, device, seed)
        k = example((self.batch, self.groups, keys, self.head), self.dtype, device, seed + 1)
        packed = example((self.batch, keys, self.groups, 2 * self.head), self.dtype, device, seed + 2)
        v = packed[..., self.head :].transpose(1, 2)
        mask = torch.ones(self.batch, keys, dtype=torch.int64, device=device)
        if device != "meta":
            mask[0, : keys // 3] = 0
            mask[-1, keys // 2 :] += int(self.texts)
        steps = example_steps(self.steps, self.out_dtype, device)
        kind = (mask if self.masked else None, self.texts, self.window, self.head**-0.5)
        return CausalAttention(q, k, v, *kind, steps, self.steps, self.out_dtype)


CASES = (
    Case(1, 1, 127, 9, 3, 64),
    Case(2, 33, 0, 4, 2, 32, texts=True),
    Case(1, 70, 60, 2, 1, 128, torch.float16, window=50, steps="", out_dtype=torch.bfloat16),
    Case(1, 40, 5, 2, 2, 80, torch.float16, masked=False, out_dtype=torch.uint8),
    Case(1, 20, 30, 4, 1, 128, steps="", out_dtype=torch.float32),
)
"""one token behind a cache, packed texts, a window, heads that no power of two divides, the largest heads"""


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))
