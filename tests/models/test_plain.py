"""Plain nets: what they cost, and that branches are one convolution once they are captured."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pqk.core.costs import count_macs, count_parameters
from pqk.errors import InputError
from pqk.models.plain import Branched, Plain, branched, fused_branches, plain
from pqk.passes.capture.capture import capture

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with batch norms that are not the identity."""
    torch.manual_seed(seed)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        assert norm.running_mean is not None and norm.running_var is not None
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    ("net", "parameters", "macs"),
    [
        (plain(), 297_626, 15_779_072),
        (plain(24), 667_618, 35_170_176),
        (branched(), 331_946, 17_532_160),
    ],
)
def test_they_cost_what_they_say(net: Plain, parameters: int, macs: int) -> None:
    assert (count_parameters(net), count_macs(net, (IMAGES,))) == (parameters, macs)


def test_widths_strides_and_options() -> None:
    net = plain(8, (1, 3), classes=7, channels=1, stem=2)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [8, 8, 16, 16, 16]
    assert [c.stride[0] for c in convolutions] == [2, 1, 2, 1, 1]
    assert net(torch.randn(2, 1, 20, 28)).shape == (2, 7)
    assert net.eval().get_submodule("stage2")(torch.randn(2, 8, 9, 9)).shape == (2, 16, 5, 5)


@pytest.mark.parametrize("options", [{"width": 0}, {"stages": ()}, {"stages": (2, 0)}, {"stem": 0}])
def test_what_is_no_net_is_refused(options: dict[str, int]) -> None:
    for factory in (plain, branched):
        with pytest.raises(InputError, match="must be 1 or more"):
            factory(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(5, 5, 1), (5, 5, 2), (4, 6, 1), (3, 8, 2)])
@pytest.mark.parametrize("size", [(7, 10), (8, 8), (1, 1)])
@torch.no_grad()
def test_one_convolution_is_all_branches(inputs: int, outputs: int, stride: int, size: tuple[int, int]) -> None:
    """Equal to the rounding of float64, at even and odd sizes, with and without an identity."""
    layer = lively(Branched(inputs, outputs, stride).double())
    assert isinstance(layer, Branched) and (layer.identity is not None) == (inputs == outputs and stride == 1)
    x = torch.randn(3, inputs, *size, dtype=torch.float64)
    fused = fused_branches(layer)
    assert (fused.weight.dtype, fused.kernel_size, fused.stride) == (torch.float64, (3, 3), (stride, stride))
    torch.testing.assert_close(fused(x).relu(), layer(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.for_inference()(x), layer(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_captured_net_has_one_convolution_for_each_layer() -> None:
    net = lively(branched(8, (2, 2)))
    want = net(IMAGES)
    graph = capture(copy.deepcopy(net), (IMAGES,))
    torch.testing.assert_close(graph(IMAGES), want, rtol=0, atol=1e-4 * float(want.abs().max()))
    shapes = [tuple(p.shape) for p in graph.parameters() if p.dim() == 4]
    assert shapes == [tuple(m.weight.shape) for m in plain(8, (2, 2)).modules() if isinstance(m, nn.Conv2d)]
    done = [n.target._opname for n in graph.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]
    assert done.count("conv2d") == len(shapes) == 5 and not any("add" in name or "norm" in name for name in done)


class Offering(nn.Module):
    """A layer that says what it is for inference: whatever it is given."""

    def __init__(self, form: object) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(4, 4), [form]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def for_inference(self) -> object:
        return self.form[0]


def test_a_form_that_computes_something_else_is_refused() -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="with for_inference of 1 the outputs on the example are other ones"):
        capture(nn.Sequential(nn.Linear(4, 4), Offering(nn.Linear(4, 4))), (x,))
    with pytest.raises(InputError, match="for_inference of the student gave a str"):
        capture(Offering("nothing"), (x,))


@torch.no_grad()
def test_an_outer_form_goes_before_what_is_in_it() -> None:
    """What is replaced as a whole is not asked for its parts."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    outer = Offering(None)
    outer.layer = Offering("nothing")  # type: ignore[assignment]
    outer.form = [outer.layer.layer]
    want = outer(x)
    torch.testing.assert_close(capture(nn.Sequential(outer), (x,))(x), want)
