"""What tests of the fused student begin with: the INT8 graph of a network, quantized after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor, fx, nn

from pqk.passes.capture import capture
from pqk.passes.convert import convert
from pqk.passes.quantize import calibrate, insert_fake_quant, placement
from pqk.target import Target


class Inputs:
    """The part of a task that calibration reads."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = inputs

    def calibration(self, limit: int) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(x[:limit] for x in self.inputs)


def int8_graph(
    net: nn.Module, *inputs: Tensor, target: str = "x86-avx2", floats: dict[str, str] | None = None
) -> fx.GraphModule:
    """The INT8 graph of `net` on the grids of `target`, its ranges those of `inputs`; `floats`: layer -> why not."""
    example, chosen = tuple(x[:2] for x in inputs), Target.named(target)
    graph = capture(net.eval(), example)
    assert isinstance(graph, fx.GraphModule)
    points, _ = placement(graph, floats)
    grids = {"activation": asdict(chosen.activation), "weight": asdict(chosen.weight)}
    fake = insert_fake_quant(graph, example, points=points, learned=True, **grids)
    calibrate(fake, Inputs(*inputs), "minmax", 99.99, len(inputs[0]))  # type: ignore[arg-type]
    made = convert(fake, example)
    assert isinstance(made, fx.GraphModule)
    return made
