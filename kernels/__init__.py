"""Triton kernels, one op a file. Imports torch, triton, `pqk.qparams` and `pqk.errors`; works where Triton is missing.

`import pqk.kernels` registers the `torch.library` ops of every module in `KERNELS`, which a `student.pt2` needs to
load. On a CPU an op runs its reference, on a CUDA device its kernel.
"""

from __future__ import annotations

from types import ModuleType

from pqk.kernels import (
    int8_add,
    int8_attention,
    int8_concat,
    int8_conv2d,
    int8_depthwise_conv2d,
    int8_embedding,
    int8_linear,
    int8_pool,
    layer_norm_quantize,
    quantize,
    rms_norm_quantize,
)

KERNELS: tuple[ModuleType, ...] = (
    quantize,
    int8_linear,
    int8_conv2d,
    int8_depthwise_conv2d,
    int8_attention,
    int8_add,
    int8_pool,
    int8_concat,
    layer_norm_quantize,
    rms_norm_quantize,
    int8_embedding,
)
"""every kernel module: a new one is a file and a line here"""
