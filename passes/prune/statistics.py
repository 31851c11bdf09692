"""Batch norm's statistics, estimated again for a network that was cut.

A cut changes what arrives at every layer behind it, and the running means and variances are still those of the uncut
network. Li et al. 2020, "EagleEye", arXiv:2007.02491, section 3.3, estimate them again by forward passes alone before a
pruned network is judged; averages over batches, all alike, are those of Wu and Johnson 2021, "Rethinking 'Batch' in
BatchNorm", arXiv:2105.07576, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pqk.core.modes import evaluating
from pqk.data.structures import Inputs


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Inputs]) -> int:
    """Sets the statistics of every batch norm to their mean over batches, in place; nothing else of the model changes.

    Only the batch norms are in training mode: each layer sees what its predecessors give with the statistics of the
    batch, and no dropout. A batch of fewer than two samples is left out, as it may have no variance.

    Args:
        model: with batch norms; without any, nothing is done.
        batches: inputs, each [B, …].

    Returns:
        How many batches were used; with none, the statistics stay as they are.
    """
    norms = norms_of(model)
    used = 0
    if not norms:
        return used
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        try:
            for inputs in batches:
                if len(inputs[0]) < 2:
                    continue
                for norm in norms:
                    norm.training = True
                    norm.momentum = 1 / (used + 1)  # the mean over all batches so far; the first one forgets what was
                model(*inputs)
                used += 1
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return used
