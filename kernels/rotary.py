"""rotary: queries and keys turned by the places of their tokens, in one launch, heads before tokens when it is done.

    c < R / 2:       out[c] = x[c] * cos[c] + (-x[c + R / 2]) * sin[c]
    R / 2 ≤ c < R:   out[c] = x[c] * cos[c] + x[c - R / 2] * sin[c]
    c ≥ R:           out[c] = x[c]

in float32, two products and a sum, each rounded, as separate operators round them. Su et al. 2021, "RoFormer: Enhanced
Transformer with Rotary Position Embedding", arXiv:2104.09864, section 3.4, with channel c beside c + R / 2 as GPT-NeoX
and Llama have it; R below the size of a head is GPT-NeoX's and Phi's partial rotary. Queries and keys are read where
they lie, as the product of all three gave them, and written in the order that attention and its cache read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_tensor, example
from pqk.kernels.common.epilogue import FLOATS
from pqk.kernels.common.launch import Launch, cdiv, falls_back, launch, next_power_of_2
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import MAX_ROWS

LARGEST_HEAD = 1024
"""channels of a head: a row is one block"""


@dataclass(frozen=True)
class Rotary:
    """The arguments of `pqk::rotary`, in their order.

    `q` [B, S, H, D] and `k` [B, S, G, D] or None: one float dtype, D with stride 1, the other strides free, so that
    views of a packed [B, S, (H + 2 G) * D] will do. `cos` and `sin`: float32 [B, S, R] or [1, S, R], R even and at
    most D, with stride 1.
    """

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        if (reason := why_not_supported(self)) is not None:
            raise InputError(f"rotary: {reason}")
        check_tensor("q", self.q, FLOATS, contiguous=False)
        if self.k is not None:
            check_tensor("k", self.k, self.q.dtype, device=self.q.device, contiguous=False)
        for name in ("cos", "sin"):
            check_tensor(name, getattr(self, name), torch.float32, device=self.q.device, contiguous=False)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula for `x` [B, S, H, D]: [B, H, S, D], contiguous, in the dtype of `x`."""
    half = cos.shape[-1] // 2
    y = x.transpose(1, 2).to(torch.float32)
    y, rest = y[..., : 2 * half], y[..., 2 * half :]
    other = torch.cat([-y[..., half:], y[..., :half]], -1)
    y = y * cos[:, None] + other * sin[:, None]
    return torch.cat([y, rest], -1).to(x.dtype).contiguous()


def reference(a: Rotary) -> tuple[Tensor, Tensor]:
    """(queries, keys) in plain torch, on any device; without keys [0] in their place. Raises `InputError`."""
    a.check()
    return turned(a.q, a.cos, a.sin), a.q.new_empty(0) if a.k is None else turned(a.k, a.cos, a.sin)


