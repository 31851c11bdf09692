"""Which nodes of the INT8 graph become one launch: `matches`, `why_not_fused`, `rewrite`, a rule a kind of layer.

    matches(root, node)         the ways in which a launch may begin at `node`, the one that takes in most first
    why_not_fused(root, match)  why a match cannot be one launch, else None
    rewrite(root, match)        the launch, put in at the insertion point, and a view of it as `match.ending.end`

Integers stay integers between launches: a layer reads the integers behind its dequantized input. The rules themselves
are in `rules_weighted`, `rules_elementwise`, `rules_attention` and `rules_embedding`, the list of them in `fuse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import aten
from pqk.core.graph import attach, call, free_path, shape, tensor_node
from pqk.errors import InputError, Reason
from pqk.kernels.common.epilogue import check_params, program
from pqk.passes.fuse.epilogue import Ending, Quantized
from pqk.passes.fuse.nhwc import TO_NHWC, nchw, nhwc


@dataclass(frozen=True)
class Match:
    """A launch in the making: what begins it, the integers it reads, and where it ends."""

    anchor: fx.Node
    inputs: tuple[Quantized, ...]
    ending: Ending
    facts: dict[str, Any] = field(default_factory=dict)
    """what the rule found out"""


class Rule(ABC):
    """One kind of layer. A match that `why_not_fused` rejects is tried again with a shorter ending."""

    @abstractmethod
    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        """The longest first; none where `node` does not begin such a layer."""

    @abstractmethod
    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None: ...

    @abstractmethod
    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node: ...


# ---- what rules share


def launch(root: fx.GraphModule, op: str, match: Match, size: Sequence[int | None], **named: Any) -> fx.Node:
    """A call of a fused operator at the insertion point. Tensors among `named` become buffers of the layer."""
    layer = match.anchor.meta["layer"]
    kwargs = {
        name: tensor_node(root, attach(root, free_path(root, f"{layer}.{name}"), value))
        if isinstance(value, Tensor)
        else value
        for name, value in named.items()
    }
    node = root.graph.call_function(getattr(torch.ops.pqk, op).default, (), kwargs)
    node.meta.update(shape=tuple(size), dtype=match.ending.dtype, layer=layer)
    return stand(node, match.ending.end, image=len(shape(match.anchor)) == 4)


def stand(node: fx.Node, end: fx.Node, image: bool = False) -> fx.Node:
    """`node`, a launch or a view of its result, noted as the value of `end` (`image`: in NHWC)."""
    node.meta.update(stands_for=end.name, image=image)
    return node


def epilogue(match: Match, size: Sequence[int | None], residual: fx.Node | None = None) -> dict[str, Any]:
    """The arguments that every operator with an epilogue takes.

    The residual is laid out as the result, of `size`, unless another way to read it is given as `residual`.
    """
    ending = match.ending
    steps, params = numbers(ending)
    if residual is None and ending.residual is not None:
        residual = as_shape(nhwc(ending.residual), size)
    return {"steps": steps, "params": params, "residual": residual, "out_dtype": ending.dtype}


def numbers(ending: Ending) -> tuple[str, Tensor]:
    """The steps of an ending in words, and their params."""
    rows = zip(ending.steps, ending.params, strict=True)
    return program(*((name, *row) for name, row in rows), table=ending.table)


def plain_epilogue(match: Match) -> dict[str, Any]:
    """The arguments of an operator whose epilogue reads no residual."""
    return {k: v for k, v in epilogue(match, ()).items() if k != "residual"}


def like(node: fx.Node) -> Tensor:
    """A tensor without memory, as a launch reads `node` for one sample: images in NHWC."""
    size = [1 if n is None else n for n in shape(node)]
    size = [size[i] for i in TO_NHWC] if len(size) == 4 else size
    return torch.empty(size, dtype=node.meta["dtype"], device="meta")


def as_end(match: Match, result: fx.Node) -> fx.Node:
    """`result`, laid out as the anchor's, as the match's end: NCHW, or in the shape that a reshape gave it."""
    if len(shape(match.anchor)) == 4:
        return nchw(result)
    view = match.ending.view
    if view is not None and shape(view).count(None) > 1:  # its own sizes say them; a -1 can say one
        return call(result.graph, view.target, (result, *view.args[1:]), result, shape=shape(view))
    return result if view is None else as_shape(result, shape(view))


def as_shape(node: fx.Node, size: Sequence[int | None]) -> fx.Node:
    """A view of `node` in another shape, at the insertion point."""
    if tuple(size) == shape(node):
        return node
    sizes = [-1 if n is None else n for n in size]
    return call(node.graph, aten.reshape.default, (node, sizes), node, shape=tuple(size))


def why_not_one_grid(match: Match) -> Reason | None:
    """Why the numbers of the ending cannot be those of an epilogue."""
    try:
        check_params(*numbers(match.ending))
    except InputError as error:
        return str(error)
    return None


def pair(values: Sequence[int]) -> list[int]:
    """ATen writes one number for both axes."""
    return [*values] * (2 // len(values))
