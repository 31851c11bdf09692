"""A tensor's layout in memory: evenly spaced rows, the bytes it reaches, and whether it shares them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pqk.errors import InputError, Reason

MAX_STRIDE = 1 << 24
"""elements from row to row: the rows of a block, at most 128, are addressed with 32 bits from its 64-bit base"""


def row_stride(x: Tensor) -> int:
    """Elements from one row of [..., K] to the next; -1 where rows are not evenly spaced."""
    stride, expected = x.shape[-1] if x.ndim else 1, -1
    for size, step in reversed(list(zip(x.shape[:-1], x.stride()[:-1], strict=True))):
        if size == 1:
            continue
        if expected == -1:
            stride = step
        elif step != expected:
            return -1
        expected = step * size
    return stride


def why_not_rows(name: str, x: Tensor) -> Reason | None:
    """Why a kernel cannot read or write the rows of `x` in place, else None."""
    if x.numel() and ((x.stride(-1) != 1 and x.shape[-1] > 1) or not 0 <= row_stride(x) < MAX_STRIDE):
        return f"{name}: shape {list(x.shape)} has strides {x.stride()}; rows must be dense and evenly spaced"
    return None


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """The first byte that `tensor` reaches, and the one after its last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_disjoint(name: str, out: Tensor, inputs: Mapping[str, Tensor | None]) -> None:
    """Raise `InputError` where `out`, which a kernel will write, shares memory with an input or with itself."""
    spans = sorted((stride, n) for n, stride in zip(out.shape, out.stride(), strict=True) if n > 1)
    reach = 0
    for stride, n in spans:
        if stride <= reach:
            raise InputError(
                f"{name}: strides {out.stride()} of shape {list(out.shape)} overlap; a kernel cannot write it"
            )
        reach += stride * (n - 1)
    low, high = byte_range(out)
    for other, tensor in inputs.items():
        if tensor is None or tensor.device != out.device:
            continue
        start, end = byte_range(tensor)
        if start < high and low < end:
            raise InputError(f"{name}: shares memory with {other}; write to a tensor of its own")
