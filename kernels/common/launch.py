"""What every kernel needs of Triton: an import that may fail, a launch that is described before it runs, and checks.

A `Launch` is one kernel over one grid with its arguments and its compile-time constants. Each kernel module builds it
in one place, `plan`, and three things read it: `launch` runs it (a GPU, or CPU tensors under `TRITON_INTERPRET=1`),
the ahead-of-time compiler turns `signature` into machine code where there is no GPU (the tensors may then be on the
`meta` device), and the tracer counts the addresses it touches. What is proven is thereby what runs.

Contraction of `a * b + c` into one rounding is off in every launch and in every compile: the epilogues reproduce
float32 arithmetic of separate operations, bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pqk.errors import InputError

TRITON_MISSING: str | None = None
"""why there is no Triton here, else None"""


class _Absent:
    """Stands where Triton would, so that modules import: any attribute, call or subscript gives itself."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> _Absent:
        return self


triton: Any = _Absent()
tl: Any = triton
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError as error:
    TRITON_MISSING = f"Triton is not installed ({error}): pip install 'pqk[triton]'"

jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""`triton.jit`; where Triton is missing, the decorated name is a stand-in that `launch` refuses to run"""

INTERPRETED: bool = TRITON_MISSING is None and bool(triton.knobs.runtime.interpret)
"""whether kernels run on CPU tensors, in Triton's interpreter: `TRITON_INTERPRET=1` when this module was imported"""

OLDEST = (8, 0)
"""the oldest compute capability that the kernels are written for: asynchronous copies and `mma.s8` of 16x8x32"""

_log = logging.getLogger("pqk.kernels")


@dataclass(frozen=True)
class Launch:
    """One kernel over one grid. `args` and `constexprs` together name every parameter of `kernel`."""

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float | None]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def options(self) -> dict[str, Any]:
        """Compile options, the same for a launch and for the ahead-of-time compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}

    def tensor(self, name: str = "out_ptr") -> Tensor:
        """An argument that is a tensor; the output where no other is named."""
        found = self.args[name]
        assert isinstance(found, Tensor)
        return found

    @property
    def device(self) -> torch.device:
        return next(a.device for a in self.args.values() if isinstance(a, Tensor))


def launch(run: Launch) -> None:
    """Run it on the device of its tensors. An empty grid runs nothing.

    Raises `InputError` where Triton is missing, and for tensors that are neither on a GPU nor interpreted.
    """
    if TRITON_MISSING is not None:
        raise InputError(f"{run.name}: {TRITON_MISSING}")
    if 0 in run.grid:
        return
    if _collected is not None:
        _collected.append(run)
        return
    device = run.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        raise InputError(
            f"{run.name}: tensors are on {device}; kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1"
        )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        run.kernel[run.grid](**run.args, **run.constexprs, **run.options)


def launched(run: Launch) -> Tensor:
    """Run it and give its output."""
    launch(run)
    return run.tensor()


_collected: list[Launch] | None = None


@contextlib.contextmanager
def collecting() -> Iterator[list[Launch]]:
    """Within it launches are collected, in order, and not run: for what reads them, such as a compiler or a tracer."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


TYPES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
}  # fmt: skip
"""Triton's words for dtypes"""


def signature(run: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """`(signature, constexprs, attrs)` of `triton.compiler.ASTSource`, specialized as a launch would be.

    An integer 1 and a None become constants; pointers and integers that 16 divides say so, which is what lets loads be
    wide. Tensors on the `meta` device count as aligned, as the allocator gives them.
    """
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    given = {**run.args, **run.constexprs}
    for i, name in enumerate(run.kernel.arg_names):
        value = given[name]
        if name in run.constexprs or value is None or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
            divisible = value.is_meta or value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            types[name], divisible = "fp32", False
        if divisible:
            attrs[i,] = [["tt.divisibility", 16]]
    return types, constants, attrs


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below `n`; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


on_allocate: Callable[[Tensor], object] | None = None
"""tests set this to fill what `allocate` gives with values that no kernel writes"""


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
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name}: dtype is {str(tensor.dtype).removeprefix('torch.')}, must be {wanted}")
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


@cache
def too_old(index: int) -> str | None:
    """Why CUDA device `index` cannot run the kernels, else None."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or capability >= OLDEST:
        return None
    name = torch.cuda.get_device_name(index)
    have, want = (".".join(map(str, c)) for c in (capability, OLDEST))
    return f"{name} has compute capability {have}; the kernels need {want}"


@dataclass(frozen=True)
class Gpu:
    """What a launch is planned for."""

    capability: tuple[int, int]
    """compute capability; an AMD GPU, which numbers otherwise, counts as the oldest"""
    processors: int
    """streaming multiprocessors, or compute units"""
    shared: int
    """bytes of shared memory that one program may have"""


_absent = Gpu(OLDEST, 108, 163 * 1024)
"""the GPU that launches are planned for where there is none: an A100"""


@contextlib.contextmanager
def planning_for(gpu: Gpu) -> Iterator[None]:
    """Within it, launches of tensors that are on no GPU are planned for this one."""
    global _absent
    before, _absent = _absent, gpu
    try:
        yield
    finally:
        _absent = before


def gpu_of(device: torch.device | str) -> Gpu:
    """The GPU that tensors are on; for what is no CUDA device the one that is planned for."""
    device = torch.device(device)
    if device.type != "cuda":
        return _absent
    return _present(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _present(index: int) -> Gpu:
    p: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Gpu(OLDEST, p.multi_processor_count, p.shared_memory_per_block)
    return Gpu((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


@cache
def _log_once(op: str, reason: str) -> None:
    _log.warning("%s runs its reference on this device: %s", op, reason)


def falls_back(op: str, device: torch.device, reason: str | None = None) -> bool:
    """Whether `op` has to run its reference on `device`: no Triton, a GPU too old, or `reason`. Logged once."""
    if reason is None:
        reason = TRITON_MISSING
    if reason is None and device.type == "cuda":
        reason = too_old(device.index if device.index is not None else torch.cuda.current_device())
    if reason is not None:
        _log_once(op, reason)
    return reason is not None


@contextlib.contextmanager
def allocations(hook: Callable[[Tensor], object]) -> Iterator[None]:
    """Within it, `hook` sees every tensor that `allocate` gives, before the kernel does."""
    global on_allocate
    before, on_allocate = on_allocate, hook
    try:
        yield
    finally:
        on_allocate = before
