"""Shared by the norm kernels: the arguments of a call, the arithmetic of a row, one kernel for both norms.

    v = x (+ residual)
    layer norm   y = (v - mean(v)) * (1 / sqrt(mean((v - mean(v))²) + eps)) * weight + bias
    RMS norm     y = v * (1 / sqrt(mean(v²) + eps)) * weight (+ bias)
    out = steps(y)                                                       see `epilogue`

in float32; division and square root are IEEE's. A row stays in registers between the two reductions: it is read once
and written once. Ba et al. 2016, "Layer Normalization"; Zhang and Sennrich 2019, "Root Mean Square Layer
Normalization". Only the order of the sums over a row differs between the reference, the interpreter and a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_tensor, example
from pqk.kernels.common.epilogue import apply_steps, encode, epilogue
from pqk.kernels.common.gpu import gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import (  # fmt: skip
    MAX_ROWS,
    check_plain_steps,
    check_values,
    example_steps,
    load_values,
    rows_of,
    values,
    whole_rows,
)

KEPT = ("nothing", "sum", "norm")
"""what a second output holds: nothing, the float sum before the norm, or the float norm before the epilogue"""
MAX_COLUMNS = 16384
"""longer rows do not stay in registers"""


@dataclass(frozen=True)
class Norm:
    """The arguments of `pqk::layer_norm_quantize` and `pqk::rms_norm_quantize`, in their order.

    `x` [..., C] and `residual`, of its shape: uint8, int8, or a float, contiguous; integers are read with their scale
    and zero point, which a float tensor does not use. `weight`, `bias`: float32 [C]; without them 1 and 0. `steps`,
    `params`, `out_dtype`: see `epilogue`; no step may read a residual. `keep`: one of `KEPT`.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    params: Tensor
    steps: str
    eps: float
    x_scale: float
    x_zero_point: int
    residual_scale: float
    residual_zero_point: int
    keep: str
    out_dtype: torch.dtype

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The second output's: that of `x`, or [0]."""
        return (0,) if self.keep == "nothing" else tuple(self.x.shape)

    @property
    def kept_dtype(self) -> torch.dtype:
        """The second output's: that of a float `x`, else float32."""
        return self.x.dtype if self.x.dtype.is_floating_point else torch.float32

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        x, device = self.x, self.x.device
        check_values("x", x, self.x_scale, self.x_zero_point, device=device, floats=True)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise InputError(f"x: shape {list(x.shape)}; a row needs at least one element to have a mean")
        if self.residual is not None:
            grid = (self.residual_scale, self.residual_zero_point)
            check_values("residual", self.residual, *grid, device=device, shape=x.shape, floats=True)
        check_affine(self.weight, self.bias, self.eps, x)
        check_plain_steps(self.steps, self.params, self.out_dtype, device)
        if self.keep not in KEPT:
            raise InputError(f'keep: "{self.keep}" (known: {", ".join(KEPT)})')


def check_affine(weight: Tensor | None, bias: Tensor | None, eps: float, x: Tensor) -> None:
    """Raise `InputError` unless the parameters of a norm over the last axis of `x` fit it."""
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_tensor(name, vector, torch.float32, device=x.device, shape=x.shape[-1:])
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"eps: {eps}; must be finite and not negative")


def why_not_launched(rows: int, columns: int) -> Reason | None:
    """Why the kernel takes no matrix of this size, else None."""
    if columns > MAX_COLUMNS:
        return f"a row of {columns} does not stay in registers; at most {MAX_COLUMNS} do"
    return f"{rows} rows do not fit a 32-bit index; split the batch" if rows > MAX_ROWS else None


def why_not_supported(norm: Norm) -> Reason | None:
    """Why the kernel cannot run these arguments, else None."""
    return why_not_launched(rows_of(norm.x.shape), norm.x.shape[-1])


