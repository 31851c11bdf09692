"""What a task keeps of a network's scores of next tokens, so that no table of all scores has to be kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.data.structures import Outputs, widened
from pqk.task.classes import IGNORED

LOSS, CHOICE, TOP = "loss", "choice", "top"


def kept(outputs: Outputs, targets: Any) -> Outputs:
    """What is judged of scores [B, S, V]: each token's loss, choice, and the choice's probability.

    "loss" is float32 [B, S], in nats, 0 where nothing is learned; "choice" is int64 [B, S]; "top" is float32 [B, S].
    """
    scores = widened(outputs)
    labels = torch.full(scores.shape[:2], IGNORED) if targets is None else targets
    losses = F.cross_entropy(scores.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    best = scores.max(-1)
    return {LOSS: losses, CHOICE: best.indices, TOP: (best.values - scores.logsumexp(-1)).exp()}


def counted(targets: Tensor) -> Tensor:
    """Which tokens have a label, bool [B, S]."""
    return targets != IGNORED
