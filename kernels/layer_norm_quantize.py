"""layer_norm_quantize: residual add, layer norm and quantization in one pass over the row.

    v = x (+ residual),   y = (v - mean(v)) / sqrt(var(v) + eps) * weight + bias,   out = steps(y)

over the last axis, in float32 (`common.norm` has the order of operations). A second output keeps what a transformer
goes on with: the float sum (before the norm: pre-norm blocks) or the float norm (after it: post-norm blocks such as
BERT's), in the same launch. Ba et al. 2016, "Layer Normalization".
"""

from __future__ import annotations

import torch

from pqk.kernels.common.launch import Launch
from pqk.kernels.common.norm import Case, NormKernel
from pqk.kernels.common.norm import why_not_supported as why_not_supported

KERNEL = NormKernel("layer_norm_quantize", centre=True)
reference, plan, run = KERNEL.reference, KERNEL.plan, KERNEL.run
layer_norm_quantize = KERNEL.operator()

CASES = (
    Case((2, 16, 384), keep="norm"),
    Case((1, 128, 768), torch.int8, torch.int8, out_dtype=torch.int8),
    Case((4, 196, 96), torch.uint8, torch.uint8, out_dtype=torch.uint8),
    Case((5, 77), torch.float16, torch.float16, keep="sum", steps="requantize", out_dtype=torch.float16),
    Case((3, 1000), torch.bfloat16, None, affine=False, out_dtype=torch.uint8),
    Case((2, 4096), torch.float32, torch.int8, keep="sum"),
    Case((7, 1), steps="", out_dtype=torch.float32),
)


def specialize(case: Case, device: str = "meta") -> Launch:
    """The launch of a case."""
    return plan(case.arguments(device))


def traffic(case: Case) -> int:
    """Bytes that the case has to move: its operands and its outputs, once."""
    return case.traffic()
