"""Tokens as rows: the same bits, with a reshape only where an operator needs the axes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.core.aten import aten
from pqk.core.graph import calls, finish, shape
from pqk.passes.capture.capture import capture
from pqk.passes.convert.token_rows import keep_rows

LENGTH = (("batch", "sequence", None),)


def on_rows(net: nn.Module, x: Tensor, axes: Any = None) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The captured graph before and after."""
    before = capture(net, (x[:2],), axes=axes)
    assert isinstance(before, fx.GraphModule)
    after = copy.deepcopy(before)
    keep_rows(after)
    return before, finish(after)


def reshapes(graph_module: fx.GraphModule) -> int:
    return len(list(calls(graph_module.graph, aten.reshape.default)))


class Block(nn.Module):
    """Of a transformer, without its attention: [B, T, 8] -> what `end` makes of [B, T, 8]."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any] = lambda first, last: last) -> None:
        super().__init__()
        self.start, self.middle = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.gain = nn.Linear(8, 12), nn.Linear(12, 8), nn.Parameter(torch.rand(8))
        self.end = end

    def forward(self, x: Tensor) -> Any:
        first = self.start(x)
        middle = self.middle(first + self.down(F.gelu(self.up(first))))
        last = middle * self.gain + self.down(torch.tanh(self.up(middle)).clamp(-0.5, 0.5))
        return self.end(first, last)


ENDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
    "all": (lambda first, last: last, 2),
    "first token": (lambda first, last: last[:, 0], 2),
    "mean": (lambda first, last: last.mean(1), 2),
    "both": (lambda first, last: (first, last), 2),
    "heads": (lambda first, last: last.reshape(last.shape[0], -1, 2, 4).transpose(1, 2), 2),
    "over tokens": (lambda first, last: last + last.sum(1, keepdim=True), 2),
}
"""what reads the last sum, and how many reshapes are left: into rows, and out of them"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", [None, LENGTH], ids=["fixed", "free"])
@pytest.mark.parametrize("name", ENDS)
def test_rows_are_the_same_bits_and_two_reshapes(name: str, axes: Any) -> None:
    end, left = ENDS[name]
    torch.manual_seed(0)
    x = torch.randn(5, 7, 8)
    before, after = on_rows(Block(end), x, axes)
    assert reshapes(after) == left < reshapes(before)
    for batch in (x, x[:1], *([x[:, :3]] if axes else [])):
        ours, theirs = after(batch), before(batch)
        for one, other in zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, theirs)), strict=True):
            assert torch.equal(one, other)
    inner = list(calls(after.graph, aten.gelu.default, aten.tanh.default))
    assert len(inner) == 2 and all(len(shape(n)) == 2 for n in inner)


def test_four_axes_are_rows_as_well() -> None:
    """The channels-last blocks of ConvNeXt."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 8)
    before, after = on_rows(Block(), x)
    assert torch.equal(after(x), before(x)) and reshapes(after) == 2


def test_a_norm_over_tokens_keeps_its_axes() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 8)
    before, after = on_rows(Block(lambda first, last: F.layer_norm(last, (7, 8))), x)
    assert torch.equal(after(x), before(x)) and reshapes(after) == 2


class Windows(nn.Module):
    """A mask and a table of positions are added to what is not on rows; sums of both shapes meet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.places = nn.Parameter(torch.randn(7, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x)) + self.places
        return self.second(y * x[..., :1])


def test_what_is_broadcast_over_tokens_keeps_its_axes() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 7, 8)
    before, after = on_rows(Windows(), x)
    assert torch.equal(after(x), before(x)) and reshapes(after) == reshapes(before)


def test_without_linear_layers_nothing_changes() -> None:
    net = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Tanh())
    before, after = on_rows(net, torch.randn(3, 4, 8))
    assert [n.target for n in after.graph.nodes] == [n.target for n in before.graph.nodes]
