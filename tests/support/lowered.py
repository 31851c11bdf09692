"""What tests of the fused student begin with: the INT8 graph of a network, quantized after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch.nn.functional as F
from torch import Tensor, fx, nn

from pqk.core.launches import launches
from pqk.passes.capture.capture import capture
from pqk.passes.convert.convert import convert
from pqk.passes.quantize.quantize import calibrate, insert_fake_quant, kept_in_float, placement
from pqk.target.target import Target
from pqk.task.axes import Axes


class Inputs:
    """The part of a task that calibration reads."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(x[:limit] for x in self.inputs)


def int8_graph(
    net: nn.Module,
    *inputs: Tensor,
    target: str = "x86-avx2",
    floats: dict[str, str] | None = None,
    axes: Axes | None = None,
    generates: bool = False,
) -> fx.GraphModule:
    """The INT8 graph of `net` on the grids of `target`, its ranges those of `inputs`; `floats`: layer -> why not;
    `axes`: those that are free, by default the batch; `generates`: products of attention stay in float."""
    example, chosen = tuple(x[:2] for x in inputs), Target.named(target)
    graph = capture(net.eval(), example, axes=axes)
    assert isinstance(graph, fx.GraphModule)
    points, _ = placement(graph, {**(floats or {}), **(kept_in_float(graph) if generates else {})})
    grids = {"activation": asdict(chosen.activation), "weight": asdict(chosen.weight)}
    fake = insert_fake_quant(graph, example, points=[p.to_json() for p in points], learned=True, **grids)
    calibrate(fake, Inputs(*inputs), "minmax", 99.99, len(inputs[0]))  # type: ignore[arg-type]
    made = convert(fake, example)
    assert isinstance(made, fx.GraphModule)
    return made


def operators(module: fx.GraphModule, example: tuple[Tensor, ...]) -> list[str]:
    """What is launched for one sample, in order."""
    return [op.removeprefix("pqk::") for _, op, _ in launches(module, tuple(x[:1] for x in example))]


class Encoder(nn.Module):
    """A post-norm layer, its scores masked where `masked`; [B, 7, 12] -> [B, 5]."""

    def __init__(self, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(12, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.one, self.two, self.out = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 5)
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        batch, tokens, width = x.shape
        q, k, v = (f(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = None if mask is None else (1 - mask)[:, None, None, :] * -1e4
        mixed = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(batch, tokens, width)
        x = self.one(x + self.o(mixed))
        return self.out(self.two(x + self.down(F.gelu(self.up(x))))[:, 0])
