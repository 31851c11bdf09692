"""What modules were given and returned, whatever an operator in place writes over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pqk.core.calls import watch
from pqk.knowledge import neuron_scores, suggest_pairs
from pqk.knowledge.taps import tap
from pqk.passes.capture.capture import capture
from pqk.passes.prune.blocks import find_blocks


class Written(nn.Module):
    """torchvision's way: a batch norm, whose output the ReLU behind it writes over, and a sum in place."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.second = nn.ReLU(inplace=inplace), nn.Conv2d(6, 6, 3, padding=1)
        self.last, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        y = self.last(self.second(x))
        if self.relu.inplace:
            y += x
        else:
            y = y + x
        return self.head(self.relu(y).mean((2, 3)))


class Clones(TorchDispatchMode):
    """Counts copies of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


POINTS = ["conv", "norm", "relu", "last"]
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", [False, True])
def test_a_feature_is_what_the_module_returned(train: bool) -> None:
    """That of a network that writes nothing over, with the same gradients, pass after pass, and of a captured copy."""
    written, plain = (Written(inplace).train(train) for inplace in (True, False))
    taps = [tap(model, POINTS) for model in (written, plain)]
    for _ in range(3):
        (outputs, features), (want, wanted) = (t(X) for t in taps)
        assert torch.equal(outputs, want)
        assert [p for p in POINTS[:2] + POINTS[3:] if not torch.equal(features[p], wanted[p])] == []
        for out, seen in ((outputs, features), (want, wanted)):
            ((seen["norm"] ** 3).sum() + seen["last"].sum() + out.square().sum()).backward()
        for (name, p), q in zip(written.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    if not train:
        _, captured = tap(capture(Written(), (X[:2],)), ["norm", "last"])(X)
        _, features = taps[0](X)
        for point, value in captured.items():
            torch.testing.assert_close(value, features[point])


def test_only_what_is_written_over_is_copied() -> None:
    taps = {inplace: tap(Written(inplace).eval(), POINTS) for inplace in (True, False)}
    counts = {}
    for inplace, tapped in taps.items():
        tapped(X)  # finds out
        with torch.no_grad():
            tapped(X)
            with Clones() as clones:
                tapped(X)
        counts[inplace] = clones.count
    assert counts == {True: 2, False: 0}  # norm and last


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.relu_() if x.sum() > 0 else y.abs()


def test_another_way_through_the_model_is_noticed() -> None:
    model = Sometimes()
    tapped, x = tap(model, ["layer"]), torch.rand(4, 3)
    for inputs in (-x, x, -x, x):
        assert torch.equal(tapped(inputs)[1]["layer"], model.layer(inputs))


def test_features_are_paired_by_what_they_were() -> None:
    """A batch norm and the ReLU that writes over it are two features, as they are in a network without such."""
    pairs = [suggest_pairs(Written(a).eval(), Written(b).eval(), (X,)) for a, b in ((True, True), (False, False))]
    assert [p.cka for p in pairs[0]] == [p.cka for p in pairs[1]]
    assert {p.point for p in pairs[0]} == {p.point for p in pairs[1]}


def test_neurons_are_scored_on_what_the_module_returned() -> None:
    for point in ("norm", "last"):
        scores = [neuron_scores(Written(inplace).eval(), point, [(X,)]) for inplace in (True, False)]
        torch.testing.assert_close(*scores)


class Preactivated(nn.Module):
    """relu(x) + conv(relu(x)): where it writes over its input, that is no longer what it was given."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return x + self.conv(x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_block_that_changes_its_input_first_is_not_removable(inplace: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(*[Preactivated(inplace) for _ in range(2)])).eval()
    blocks, _ = find_blocks(model, (X,))
    assert [b.path for b in blocks] == []
    model[1].insert(0, nn.ReLU())  # then the first passes its input through
    assert [b.path for b in find_blocks(model, (X,))[0]] == ["1.1"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Identity()

    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        first = self.step(x)
        first.add_(1)
        return self.step(y).mul_(2) + first


def test_calls_are_counted_and_one_of_them_is_kept() -> None:
    model, x, y = Twice(), torch.zeros(2), torch.ones(2)
    for kept, value in (("first", torch.zeros(2)), ("last", torch.ones(2))):
        with watch({"step": model.step, "": model}, kept=kept, arguments=True) as calls:  # type: ignore[arg-type]
            model(x.clone(), y=y.clone())
        call = calls["step"]
        assert call.times == 2 and call.output.overwritten
        assert torch.equal(call.output.values, value) and torch.equal(call.arguments.values[0], value)
        assert torch.equal(calls[""].keywords.values["y"], y) and [*calls] == ["step", ""]
    with torch.inference_mode(), watch({"step": model.step}) as calls:
        model(x.clone(), y=y.clone())
        assert torch.equal(calls["step"].output.values, y)  # it does not count, so it is copied
    with watch({"step": model.step}, copied=lambda path: False) as calls:
        model(x.clone(), y=y.clone())
    with pytest.raises(LookupError, match="not copied"):
        _ = calls["step"].output.values
