"""Gates that stayed in float: hard-swish and hard-sigmoid as one operator again.

`capture` spells `x * clamp(x + 3, 0, 6) / 6` out, so that each step may become integers. Where none did, four operators
read and write memory for what a runtime's own one does at once: a net of such gates in float was 0.6 times as fast.
"""

from __future__ import annotations

from torch import fx

from pqk.copies import copy_of
from pqk.core.aten import aten
from pqk.core.graph import attribute, call, calls, finish, operand, replace

THREE, SIXTH, BOUNDS = 3.0, 1 / 6, (0.0, 6.0)


def with_joined_gates(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph with one operator in the place of every spelled-out gate without a quantizer in it; `graph_module` stays.

    What it computes differs by the rounding of a product, as runtimes' own operators do.
    """
    if not any(_gated(graph_module, node) is not None for node in calls(graph_module.graph, aten.mul.Tensor)):
        return graph_module
    joined = copy_of(graph_module, "student")
    assert isinstance(joined, fx.GraphModule)
    for sixth in list(calls(joined.graph, aten.mul.Tensor)):
        x = _gated(joined, sixth)
        if x is None:
            continue
        products = [user for user in sixth.users if user.target is aten.mul.Tensor and set(user.args) == {x, sixth}]
        if len(products) == len(sixth.users) == 1:
            _put(joined, products[0], aten.hardswish.default, x)
        else:
            _put(joined, sixth, aten.hardsigmoid.default, x)
    return finish(joined)


def _put(graph_module: fx.GraphModule, old: fx.Node, target: object, x: fx.Node) -> None:
    with graph_module.graph.inserting_before(old):
        new = call(graph_module.graph, target, (x,), old)
    replace(graph_module, old, new)


def _gated(graph_module: fx.GraphModule, sixth: fx.Node) -> fx.Node | None:
    """The x of `clamp(x + 3, 0, 6) / 6`, whose last product `sixth` may be; None where it is something else."""
    if sixth.args[1] != SIXTH:
        return None
    clamp = operand(sixth)
    if clamp.target is not aten.hardtanh.default or tuple(clamp.args[1:]) != BOUNDS or len(clamp.users) > 1:
        return None
    shifted = operand(clamp)
    if shifted.target is not aten.add.Tensor or len(shifted.users) > 1 or len(shifted.args) != 2:
        return None
    three = operand(shifted, 1)
    if three.op != "get_attr":
        return None
    value = attribute(graph_module, str(three.target))
    return operand(shifted) if value.numel() == 1 and float(value) == THREE else None
