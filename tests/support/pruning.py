"""Networks and tasks to prune: nothing at a neutral value, fixed data, labels that the network gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.target.target import Target
from pqk.task.task import Task


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with nothing left at a neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point():
            noise = torch.rand(t.shape, generator=generator)
            fan = (t[0].numel() if t.ndim > 1 else 4) ** 0.5
            t.data.copy_(
                0.5 + noise
                if "running_var" in name or (t.ndim == 1 and "weight" in name)
                else (noise * 2 - 1) * 2 / fan
            )
    return model.eval()


def data(shape: tuple[int, ...], count: int = 64) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(7))


def task_of(model: nn.Module, shape: tuple[int, ...]) -> Task:
    x = data(shape)
    with torch.no_grad():
        part = ArrayData((x,), model(x).argmax(1), batch_size=32)
    return Task(part, part, validation=part)


def program_of(model: nn.Module, **run: Any) -> Program:
    return Program(model, copy.deepcopy(model), Stage.MODULE, Target.named("x86-avx2"), RunContext(**run))
