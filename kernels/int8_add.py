"""int8_add: two quantized tensors, each with its own qparams, added and requantized in one pass over memory.

    y = (a - a_zero_point) * a_scale + (b - b_zero_point) * b_scale      float32, in this order
    out = steps(y)                                                       see `epilogue`

One launch takes the place of two dequantizes, the add, the activation and the quantize. A residual add right after a
convolution or linear layer needs no launch at all: it is a step of that layer's epilogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pqk.errors import Reason
from pqk.kernels.common import binary
from pqk.kernels.common.binary import Binary
from pqk.kernels.common.checks import example
from pqk.kernels.common.epilogue import epilogue
from pqk.kernels.common.launch import Launch, output_of
from pqk.kernels.common.triton import jit, tl
from pqk.kernels.common.values import example_steps, load_values


class Add(Binary):
    """The arguments of `pqk::int8_add`; `b` has the shape of `a`."""


def reference(add: Add) -> Tensor:
    """The formula in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    a, b = add.operands()
    return add.finish(a + b)


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
    return binary.plan(add, int8_add_kernel)


def run(add: Add) -> Tensor:
    """The sum by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    add.check()
    return output_of(plan(add))


def why_not_supported(add: Add) -> Reason | None:
    """Why the kernel cannot run these arguments, else None: it runs whatever `check` lets through."""
    return None


int8_add = binary.operator("int8_add", Add, reference, run, why_not_supported)


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
