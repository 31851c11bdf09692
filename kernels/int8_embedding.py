"""int8_embedding: gather quantized rows, add position and type rows, layer norm, quantize: one pass, one launch.

    v[t] = words[ids[t]] + types[type_ids[t]] + positions[position_ids[t]]       float32, in this order
    y = layer norm of v over the last axis (`common.norm`), or v
    out = steps(y)                                                               see `epilogue`

An int8 table stands for `q * scale`, with one scale, one a row or one a column; a float32 table for itself. Positions
default to a token's place in its sequence and types to 0, as in BERT (Devlin et al. 2019, section 3, figure 2). Only
the rows that are asked for are read: a quarter of the bytes of a float table. A second output keeps y in float for a
residual sum that skips the quantize.

An id outside its table is an `InputError` in the reference. On a GPU, where looking at ids would wait for them, the
kernel reads no memory for it and takes the row as zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_scale, check_tensor, example
from pqk.kernels.common.epilogue import apply_steps, encode, epilogue
from pqk.kernels.common.gpu import gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, output_of
from pqk.kernels.common.norm import check_affine, normalize, normalized, why_not_launched
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import check_plain_steps, example_steps, whole_rows

IDS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Embedding:
    """The arguments of `pqk::int8_embedding`, in their order.

    `ids` int64 or int32 [..., T]. `words` [V, C], `positions` [P, C], `types` [Y, C]: int8, with a float32 scale []
    (one), [rows] or [1, C], or float32, without one; the last two may be None. `position_ids`, `type_ids`: int64 or
    int32 of the shape of `ids`, or None. `weight`, `bias`: float32 [C] or None, read where `normalize`. `steps`,
    `params`, `out_dtype`: see `epilogue`; no step may read a residual. `keep`: whether the second output is the float
    y before the steps. All contiguous.
    """

    ids: Tensor
    words: Tensor
    word_scale: Tensor | None
    positions: Tensor | None
    position_scale: Tensor | None
    position_ids: Tensor | None
    types: Tensor | None
    type_scale: Tensor | None
    type_ids: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    params: Tensor
    steps: str
    normalize: bool
    eps: float
    keep: bool
    out_dtype: torch.dtype

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[..., T, C]."""
        return (*self.ids.shape, self.words.shape[1])

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The second output's, which is float32: that of the first, or [0]."""
        return self.out_shape if self.keep else (0,)

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        ids, device = self.ids, self.ids.device
        check_tensor("ids", ids, IDS)
        if ids.ndim == 0:
            raise InputError("ids: a scalar is no sequence; give [1]")
        check_tensor("words", self.words, (torch.int8, torch.float32), device=device, shape=(-1, -1))
        columns = self.words.shape[1]
        if columns == 0:
            raise InputError(f"words: shape {list(self.words.shape)} has empty rows")
        self._check_table("words", self.words, self.word_scale, None)
        self._check_table("positions", self.positions, self.position_scale, self.position_ids)
        self._check_table("types", self.types, self.type_scale, self.type_ids)
        if self.positions is not None and self.position_ids is None and ids.shape[-1] > len(self.positions):
            raise InputError(f"ids: sequences of {ids.shape[-1]}, but positions has {len(self.positions)} rows")
        if not self.normalize and (self.weight is not None or self.bias is not None):
            raise InputError("weight, bias: belong to the layer norm; give none, or normalize=True")
        check_affine(self.weight, self.bias, self.eps, self.words)
        check_plain_steps(self.steps, self.params, self.out_dtype, device)

    def _check_table(self, name: str, table: Tensor | None, scale: Tensor | None, ids: Tensor | None) -> None:
        if table is None:
            if scale is not None or ids is not None:
                raise InputError(f"{name}: a scale or ids are given, but no table")
            return
        device = self.ids.device
        check_tensor(name, table, (torch.int8, torch.float32), device=device, shape=(-1, self.words.shape[1]))
        if (table.dtype == torch.int8) != (scale is not None):
            raise InputError(f"{name}: a {table.dtype} table {'has no' if scale is not None else 'needs a'} scale")
        if scale is not None:
            sizes: tuple[tuple[int, ...], ...] = ((), (len(table),), (1, table.shape[1]))
            check_scale(f"{name} scale", scale, device=device, shape=sizes[min(scale.ndim, 2)])
        if ids is not None:
            check_tensor(f"{name} ids", ids, IDS, device=device, shape=self.ids.shape)