def normalized(v: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    """The reference of a row: float32 [..., C] → float32. `centre`: layer norm, else RMS norm."""
    count = v.new_tensor(float(v.shape[-1]))
    if centre:
        v = v - v.sum(-1, keepdim=True) / count
    y = v * (1.0 / torch.sqrt((v * v).sum(-1, keepdim=True) / count + eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@jit
def normalize(v, column, inside, columns, weight_ptr, bias_ptr, eps, CENTRE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`normalized` of a block of rows: float32 `v` [R, C], 0 outside; `column` [1, C]; `inside` [R, C] or [1, C]."""
    count = columns * 1.0  # an integer 1 is a constant when compiled, which has no `.to`
    if CENTRE:
        v = tl.where(inside, v - tl.div_rn(tl.sum(v, axis=1), count)[:, None], 0.0)
    spread = tl.sqrt_rn(tl.div_rn(tl.sum(v * v, axis=1), count) + eps)
    y = v * tl.div_rn(1.0, spread)[:, None]
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + column, mask=column < columns, other=0.0)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + column, mask=column < columns, other=0.0)
    return y


@jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, kept_ptr, params_ptr, rows, columns, eps,
    x_scale, x_zero_point, residual_scale, residual_zero_point,
    CENTRE: tl.constexpr, KEEP_SUM: tl.constexpr, KEEP_NORM: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R whole rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    at = row * columns + column
    v = load_values(x_ptr, at, inside, x_scale, x_zero_point)
    if residual_ptr is not None:
        v += load_values(residual_ptr, at, inside, residual_scale, residual_zero_point)
    if KEEP_SUM:
        tl.store(kept_ptr + at, v.to(kept_ptr.dtype.element_ty), mask=inside)
    y = normalize(v, column, inside, columns, weight_ptr, bias_ptr, eps, CENTRE)
    if KEEP_NORM:
        tl.store(kept_ptr + at, y.to(kept_ptr.dtype.element_ty), mask=inside)
    y = epilogue(y, STEPS, params_ptr, None, at, inside)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class NormKernel:
    """Reference, launch and registration of one of the two norms."""

    name: str
    """of the operator"""
    centre: bool
    """layer norm, else RMS norm"""

    def reference(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """(out, kept) in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
        norm.check()
        v = values(norm.x, norm.x_scale, norm.x_zero_point)
        if norm.residual is not None:
            v = v + values(norm.residual, norm.residual_scale, norm.residual_zero_point)
        y = normalized(v, norm.weight, norm.bias, norm.eps, self.centre)
        out = apply_steps(y, norm.steps, norm.params, None, norm.out_dtype)
        kept = {"nothing": v.new_empty(0), "sum": v, "norm": y}[norm.keep].to(norm.kept_dtype)
        return out, kept.clone()  # ops may not return views of each other or of their inputs

    def plan(self, norm: Norm) -> Launch:
        """The launch; its outputs are `args["out_ptr"]` and `args["kept_ptr"]`. Tensors may be on the `meta` device."""
        rows, columns = rows_of(norm.x.shape), norm.x.shape[-1]
        height, width, warps = whole_rows(rows, columns, gpu_of(norm.x.device).processors)
        return Launch(
            norm_kernel,
            (cdiv(rows, height),),
            {
                "x_ptr": norm.x, "residual_ptr": norm.residual, "weight_ptr": norm.weight, "bias_ptr": norm.bias,
                "out_ptr": allocate(norm.x.shape, norm.out_dtype, norm.x.device),
                "kept_ptr": allocate(norm.kept_shape, norm.kept_dtype, norm.x.device),
                "params_ptr": norm.params, "rows": rows, "columns": columns, "eps": float(norm.eps),
                "x_scale": float(norm.x_scale), "x_zero_point": float(norm.x_zero_point),
                "residual_scale": float(norm.residual_scale), "residual_zero_point": float(norm.residual_zero_point),
            },
            {
                "CENTRE": self.centre, "KEEP_SUM": norm.keep == "sum", "KEEP_NORM": norm.keep == "norm",
                "STEPS": encode(norm.steps), "BLOCK_R": height, "BLOCK_C": width,
            },
            num_warps=warps,
        )  # fmt: skip

    def run(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """(out, kept) by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
        norm.check()
        if reason := why_not_supported(norm):
            raise InputError(f"{self.name}: {reason}")
        planned = self.plan(norm)
        return output_of(planned), planned.tensor("kept_ptr")

    def operator(self) -> CustomOpDef:
        """The operator `pqk::name`, its reference on a CPU and its kernel on a CUDA device.

        It takes the arguments of `Norm` and returns `out_dtype` of the shape of `x`, and what `keep` names: a float, or
        [0].
        """

        def on_cpu(
            x: Tensor,
            residual: Tensor | None,
            weight: Tensor | None,
            bias: Tensor | None,
            params: Tensor,
            steps: str,
            eps: float,
            x_scale: float,
            x_zero_point: int,
            residual_scale: float,
            residual_zero_point: int,
            keep: str,
            out_dtype: torch.dtype,
        ) -> tuple[Tensor, Tensor]:
            grids = (x_scale, x_zero_point, residual_scale, residual_zero_point)
            return self.reference(Norm(x, residual, weight, bias, params, steps, eps, *grids, keep, out_dtype))

        op = torch.library.custom_op(f"pqk::{self.name}", on_cpu, mutates_args=(), device_types="cpu")

        @op.register_kernel("cuda")
        def _(*arguments: Any) -> tuple[Tensor, Tensor]:
            norm = Norm(*arguments)
            norm.check()
            fallback = falls_back(self.name, norm.x.device, why_not_supported(norm))
            return self.reference(norm) if fallback else self.run(norm)

        @op.register_fake
        def _(*arguments: Any) -> tuple[Tensor, Tensor]:
            norm = Norm(*arguments)
            out = norm.x.new_empty(norm.x.shape, dtype=norm.out_dtype)
            return out, norm.x.new_empty(norm.kept_shape, dtype=norm.kept_dtype)

        return op


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    residual: torch.dtype | None = torch.float32
    affine: bool = True
    keep: str = "nothing"
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.int8

    def arguments(self, device: str = "meta", seed: int = 0) -> Norm:
        residual = example(self.shape, self.residual, device, seed + 1) if self.residual else None
        weight, bias = (
            example(self.shape[-1:], torch.float32, device, seed + i) if self.affine else None for i in (2, 3)
        )
        grids: dict[torch.dtype | None, tuple[float, int]] = {torch.uint8: (0.013, 109), torch.int8: (0.017, 0)}
        (scale, zero_point), (r_scale, r_zero_point) = (grids.get(d, (1.0, 0)) for d in (self.dtype, self.residual))
        return Norm(
            example(self.shape, self.dtype, device, seed), residual, weight, bias,
            example_steps(self.steps, self.out_dtype, device), self.steps, 1e-5,
            scale, zero_point, r_scale, r_zero_point, self.keep, self.out_dtype,
        )  # fmt: skip

    def traffic(self) -> int:
        """Bytes to move: inputs, the norm's two vectors and the outputs, once."""
        sizes = [self.dtype.itemsize, self.out_dtype.itemsize, self.residual.itemsize if self.residual else 0]
        if self.keep != "nothing":
            sizes.append(self.dtype.itemsize if self.dtype.is_floating_point else 4)
        return math.prod(self.shape) * sum(sizes) + (8 * self.shape[-1] if self.affine else 0)
