"""What a network costs on paper: multiply-accumulates, parameters, bytes. Milliseconds are measured elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pqk.core.modes import evaluating
from pqk.errors import InputError

INTEGER_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear)
"""modules whose weights are deployed as one byte each"""


def count_macs(module: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one sample, in eval mode.

    `example` is a batch of inputs; its size (first dimension of the first input) is divided out. Raises `InputError`
    for an empty batch.
    """
    if not example or not example[0].ndim or not len(example[0]):
        raise InputError("counting MACs needs example inputs with at least one sample in the first dimension")
    with evaluating(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*example)
    return counter.get_total_flops() // (2 * len(example[0]))


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameter values; a shared parameter counts once."""
    return sum(p.numel() for p in module.parameters())


def float_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers in FP32."""
    return 4 * sum(t.numel() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def integer_bytes(module: nn.Module) -> int:
    """Bytes of the INT8 form of a float module: a byte for each value of conv and linear weights and of tables of
    embeddings, four for the biases.

    Batch norm is folded into the convolution before it: it leaves an int32 bias and a float scale for each channel.
    """
    weights = {
        id(m.weight): m.weight.numel() for m in module.modules() if isinstance(m, (*INTEGER_WEIGHTS, nn.Embedding))
    }
    folded = {
        id(p): p.numel()
        for m in module.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        for p in m.parameters(recurse=False)
    }
    rest = sum(p.numel() for p in module.parameters() if id(p) not in weights and id(p) not in folded)
    return sum(weights.values()) + 4 * (rest + sum(folded.values()))