def reference(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, on any device: (out, kept). Raises `InputError`, also for an id outside its table."""
    embedding.check()
    e = embedding
    v = _rows("ids", e.words, e.word_scale, e.ids)
    if e.types is not None:
        v = v + _rows("type_ids", e.types, e.type_scale, torch.zeros_like(e.ids) if e.type_ids is None else e.type_ids)
    if e.positions is not None:
        places = torch.arange(e.ids.shape[-1], device=e.ids.device).expand(e.ids.shape)
        v = v + _rows(
            "position_ids", e.positions, e.position_scale, places if e.position_ids is None else e.position_ids
        )
    if e.normalize:
        v = normalized(v, e.weight, e.bias, e.eps, centre=True)
    out = apply_steps(v, e.steps, e.params, None, e.out_dtype)
    return out, v.clone() if e.keep else v.new_empty(0)  # ops may not return views of each other


def _rows(name: str, table: Tensor, scale: Tensor | None, ids: Tensor) -> Tensor:
    """float32 [..., C]: the rows of `table` at `ids`."""
    outside = (ids < 0) | (ids >= len(table))
    if outside.any():
        where = [int(i) for i in outside.nonzero()[0]]
        raise InputError(f"{name}{where}: {int(ids[tuple(where)])} is outside a table of {len(table)} rows")
    rows = table[ids.to(torch.int64)].to(torch.float32)
    if scale is None:
        return rows
    return rows * (scale[ids.to(torch.int64)][..., None] if scale.ndim == 1 else scale.squeeze(0))


@jit
def table_rows(table_ptr, scale_ptr, row, rows, column, columns, inside, SCALES: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [R, C]: the rows `row` [R] of a table; zeros for one that is not there. `SCALES`: axes of the scale."""
    there = (row >= 0) & (row < rows)
    at = row.to(tl.int64)[:, None] * columns + column
    y = tl.load(table_ptr + at, mask=inside & there[:, None], other=0).to(tl.float32)
    if SCALES == 1:
        y = y * tl.load(scale_ptr + row, mask=there, other=0.0)[:, None]
    elif SCALES == 2:
        y = y * tl.load(scale_ptr + column, mask=column < columns, other=0.0)
    elif scale_ptr is not None:
        y = y * tl.load(scale_ptr)
    return y


@jit
def int8_embedding_kernel(  # type: ignore[no-untyped-def]
    ids_ptr, words_ptr, word_scale_ptr, positions_ptr, position_scale_ptr, position_ids_ptr,
    types_ptr, type_scale_ptr, type_ids_ptr, weight_ptr, bias_ptr, params_ptr, out_ptr, kept_ptr,
    tokens, length, columns, words, positions, types, eps,
    WORD_SCALES: tl.constexpr, POSITION_SCALES: tl.constexpr, TYPE_SCALES: tl.constexpr,
    NORMALIZE: tl.constexpr, KEEP: tl.constexpr, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R tokens, whole rows of C."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)[None, :]
    given = token < tokens
    inside = given[:, None] & (column < columns)
    row = tl.load(ids_ptr + token, mask=given, other=0)
    v = table_rows(words_ptr, word_scale_ptr, row, words, column, columns, inside, WORD_SCALES)
    if types_ptr is not None:
        row = tl.zeros((BLOCK_R,), tl.int64)
        if type_ids_ptr is not None:
            row = tl.load(type_ids_ptr + token, mask=given, other=0).to(tl.int64)
        v += table_rows(types_ptr, type_scale_ptr, row, types, column, columns, inside, TYPE_SCALES)
    if positions_ptr is not None:
        row = token % length
        if position_ids_ptr is not None:
            row = tl.load(position_ids_ptr + token, mask=given, other=0).to(tl.int64)
        v += table_rows(positions_ptr, position_scale_ptr, row, positions, column, columns, inside, POSITION_SCALES)
    if NORMALIZE:
        v = normalize(v, column, inside, columns, weight_ptr, bias_ptr, eps, True)
    to = token[:, None] * columns + column
    if KEEP:
        tl.store(kept_ptr + to, v, mask=inside)
    y = epilogue(v, STEPS, params_ptr, None, to, inside)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan(embedding: Embedding) -> Launch:
    """The launch; its outputs are `args["out_ptr"]` and `args["kept_ptr"]`. Tensors may be on the `meta` device."""
    e = embedding
    tokens, columns = e.ids.numel(), e.words.shape[1]
    height, width, warps = whole_rows(tokens, columns, gpu_of(e.ids.device).processors)

    def scales(scale: Tensor | None) -> int:
        return 0 if scale is None else scale.ndim

    return Launch(
        int8_embedding_kernel,
        (cdiv(tokens, height),),
        {
            "ids_ptr": e.ids, "words_ptr": e.words, "word_scale_ptr": e.word_scale,
            "positions_ptr": e.positions, "position_scale_ptr": e.position_scale, "position_ids_ptr": e.position_ids,
            "types_ptr": e.types, "type_scale_ptr": e.type_scale, "type_ids_ptr": e.type_ids,
            "weight_ptr": e.weight, "bias_ptr": e.bias, "params_ptr": e.params,
            "out_ptr": allocate(e.out_shape, e.out_dtype, e.ids.device),
            "kept_ptr": allocate(e.kept_shape, torch.float32, e.ids.device),
            "tokens": tokens, "length": e.ids.shape[-1], "columns": columns, "words": len(e.words),
            "positions": 0 if e.positions is None else len(e.positions),
            "types": 0 if e.types is None else len(e.types), "eps": float(e.eps),
        },
        {
            "WORD_SCALES": scales(e.word_scale), "POSITION_SCALES": scales(e.position_scale),
            "TYPE_SCALES": scales(e.type_scale), "NORMALIZE": e.normalize, "KEEP": e.keep, "STEPS": encode(e.steps),
            "BLOCK_R": height, "BLOCK_C": width,
        },
        num_warps=warps,
    )  # fmt: skip


def run(embedding: Embedding) -> tuple[Tensor, Tensor]:
    """(out, kept) by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    embedding.check()
    if reason := why_not_supported(embedding):
        raise InputError(f"int8_embedding: {reason}")
    planned = plan(embedding)
    return output_of(planned), planned.tensor("kept_ptr")


def why_not_supported(embedding: Embedding) -> Reason | None:
    """Why the kernel cannot run these arguments, else None."""
    return why_not_launched(embedding.ids.numel(), embedding.words.shape[1])


@torch.library.custom_op("pqk::int8_embedding", mutates_args=(), device_types="cpu")
def int8_embedding(
    ids: Tensor,
    words: Tensor,
    word_scale: Tensor | None,
    positions: Tensor | None,
    position_scale: Tensor | None,
    position_ids: Tensor | None,
    types: Tensor | None,
    type_scale: Tensor | None,
    type_ids: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    params: Tensor,
    steps: str,
    normalize: bool,
    eps: float,
    keep: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `Embedding`. → `out_dtype` [..., T, C], and float32 of that shape or [0]. Raises `InputError`."""
    return reference(
        Embedding(
            ids, words, word_scale, positions, position_scale, position_ids, types, type_scale, type_ids,
            weight, bias, params, steps, normalize, eps, keep, out_dtype,
        )
    )  # fmt: skip


@int8_embedding.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    embedding = Embedding(*arguments)
    embedding.check()
    fallback = falls_back("int8_embedding", embedding.ids.device, why_not_supported(embedding))
    return reference(embedding) if fallback else run(embedding)


@int8_embedding.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    e = Embedding(*arguments)
    out = e.words.new_empty(e.out_shape, dtype=e.out_dtype)
    return out, e.words.new_empty(e.kept_shape, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    """the shape of the ids"""
    columns: int
    words: int = 300
    dtype: torch.dtype = torch.int64
    scales: str = "row"
    """what each scale of the int8 word table is for: "table", "row" or "column"; positions have no "row"s"""
    positions: torch.dtype | None = torch.int8
    types: torch.dtype | None = torch.float32
    with_ids: bool = False
    """whether position and type ids are passed"""
    normalize: bool = True
    keep: bool = False
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8

    def arguments(self, device: str = "meta", seed: int = 0) -> Embedding:
        def table(rows: int, dtype: torch.dtype | None, scales: str) -> tuple[Tensor | None, Tensor | None]:
            if dtype is None:
                return None, None
            size = {"table": (), "row": (rows,), "column": (1, self.columns)}[scales]
            scale = example(size, torch.float32, device, seed + rows).abs() * 0.01 + 0.005
            return example((rows, self.columns), dtype, device, seed + rows), scale if dtype == torch.int8 else None

        def draw(rows: int, dtype: torch.dtype) -> Tensor:
            ids = example(self.shape, torch.int32, device, seed + 2 * rows)
            return (ids % rows).to(dtype)

        words, word_scale = table(self.words, torch.int8, self.scales)
        assert words is not None
        by = "table" if self.scales == "row" else self.scales
        positions, position_scale = table(self.shape[-1] + 2, self.positions, by)
        types, type_scale = table(2, self.types, "row")
        position_ids = draw(self.shape[-1] + 2, torch.int32) if self.with_ids and self.positions else None
        type_ids = draw(2, self.dtype) if self.with_ids and self.types else None
        weight, bias = (
            example((self.columns,), torch.float32, device, seed + i) if self.normalize else None for i in (1, 2)
        )
        params = example_steps(self.steps, self.out_dtype, device)
        return Embedding(
            draw(self.words, self.dtype), words, word_scale, positions, position_scale, position_ids,
            types, type_scale, type_ids, weight, bias, params, self.steps, self.normalize, 1e-12, self.keep,
            self.out_dtype,
        )  # fmt: skip


CASES = (
    Case((2, 16), 384, with_ids=True),
    Case((1, 128), 768, scales="column", keep=True, out_dtype=torch.uint8),
    Case((3, 5), 33, dtype=torch.int32, scales="table", positions=torch.float32, types=torch.int8),
    Case((4, 7), 130, positions=None, types=None, steps="", out_dtype=torch.float32),
    Case((40,), 64, dtype=torch.int32, types=None, normalize=False, steps="", out_dtype=torch.float16),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: ids, a row of each table for each distinct id, scales of columns, and the
    outputs, once."""
    e = case.arguments("cpu")
    total = math.prod(e.out_shape) * case.out_dtype.itemsize + (8 * case.columns if case.normalize else 0)
    total += math.prod(e.kept_shape) * 4
    total += sum(s.nbytes for s in (e.word_scale, e.position_scale) if s is not None and s.ndim == 2)
    places = torch.arange(e.ids.shape[-1]) if e.position_ids is None else e.position_ids
    read = [(e.words, e.ids), (e.positions, places), (e.types, e.type_ids if e.type_ids is not None else places * 0)]
    total += sum(len(ids.unique()) * table[0].nbytes for table, ids in read if table is not None)
    return total + sum(ids.nbytes for ids in (e.ids, e.position_ids, e.type_ids) if ids is not None)
