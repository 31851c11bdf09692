"""Quantization: float32, float16 or bfloat16 → int8 or uint8, one read and one write.

static, one scale a tensor:    q = clamp(rint(x / scale) + zero_point, qmin, qmax)
dynamic, one scale a token:    scale = max(max_k |x[k]| / 127, 1e-9),   q = clamp(rint(x / scale), -127, 127)

The static kernel reads any strides and writes contiguous memory, so `x.permute(0, 2, 3, 1)` of an NCHW image comes out
as NHWC in the same launch. Arithmetic is float32, division is IEEE division, ties go to even, a NaN becomes qmin: the
values of ONNX QuantizeLinear. Dynamic quantization is that of LLM.int8() (Dettmers et al. 2022, section 2.1, row-wise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, check_number, check_tensor, example
from pqk.kernels.common.epilogue import FLOATS, INTEGERS, apply_steps, on_grid, program
from pqk.kernels.common.launch import Launch, cdiv, falls_back, next_power_of_2, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.quant.qparams import TINY

LONGEST_ROW = 16384
"""a longer row of the dynamic kernel is read twice; up to this it stays in registers"""


def reference(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Tensor:
    """The static formula, in float32. `x` any shape and strides → `out_dtype` of its shape, contiguous."""
    steps, params = program(("quantize", scale, zero_point, qmin, qmax))
    return apply_steps(x.to(torch.float32), steps, params.to(x.device), None, out_dtype).contiguous()


def reference_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """The dynamic formula: [..., K] → int8 [..., K] and float32 scales [...]."""
    x = x.to(torch.float32)
    if x.numel() == 0:
        return x.to(torch.int8), x.new_full(x.shape[:-1], TINY)
    scale = (x.abs().amax(-1) / x.new_full((), 127.0)).clamp(min=TINY)
    return torch.round(x / scale[..., None]).clamp(-127, 127).to(torch.int8), scale


@jit
def _static(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, scale, zero_point, qmin, qmax,
    rows, columns, size_1, size_2, stride_0, stride_1, stride_2, stride_c,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of the contiguous output [rows, columns], rows being the axes [size_0, size_1, size_2] of the input."""
    across = tl.cdiv(columns, BLOCK_C)
    block = tl.program_id(0)
    row = (block // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (block % across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    outer = row // size_2
    start = (outer // size_1) * stride_0 + (outer % size_1) * stride_1 + (row % size_2) * stride_2
    x = tl.load(x_ptr + start[:, None] + (column * stride_c)[None, :], mask=inside, other=0.0).to(tl.float32)
    y = on_grid(x, scale, zero_point, qmin, qmax)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _dynamic(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, scales_ptr, rows, columns, stride_r, stride_c, tiny,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows: their largest magnitudes, then their integers. `WHOLE`: a row fits one block and is read once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C)
    there = row < rows
    x_row = x_ptr + (row * stride_r)[:, None]
    y_row = out_ptr + (row * columns)[:, None]
    inside = there[:, None] & (column < columns)[None, :]
    x = tl.load(x_row + (column.to(tl.int64) * stride_c)[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.abs(x)
    if not WHOLE:
        for begin in range(BLOCK_C, columns, BLOCK_C):
            c = begin + column
            inside = there[:, None] & (c < columns)[None, :]
            more = tl.load(x_row + (c.to(tl.int64) * stride_c)[None, :], mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(more))
    scale = tl.maximum(tl.div_rn(tl.max(largest, axis=1), 127.0), tiny)
    tl.store(scales_ptr + row, scale, mask=there)
    if WHOLE:
        y = on_grid(x, scale[:, None], 0.0, -127.0, 127.0)
        tl.store(y_row + column[None, :], y.to(tl.int8), mask=inside)
    else:
        for begin in range(0, columns, BLOCK_C):
            c = begin + column
            inside = there[:, None] & (c < columns)[None, :]
            again = tl.load(x_row + (c.to(tl.int64) * stride_c)[None, :], mask=inside, other=0.0).to(tl.float32)
            y = on_grid(again, scale[:, None], 0.0, -127.0, 127.0)
            tl.store(y_row + c[None, :], y.to(tl.int8), mask=inside)


def merged_axes(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest axes that address the same elements in the same order."""
    axes: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * step:
            axes[-1] = (axes[-1][0] * size, step)
        else:
            axes.append((size, step))
    return axes


def plan(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Launch:
    """The launch of the static kernel; its output is `args["out_ptr"]`."""
    y = allocate(x.shape, out_dtype, x.device)
    axes = merged_axes(tuple(x.shape), x.stride())
    columns, stride_c = axes.pop() if axes else (1, 1)
    (size_0, stride_0), (size_1, stride_1), (size_2, stride_2) = [(1, 0)] * (3 - len(axes)) + axes
    rows = size_0 * size_1 * size_2
    block_c = min(next_power_of_2(columns), 1024)
    block_r = max(1, min(1024 // block_c, next_power_of_2(rows)))
    return Launch(
        kernel=_static,
        grid=(cdiv(rows, block_r) * cdiv(columns, block_c) if x.numel() else 0,),
        args={
            "x_ptr": x, "out_ptr": y,
            "scale": float(scale), "zero_point": float(zero_point), "qmin": float(qmin), "qmax": float(qmax),
            "rows": rows, "columns": columns, "size_1": size_1, "size_2": size_2,
            "stride_0": stride_0, "stride_1": stride_1, "stride_2": stride_2, "stride_c": stride_c,
        },
        constexprs={"BLOCK_R": block_r, "BLOCK_C": block_c},
    )  # fmt: skip


def plan_dynamic(x: Tensor) -> Launch:
    """The launch of the dynamic kernel; its outputs are `args["out_ptr"]` and `args["scales_ptr"]`."""
    (rows, stride_r), (columns, stride_c) = [(1, 0), (1, 1), *_rows(x)][-2:]
    y = allocate(x.shape, torch.int8, x.device)
    scales = allocate(x.shape[:-1], torch.float32, x.device)
    block_c = min(next_power_of_2(columns), LONGEST_ROW)
    block_r = max(1, min(1024 // block_c, next_power_of_2(rows)))
    return Launch(
        kernel=_dynamic,
        grid=(cdiv(rows, block_r) if x.numel() else 0,),
        args={
            "x_ptr": x, "out_ptr": y, "scales_ptr": scales,
            "rows": rows, "columns": columns, "stride_r": stride_r, "stride_c": stride_c, "tiny": TINY,
        },
        constexprs={"WHOLE": columns <= block_c, "BLOCK_R": block_r, "BLOCK_C": block_c},
        num_warps=8 if block_c * block_r > 4096 else 4,
    )  # fmt: skip


def _rows(x: Tensor) -> list[tuple[int, int]]:
    """[(rows, stride)] of the leading axes, then (columns, stride). Empty where the rows are not evenly spaced."""
    leading = merged_axes(tuple(x.shape[:-1]), x.stride()[:-1]) or [(1, 0)]
    return [*leading, (x.shape[-1], x.stride(-1))] if len(leading) == 1 else []


def why_not_supported(x: Tensor, out_dtype: torch.dtype = torch.int8) -> Reason | None:
    """Why the static kernel cannot take `x`, else None."""
    if x.dtype not in FLOATS:
        return f"it quantizes float32, float16 and bfloat16, not {x.dtype}"
    if out_dtype not in INTEGERS:
        return f"it gives int8 and uint8, not {out_dtype}"
    if (axes := len(merged_axes(tuple(x.shape), x.stride()))) > 4:
        return f"shape {list(x.shape)} with strides {x.stride()} needs {axes} axes; it reads at most 4"
    return None


def why_not_supported_dynamic(x: Tensor) -> Reason | None:
    """Why the dynamic kernel cannot take `x`, else None."""
    if x.dtype not in FLOATS:
        return f"it quantizes float32, float16 and bfloat16, not {x.dtype}"
    if x.ndim == 0:
        return "a scalar has no tokens"
    if x.numel() and not _rows(x):
        return f"rows of shape {list(x.shape)} with strides {x.stride()} are not evenly spaced; call .contiguous()"
    return None


def check(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> None:
    """Raise `InputError` for what neither the reference nor the kernel can do."""
    check_tensor("x", x, FLOATS, contiguous=False)
    check_number("scale", scale)
    if out_dtype not in INTEGERS:
        raise InputError(f"out_dtype: {out_dtype}, must be int8 or uint8")
    limits = torch.iinfo(out_dtype)
    if not limits.min <= qmin <= zero_point <= qmax <= limits.max:
        bounds = f"{limits.min} ≤ {qmin} ≤ {zero_point} ≤ {qmax} ≤ {limits.max}"
        raise InputError(f"qmin ≤ zero_point ≤ qmax must hold within {out_dtype}: {bounds}")


def run(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Tensor:
    """Static quantization by its kernel. Raises `InputError`, with the reason of `why_not_supported`."""
    check(x, scale, zero_point, qmin, qmax, out_dtype)
    if reason := why_not_supported(x, out_dtype):
        raise InputError(f"quantize_static: {reason}")
    return output_of(plan(x, scale, zero_point, qmin, qmax, out_dtype))


def run_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantization by its kernel. Raises `InputError`, with the reason of `why_not_supported_dynamic`."""
    if reason := why_not_supported_dynamic(x):
        raise InputError(f"quantize_dynamic: {reason}")
    planned = plan_dynamic(x)
    if x.numel() == 0:
        planned.tensor("scales_ptr").fill_(TINY)
    return output_of(planned), planned.tensor("scales_ptr")


@torch.library.custom_op("pqk::quantize_static", mutates_args=(), device_types="cpu")
def quantize_static(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Tensor:
    """float `x` of any strides → contiguous int8 or uint8 of its shape, on one scale. Raises `InputError`."""
    check(x, scale, zero_point, qmin, qmax, out_dtype)
    return reference(x, scale, zero_point, qmin, qmax, out_dtype)


@quantize_static.register_kernel("cuda")
def _(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Tensor:
    if falls_back("quantize_static", x.device, why_not_supported(x, out_dtype)):
        check(x, scale, zero_point, qmin, qmax, out_dtype)
        return reference(x, scale, zero_point, qmin, qmax, out_dtype)
    return run(x, scale, zero_point, qmin, qmax, out_dtype)


@quantize_static.register_fake
def _(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


@torch.library.custom_op("pqk::quantize_dynamic", mutates_args=(), device_types="cpu")
def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., K] → int8 [..., K] and float32 scales [...], one a row. Raises `InputError`."""
    check_tensor("x", x, FLOATS, contiguous=False)
    if x.ndim == 0:
        raise InputError("quantize_dynamic: a scalar has no tokens")
    return reference_dynamic(x)


@quantize_dynamic.register_kernel("cuda")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    if falls_back("quantize_dynamic", x.device):
        return reference_dynamic(x)
    return run_dynamic(x if x.numel() == 0 or _rows(x) else x.contiguous())


@quantize_dynamic.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    to_nhwc: bool = False
    """the input is an NCHW image, read as NHWC"""
    out_dtype: torch.dtype = torch.int8

    def arguments(self, device: str = "meta") -> dict[str, Any]:
        x = example(self.shape, self.dtype, device)
        x = x.permute(0, 2, 3, 1) if self.to_nhwc else x
        if self.dynamic:
            return {"x": x}
        low, high, zero_point = (0, 255, 121) if self.out_dtype == torch.uint8 else (-127, 127, 0)
        return {
            "x": x, "scale": 0.03, "zero_point": zero_point, "qmin": low, "qmax": high, "out_dtype": self.out_dtype,
        }  # fmt: skip


CASES = (
    Case((2, 3, 32, 32), to_nhwc=True, out_dtype=torch.uint8),
    Case((1, 3, 96, 96), to_nhwc=True),
    Case((1, 16, 8, 8), torch.float16, to_nhwc=True),
    Case((16, 384)),
    Case((7, 33), torch.bfloat16, out_dtype=torch.uint8),
    Case((16, 384), dynamic=True),
    Case((5, 3, 129), torch.float16, dynamic=True),
    Case((2, 20000), torch.bfloat16, dynamic=True),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    arguments = case.arguments(device)
    return plan_dynamic(**arguments) if case.dynamic else plan(**arguments)
