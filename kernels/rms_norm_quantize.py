"""rms_norm_quantize: residual add, RMS norm and quantization in one pass over the row.

    v = x (+ residual),   y = v / sqrt(mean(v²) + eps) * weight (+ bias),   out = steps(y)

over the last axis, in float32 (`_norm` has the order of operations). A second output keeps the float sum, which the
residual stream of a pre-norm transformer goes on with, or the float norm, in the same launch. Zhang and Sennrich 2019,
"Root Mean Square Layer Normalization".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pqk.kernels.common import norm as common
from pqk.kernels.common.launch import Launch, falls_back
from pqk.kernels.common.norm import Case, Norm, why_not_supported


def reference(norm: Norm) -> tuple[Tensor, Tensor]:
    """(out, kept) in plain torch, on any device. Raises `InputError` for arguments that do not fit each other."""
    return common.reference(norm, centre=False)


def plan(norm: Norm) -> Launch:
    """The launch; its outputs are `args["out_ptr"]` and `args["kept_ptr"]`. Tensors may be on the `meta` device."""
    return common.plan(norm, centre=False)


def run(norm: Norm) -> tuple[Tensor, Tensor]:
    """(out, kept) by the kernel: on a GPU, or on CPU tensors under Triton's interpreter. Raises `InputError`."""
    return common.run("rms_norm_quantize", norm, centre=False)


@torch.library.custom_op("pqk::rms_norm_quantize", mutates_args=(), device_types="cpu")
def rms_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    params: Tensor,
    steps: str,
    eps: float,
    x_scale: float,
    x_zero_point: int,
    residual_scale: float,
    residual_zero_point: int,
    keep: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `norm.Norm`. → `out_dtype` of the shape of `x`; what `keep` names, a float, or [0]. Raises `InputError`."""
    grids = (x_scale, x_zero_point, residual_scale, residual_zero_point)
    return reference(Norm(x, residual, weight, bias, params, steps, eps, *grids, keep, out_dtype))


@rms_norm_quantize.register_kernel("cuda")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    norm = Norm(*arguments)
    norm.check()
    return reference(norm) if falls_back("rms_norm_quantize", norm.x.device, why_not_supported(norm)) else run(norm)


@rms_norm_quantize.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return common.empty(Norm(*arguments))


CASES = (
    Case((2, 16, 384), keep="sum"),
    Case((1, 64, 2048), torch.bfloat16, torch.bfloat16, keep="sum"),
    Case((4, 49, 96), torch.uint8, torch.uint8, out_dtype=torch.uint8),
    Case((5, 77), torch.float16, torch.float16, keep="norm", steps="silu,quantize", out_dtype=torch.uint8),
    Case((3, 1000), torch.int8, None, affine=False, steps="", out_dtype=torch.bfloat16),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: its operands and its outputs, once."""
    return case.traffic()
