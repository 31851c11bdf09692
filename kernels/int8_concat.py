"""int8_concat: quantized tensors, each with its own qparams, side by side along the channels of one buffer.

    out[..., first_i + c] = steps((input_i[..., c] - zero_point_i) * scale_i)        see `epilogue`

with `first_i` the channels of the inputs before. A launch an input reads it once and writes its slice of the shared
buffer once. Absorbed: the dequantize of each input, the concatenation as a copy of its own, an activation after it and
the quantize of the result. Where an input has the qparams of the result, requantization gives back its integers. Not
absorbed: the write of the input itself, as its producer writes a tensor of its own; a producer that nothing else reads
writes its slice by itself (`columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import InputError, Reason
from pqk.kernels.common.checks import allocate, example
from pqk.kernels.common.epilogue import apply_steps, encode, epilogue
from pqk.kernels.common.gpu import gpu_of
from pqk.kernels.common.launch import Launch, cdiv, falls_back, launch, output_of
from pqk.kernels.common.strides import row_stride
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import (  # fmt: skip
    MAX_ROWS,
    blocks,
    check_plain_steps,
    check_values,
    example_steps,
    load_values,
    rows_of,
    values,
)


@dataclass(frozen=True)
class Concat:
    """The arguments of `pqk::int8_concat`, in their order.

    `inputs`: uint8 or int8 [..., C_i], contiguous and alike but for C_i; `scales`, `zero_points`: one each.
    `steps`, `params`, `out_dtype`: see `epilogue`, the same for all inputs; no step may read a residual.
    """

    inputs: Sequence[Tensor]
    params: Tensor
    steps: str
    scales: Sequence[float]
    zero_points: Sequence[int]
    out_dtype: torch.dtype

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[..., Σ C_i]."""
        return (*self.inputs[0].shape[:-1], sum(x.shape[-1] for x in self.inputs))

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        n = len(self.inputs)
        if n == 0 or len(self.scales) != n or len(self.zero_points) != n:
            raise InputError(
                f"inputs: {n} tensors, {len(self.scales)} scales and {len(self.zero_points)} zero points; "
                "give at least one tensor, and a scale and a zero point for each"
            )
        first = self.inputs[0]
        if first.ndim == 0:
            raise InputError("inputs[0]: a scalar has no channels to concatenate along")
        shape = (*first.shape[:-1], -1)
        for i, (x, scale, zero_point) in enumerate(zip(self.inputs, self.scales, self.zero_points, strict=True)):
            check_values(f"inputs[{i}]", x, scale, zero_point, device=first.device, shape=shape)
        check_plain_steps(self.steps, self.params, self.out_dtype, first.device)


def reference(concat: Concat) -> Tensor:
    """The formula in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    concat.check()
    parts = [values(*part) for part in zip(concat.inputs, concat.scales, concat.zero_points, strict=True)]
    return apply_steps(torch.cat(parts, -1), concat.steps, concat.params, None, concat.out_dtype)


@jit
def int8_concat_kernel(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, params_ptr, rows, columns, first, out_columns, scale, zero_point,
    STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows x BLOCK_C columns of one input, whose slice of `out` begins at column `first`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < rows) & (column < columns)
    y = load_values(x_ptr, row * columns + column, inside, scale, zero_point)
    to = row * out_columns + first + column
    y = epilogue(y, STEPS, params_ptr, None, to, inside)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan(concat: Concat, out: Tensor | None = None) -> tuple[Launch, ...]:
    """The launches, one an input; all write one output, `out` where it is given: columns of a wider tensor.

    The tensors may be on the `meta` device.
    """
    if out is None:
        out = allocate(concat.out_shape, concat.out_dtype, concat.inputs[0].device)
    launches, first, rows = [], 0, rows_of(concat.out_shape)
    for x, scale, zero_point in zip(concat.inputs, concat.scales, concat.zero_points, strict=True):
        columns = x.shape[-1]
        height, width, warps = blocks(rows, columns, gpu_of(out.device).processors)
        launches.append(
            Launch(
                int8_concat_kernel,
                (cdiv(rows, height), cdiv(columns, width)),
                {
                    "x_ptr": x, "out_ptr": out, "params_ptr": concat.params, "rows": rows, "columns": columns,
                    "first": first, "out_columns": row_stride(out),
                    "scale": float(scale), "zero_point": float(zero_point),
                },
                {"STEPS": encode(concat.steps), "BLOCK_R": height, "BLOCK_C": width},
                num_warps=warps,
            )
        )  # fmt: skip
        first += columns
    return tuple(launches)


def run(concat: Concat) -> Tensor:
    """The concatenation by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    concat.check()
    if reason := why_not_supported(concat):
        raise InputError(f"int8_concat: {reason}")
    *others, last = plan(concat)
    for part in others:
        launch(part)
    return output_of(last)


def why_not_supported(concat: Concat) -> Reason | None:
    """Why the kernel cannot run these arguments, else None."""
    rows = rows_of(concat.out_shape)
    return f"{rows} rows do not fit a 32-bit index; split the batch" if rows > MAX_ROWS else None


@torch.library.custom_op("pqk::int8_concat", mutates_args=(), device_types="cpu")
def int8_concat(
    inputs: Sequence[Tensor],
    params: Tensor,
    steps: str,
    scales: Sequence[float],
    zero_points: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """See `Concat`. → `out_dtype` [..., Σ C_i]. Raises `InputError`."""
    return reference(Concat(inputs, params, steps, scales, zero_points, out_dtype))


@int8_concat.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    concat = Concat(*arguments)
    concat.check()
    return (
        reference(concat)
        if falls_back("int8_concat", concat.inputs[0].device, why_not_supported(concat))
        else run(concat)
    )


@int8_concat.register_fake
def _(*arguments: Any) -> Tensor:
    concat = Concat(*arguments)
    return concat.inputs[0].new_empty(concat.out_shape, dtype=concat.out_dtype)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    """all axes but the last"""
    channels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.uint8

    def arguments(self, device: str = "meta", seed: int = 0) -> Concat:
        inputs = [
            example((*self.shape, c), dtype, device, seed + i)
            for i, (c, dtype) in enumerate(zip(self.channels, self.dtypes, strict=True))
        ]
        scales = [0.011 + 0.004 * i for i in range(len(inputs))]
        zero_points = [120 - 7 * i if x.dtype == torch.uint8 else 0 for i, x in enumerate(inputs)]
        params = example_steps(self.steps, self.out_dtype, device)
        return Concat(inputs, params, self.steps, scales, zero_points, self.out_dtype)


CASES = (
    Case((1, 8, 8), (64, 32), (torch.uint8, torch.uint8), "relu,quantize"),
    Case((2, 14, 14), (64, 96, 16), (torch.int8, torch.int8, torch.int8), out_dtype=torch.int8),
    Case((3, 5), (7, 1, 130), (torch.uint8, torch.int8, torch.uint8), "hard_swish,quantize", torch.int8),
    Case((4, 6), (33, 31), (torch.int8, torch.uint8), "", torch.float32),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case's last input, whose slice may begin at any column; the others are alike."""
    return plan(case.arguments(device))[-1]


def traffic(case: Case) -> int:
    """Bytes that the launch of `specialize` has to move: the last input and its slice of the output, once."""
    return rows_of((*case.shape, 1)) * case.channels[-1] * (1 + case.out_dtype.itemsize)
