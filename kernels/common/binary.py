"""Shared by the kernels of two quantized tensors, `int8_add` and `int8_mul`: arguments, launch, registration.

    y = (a - a_zero_point) * a_scale ∘ (b - b_zero_point) * b_scale      float32; ∘ is the op's
    out = steps(y)                                                       see `epilogue`

One launch takes the place of two dequantizes, the operation, an activation after it and the quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

from pqk.errors import Reason
from pqk.kernels.common.checks import allocate
from pqk.kernels.common.epilogue import apply_steps, encode
from pqk.kernels.common.launch import Launch, cdiv, falls_back
from pqk.kernels.common.values import check_plain_steps, check_values, values


@dataclass(frozen=True)
class Binary:
    """The arguments of `pqk::int8_add` and `pqk::int8_mul`, in their order.

    `a` and `b`: uint8 or int8, contiguous, `b` of `b_shape`. `steps`, `params`, `out_dtype`: see `epilogue`; no step
    may read a residual.
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

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape that `b` must have beside this `a`."""
        return tuple(self.a.shape)

    def check(self) -> None:
        """Raise `InputError` for arguments that no implementation takes."""
        device = self.a.device
        check_values("a", self.a, self.a_scale, self.a_zero_point, device=device)
        check_values("b", self.b, self.b_scale, self.b_zero_point, device=device, shape=self.b_shape)
        check_plain_steps(self.steps, self.params, self.out_dtype, device)

    def operands(self) -> tuple[Tensor, Tensor]:
        """The float32 values of `a` and `b`. Raises `InputError` for arguments that do not fit each other."""
        self.check()
        return values(self.a, self.a_scale, self.a_zero_point), values(self.b, self.b_scale, self.b_zero_point)

    def finish(self, y: Tensor) -> Tensor:
        """The output of the reference, for float32 `y`."""
        return apply_steps(y, self.steps, self.params, None, self.out_dtype)


T = TypeVar("T", bound=Binary)


def plan(call: Binary, kernel: Any, sizes: Mapping[str, int] | None = None, **constants: Any) -> Launch:
    """The launch of `kernel`, which has `sizes` and `constants` beside the arguments that both kernels have.

    Its output is `args["out_ptr"]`. The tensors may be on the `meta` device.
    """
    elements = call.a.numel()
    block = 1024 if elements < 1 << 20 else 4096
    return Launch(
        kernel,
        (cdiv(elements, block),),
        {
            "a_ptr": call.a, "b_ptr": call.b, "out_ptr": allocate(call.a.shape, call.out_dtype, call.a.device),
            "params_ptr": call.params, "elements": elements, **(sizes or {}),
            "a_scale": float(call.a_scale), "a_zero_point": float(call.a_zero_point),
            "b_scale": float(call.b_scale), "b_zero_point": float(call.b_zero_point),
        },
        {**constants, "STEPS": encode(call.steps), "BLOCK": block},
    )  # fmt: skip


def operator(
    name: str,
    arguments: Callable[..., T],
    reference: Callable[[T], Tensor],
    run: Callable[[T], Tensor],
    why_not_supported: Callable[[T], Reason | None],
) -> CustomOpDef:
    """The operator `pqk::name`, its reference on a CPU and its kernel on a CUDA device.

    It takes the arguments of `Binary` and returns `out_dtype` of the shape of `a`.
    """

    def on_cpu(
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
        return reference(arguments(a, b, params, steps, a_scale, a_zero_point, b_scale, b_zero_point, out_dtype))

    op = torch.library.custom_op(f"pqk::{name}", on_cpu, mutates_args=(), device_types="cpu")

    @op.register_kernel("cuda")
    def _(*values: Any) -> Tensor:
        call = arguments(*values)
        return reference(call) if falls_back(name, call.a.device, why_not_supported(call)) else run(call)

    @op.register_fake
    def _(*values: Any) -> Tensor:
        call = arguments(*values)
        return call.a.new_empty(call.a.shape, dtype=call.out_dtype)

    return op
