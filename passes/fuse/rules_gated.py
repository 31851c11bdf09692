"""The rule for a gated linear unit: two linear layers of one input, whose results are multiplied.

    silu(gate(x)) * up(x)          SwiGLU; with another activation GeGLU and the like

The chain behind the gate is what `endings` finds, a product with another tensor among its steps; where that tensor is
what a sibling of the gate gives, both are one launch, and neither is written. What stands between gate and product, an
activation with its quantizers or the table of them, is the gate's program; what stands between the sibling and the
product is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pqk.core.aten import RESHAPES, aten
from pqk.core.graph import operand, shape
from pqk.errors import InputError, Reason
from pqk.kernels import int8_linear
from pqk.kernels.common.epilogue import check_params
from pqk.kernels.int8_gated_linear import interleaved
from pqk.passes.fuse.epilogue import Ending, endings, quantized
from pqk.passes.fuse.rule import Match, Rule, as_end, launch, like, numbers
from pqk.passes.fuse.rules_weighted import Weights, weights


@dataclass(frozen=True)
class Unit:
    """A gated unit: the parameters of both layers, and the three programs, as endings of their steps alone."""

    parameters: tuple[Weights | str, Weights | str]
    gate: Ending
    up: Ending
    rest: Ending

    def programs(self) -> dict[str, tuple[str, Tensor]]:
        """The programs by the name that their arguments begin with."""
        return {"gate_": numbers(self.gate), "up_": numbers(self.up), "": numbers(self.rest)}


class GatedRule(Rule):
    """`pqk::int8_gated_linear`: a linear layer whose result, after its activation, multiplies that of a sibling."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        value = quantized(root, node.args[0]) if node.target is aten.linear.default else None
        if value is None:
            return ()
        readers = [d for d in value.integers.users if quantized(root, d) == value]
        siblings = [u for d in readers for u in d.users if u.target is node.target and u.args[0] is d and u is not node]
        found = []
        for ending in endings(root, node):
            up = next((s for s in siblings if _gives(root, s, ending) is not None), None)
            if up is not None and shape(up) == shape(node):
                both = (weights(root, node, value), weights(root, up, value))
                unit = Unit(both, *_split(ending, _gives(root, up, ending) or Ending(up)))
                found.append(Match(node, (value,), ending, {"unit": unit}))
        return found

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        unit: Unit = match.facts["unit"]
        if (reason := next((w for w in unit.parameters if isinstance(w, str)), None)) is not None:
            return reason
        try:
            for words, params in unit.programs().values():
                check_params(words, params)
        except InputError as error:
            return str(error)
        both = torch.cat([w.weight for w in unit.parameters if isinstance(w, Weights)])
        return int8_linear.why_not_supported(like(match.inputs[0].integers), both)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        unit: Unit = match.facts["unit"]
        gate, up = unit.parameters
        assert isinstance(gate, Weights) and isinstance(up, Weights)
        tensors = {k: interleaved(getattr(gate, k), getattr(up, k)) for k in ("weight", "bias", "scale")}
        programs = {f"{k}{part}": v for k, p in unit.programs().items() for part, v in zip(PARTS, p, strict=True)}
        named = {"x": match.inputs[0].integers, **tensors, **programs, "out_dtype": match.ending.dtype}
        return as_end(match, launch(root, "int8_gated_linear", match, shape(match.anchor), **named))


PARTS = ("steps", "params")
"""what the arguments of a program are called"""


def _gives(root: fx.GraphModule, layer: fx.Node, ending: Ending) -> Ending | None:
    """Where `layer` ends as the tensor that a product among the steps of `ending` reads, and nobody else does."""
    if "mul" not in ending.steps or ending.residual is None:
        return None
    read = ending.residual
    while read.target in RESHAPES and len(read.users) == 1:
        read = operand(read)
    found = next((e for e in endings(root, layer) if e.end is read and e.residual is None), None)
    while found is not None and read.target is not aten.mul.Tensor:
        if len(read.users) != 1:
            return None
        (read,) = read.users
    return found


def _split(ending: Ending, up: Ending) -> tuple[Ending, Ending, Ending]:
    """The programs of gate, sibling and product; the sibling's last quantize is one with the dequantize behind it."""
    at = ending.steps.index("mul")
    rows = list(up.params)
    words = up.steps
    if words[-1:] == ("quantize",):
        scale, zero_point, *_ = ending.params[at]
        assert zero_point == rows[-1][1]
        words, rows[-1] = (*words[:-1], "requantize"), (*rows[-1][:4], scale)
    parts = [
        replace(ending, steps=ending.steps[part], params=ending.params[part], residual=None)
        for part in (slice(at), slice(at + 1, None))
    ]
    gate, rest = (p if "table" in p.steps else replace(p, table=()) for p in parts)
    return gate, replace(up, steps=words, params=tuple(rows)), rest
