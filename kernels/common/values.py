"""Shared by the memory-bound kernels: integers read as values, blocks of rows, the numbers of a case's epilogue.

A tensor of integers stands for `(q - zero_point) * scale` in float32; a float tensor stands for itself. A row is what
lies along the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pqk.errors import InputError
from pqk.kernels.common.checks import check_number, check_tensor
from pqk.kernels.common.epilogue import FLOATS, INTEGERS, check_steps, names_of, program, reads_residual
from pqk.kernels.common.launch import cdiv, next_power_of_2
from pqk.kernels.common.triton import jit, tl

MAX_ROWS = (1 << 31) - 4096
"""rows are counted in 32 bits, and the last block may reach past the end; offsets into memory have 64"""


def values(q: Tensor, scale: float, zero_point: int) -> Tensor:
    """float32 `(q - zero_point) * scale` of an integer tensor; a float tensor as float32."""
    if q.dtype.is_floating_point:
        return q.to(torch.float32)
    return (q.to(torch.float32) - zero_point) * torch.tensor(scale, dtype=torch.float32, device=q.device)


@jit
def load_values(pointer, offsets, mask, scale, zero_point):  # type: ignore[no-untyped-def]
    """The float32 values at `offsets`, as `values` has them; 0 where `mask` is off."""
    q = tl.load(pointer + offsets, mask=mask, other=0)
    y = q.to(tl.float32)
    if not q.dtype.is_floating():
        y = tl.where(mask, (y - zero_point) * scale, 0.0)
    return y


def check_values(
    name: str,
    tensor: Tensor,
    scale: float,
    zero_point: int,
    *,
    device: torch.device,
    shape: Sequence[int] | None = None,
    floats: bool = False,
) -> None:
    """Raise `InputError` unless `tensor` is uint8 or int8 with qparams that fit, or, where `floats`, a float tensor."""
    check_tensor(name, tensor, (*INTEGERS, *FLOATS) if floats else INTEGERS, device=device, shape=shape)
    if tensor.dtype.is_floating_point:
        return
    check_number(f"{name} scale", scale)
    limits = torch.iinfo(tensor.dtype)
    if not limits.min <= zero_point <= limits.max:
        raise InputError(f"{name} zero point: {zero_point} is not a {tensor.dtype}, [{limits.min}, {limits.max}]")


def check_plain_steps(steps: str, params: Tensor, out_dtype: torch.dtype, device: torch.device) -> None:
    """`check_steps` for an op whose epilogue has no residual tensor."""
    if reads_residual(steps):
        raise InputError(f'steps "{steps}": add and mul read a residual tensor, which this op does not have')
    check_steps(steps, params, None, (), out_dtype, device)


def rows_of(shape: Sequence[int]) -> int:
    """The number of rows in a tensor of `shape`: the product of all axes but the last."""
    return math.prod(shape[:-1])


def blocks(rows: int, columns: int, processors: int) -> tuple[int, int, int]:
    """`(block_rows, block_columns, num_warps)` of a kernel whose elements are independent.

    Up to 128 columns and 2048 elements; less where there would not be a program for each of the GPU's `processors`, but
    no less than 512 elements.
    """
    width = min(max(next_power_of_2(columns), 16), 128)
    height = min(2048 // width, next_power_of_2(rows))
    while height * width > 512 and cdiv(rows, height) * cdiv(columns, width) < processors:
        height //= 2
    return height, width, max(1, min(4, height * width // 256))


def whole_rows(rows: int, columns: int, processors: int) -> tuple[int, int, int]:
    """`(block_rows, block_columns, num_warps)` of a kernel that reduces over rows and holds them in registers."""
    width = max(next_power_of_2(columns), 16)
    height = max(1, min(2048 // width, next_power_of_2(rows), 16))
    while height > 1 and cdiv(rows, height) < processors and height * width > 512:
        height //= 2
    return height, width, max(1, min(16, height * width // 256))


def example_steps(steps: str, out_dtype: torch.dtype, device: str) -> Tensor:
    """`params` of a case's program, for values of about ±2; the last quantize fills the grid of `out_dtype`."""
    numbers: dict[str, tuple[float, ...]] = {
        "requantize": (0.021, 3, 0, 127, 0.021),
        "quantize": (0.019, 117, 0, 255) if out_dtype == torch.uint8 else (0.019, 0, -127, 127),
        "add": (0.017, 2),
        "mul": (0.017, 2),
    }
    rows: list[tuple[str, *tuple[float, ...]]] = [(name, *numbers.get(name, ())) for name in names_of(steps)]
    return program(*rows)[1].to(device)
