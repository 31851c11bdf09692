"""Copies of modules: what `copy.deepcopy` refuses, and what hooks compute."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pqk.copies import copy_of
from pqk.errors import InputError
from pqk.passes.capture.capture import capture
from pqk.task.checks import try_forward


def weight_norm(layer: nn.Module, name: str = "weight") -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name)


def spectral_norm(layer: nn.Module) -> nn.Module:
    nn.utils.spectral_norm(layer)
    layer(torch.randn(4, 4, 8))  # a step of its power iteration
    return layer


def masked(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.parametrize("hooked", [weight_norm, spectral_norm, masked])
def test_weights_that_hooks_compute_are_parameters_of_the_copy(hooked: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(hooked(nn.Conv1d(4, 4, 3)), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    names, x = sorted(model.state_dict()), torch.randn(2, 4, 8)
    want = model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    twin = copy_of(model)
    assert torch.equal(twin(x), want) and not twin[0]._forward_pre_hooks  # type: ignore[index]
    assert sorted(twin.state_dict()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(p.is_leaf and p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert sorted(model.state_dict()) == names and torch.equal(model(x), want)  # the user's is untouched


def test_both_weights_of_a_recurrent_layer_are_folded() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        weight_norm(layer, name)
    x = torch.randn(5, 2, 3)
    want = layer(x)[0]
    twin = copy_of(layer)
    torch.testing.assert_close(twin(x)[0], want, rtol=0, atol=0)
    assert sorted(twin.state_dict()) == ["bias_hh_l0", "bias_ih_l0", "weight_hh_l0", "weight_ih_l0"]


class Keeper(nn.Module):
    """Keeps activations of its last pass, with their gradients' history."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.kept: list[dict[str, Tensor]] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        self.kept = [{"hidden": self.last}]
        return self.head(self.last)


def test_an_activation_of_the_last_pass_is_copied_without_its_history() -> None:
    torch.manual_seed(0)
    model = Keeper().eval()
    x = torch.randn(2, 3)
    want = model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    twin = copy_of(model)
    assert torch.equal(twin(x), want)
    twin = copy_of(model)
    assert twin.last is not None and twin.last.is_leaf and twin.kept[0]["hidden"] is twin.last  # one, as it was
    assert model.last is not None and model.last.grad_fn is not None and twin.last is not model.last


def test_what_cannot_be_copied_is_named_with_what_takes_it_out() -> None:
    model = nn.Sequential(nn.Linear(3, 2), Keeper())
    model[1].guard = threading.Lock()  # type: ignore[assignment]
    model[1](torch.randn(2, 3))  # an activation that could be copied is not to blame
    with pytest.raises(
        InputError, match=r'its attribute 1\.guard, a lock, cannot.*`del teacher\.get_submodule\("1"\)\.guard`'
    ):
        copy_of(model)


def test_a_plain_copy_shares_nothing_and_ties_what_was_tied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).eval()
    model[2].weight = model[0].weight
    twin = copy_of(model)
    assert twin[2].weight is twin[0].weight and not twin.training
    shared = {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in twin.state_dict().values()}
    assert not shared


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        for other in more:
            x = x + other
        return self.layer(x)


class Named(Variadic):
    def forward(self, x: Tensor, *, mask: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return self.layer(x * mask) * scale


def test_inputs_that_forward_takes_as_a_tuple_are_captured() -> None:
    model, example = Variadic().eval(), tuple(torch.randn(2, 4) for _ in range(3))
    graph = capture(copy_of(model), example, input_names=["a", "b", "c"])
    inputs = tuple(torch.randn(5, 4) for _ in range(3))
    torch.testing.assert_close(graph(*inputs), model(*inputs))


def test_an_input_by_keyword_alone_is_refused_with_the_wrapper_that_helps() -> None:
    with pytest.raises(InputError, match=r"Named\.forward takes mask by keyword alone.*def forward\(self, x, mask\)"):
        try_forward(Named(), (torch.randn(2, 4), torch.randn(2, 4)), "example")
