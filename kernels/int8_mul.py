"""int8_mul: the product of two quantized tensors, each with its own scale and zero point; the gate of an image.

    y = (a - a_zero_point) * a_scale * ((b - b_zero_point) * b_scale)
    out = steps(y)                                                       see `epilogue`

`b` has the shape of `a`, or, [N, 1, 1, C] beside [N, H, W, C], a value for each channel of a sample: the gate of
squeeze and excitation (Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3). One launch takes the place of
two dequantizes, the product and the quantize.
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


class Mul(Binary):
    """The arguments of `pqk::int8_mul`; `b` has the shape of `a`, or is [N, 1, …, C] beside `a` [N, …, C]."""

    @property
    def gates(self) -> bool:
        """Whether `b` has one value for each channel of a sample."""
        return self.a.ndim > 2 and self.b.shape != self.a.shape

    @property
    def b_shape(self) -> tuple[int, ...]:
        a = self.a
        return (len(a), *[1] * (a.ndim - 2), a.shape[-1]) if self.gates else super().b_shape


def reference(mul: Mul) -> Tensor:
    """The formula in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    a, b = mul.operands()
    return mul.finish(a * b)


@jit
def int8_mul_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, params_ptr, elements, sample, channels, a_scale, a_zero_point, b_scale, b_zero_point,
    GATES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements; `sample` are the elements of one sample, of which each `channels` share their gates."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < elements
    y = load_values(a_ptr, offset, inside, a_scale, a_zero_point)
    b_offset = offset
    if GATES:
        b_offset = offset // sample * channels + offset % channels
    y *= load_values(b_ptr, b_offset, inside, b_scale, b_zero_point)
    y = epilogue(y, STEPS, params_ptr, None, offset, inside)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=inside)


def plan(mul: Mul) -> Launch:
    """The launch; its output is `args["out_ptr"]`. The tensors may be on the `meta` device."""
    sizes = {"sample": math.prod(mul.a.shape[1:]), "channels": mul.a.shape[-1] if mul.a.ndim else 1}
    return binary.plan(mul, int8_mul_kernel, sizes, GATES=mul.gates)


def run(mul: Mul) -> Tensor:
    """The product by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    mul.check()
    return output_of(plan(mul))


def why_not_supported(mul: Mul) -> Reason | None:
    """Why the kernel cannot run these arguments, else None: it runs whatever `check` lets through."""
    return None


int8_mul = binary.operator("int8_mul", Mul, reference, run, why_not_supported)


@dataclass(frozen=True)
class Case:
    """A call that is tested, compiled ahead of time and traced."""

    shape: tuple[int, ...]
    gates: bool = True
    a_dtype: torch.dtype = torch.uint8
    b_dtype: torch.dtype = torch.uint8
    steps: str = "quantize"
    out_dtype: torch.dtype = torch.uint8

    @property
    def b_shape(self) -> tuple[int, ...]:
        return (self.shape[0], *[1] * (len(self.shape) - 2), self.shape[-1]) if self.gates else self.shape

    def arguments(self, device: str = "meta", seed: int = 0) -> Mul:
        a, b = example(self.shape, self.a_dtype, device, seed), example(self.b_shape, self.b_dtype, device, seed + 1)
        a_zero, b_zero = (101 if d == torch.uint8 else 0 for d in (self.a_dtype, self.b_dtype))
        params = example_steps(self.steps, self.out_dtype, device)
        return Mul(a, b, params, self.steps, 0.013, a_zero, 0.017, b_zero, self.out_dtype)


CASES = (
    Case((2, 14, 14, 96)),
    Case((2, 7, 7, 160), a_dtype=torch.int8, b_dtype=torch.int8, out_dtype=torch.int8),
    Case((3, 5, 3, 7), True, torch.int8, torch.uint8, "relu,quantize", torch.int8),
    Case((16, 384), False, torch.int8, torch.int8, "", torch.float32),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: both inputs and the output, once."""
    return math.prod(case.shape) * (1 + case.out_dtype.itemsize) + math.prod(case.b_shape)
