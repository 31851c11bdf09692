"""RMS norms that are spelled out become one operator, and what only looks like one stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pqk.core.aten import aten
from pqk.passes.capture.capture import capture

WIDTH = 6


class Norm(nn.Module):
    """Computes `form(x, weight)` for x [B, T, 6]."""

    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(2, keepdim=True) + 1e-6) * (1.0 + weight)


def bare(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def over_tokens(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * weight


def of_another(x: Tensor, weight: Tensor) -> Tensor:
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def read_twice(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * scale * weight + scale


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "norms"), [(llama, 1), (gemma, 1), (bare, 1), (over_tokens, 0), (of_another, 0), (read_twice, 0)]
)
def test_it_is_one_operator_exactly_where_it_is_a_norm(form: Callable[[Tensor, Tensor], Tensor], norms: int) -> None:
    module, x = Norm(form).eval(), torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    graph = capture(module, (x,))
    assert [n.target for n in graph.graph.nodes].count(aten.rms_norm.default) == norms
    torch.testing.assert_close(graph(x), module(x))
