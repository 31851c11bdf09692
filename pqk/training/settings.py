"""How a student is trained: the settings, and the optimizer and the learning rate that they mean."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from pqk.errors import InputError
from pqk.settings import settings


@settings
class Training:
    """How a student is trained; the fields that every training pass shares."""

    epochs: float = Field(default=1.0, gt=0)
    """epochs over the training data; a fraction is allowed"""
    learning_rate: float = Field(default=0.05, gt=0)
    """the peak learning rate"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd is with Nesterov momentum"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """of sgd"""
    weight_decay: float = Field(default=1e-4, ge=0)
    """of weight matrices and filters only, never of biases, norms and quantizer scales"""
    schedule: Literal["cosine", "one_cycle", "constant"] = "cosine"
    """cosine falls from the peak after the warm-up; one_cycle rises over the warm-up from 1/25 and falls to 1e-4"""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """share of the steps over which the rate rises"""
    clip: float | None = Field(default=None, gt=0)
    """gradients are scaled to at most this norm; by default not at all, and in `distill` after `capture` to 1.0"""
    average: float = Field(default=0.0, ge=0)
    """the student ends as the exponential moving average of its weights over this many epochs; 0: the last weights"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes forward passes in bfloat16 autocast, weights stay float32; on a CPU without bfloat16 instructions,
    where that is slower, it is fp32, which is logged"""
    checkpoint_seconds: float = Field(default=100.0, gt=0)
    """a killed run loses at most this much"""

    @property
    def training_epochs(self) -> float:
        """Epochs over the training data that the pass takes."""
        return self.epochs

    @property
    def notes_losses(self) -> bool:
        """Whether what the pass notes is about its training, of which a rehearsal says nothing."""
        return True

    def rehearsal(self, epochs: float) -> Any:
        """The same training of at most so many epochs."""
        return dataclasses.replace(self, epochs=min(self.epochs, epochs))


def rate(training: Training, progress: float) -> float:
    """The learning rate's factor at `progress` (0 to 1) of the training."""
    if progress < training.warmup:
        low = 0.04 if training.schedule == "one_cycle" else 0.0
        return low + (1 - low) * (progress / training.warmup)
    if training.schedule == "constant":
        return 1.0
    done = (progress - training.warmup) / (1 - training.warmup)
    low = 1e-4 if training.schedule == "one_cycle" else 0.0
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizer_for(training: Training, *modules: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all parameters that train. Raises `InputError` where there are none.

    Only tensors of two or more axes decay: never biases, norms and scales (LSQ: no decay on s).
    """
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("distill: the student has no trainable parameters")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if training.optimizer == "adamw":
        # Fused: one pass over each tensor; of an encoder's step, ten over its word table were the half.
        return torch.optim.AdamW(groups, lr=training.learning_rate, fused=True)
    return torch.optim.SGD(
        groups, lr=training.learning_rate, momentum=training.momentum, nesterov=training.momentum > 0
    )
