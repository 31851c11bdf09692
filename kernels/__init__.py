"""What a fused student runs on: Triton kernels, one operator a file.

Imports torch, triton, `pqk.quant` and `pqk.errors` only; works where Triton is missing.

`import pqk.kernels` registers the `torch.library` ops of every module in `KERNELS`, which a `student.pt2` needs to
load. On a CPU an op runs its reference, on a CUDA device its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from pqk.kernels import (
    causal_attention,
    columns,
    int8_add,
    int8_attention,
    int8_concat,
    int8_conv2d,
    int8_depthwise_conv2d,
    int8_embedding,
    int8_gated_linear,
    int8_linear,
    int8_mul,
    int8_pool,
    layer_norm_quantize,
    quantize,
    rms_norm_quantize,
    rotary,
)

KERNELS: tuple[ModuleType, ...] = (
    quantize,
    int8_linear,
    int8_gated_linear,
    int8_conv2d,
    int8_depthwise_conv2d,
    int8_attention,
    causal_attention,
    int8_add,
    int8_mul,
    int8_pool,
    int8_concat,
    columns,
    layer_norm_quantize,
    rms_norm_quantize,
    rotary,
    int8_embedding,
)
"""every kernel module: a new one is a file and a line here"""


def on_cuda(op: str) -> Callable[..., Any] | None:
    """The function that torch runs for the operator `pqk::…` on a CUDA device; None for one not in `KERNELS`."""
    space, _, name = op.partition("::")
    candidates = (getattr(module, name, None) for module in KERNELS if space == "pqk")
    operator = next((each for each in candidates if isinstance(each, torch.library.CustomOpDef)), None)
    return None if operator is None else operator._backend_fns["cuda"]
