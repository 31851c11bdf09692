"""Checks of a kernel's arguments, and the allocation of its outputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pqk.errors import InputError

on_allocate: Callable[[Tensor], object] | None = None
"""called with every tensor of `allocate`; see `allocations`"""


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialized contiguous tensor for a kernel to write."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if on_allocate is not None and not tensor.is_meta:
        on_allocate(tensor)
    return tensor


def example(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Values to run a case on: normal floats, integers over the whole range of int8 or uint8, int32 up to 1000.

    On the `meta` device there are none, which is enough to compile.
    """
    shape = tuple(shape)
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype).to(device)
    limits = torch.iinfo(dtype)
    low, high = max(limits.min, -1000), min(limits.max, 1000)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype).to(device)


def check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    device: torch.device | None = None,
    shape: Sequence[int] | None = None,
    contiguous: bool = True,
) -> None:
    """Raise `InputError` unless `tensor` has one of `dtypes`, is on `device`, of `shape` (-1: any) and aligned."""
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name}: dtype is {str(tensor.dtype).removeprefix('torch.')}, must be {allowed}")
    if device is not None and tensor.device != device:
        raise InputError(f"{name}: is on {tensor.device}, the other tensors are on {device}; move it")
    if shape is not None:
        fits = len(shape) == tensor.ndim and all(
            want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise InputError(f"{name}: shape is {list(tensor.shape)}, must be {list(shape)}")
    if contiguous and not tensor.is_contiguous():
        raise InputError(f"{name}: strides {tensor.stride()} of shape {list(tensor.shape)}; call .contiguous()")
    if not tensor.is_meta and tensor.data_ptr() % tensor.element_size():
        raise InputError(
            f"{name}: address {tensor.data_ptr():#x} is not a multiple of {tensor.element_size()} bytes; clone it"
        )


_checked = WeakTensorKeyDictionary()
"""scales whose values were checked, and the version of the tensor then"""


def check_scale(
    name: str, scale: Tensor, *, device: torch.device | None = None, shape: Sequence[int] | None = None
) -> None:
    """Raise `InputError` unless `scale` is a float32 tensor of finite values above 0.

    Reading values waits for the GPU, so a tensor is read once and again only after it was written to.
    """
    check_tensor(name, scale, torch.float32, device=device, shape=shape)
    version = 0 if scale.is_inference() else scale._version
    if scale.is_meta or _checked.get(scale) == version:
        return
    bad = (~(torch.isfinite(scale) & (scale > 0))).nonzero()
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        where = f" at {list(first)}" if first else ""
        raise InputError(
            f"{name}: {float(scale[first])}{where} ({len(bad)} of {scale.numel()}); a scale must be finite and above 0"
        )
    _checked[scale] = version


def check_number(name: str, value: float) -> None:
    """Raise `InputError` unless the scale `value` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}: {value}; a scale must be finite and above 0")


@contextlib.contextmanager
def allocations(hook: Callable[[Tensor], object]) -> Iterator[None]:
    """Calls `hook` within the context with every tensor that `allocate` returns, before the kernel writes it."""
    global on_allocate
    before, on_allocate = on_allocate, hook
    try:
        yield
    finally:
        on_allocate = before
