"""rms_norm_quantize: residual add, RMS norm and quantization in one pass over the row.

    v = x (+ residual),   y = v / sqrt(mean(v²) + eps) * weight (+ bias),   out = steps(y)

over the last axis, in float32 (`common.norm` has the order of operations). A second output keeps the float sum, which
the residual stream of a pre-norm transformer goes on with, or the float norm, in the same launch. Zhang and Sennrich
2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch

from pqk.kernels.common.launch import Launch
from pqk.kernels.common.norm import Case, NormKernel
from pqk.kernels.common.norm import why_not_supported as why_not_supported

KERNEL = NormKernel("rms_norm_quantize", centre=False)
reference, plan, run = KERNEL.reference, KERNEL.plan, KERNEL.run
rms_norm_quantize = KERNEL.operator()

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
