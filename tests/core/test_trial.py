"""Two forms of a model at several sizes: alike, or which of them fails or answers otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pqk.core.trial import Trial

AXES = [["batch", "time"]]


class Model(nn.Module):
    """What a function makes of x; it takes no more than 8 steps, and is none where there is one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 8:
            raise ValueError("too long")
        return self.function(x / 0 * 0 if x.shape[1] == 1 else x)


def trial(graph: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor] = torch.relu) -> Trial:
    return Trial(Model(function), graph, (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),), AXES)


def refusing(x: Tensor) -> Tensor:
    return x.reshape(3, 4).relu()


@pytest.mark.parametrize(
    ("graph", "outcomes"),
    [
        (torch.relu, ["same", "model", "model", "same"]),
        (lambda x: x.relu() * (1 + 1e-5), ["same", "model", "model", "same"]),
        (refusing, ["graph", "model", "model", "graph"]),
        (lambda x: x[:, :4].relu(), ["shape", "model", "model", "same"]),
        (lambda x: x.relu() * (1 if x.shape == (3, 4) else 2), ["value", "model", "model", "value"]),
    ],
)
def test_outcomes(graph: Callable[[Tensor], Tensor], outcomes: list[str]) -> None:
    tried = trial(graph)
    assert tried.at_example.outcome == "same" and not tried.two_models()
    sizes = [{"time": 6}, {"time": 9}, {"time": 1}, {"batch": 5, "time": 3}]
    assert [tried.run(at).outcome for at in sizes] == outcomes


def test_infinities_are_answers() -> None:
    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(x < 0, -torch.inf)

    assert trial(masked, masked).run({"time": 6}).outcome == "same"
    assert trial(lambda x: masked(x).clamp_min(-1e9), masked).at_example.largest == float("inf")


def test_a_large_difference_on_the_example_excuses_none_elsewhere() -> None:
    assert trial(lambda x: x.relu() * (1.06 if x.shape[1] == 4 else 1.5)).run({"time": 6}).outcome == "value"
    assert trial(lambda x: x.relu() * 2).two_models()
    assert not trial(torch.rand_like, torch.rand_like).two_models(), "it is not the same twice itself"


def test_values_that_have_a_meaning_are_left_as_they_are() -> None:
    """Of one alone, only whole numbers are taken."""

    def looked_up(x: Tensor) -> Tensor:
        if not torch.equal(x, x.round()):
            raise ValueError("not a whole number")
        return torch.arange(100.0)[x.long()]

    tried = Trial(Model(looked_up), looked_up, (torch.arange(12.0).reshape(3, 4),), AXES)
    assert tried.run({"time": 6}).outcome == "same"


def test_a_batch_of_none() -> None:
    assert trial(torch.relu).answers_none()
    assert not trial(lambda x: x.reshape(x.shape[0], -1)).answers_none()
    assert not trial(lambda x: x.sum(0)).answers_none()
