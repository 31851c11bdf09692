"""Where a fused launch may end: the chain of operators behind a layer, as the steps of its epilogue.

    conv -> quantize -> dequantize -> + shortcut -> quantize        requantize, add, quantize

The chain goes on while each value has one reader and the reader is a step: an activation function, a sum or product
with one other tensor, a quantize (and the dequantize behind it, which together are `requantize`; or all that is
computed from its integers alone, which is a `table`). A reshape between steps is no work; the result gets the last
one's shape. What the steps mean is in `pqk.kernels.common.epilogue`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from pqk.core.aten import DEQUANTIZE, QUANTIZE, RESHAPES, RESIDUAL_STEPS, STEPS, aten, bounds
from pqk.core.graph import arguments, attribute, is_float, operand, shape
from pqk.kernels.common.epilogue import MAX_STEPS
from pqk.passes.fuse.lookup_table import tabulated

EpilogueRow = tuple[float, float, float, float, float]
NOTHING: EpilogueRow = (0.0, 0.0, 0.0, 0.0, 0.0)
CLAMP_STEPS: dict[tuple[float | None, float | None] | None, str] = {(0.0, None): "relu", (0.0, 6.0): "relu6"}
"""bounds of a clamp -> the step that it is"""


@dataclass(frozen=True)
class Quantized:
    """A dequantized value: its integers, and float32 scale and zero point of the whole tensor."""

    integers: fx.Node
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Ending:
    """`end` is what `steps` make of the layer's result; `params` has a row for each, as the kernels lay it out."""

    end: fx.Node
    steps: tuple[str, ...] = ()
    params: tuple[EpilogueRow, ...] = ()
    residual: fx.Node | None = None
    table: tuple[float, ...] = ()
    """the numbers of the step that is a table"""
    view: fx.Node | None = None
    """the last reshape on the way to `end`, whose shape `end` has"""

    @property
    def reshaped(self) -> bool:
        """Whether `end` has another shape than the layer's result."""
        return self.view is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.end.meta["dtype"]

    def then(self, end: fx.Node, step: str, row: EpilogueRow = NOTHING, residual: fx.Node | None = None) -> Ending:
        return replace(
            self,
            end=end,
            steps=(*self.steps, step),
            params=(*self.params, row),
            residual=self.residual if residual is None else residual,
        )


def quantized(root: fx.GraphModule, node: object) -> Quantized | None:
    """What `node` dequantizes, if it does so with one scale for all."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    tensors = [attribute(root, str(operand(node, i).target)) for i in (1, 2)]
    if any(t.numel() != 1 for t in tensors):
        return None
    return Quantized(operand(node), float(tensors[0]), int(tensors[1]))


def endings(root: fx.GraphModule, anchor: fx.Node) -> list[Ending]:
    """Every place where a launch that begins with `anchor` may end, the longest first.

    Not behind a `requantize`: integers are smaller than the floats that they stand for.
    """
    image = len(shape(anchor)) == 4  # in NHWC, where a reshape is no view
    places = [Ending(anchor)]
    at: Ending | None = places[0]
    while at is not None and len(at.steps) < MAX_STEPS and len(at.end.users) == 1:
        (user,) = at.end.users
        if _is_reshape(user) and not image:
            at = replace(at, end=user, view=user)
        elif user.target is QUANTIZE:
            row = _grid(root, user)
            places.append(at.then(user, "quantize", row))
            at = _behind(root, at, user, row, image)
            continue
        else:
            at = _step(root, at, user)
        if at is not None and at.steps[-1:] != ("requantize",):
            places.append(at)
    return places[::-1]


def _grid(root: fx.GraphModule, node: fx.Node) -> EpilogueRow:
    scale, zero_point = (attribute(root, str(operand(node, i).target)) for i in (1, 2))
    return (float(scale), float(zero_point), float(node.args[3]), float(node.args[4]), 0.0)  # type: ignore[arg-type]


def _behind(root: fx.GraphModule, at: Ending, node: fx.Node, row: EpilogueRow, image: bool) -> Ending | None:
    """Behind a quantize: its dequantize, if that leads to another step, else whatever its integers are looked up in."""
    dequantized = _through(root, at, node, row, image)
    if dequantized is not None and len(dequantized.end.users) == 1:
        (user,) = dequantized.end.users
        if user.target is QUANTIZE or _is_reshape(user) or _step(root, dequantized, user) is not None:
            return dequantized
    looked_up = None if at.table else tabulated(root, node)
    if looked_up is None:
        return dequantized
    end, table = looked_up
    return replace(at.then(end, "table", row), table=table)


def _through(root: fx.GraphModule, at: Ending, node: fx.Node, row: EpilogueRow, image: bool) -> Ending | None:
    """Behind a quantize and the only dequantize that reads it (perhaps reshaped between)."""
    view = at.view
    while not image and len(node.users) == 1 and _is_reshape(next(iter(node.users))):
        (node,) = node.users
        view = node
    users = list(node.users)
    value = quantized(root, users[0]) if len(users) == 1 else None
    if value is None or value.zero_point != row[1]:
        return None
    return replace(at, view=view).then(users[0], "requantize", (*row[:4], value.scale))


def _is_reshape(node: fx.Node) -> bool:
    """Whether `node` reshapes, in a way that can be said of any tensor: several free sizes only in a reshape."""
    return node.target in RESHAPES and (node.target is aten.reshape.default or shape(node).count(None) < 2)


def _step(root: fx.GraphModule, at: Ending, user: fx.Node) -> Ending | None:
    name = function(user)
    if name is not None:
        return at.then(user, name)
    if user.target not in RESIDUAL_STEPS or at.residual is not None:
        return None
    a = arguments(user)
    other = a["other"] if a["self"] is at.end else a["self"]
    if not is_float(other) or other is at.end or other.op == "get_attr" or a.get("alpha", 1) != 1:
        return None
    if shape(other) != shape(at.end):
        return None
    value = quantized(root, other)
    step = RESIDUAL_STEPS[user.target]
    if value is None:
        return at.then(user, step, (1.0, 0.0, 0.0, 0.0, 0.0), other)
    return at.then(user, step, (value.scale, float(value.zero_point), 0.0, 0.0, 0.0), value.integers)


def function(node: fx.Node) -> str | None:
    """The name of the step that an activation function is; None for anything else."""
    if node.target not in STEPS:
        return CLAMP_STEPS.get(bounds(node))
    approximated = arguments(node).get("approximate") == "tanh"
    return f"{STEPS[node.target]}_tanh" if approximated else STEPS[node.target]
