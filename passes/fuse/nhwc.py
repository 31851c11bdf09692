"""Pixels before channels: the fused student is NHWC from its first quantize to its last pool.

A fused operator takes and gives NHWC. Where a rule puts one in, a permutation to NHWC stands before it and one back to
NCHW after it, so that every rule is right by itself. `settle` then lets the pairs between neighbours cancel, moves
the others behind operators that only move values, and turns a flatten of single pixels into a view.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from pqk.core.aten import PADS, aten
from pqk.core.graph import arguments, call, operand, replace, shape

TO_NHWC, TO_NCHW = [0, 2, 3, 1], [0, 3, 1, 2]
NHWC_AXIS = {0: 0, 1: 3, 2: 1, 3: 2}
"""axis of an NCHW tensor -> the same axis in NHWC"""


def turned(node: fx.Node) -> fx.Node:
    """A view of `node`, NCHW, as NHWC, at the insertion point; other ranks as they are."""
    if len(shape(node)) != 4:
        return node
    n, c, h, w = shape(node)
    return call(node.graph, aten.permute.default, (node, TO_NHWC), node, shape=(n, h, w, c))


def nhwc(node: fx.Node) -> fx.Node:
    """`turned`, and without gaps in memory."""
    view = turned(node)
    return call(node.graph, aten.contiguous.default, (view,), view)


def nchw(node: fx.Node) -> fx.Node:
    """A view of NHWC `node` as NCHW, at the insertion point; other ranks as they are."""
    if len(shape(node)) != 4:
        return node
    n, h, w, c = shape(node)
    return call(node.graph, aten.permute.default, (node, TO_NCHW), node, shape=(n, c, h, w))


def settle(fused: fx.GraphModule) -> None:
    """Take out every change of layout between operators that agree on one."""
    for node in list(fused.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if _permutes(node, TO_NHWC) and _permutes(operand(node), TO_NCHW):
            replace(fused, node, operand(operand(node)))
        elif node.target is aten.contiguous.default and dense(operand(node)):
            replace(fused, node, operand(node))
        elif _permutes(operand(node), TO_NCHW):
            _sink(fused, node)


def dense(node: fx.Node) -> bool:
    """Whether `node` is sure to be contiguous: the result of an operator of ours, which fills new memory."""
    target = node.target
    fills_memory = node.op == "call_function" and getattr(target, "namespace", "") == "pqk"
    return fills_memory or target in PADS


def _permutes(node: Any, order: list[int]) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.permute.default and node.args[1] == order


def _sink(fused: fx.GraphModule, node: fx.Node) -> None:
    """Let `node`, which moves values of an NCHW view, act on the NHWC tensor behind it."""
    source, graph = operand(operand(node)), fused.graph
    if node.target is aten.flatten.using_ints:
        single = shape(source)[1:3] == (1, 1) and node.args[1:] in ((1,), (1, -1), (1, 3))
        if single:
            node.replace_input_with(operand(node), source)
        return
    args = _nhwc_arguments(node)
    if args is None:
        return
    n, c, h, w = shape(node)
    with graph.inserting_before(node):
        result = call(graph, node.target, (source, *args), node, shape=(n, h, w, c))
        replace(fused, node, nchw(result))


def _nhwc_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """The arguments after the input of a movement, for an NHWC input; None where there is no such form."""
    a = arguments(node)
    if node.target is aten.slice.Tensor:
        return (NHWC_AXIS[a["dim"] % 4], a["start"], a["end"], a["step"])
    if node.target is aten.index_select.default:
        return (NHWC_AXIS[a["dim"] % 4], a["index"])
    if node.target in PADS:
        pairs = [*a["pad"], *[0] * (8 - len(a["pad"]))]
        w, h, c, n = (pairs[i : i + 2] for i in (0, 2, 4, 6))
        pad = [*c, *w, *h, *n]
        return (pad, a["mode"], a["value"]) if node.target is aten.pad.default else (pad, a["value"])
    return None
