"""What is no module that a copy could be made of and rewritten is refused, by `check` and by `compress` alike."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk import compress
from pqk.check import check
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.recipe.recipe import Recipe
from pqk.task.state import frozen_copy
from pqk.task.task import Task

X = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)


def task() -> Task:
    x, y = torch.randn(32, 6), torch.arange(32) % 4
    data = ArrayData(x, y, batch_size=8)
    return Task(data, data, data)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def closure() -> nn.Module:
    model = network()
    first, _, last = model
    model.forward = lambda x: last(torch.relu(first(x)))
    return model


def wrapped() -> nn.Module:
    """As people scale or normalize what a model answers."""
    model = network()
    before = model.forward
    model.forward = functools.wraps(before)(lambda x: before(x) * 2)
    return model


def hooked() -> nn.Module:
    model, other = network(), nn.Linear(4, 4)
    model.other = other
    model[2].register_forward_hook(lambda module, inputs, output: other(output))
    return model


@pytest.mark.parametrize("build", [closure, hooked])
def test_a_forward_that_holds_another_module_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match="a copy of it computes with .*weight of the module that was passed"):
        frozen_copy(build(), X)


def test_a_forward_that_wraps_the_modules_own_is_refused_or_right() -> None:
    """A bound method in a closure is that of the module that was passed."""
    with pytest.raises(InputError, match="a copy of it computes with 0.weight of the module that was passed"):
        frozen_copy(wrapped(), X)


class Listed(nn.Module):
    """Layers that torch does not see."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.layers: Any = {"list": [nn.Linear(6, 8)], "dict": {"first": nn.Linear(6, 8)}}.get(how)

    def forward(self, x: Tensor) -> Tensor:
        layer = OUTSIDE if self.layers is None else next(iter(getattr(self.layers, "values", self.layers.__iter__)()))
        return self.head(torch.relu(layer(x)))


OUTSIDE = nn.Linear(6, 8)


@pytest.mark.parametrize("how", ["list", "dict", "global"])
def test_parameters_that_torch_does_not_see_are_refused(how: str) -> None:
    with pytest.raises(InputError, match=r"computes with a parameter of shape \[8, 6\] that is none of its own"):
        frozen_copy(Listed(how).eval(), X)


def test_hooks_and_methods_of_the_modules_own_are_copied() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.inner[2].register_forward_hook(lambda module, inputs, output: output * 2)
            self.forward = self.answer

        def answer(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    model = Doubled().eval()
    twin = frozen_copy(model, X)
    with torch.no_grad():
        model.inner[0].weight.zero_()
        assert not torch.equal(twin(*X), model(*X))


class Stated(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor.*:UserWarning")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: torch.jit.script(network()), "scripted"),
        (lambda: network().half(), "0.weight is in half precision"),
        (lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}), "0 is a .*quantized already"),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Stated(8, 4)).eval(), "2._extra_state, which is no tensor"),
        (lambda: closure(), "a copy of it computes with"),
    ],
    ids=["scripted", "half", "quantized", "extra state", "closure"],
)
def test_check_and_compress_refuse_the_same(build: Callable[[], nn.Module], words: str, tmp_path: Path) -> None:
    teacher = build()
    with pytest.raises(InputError, match=words):
        check(teacher, task(), Recipe.default(trains=False))
    with pytest.raises(InputError, match=words):
        compress(teacher, task(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
