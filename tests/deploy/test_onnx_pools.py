"""Pools in the file divide and end as torch's do: every window, padding, divisor and hanging edge, free sizes too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from pqk.core.onnxruntime_session import session
from pqk.deploy.onnx_emitter import emit_onnx


class Side(nn.Module):
    """Each of its layers on the same input."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def pools(axes: int) -> Iterator[nn.Module]:
    average = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[axes]
    largest = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[axes]
    windows = list(itertools.product((2, 3), (1, 2, 3), (0, 1), (False, True)))
    for kernel, stride, padding, ceil in windows:
        for include in (False, True):
            for divisor in (None,) if axes == 1 else (None, 5):
                yield average(kernel, stride, padding, ceil, include, *([] if axes == 1 else [divisor]))
        for dilation in (1, 2):
            yield largest(kernel, stride, padding, dilation, ceil_mode=ceil)
    if axes == 2:
        yield nn.AvgPool2d((2, 3), (3, 2), (1, 0), True)


SIZES = {1: (2, 3, 9), 2: (2, 3, 7, 9), 3: (2, 2, 5, 6, 7)}


@pytest.mark.parametrize(("axes", "free"), [(1, False), (2, False), (2, True), (3, False)])
def test_pools_are_those_of_torch(axes: int, free: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, layers = torch.randn(SIZES[axes]), list(pools(axes))
    names = [f"y{i}" for i in range(len(layers))]
    named = [["batch", *(None for _ in range(axes)), "width"]] if free else None
    emit_onnx(Side(layers), (x,), tmp_path / "a.onnx", ["x"], names, named)
    wide = torch.cat([x, x[..., :3]], -1) if free else x[:1]
    for each in (x, wide):
        for layer, y in zip(layers, session(tmp_path / "a.onnx").run(None, {"x": each.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(y), layer(each), atol=1e-5, rtol=1e-5, msg=str(layer))


def test_plain_pools_are_one_operator(tmp_path: Path) -> None:
    """ONNX Runtime's integer pools know these; `ceil_mode` says nothing where the windows come out even."""
    layers = [nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2, 1, ceil_mode=True)]
    emit_onnx(Side(layers), (torch.randn(2, 3, 9, 9)[..., :7, :7],), tmp_path / "a.onnx", ["x"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "a.onnx").graph.node]
    assert kinds == ["AveragePool", "Pad", "AveragePool", "Mul", "MaxPool"], "7 is odd"
