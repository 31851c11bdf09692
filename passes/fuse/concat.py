"""Concatenation by its producers: launches write their channels of one buffer, and nothing is copied.

    x = int8_conv2d(…), y = int8_conv2d(…), z = int8_concat([x, y])
    z = concat_buffer(…), int8_conv2d_into(z[..., :a], …), int8_conv2d_into(z[..., a:], …)

The concatenation's own steps (its requantization, perhaps an activation) go behind those of the producer, which rounds
to its own grid in registers before. An input that others read too, or that no such launch gives, is written to its
slice by a launch of its own, as `int8_concat` does it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pqk.core.aten import aten
from pqk.core.graph import attach, attribute, call, calls, free_path, replace, shape, tensor_node
from pqk.errors import Reason
from pqk.kernels.common.epilogue import MAX_STEPS, rows_of

OPS = torch.ops.pqk
WRITERS: dict[Any, Any] = {
    OPS.int8_linear.default: OPS.int8_linear_into.default,
    OPS.int8_conv2d.default: OPS.int8_conv2d_into.default,
}
"""launches that can write columns -> those that do"""


def join(fused: fx.GraphModule) -> list[tuple[str, str]]:
    """Let what it can write into the buffers of concatenations; `(layer, reason)` of the inputs that are copied."""
    declined = []
    for node in calls(fused.graph, OPS.int8_concat.default):
        parts: list[fx.Node] = node.kwargs["inputs"]  # type: ignore[assignment]
        reasons = [_why_not_written(fused, node, part) for part in parts]
        declined += [(p.meta["layer"], r) for p, r in zip(parts, reasons, strict=True) if r is not None]
        if None in reasons:
            _apply(fused, node, [reason is None for reason in reasons])
    return declined


def _why_not_written(fused: fx.GraphModule, node: fx.Node, part: fx.Node) -> Reason | None:
    """Why the launch of `part` cannot write its slice of the concatenation `node`."""
    steps, more = (str(n.kwargs.get("steps", "")).split(",") for n in (part, node))
    if part.target not in WRITERS:
        return f"cat: what it joins is copied: {getattr(part.target, '_opname', part.target)} writes no slices"
    parts: list[fx.Node] = node.kwargs["inputs"]  # type: ignore[assignment]
    if len(part.users) > 1 or parts.count(part) > 1:
        return "cat: what it joins is copied: others read it too"
    if steps[-1] != "quantize" or len(steps) + len(more) > MAX_STEPS or "table" in more:
        return f"cat: what it joins is copied: its steps ({','.join(steps + more)}) do not fit one launch"
    return None


def _apply(fused: fx.GraphModule, node: fx.Node, writes: list[bool]) -> None:
    graph = fused.graph
    joined: dict[str, Any] = dict(node.kwargs)
    parts: list[fx.Node] = joined["inputs"]
    places = {n: i for i, n in enumerate(graph.nodes)}
    first = min((p for p, w in zip(parts, writes, strict=True) if w), key=places.__getitem__)
    with graph.inserting_before(first):
        arguments = (first.kwargs["x"], list(shape(node)[1:]), joined["out_dtype"])
        buffer = call(graph, OPS.concat_buffer.default, arguments, node)
    begin = 0
    for i, (part, writes_slice) in enumerate(zip(parts, writes, strict=True)):
        end = begin + (shape(part)[-1] or 0)
        with graph.inserting_before(part if writes_slice else node):
            out = call(graph, aten.slice.Tensor, (buffer, len(shape(node)) - 1, begin, end), part)
            scale, zero_point = (joined[k][i] for k in ("scales", "zero_points"))
            if writes_slice:
                keywords = {**part.kwargs, **_steps(fused, part, node, float(scale))}
                launched = graph.call_function(WRITERS[part.target], (), {**keywords, "out": out})
            else:
                keywords = {k: joined[k] for k in ("params", "steps", "out_dtype")}
                keywords |= {"out": out, "x": part, "scale": scale, "zero_point": zero_point}
                launched = graph.call_function(OPS.int8_concat_into.default, (), keywords)
        layer = (part if writes_slice else node).meta["layer"]
        launched.meta.update({k: node.meta[k] for k in ("stands_for", "image")}, layer=layer, columns=(begin, end))
        begin = end
    replace(fused, node, buffer)
    for part, writes_slice in zip(parts, writes, strict=True):
        if writes_slice:
            graph.erase_node(part)


def _steps(fused: fx.GraphModule, part: fx.Node, node: fx.Node, scale: float) -> dict[str, Any]:
    """The producer's steps, its last quantize and the dequantize behind it in one, then those of the concatenation."""
    words, more = str(part.kwargs["steps"]).split(","), str(node.kwargs["steps"])
    assert "table" not in more
    own, others = (attribute(fused, str(n.kwargs["params"].target)) for n in (part, node))  # type: ignore[union-attr]
    rows = rows_of(str(part.kwargs["steps"]), own).clone()
    rows[-1, 4] = scale
    params = torch.cat([rows, others, own[len(rows) + len(others) :]])  # a table stays where it is
    path = attach(fused, free_path(fused, f"{part.meta['layer']}.params"), params)
    steps = ",".join([*words[:-1], "requantize", *([more] if more else [])])
    return {"steps": steps, "params": tensor_node(fused, path), "out_dtype": node.kwargs["out_dtype"]}
