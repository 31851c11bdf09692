"""Eval mode for a while: every module has its own mode again, whatever happened meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pqk.core.costs import count_macs
from pqk.core.modes import evaluating
from pqk.knowledge import neuron_scores, suggest_pairs


def net() -> nn.Module:
    """It trains, and a batch norm in it does not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 5)).train()
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_each_module_gets_its_own_mode_back() -> None:
    model, before = net(), modes(net())
    with pytest.raises(ValueError), evaluating(model) as same:
        assert same is model and not any(modes(model))
        raise ValueError
    assert modes(model) == before and before.count(False) == 1


def test_what_looks_at_a_model_leaves_its_modes_alone() -> None:
    model, before, x = net(), modes(net()), torch.randn(2, 3, 6, 6)
    count_macs(model, (x,))
    neuron_scores(model, "0", [(x,)])
    suggest_pairs(model, net(), (x,))
    assert modes(model) == before
