"""Residual nets for small images: what they cost, their shapes, and that they are captured and pruned as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pqk.core.costs import count_macs, count_parameters
from pqk.errors import InputError
from pqk.models.residual import Residual, residual
from pqk.passes.capture.capture import capture

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("net", "parameters", "macs"),
    [(residual(), 692_482, 36_054_912), (residual(32, (1, 1, 1), (2, 2, 2)), 309_738, 13_206_784)],
)
def test_they_cost_what_they_say(net: Residual, parameters: int, macs: int) -> None:
    assert (count_parameters(net), count_macs(net.eval(), (IMAGES,))) == (parameters, macs)


def test_widths_strides_and_options() -> None:
    net = residual(8, (1, 2), (2, 1), classes=7, channels=1, stem=2).eval()
    assert net(torch.randn(2, 1, 20, 28)).shape == (2, 7)
    assert net.get_submodule("stage1")(torch.randn(2, 8, 10, 14)).shape == (2, 8, 5, 7)
    assert net.get_submodule("stage2")(torch.randn(2, 8, 5, 7)).shape == (2, 16, 5, 7)
    identities = [m for m in net.modules() if isinstance(m, nn.Identity)]
    assert len(identities) == 1  # the second block of stage 2 alone keeps its shape


def test_it_is_captured_with_its_numbers() -> None:
    net = residual(8).eval()
    with torch.no_grad():
        assert torch.allclose(capture(net, (IMAGES,))(IMAGES), net(IMAGES), atol=1e-4)


@pytest.mark.parametrize("options", [{"width": 0}, {"stages": ()}, {"strides": (1,)}, {"stem": 0}, {"channels": 0}])
def test_what_is_no_net_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be 1 or more, in every stage, with one stride a stage"):
        residual(**options)
