"""Free axes: what a graph keeps of the example's sizes is refused with its line; the model's own limits are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._sympy.functions import FloorDiv, Mod

from pqk.errors import InputError
from pqk.passes.capture.capture import capture
from pqk.passes.capture.traced_axes import Guard
from pqk.task.axes import Sizes


class Net(nn.Module):
    """Layers that `forward`, which is given, may use; [B, 8, 8] to anything."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.table, self.places = nn.Linear(8, 8), nn.Embedding(12, 8), nn.Parameter(torch.randn(12, 8))
        self.down, self.up = nn.Conv1d(8, 8, 3, 2, 1), nn.ConvTranspose1d(8, 8, 2, 2)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def captured(forward: Callable[..., Any], example: Tensor | None = None) -> fx.GraphModule:
    torch.manual_seed(1)
    x = torch.randn(2, 8, 8) if example is None else example
    graph = capture(Net(forward).eval(), (x,), axes=[["batch", "time", *[None] * (x.dim() - 2)]])
    assert isinstance(graph, fx.GraphModule)
    return graph


def resize_by_a_quotient(net: Net, x: Tensor) -> Tensor:
    size = int(x.shape[1] / 2)
    return F.interpolate(x.transpose(1, 2), size=size)


def branch(net: Net, x: Tensor) -> Tensor:
    if x.shape[1] > 6:
        x = net.linear(x)
    return x * 2


def pad_to_a_multiple(net: Net, x: Tensor) -> Tensor:
    if x.shape[1] % 4:
        x = F.pad(x, (0, 0, 0, 4 - x.shape[1] % 4))
    return net.linear(x)


def all_but_one_length(net: Net, x: Tensor) -> Tensor:
    return x if x.shape[1] == 6 else net.linear(x)


def positions_that_are_grown(net: Net, x: Tensor) -> Tensor:
    return x + (net.places if x.shape[1] <= 12 else net.places.repeat(9, 1))[: x.shape[1]]


def crop_by_a_share(net: Net, x: Tensor) -> Tensor:
    return net.linear(x[:, : int(0.5 * x.shape[1])]).mean(1)


def scores(net: Net, x: Tensor) -> Tensor:
    """Outputs with infinities, which are answers like others."""
    later = torch.ones(12, 12, dtype=torch.bool).triu(1)[: x.shape[1], : x.shape[1]]
    return (x @ x.transpose(1, 2)).masked_fill(later, -torch.inf)