@jit
def _turn(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, cos_ptr, sin_ptr, first, tokens, length, heads, width, turned_width,
    x_batch, x_token, x_head, cos_batch, cos_token, sin_batch, sin_token,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows from `first` on; a row is a head of a token, and `tokens` those of all samples."""
    row = first * BLOCK_R + tl.arange(0, BLOCK_R)
    token, head = row // heads, (row % heads).to(tl.int64)
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    inside = (token < tokens)[:, None] & (c < width)
    x_row = x_ptr + (batch * x_batch + place * x_token + head * x_head)[:, None]
    x = tl.load(x_row + c, mask=inside, other=0.0)
    half = turned_width // 2
    turns = inside & (c < turned_width)
    other = tl.load(x_row + tl.where(c < half, c + half, c - half), mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (batch * cos_batch + place * cos_token)[:, None] + c, mask=turns, other=0.0)
    sin = tl.load(sin_ptr + (batch * sin_batch + place * sin_token)[:, None] + c, mask=turns, other=0.0)
    y = x.to(tl.float32) * cos + tl.where(c < half, -other, other) * sin
    y = tl.where(turns, y, x.to(tl.float32))
    out_row = out_ptr + (((batch * heads + head) * length + place) * width)[:, None]
    tl.store(out_row + c, y.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def rotary_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, length, q_heads, k_heads, width, turned_width,
    q_batch, q_token, q_head, k_batch, k_token, k_head, cos_batch, cos_token, sin_batch, sin_token,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blocks of rows of queries, then those of keys."""
    block = tl.program_id(0)
    of_queries = tl.cdiv(tokens * q_heads, BLOCK_R)
    if block < of_queries:
        _turn(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, block, tokens, length, q_heads, width, turned_width,
            q_batch, q_token, q_head, cos_batch, cos_token, sin_batch, sin_token, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif k_ptr is not None:
        _turn(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, block - of_queries, tokens, length, k_heads, width, turned_width,
            k_batch, k_token, k_head, cos_batch, cos_token, sin_batch, sin_token, BLOCK_R, BLOCK_C,
        )  # fmt: skip


def plan(a: Rotary) -> Launch:
    """The launch; its outputs are `args["q_out_ptr"]` and `args["k_out_ptr"]`. Tensors may be on the `meta` device."""
    batch, length, heads, width = a.q.shape
    groups, device, dtype = 0 if a.k is None else a.k.shape[2], a.q.device, a.q.dtype
    block_c = max(16, next_power_of_2(width))
    block_r = max(1, min(1024 // block_c, next_power_of_2(batch * length * max(heads, groups))))
    tokens = batch * length
    k = a.q if a.k is None else a.k
    tables = {
        f"{name}_{axis}": 0 if axis == "batch" and len(table) == 1 else table.stride(i)
        for name, table in (("cos", a.cos), ("sin", a.sin))
        for i, axis in enumerate(("batch", "token"))
    }
    strides = {f"{n}_{axis}": t.stride(i) for n, t in (("q", a.q), ("k", k)) for i, axis in enumerate(AXES)}
    return Launch(
        rotary_kernel,
        (cdiv(tokens * heads, block_r) + cdiv(tokens * groups, block_r) if width else 0,),
        {
            "q_ptr": a.q, "k_ptr": a.k, "cos_ptr": a.cos, "sin_ptr": a.sin,
            "q_out_ptr": allocate((batch, heads, length, width), dtype, device),
            "k_out_ptr": allocate((0,) if a.k is None else (batch, groups, length, width), dtype, device),
            "tokens": tokens, "length": length, "q_heads": heads, "k_heads": groups, "width": width,
            "turned_width": a.cos.shape[-1], **strides, **tables,
        },
        {"BLOCK_R": block_r, "BLOCK_C": block_c},
    )  # fmt: skip


AXES = ("batch", "token", "head")


def run(a: Rotary) -> tuple[Tensor, Tensor]:
    """(queries, keys) by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    a.check()
    planned = plan(a)
    launch(planned)
    return planned.tensor("q_out_ptr"), planned.tensor("k_out_ptr")


def why_not_supported(a: Rotary) -> Reason | None:
    """Why neither the kernel nor the reference can turn these, else None. Values are not looked at."""
    q, k = a.q, a.q if a.k is None else a.k
    if q.ndim != 4 or k.ndim != 4:
        return f"queries and keys have {q.ndim} and {k.ndim} axes; they are [B, S, heads, D]"
    batch, length, _, width = q.shape
    if (k.shape[0], k.shape[1], k.shape[3]) != (batch, length, width):
        return f"queries {list(q.shape)} and keys {list(k.shape)} do not fit together"
    turns = a.cos.shape[-1] if a.cos.ndim else 0
    if any(t.ndim != 3 or tuple(t.shape) not in {(batch, length, turns), (1, length, turns)} for t in (a.cos, a.sin)):
        return (
            f"cos {list(a.cos.shape)} and sin {list(a.sin.shape)}; [{batch}, {length}, R] or [1, {length}, R] is needed"
        )
    if turns % 2 or turns > width or width > LARGEST_HEAD:
        return f"it turns {turns} channels of heads of {width}; it can an even number, of heads of up to {LARGEST_HEAD}"
    if any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in (q, k, a.cos, a.sin)):
        return f"strides {q.stride()}, {k.stride()}, {a.cos.stride()}, {a.sin.stride()}: channels must lie side by side"
    rows = batch * length * max(q.shape[2], k.shape[2])
    return f"{rows} rows do not fit a 32-bit index; split the batch" if rows > MAX_ROWS else None


@torch.library.custom_op("pqk::rotary", mutates_args=(), device_types="cpu")
def rotary(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `Rotary`. → [B, H, S, D] and [B, G, S, D] of their dtype, contiguous, or [0]. Raises `InputError`."""
    return reference(Rotary(q, k, cos, sin))


@rotary.register_kernel("cuda")
def _(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    a = Rotary(q, k, cos, sin)
    return reference(a) if falls_back("rotary", q.device) else run(a)


@rotary.register_fake
def _(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = q.shape
    keys = q.new_empty(0) if k is None else k.new_empty((batch, k.shape[2], length, width))
    return q.new_empty((batch, heads, length, width)), keys


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced; queries, keys and values lie in one packed buffer."""

    batch: int
    length: int
    heads: int
    groups: int
    head: int
    turned: int
    dtype: torch.dtype = torch.float32
    shared: bool = False
    """all samples have the same places"""

    def arguments(self, device: str = "meta", seed: int = 0) -> Rotary:
        together = (self.heads + 2 * self.groups) * self.head
        packed = example((self.batch, self.length, together), self.dtype, device, seed)
        q, k, _ = packed.unflatten(-1, (-1, self.head)).split([self.heads, self.groups, self.groups], 2)
        shape = (1 if self.shared else self.batch, self.length, self.turned)
        angles = example(shape, torch.float32, device, seed + 1)
        return Rotary(q, k if self.groups else None, angles.cos(), angles.sin())


CASES = (
    Case(1, 64, 9, 3, 64, 64),
    Case(2, 7, 4, 2, 80, 32, torch.float16),
    Case(1, 1, 32, 8, 128, 128, torch.bfloat16),
    Case(3, 5, 4, 0, 8, 8, shared=True),
)
"""a prompt, partial rotary of heads that no power of two divides, one token, queries alone"""


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))
