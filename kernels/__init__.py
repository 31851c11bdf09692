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
    columns,
    int8_add,
    int8_attention,
    int8_concat,
    int8_conv2d,
    int8_depthwise_conv2d,
    int8_embedding,
    int8_linear,
    int8_mul,
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
    int8_mul,
    int8_pool,
    int8_concat,
    columns,
    layer_norm_quantize,
    rms_norm_quantize,
    int8_embedding,
)
"""every kernel module: a new one is a file and a line here"""


def on_cuda(op: str) -> Callable[..., Any] | None:
    """What torch runs for the operator `pqk::…` on a CUDA device; None for one that is not in `KERNELS`."""
    space, _, name = op.partition("::")
    ours = (getattr(module, name, None) for module in KERNELS if space == "pqk")
    found = next((each for each in ours if isinstance(each, torch.library.CustomOpDef)), None)
    return None if found is None else found._backend_fns["cuda"]
