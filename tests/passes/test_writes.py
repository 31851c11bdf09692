"""Writes into parts of a tensor: captured with the values they leave, trainable, and integers where slices are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pqk.core.aten import aten, quantized_tensors
from pqk.core.onnxruntime_session import session
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.passes import Capture, Convert, Quantize
from pqk.passes.capture.capture import capture
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.parity import check_layers

Write = Callable[[Any, Tensor, Tensor], Tensor | None]


class Net(nn.Module):
    """y = conv(x), a write into it, and y or what the write returns."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.conv, self.write = nn.Conv2d(4, 4, 1), write
        self.register_buffer("mask", torch.tensor([True, False, True, False]))
        self.register_buffer("index", torch.tensor([2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        result = self.write(self, x, y)
        return y if result is None else result


def channels(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, :2] = x[:, 2:]


def partial_convolution(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """As in FasterNet: some channels are convolved, and the others stay."""
    x = x.clone()
    x[:, :1] = y[:, :1]
    return x


def shift(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """As in temporal shift modules."""
    out = torch.zeros_like(y)
    out[:, :1, :-1] = y[:, :1, 1:]
    out[:, 1:2, 1:] = y[:, 1:2, :-1]
    out[:, 2:] = y[:, 2:]
    return out


def boxes(net: Net, x: Tensor, y: Tensor) -> None:
    """As in detectors: every other channel, from the last axis."""
    y[..., 0::2] = x[..., 1::2] * 2
    y[..., -1] = x[..., 0]


def parts(net: Net, x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(x.shape[0], 4, 4, 6)
    out[:, :3] = x[:, :3]
    out[:, 3:] = y[:, 3:]
    out[:, 1:2] = y[:, :1]
    return out


def broadcast(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, 1:3] = x[:, :1, :1].double()


def numbers(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, 0] = 0
    y[:, 2:, 1:3, 2:4] = 1.5
    y[:, 1].zero_()


def added(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, [0, 3]] += x[:, :2]


def chosen(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, net.index] = x[:, :2]


def places(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, net.index, net.index] = x[:, :2, 0]


def grid(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, :, torch.tensor([[0, 1], [2, -1]])] = x[:, :, None, :2]


def masked_channels(net: Net, x: Tensor, y: Tensor) -> None:
    y[:, net.mask] = 0.25


def masked_values(net: Net, x: Tensor, y: Tensor) -> None:
    y[y < 0] = 0.5


def nested(net: Net, x: Tensor, y: Tensor) -> Tensor:
    y = y.flatten(2)
    y[:, :, :3] = x.flatten(2)[:, :, -3:]
    y.transpose(1, 2)[:, 0] = 1.0
    return y


def everything(net: Net, x: Tensor, y: Tensor) -> None:
    y[:] = x.relu()


WRITES = (
    channels, partial_convolution, shift, boxes, parts, broadcast, numbers, added, chosen, places, grid,
    masked_channels, masked_values, nested, everything,
)  # fmt: skip
X = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(0))


def captured(write: Write) -> tuple[Net, fx.GraphModule]:
    torch.manual_seed(0)
    net = Net(write).eval()
    graph = capture(net, (X[:2],))
    assert isinstance(graph, fx.GraphModule)
    return net, graph


@pytest.mark.parametrize("write", WRITES)
def test_values_are_right_and_train(write: Write) -> None:
    net, graph = captured(write)
    for x in (X, X[:1]):
        torch.testing.assert_close(graph(x), net(x), atol=1e-6, rtol=1e-6)
    left = {n.target for n in graph.graph.nodes}
    assert not left & {
        aten.copy.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.index_put.default,
    }
    if write is not everything:
        graph(X).square().sum().backward()
        got = [p.grad for p in graph.parameters()]
        net(X).square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in net.parameters()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("write", [shift, boxes, masked_channels, masked_values, places])
def test_the_file_says_the_same(write: Write, tmp_path: Path) -> None:
    net, graph = captured(write)
    emit_onnx(graph, (X[:2],), tmp_path / "a.onnx", ["x"])
    with torch.no_grad():
        expected = net(X)
    (got,) = session(tmp_path / "a.onnx").run(None, {"x": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-6, rtol=1e-6)


def test_pieces_of_pieces_are_one_concatenation() -> None:
    _, graph = captured(parts)
    (cat,) = [n for n in graph.graph.nodes if n.target is aten.cat.default]
    assert [n.target for n in cat.args[0]] == [aten.slice.Tensor] * 4
    assert not any("empty" in str(n.target) for n in graph.graph.nodes), "what is overwritten is gone"


def test_a_write_is_in_integers(tmp_path: Path) -> None:
    """Quantization-aware training has gradients, and the file computes what the integer graph computes."""
    torch.manual_seed(0)
    teacher = nn.Sequential(Net(partial_convolution), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval().requires_grad_(False)
    data = ArrayData(X.repeat(4, 1, 1, 1), torch.zeros(12, 4, 2, 4), 4)
    task = Task(train=data, evaluation=data, validation=data, loss=lambda o, y: (o - y).square().mean((1, 2, 3)))
    program = Program(teacher, teacher, Stage.MODULE, Target.named("x86-avx2"), RunContext())
    for p in (Capture(), Quantize(samples=12), Convert()):
        after = p.apply(program, task)
        program = replace(after, stage=p.result_stage(program.stage))
        if program.stage == Stage.FAKE_QUANT:
            program.student(X).square().sum().backward()
    graph = program.student
    assert isinstance(graph, fx.GraphModule)
    emit_onnx(graph, (X[:2],), tmp_path / "a.onnx", ["x"])
    rows = check_layers(graph, quantized_tensors(graph), tmp_path / "a.onnx", (X,))
    assert rows and all(row.passed for row in rows)
