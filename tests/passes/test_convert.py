"""Integers instead of rounded floats: the same numbers bit for bit, on every target."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.core.aten import DEQUANTIZE, PADS, QUANTIZE, quantized_tensors
from pqk.core.graph import operand
from pqk.passes.capture.capture import capture
from pqk.passes.convert.convert import convert
from pqk.passes.quantize.placement import placement
from pqk.passes.quantize.quantize import calibrate, insert_fake_quant
from pqk.target.target import Target
from tests.support.lowered import int8_graph

aten = torch.ops.aten
TARGETS = ["x86-avx2", "arm-dotprod", "cuda-sm80"]


class Inputs:
    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(x[:limit] for x in self.inputs)


class Net(nn.Module):
    """Every way a value gets to an integer operator: folded clamps, a constant, a gain, movement, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.act, self.pool, self.head = nn.Hardswish(), nn.MaxPool2d(3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem(x)))
        y = self.act(self.wide(x)) + F.pad(x[:, :4], (0, 0, 0, 0, 2, 2))
        return self.head(torch.cat([x, y], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def captured() -> tuple[fx.GraphModule, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    graph = capture(Net(), (x[:2],))
    assert isinstance(graph, fx.GraphModule)
    return graph, x


@pytest.fixture(scope="module", params=TARGETS)
def both(request: Any, captured: Any) -> tuple[nn.Module, fx.GraphModule, Tensor, Target]:
    graph, x = captured
    target = Target.named(request.param)
    points = [point.to_json() for point in placement(graph)[0]]
    grids = {"activation": asdict(target.activation), "weight": asdict(target.weight)}
    fake = insert_fake_quant(copy.deepcopy(graph), (x[:2],), points=points, learned=True, **grids)
    calibrate(fake, Inputs(x), "mse", 99.99, 16)  # type: ignore[arg-type]
    int8 = convert(copy.deepcopy(fake), (x[:2],))
    assert isinstance(int8, fx.GraphModule)
    return fake.eval(), int8, x, target


def test_the_integer_graph_computes_the_same_bits(both: Any) -> None:
    fake, int8, x, _ = both
    with torch.no_grad():
        assert torch.equal(fake(x), int8(x))
        assert torch.equal(fake(x[:1]), int8(x[:1]))
        assert float(fake(x).std()) > 0.01


def test_weights_are_int8_on_the_grid_and_biases_int32(both: Any) -> None:
    _, int8, _, target = both
    state = int8.state_dict()
    assert {"stem.weight_int8", "stem.bias_int32", "wide.weight_int8", "head.weight_int8"} <= set(state)
    assert not [k for k, v in state.items() if v.is_floating_point() and not k.endswith(("_scale", "_scale_out"))]
    for name, value in state.items():
        if name.endswith("weight_int8"):
            assert value.dtype == torch.int8 and target.weight.qmin <= int(value.min())
            assert int(value.max()) <= target.weight.qmax and len(value.unique()) > 20
        if name.endswith("int32"):
            assert value.dtype == torch.int32
    assert not list(int8.parameters())


def test_movement_acts_on_the_integers(both: Any) -> None:
    _, int8, _, target = both
    moved = [n for n in int8.graph.nodes if n.target in (aten.slice.Tensor, aten.pad.default, aten.max_pool2d.default)]
    assert len(moved) == 3
    assert {n.meta["dtype"] for n in moved} == {target.activation.torch_dtype}
    assert all(n.args[0].target is not DEQUANTIZE for n in moved)


def test_quantized_tensors_are_the_quantize_nodes_in_order(both: Any) -> None:
    _, int8, _, _ = both
    found = quantized_tensors(int8)
    assert [n for _, n in found] == [n for n in int8.graph.nodes if n.target is QUANTIZE]
    layers = [layer for layer, _ in found]
    assert layers[:3] == ["x", "stem", "wide"] and len(set(layers)) == len(layers)


def test_converting_twice_gives_graphs_that_load_each_other(both: Any, captured: Any) -> None:
    fake, int8, x, _ = both
    again = convert(copy.deepcopy(fake), (x[:2],))
    for value in again.state_dict().values():
        value.zero_()
    again.load_state_dict(int8.state_dict(), strict=True)
    assert torch.equal(again(x), int8(x))


class Pooled(nn.Module):
    """A pool of more pixels than 8 bits count, of values that lie channels last: permuted, or behind what was."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.tail, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), how
        self.norm, self.point = nn.LayerNorm(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.how == "permuted":
            x = x.transpose(2, 3).permute(0, 2, 3, 1).reshape(-1, 16, 16, 8).permute(0, 3, 1, 2)
        if self.how == "normed":  # the convolution behind it puts out what lies as what it reads
            x = self.point(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.tail(F.max_pool2d(x, 2)).mean((2, 3))


def both_forms(module: nn.Module, x: Tensor) -> tuple[nn.Module, fx.GraphModule]:
    """Fake-quantized and converted."""
    graph = capture(module.eval(), (x[:2],))
    assert isinstance(graph, fx.GraphModule)
    target = Target.named("x86-avx2")
    points = [point.to_json() for point in placement(graph)[0]]
    grids = {"activation": asdict(target.activation), "weight": asdict(target.weight)}
    fake = insert_fake_quant(graph, (x,), points=points, learned=True, **grids)
    calibrate(fake, Inputs(x), "mse", 99.99, 8)  # type: ignore[arg-type]
    int8 = convert(copy.deepcopy(fake), (x,))
    assert isinstance(int8, fx.GraphModule)
    return fake.eval(), int8


@pytest.mark.parametrize("how", ["permuted", "normed", "inputs"])
def test_integers_that_lie_channels_last_are_pooled(how: str) -> None:
    """Torch's pool of 8-bit integers in that layout counts pixels in 8 bits, and raises."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    x = x if how != "inputs" else x.contiguous(memory_format=torch.channels_last)
    fake, int8 = both_forms(Pooled(how), x)
    with torch.no_grad():
        assert torch.equal(int8(x), fake(x))
    pool = next(n for n in int8.graph.nodes if n.target is aten.max_pool2d.default)
    assert pool.args[0].meta["dtype"] == torch.uint8


class PaddedBelow(nn.Module):
    """A pool whose padding is no value, as networks that came from another framework have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.stem(x), (0, 1, 0, 1), value=float("-inf"))
        return self.tail(F.max_pool2d(x, 3, 2)).mean((2, 3))


def test_padding_that_no_pool_takes_is_an_integer_below_all() -> None:
    """With a quantizer behind it the range was infinite, and every answer not a number."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10)
    fake, int8 = both_forms(PaddedBelow(), x)
    with torch.no_grad():
        assert torch.equal(int8(x), fake(x)) and bool(int8(x).isfinite().all())
    assert [n.meta["dtype"] for n in int8.graph.nodes if n.target in PADS] == [torch.uint8]


class TwoReaders(nn.Module):
    """One value that is quantized as it is and behind a scaling, at first with the same scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.a(x) + self.b(x * 0.25)


def test_what_is_quantized_alike_is_quantized_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    fake, int8 = both_forms(TwoReaders(), x)
    with torch.no_grad():
        assert torch.equal(int8(x), fake(x))
    assert len(quantized_tensors(int8)) == 1


def test_integers_of_large_planes_are_pooled_however_images_lie_in_memory() -> None:
    """Torch refuses to pool uint8 with channels last where a plane has more than 255 values."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 20, 20)
    student = int8_graph(Net(), x)
    pooled = [n for n in student.graph.nodes if n.target is aten.max_pool2d.default]
    assert len(pooled) == 1 and operand(pooled[0]).target is QUANTIZE
    with torch.no_grad():
        want = student(x)
        for p in (*student.parameters(), *student.buffers()):
            if p.dim() == 4:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        found = student(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(found.argmax(-1), want.argmax(-1)) and (found - want).abs().max() < 0.02 * want.abs().max()
