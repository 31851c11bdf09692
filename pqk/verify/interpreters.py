"""Interpreters of the fake-quant graph and of the INT8 graph: exact products, recorded integers, exact ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.aten import DEQUANTIZE, NBITS, QUANTIZE, QUANTIZERS
from pqk.core.graph import attribute, operand
from pqk.quant.block_fake_quant import BlockFakeQuant
from pqk.quant.qparams import per_axis

aten = torch.ops.aten
TIE = 1e-9
"""how near to a half a float64 quotient must be to be one: well above its rounding, well below float32's"""
REQUANTIZED = 4 * 2.0**-24
"""how far a runtime's quotient may be off, relative: the accumulator, its scale (twice) and their product round"""


class Recorder(fx.Interpreter):
    """Runs the INT8 graph and keeps the integers of every tensor that it quantizes, with a scale and a zero point where
    they are found at run time, and the floats that its operators round inside."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.integers: dict[fx.Node, tuple[Tensor, ...]] = {}
        self.rounded: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is NBITS:
            self.rounded[operand(n)] = self.fetch_args_kwargs_from_env(n)[0][0]
        result = super().run_node(n)
        if n.target in QUANTIZERS:
            self.integers[n] = (result,) if n.target is QUANTIZE else tuple(result)
        return result


class RoundedOnce(fx.Interpreter):
    """Runs a fake-quant graph with the products of linear layers in blocks in float64, rounded once, as the INT8 graph.

    The next layer rounds what they give, and a sum of floats falls on the other side of a half more often.
    """

    def run_node(self, n: fx.Node) -> Any:
        source = operand(n) if n.target is aten.linear.default else n
        rounds = source.op == "call_module" and isinstance(attribute(self.module, str(source.target)), BlockFakeQuant)
        if source is n or not rounds:
            return super().run_node(n)
        x, weight, bias = (*self.fetch_args_kwargs_from_env(n)[0], None)[:3]
        return nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()


def rounded_once(fake_quant: nn.Module) -> Callable[..., Any]:
    """A fake-quant graph as `RoundedOnce` runs it, where it has blocks; else itself."""
    in_blocks = any(isinstance(m, BlockFakeQuant) for m in fake_quant.modules())
    return RoundedOnce(fake_quant).run if in_blocks and isinstance(fake_quant, fx.GraphModule) else fake_quant


class Ties(fx.Interpreter):
    """Runs the INT8 graph in float64 on recorded integers: the integers of exact arithmetic, and where halves are.

    The graph adds up floats, each rounded, and where terms cancel its sum may fall on the other side of a half; a
    runtime adds up integers and rounds once.
    """

    def __init__(self, graph: fx.GraphModule, integers: Mapping[fx.Node, tuple[Tensor, ...]]) -> None:
        super().__init__(graph)
        self.integers = integers
        self.masks: dict[fx.Node, Tensor] = {}
        """where what a quantizer reads is a half, or so near to one that rounding a quotient once may move it there"""
        self.exact: dict[fx.Node, Tensor] = {}
        """what a quantizer of fixed scale makes of exact sums"""

    def run_node(self, n: fx.Node) -> Any:
        if n.target in QUANTIZERS:
            x, *fixed = self.fetch_args_kwargs_from_env(n)[0][:2]
            outputs = self.integers[n]
            steps = x.double() / (fixed or outputs[1:2])[0].double()
            near = ((steps - steps.floor()) - 0.5).abs()
            self.masks[n] = near < (steps.abs() * REQUANTIZED).clamp_min(TIE)
            if n.target is QUANTIZE:
                zero_point, qmin, qmax = self.fetch_args_kwargs_from_env(n)[0][2:5]
                self.exact[n] = (steps.round() + zero_point.double()).clamp(qmin, qmax).to(outputs[0].dtype)
            # Every layer is given the same integers, so that differences do not add up.
            return outputs[0] if fixed else outputs
        if n.target is DEQUANTIZE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            q, scale, zero_point, axis = (*args, *kwargs.values(), None)[:4]
            scale, zero_point = (per_axis(p.double(), q, axis) for p in (scale, zero_point))
            return (q.double() - zero_point) * scale
        result = super().run_node(n)
        widen = isinstance(result, Tensor) and result.dtype == torch.float32
        return result.double() if widen else result
