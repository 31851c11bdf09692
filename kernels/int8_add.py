"""int8_add: two quantized tensors, each with its own qparams, added and requantized in one pass over memory.

    y = (a - a_zero_point) * a_scale + (b - b_zero_point) * b_scale      float32, in this order
    out = steps(y)                                                       see `_epilogue`

One launch takes the place of two dequantizes, the add, the activation and the quantize. A residual add right after a
convolution or linear layer needs no launch at all: it is a step of that layer's epilogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.errors import Reason
from pqk.kernels.common.checks import allocate, example
from pqk.kernels.common.epilogue import apply_steps, encode, epilogue
from pqk.kernels.common.launch import Launch, cdiv, falls_back, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import check_plain_steps, check_values, example_steps, load_values, values


@dataclass(frozen=True)
class Add:
    """The arguments of `pqk::int8_add`, in their order: `a` and `b` uint8 or int8, of one shape and contiguous.

    `steps`, `params`, `out_dtype`: see `_epilogue`; no step may read a residual.
    """

    a: Tensor
    b: Tensor
    params: Tensor
    steps: str
    a_scale: float
    a_zero_point: int
    b_scale: float
    b_zero_point: int
    out_dtype: torch.dtype

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        check_values("a", self.a, self.a_scale, self.a_zero_point, device=self.a.device)
        check_values("b", self.b, self.b_scale, self.b_zero_point, device=self.a.device, shape=self.a.shape)
        check_plain_steps(self.steps, self.params, self.out_dtype, self.a.device)


def reference(add: Add) -> Tensor:
    """The formula in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    add.check()
    y = values(add.a, add.a_scale, add.a_zero_point) + values(add.b, add.b_scale, add.b_zero_point)
    return apply_steps(y, add.steps, add.params, None, add.out_dtype)


@jit
def int8_add_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, params_ptr, elements, a_scale, a_zero_point, b_scale, b_zero_point,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    y = load_values(a_ptr, offset, inside, a_scale, a_zero_point)
    y += load_values(b_ptr, offset, inside, b_scale, b_zero_point)
    y = epilogue(y, STEPS, params_ptr, None, offset, inside)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan(add: Add) -> Launch:
    """The launch; its output is `args["out_ptr"]`. The tensors may be on the `meta` device."""
    elements = add.a.numel()
    out = allocate(add.a.shape, add.out_dtype, add.a.device)
    block = 1024 if elements < 1 << 20 else 4096
    return Launch(
        int8_add_kernel,
        (cdiv(elements, block),),
        {
            "a_ptr": add.a, "b_ptr": add.b, "out_ptr": out, "params_ptr": add.params, "elements": elements,
            "a_scale": float(add.a_scale), "a_zero_point": float(add.a_zero_point),
            "b_scale": float(add.b_scale), "b_zero_point": float(add.b_zero_point),
        },
        {"STEPS": encode(add.steps), "BLOCK": block},
    )  # fmt: skip


def run(add: Add) -> Tensor:
    """The sum by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    add.check()
    return output_of(plan(add))


def why_not_supported(add: Add) -> Reason | None:
    """Why the kernel cannot run these arguments, else None: it runs whatever `check` lets through."""
    return None


@torch.library.custom_op("pqk::int8_add", mutates_args=(), device_types="cpu")
def int8_add(
    a: Tensor,
    b: Tensor,
    params: Tensor,
    steps: str,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `Add`. → `out_dtype` of the shape of `a`. Raises `InputError`."""
    return reference(Add(a, b, params, steps, a_scale, a_zero_point, b_scale, b_zero_point, out_dtype))


@int8_add.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    add = Add(*arguments)
    return reference(add) if falls_back("int8_add", add.a.device, why_not_supported(add)) else run(add)


@int8_add.register_fake
def _(*arguments: Any) -> Tensor:
    add = Add(*arguments)
    return add.a.new_empty(add.a.shape, dtype=add.out_dtype)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    a_dtype: torch.dtype = torch.uint8
    b_dtype: torch.dtype = torch.uint8
    steps: str = "relu,quantize"
    out_dtype: torch.dtype = torch.uint8

    def arguments(self, device: str = "meta", seed: int = 0) -> Add:
        a = example(self.shape, self.a_dtype, device, seed)
        b = example(self.shape, self.b_dtype, device, seed + 1)
        a_zero, b_zero = (101 if d == torch.uint8 else 0 for d in (self.a_dtype, self.b_dtype))
        params = example_steps(self.steps, self.out_dtype, device)
        return Add(a, b, params, self.steps, 0.013, a_zero, 0.017, b_zero, self.out_dtype)


CASES = (
    Case((1, 32, 32, 16)),
    Case((2, 8, 8, 64), torch.int8, torch.int8, out_dtype=torch.int8),
    Case((3, 7, 5, 3), torch.uint8, torch.int8, "hard_swish,quantize", torch.int8),
    Case((16, 384), torch.int8, torch.int8, "", torch.float32),
    Case((5, 129), torch.int8, torch.uint8, "requantize,silu", torch.float16),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: both inputs and the output, once."""
    return math.prod(case.shape) * (2 + case.out_dtype.itemsize)