def padded_windows(net: Net, x: Tensor) -> Tensor:
    x = F.pad(x, (0, 0, 0, (4 - x.shape[1] % 4) % 4))
    return net.linear(x.reshape(x.shape[0], x.shape[1] // 4, 4, 8)).sum(2)


def multiples_of_four(net: Net, x: Tensor) -> Tensor:
    if x.shape[1] % 4:
        raise ValueError("lengths are multiples of 4")
    return net.linear(x)


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (crop_by_a_share, "int(0.5 * x.shape[1])"),
        (resize_by_a_quotient, "size = int(x.shape[1] / 2)"),
        (branch, "if x.shape[1] > 6:"),
        (pad_to_a_multiple, "if x.shape[1] % 4:"),
        (positions_that_are_grown, "if x.shape[1] <= 12"),
    ],
)
def test_what_the_graph_keeps_of_a_length_is_refused_with_its_line(forward: Callable[..., Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        captured(forward)
    text = str(error.value)
    assert "of the example's time, 8" in text and "test_free_sizes.py:" in text and line in text, text


@pytest.mark.parametrize(
    ("forward", "line"),
    [
        (lambda net, x: x * len(x.transpose(0, 1)), "len(x.transpose(0, 1))"),
        (lambda net, x: x / math.sqrt(x.shape[1]), "math.sqrt(x.shape[1])"),
        (lambda net, x: torch.stack([x[:, i] for i in range(x.shape[1])]).sum(0), "in range(x.shape[1])"),
        (lambda net, x: x if x.shape[1] == 8 else net.linear(x), "if x.shape[1] == 8"),
    ],
)
def test_what_fixes_a_length_is_named_with_its_line(forward: Callable[..., Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        captured(forward)
    text = str(error.value)
    assert "the time size is fixed to 8" in text and "test_free_sizes.py:" in text and line in text, text


def test_a_branch_on_one_sample_is_refused() -> None:
    """The tracer takes for granted that there are two, and notes nothing."""
    with pytest.raises(InputError, match="of the example's batch, 2: at 1 the captured graph is wrong"):
        captured(lambda net, x: x - x.mean(0) if x.shape[0] > 1 else x)
    with pytest.raises(InputError, match="at 1 the captured graph is wrong"):
        captured(lambda net, x: net.linear(x) if x.shape[1] != 1 else x)


def test_a_second_input_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, mask: Tensor) -> Tensor:
            return image * mask.sum(1, keepdim=True) / float(mask.shape[1])

    with pytest.raises(InputError, match=r"the tokens size is fixed to 5 .*float\(mask.shape\[1\]\)"):
        capture(Two(), (torch.randn(2, 3), torch.rand(2, 5)), axes=[["batch", None], ["batch", "tokens"]])
    assert capfd.readouterr() == ("", ""), "the library never prints"


@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        pytest.param(lambda net, x: net.linear(x), Sizes(1), id="any"),
        pytest.param(lambda net, x: x[:, :6], Sizes(1), id="crop"),
        pytest.param(lambda net, x: x[:, : x.shape[1] // 2], Sizes(1), id="half"),
        pytest.param(lambda net, x: x + net.places[: x.shape[1]], Sizes(1, 12), id="positions"),
        pytest.param(lambda net, x: x + net.table(torch.arange(x.shape[1])), Sizes(1, 12), id="embedded positions"),
        pytest.param(lambda net, x: x.unfold(1, 4, 4), Sizes(4), id="window"),
        pytest.param(lambda net, x: F.interpolate(x.transpose(1, 2), size=x.shape[1] // 2), Sizes(2), id="resize"),
        pytest.param(
            lambda net, x: torch.cat([x.transpose(1, 2), net.up(net.down(x.transpose(1, 2)))], 1),
            Sizes(2, step=2),
            id="strides, concatenated",
        ),
        pytest.param(
            lambda net, x: x.transpose(1, 2) + net.up(net.down(x.transpose(1, 2))),
            Sizes(2, step=2),
            id="strides, added",
        ),
        pytest.param(lambda net, x: x.reshape(x.shape[0], -1, 2, 8).sum(2), Sizes(2, step=2), id="pairs"),
        pytest.param(
            lambda net, x: (x.reshape(x.shape[0], -1, 16), x[:, :6]), Sizes(2, step=2), id="pairs, beside numbers"
        ),
        pytest.param(lambda net, x: F.scaled_dot_product_attention(x, x, x), Sizes(1), id="attention"),
        pytest.param(scores, Sizes(1, 12), id="infinities"),
        pytest.param(padded_windows, Sizes(1), id="padded"),
        pytest.param(multiples_of_four, Sizes(4, step=4), id="multiples that are asked for"),
    ],
)
def test_limits_of_the_model_are_found(forward: Callable[..., Any], sizes: Sizes) -> None:
    graph = captured(forward)
    assert graph.meta["sizes"]["time"] == sizes
    model = Net(forward).eval()
    most = 20 if sizes.most is None else sizes.most
    with torch.no_grad():
        for n in [n for n in range(1, most + 1) if n in sizes]:
            x = torch.randn(3, n, 8)
            torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_table_far_beyond_the_example_is_a_limit() -> None:
    net = Net(lambda net, x: x + net.places[: x.shape[1]])
    net.places = nn.Parameter(torch.randn(300, 8))
    graph = capture(net.eval(), (torch.randn(2, 4, 8),), axes=[["batch", "time", None]])
    assert graph.meta["sizes"]["time"] == Sizes(1, 300)  # type: ignore[index]


def test_sizes_are_said_in_words() -> None:
    assert [str(s) for s in (Sizes(), Sizes(2, 12), Sizes(3, 3), Sizes(4, step=2), Sizes(32, 96, 32))] == [
        "at least 1", "2 to 12", "3", "4, 6, 8 …", "32, 64, 96 … up to 96",
    ]  # fmt: skip
    assert [n for n in range(100) if n in Sizes(32, 96, 32)] == [32, 64, 96]


def test_axes_of_outputs_have_the_names_of_the_inputs() -> None:
    graph = captured(lambda net, x: (net.linear(x), net.down(x.transpose(1, 2)), x.mean(1)))
    assert graph.meta["outputs"] == [["batch", "time", 8], ["batch", 8, "(((time - 1)//2)) + 1"], ["batch", 8]]


def test_sizes_of_outputs_are_said_as_simply_as_they_are() -> None:
    graph = captured(lambda net, x: (x[:, ::2].repeat_interleave(2, 1) + x, x.reshape(x.shape[0], -1, 16), x[:, :6]))
    assert graph.meta["outputs"] == [["batch", "time", 8], ["batch", "(time//2)", 16], ["batch", "Min(6, time)", 8]]


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y


def test_axes_that_must_be_equal_have_one_name() -> None:
    graph = capture(Sum(), (torch.randn(2, 5), torch.randn(2, 5)), axes=[["batch", "left"], ["batch", "right"]])
    assert graph.meta["outputs"] == [["batch", "left"]]  # type: ignore[index]
    assert graph.meta["sizes"] == {"batch": Sizes(0), "left": Sizes(), "right": Sizes(equals="left")}


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x, y = torch.randn(2, 3, 5)
    assert torch.equal(capture(Sum(), (x, x))(x, y), x + 2 * y)


class Area(nn.Module):
    """Of two sides, each of which is short."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 12 or x.shape[2] > 12:
            raise ValueError("a side is too long")
        return x * (2 if x.shape[1] * x.shape[2] > 140 else 1)


def test_several_axes_at_once_are_tried() -> None:
    with pytest.raises(InputError, match=r"height and width, 6 x 8, at .*> 140 else 1.*: at 12 x 12 the cap"):
        capture(Area(), (torch.randn(2, 6, 8),), axes=[["batch", "height", "width"]])


class GlobalPool(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.avg_pool2d(y, y.shape[2:])


@pytest.mark.parametrize("stride", [1, 2])
def test_an_operator_that_keeps_a_size_is_named_with_its_line(stride: int) -> None:
    with pytest.raises(InputError, match=r"height.*16.* at test_free_sizes.py:\d+: 'return F.avg_pool2d\(y, y.shape"):
        capture(GlobalPool(stride), (torch.randn(2, 1, 16, 24),), axes=[["batch", None, "height", "width"]])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


@pytest.mark.slow
def test_a_recurrent_layer_is_named() -> None:
    with pytest.raises(InputError, match="the time size is fixed: cells, a recurrent layer, is unrolled over the 3 st"):
        capture(Recurrent().eval(), (torch.randn(2, 3, 4),), axes=[["batch", "time", None]])


class Grown(nn.Module):
    """As a branch on the batch that the tracer takes for a limit of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] < 64 else x


def test_a_limit_of_the_batch_is_named_with_its_line() -> None:
    with pytest.raises(InputError, match=r"it takes batch < 64 for granted, at .*return x \* 2 if x.shape\[0\] < 64"):
        capture(Grown(), (torch.randn(2, 3),))


class Spelled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(str(x.shape[1]))


def test_a_graph_that_is_not_the_model_on_the_example_is_refused() -> None:
    with pytest.raises(InputError, match="is not the model already on the task's example: its outputs differ"):
        capture(Spelled(), (torch.randn(2, 3),), axes=[["batch", "time"]])


def test_guards_are_evaluated_as_they_are_written() -> None:
    """Python's arithmetic and sympy's agree, and what makes no sense does not hold."""
    time, batch = (sympy.Symbol(n, integer=True, positive=True) for n in ("time", "batch"))
    quotient = FloorDiv(time + 3, 4) * batch - Mod(time, 3)
    cases = [sympy.Eq(quotient, 6), quotient <= 5, sympy.Ne(sympy.Max(quotient, 4), 4), sympy.And(time > 4, batch < 3)]
    for size in range(1, 20):
        integers = {time: sympy.Integer(size), batch: sympy.Integer(2)}
        for expression in cases:
            assert Guard(expression, "").holds({"time": size, "batch": 2}) is bool(expression.xreplace(integers))
    assert not Guard(sympy.Ne(FloorDiv(batch, time - 1), 9), "").holds({"time": 1, "batch": 2})


@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(lambda net, x: x.reshape(x.shape[0], -1, 2, 4).sum(2), id="a number"),
        pytest.param(lambda net, x: net.linear(x.reshape(x.shape[0], -1, 16)[..., :8]), id="a quotient"),
        pytest.param(lambda net, x: net.linear(x).flatten(1), id="flat"),
    ],
)
def test_a_batch_of_none_gives_none(forward: Callable[..., Any]) -> None:
    """No size is left to -1 beside the batch: which one it stands for cannot be told where there are no values."""
    graph = captured(forward)
    assert graph.meta["sizes"]["batch"].least == 0
    with torch.no_grad():
        assert graph(torch.zeros(0, 8, 8)).shape == (0, *graph(torch.zeros(2, 8, 8)).shape[1:])


class Strided(nn.Module):
    """A recurrent layer whose steps are a part of the free length."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.recurrent = nn.Conv1d(4, 8, 5, stride=2, padding=2), kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(self.conv(x.transpose(1, 2)).transpose(1, 2))[0].mean(1)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_a_recurrent_layer_over_a_part_of_a_free_length_is_refused_by_name(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(2, 20, 4)
    with pytest.raises(InputError, match="recurrent, a recurrent layer, is unrolled"):
        capture(Strided(kind).eval(), (x,), axes=[["batch", "time", None]])
    capture(Strided(kind).eval(), (x,))
