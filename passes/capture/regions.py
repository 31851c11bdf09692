"""Parts of a `forward` under `torch.no_grad()`, `torch.set_grad_enabled` or `torch.autocast`, as plain operators.

The tracer keeps each such part as a graph of its own within one operator. Nothing in it would be seen: it would stay
float, and what is in it would be neither folded nor pruned. A student trains all its layers, and an inference has no
gradients, so the mode of gradients means nothing here; a part for which autocast is off has the types that it has.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from pqk.core.graph import attach, attribute, free_path
from pqk.errors import InputError

GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast
MODE = {GRADIENTS: 1, AUTOCAST: 4}
"""the operators -> how many arguments say the mode, before the graph and what it is given"""


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Replaces every part under a mode by its operators, and parts within parts.

    Raises `InputError` for one that computes in lower precision, whose types are nowhere in the graph.
    """
    graph = graph_module.graph
    found = [n for n in graph.nodes if n.op == "call_function" and n.target in MODE]
    for node in found:
        mode = MODE[node.target]
        _refuse_lower_precision(node)
        body, *given = node.args[mode:]
        part: fx.GraphModule = attribute(graph_module, str(body.target))
        inline_regions(part)
        _inline(graph_module, node, part, given)
    if found:
        graph.eliminate_dead_code()
        graph_module.delete_all_unused_submodules()
        graph_module.recompile()


def _inline(graph_module: fx.GraphModule, node: fx.Node, part: fx.GraphModule, given: list[fx.Node]) -> None:
    """The operators of `part` at `node`, whose results, each taken by `getitem`, are theirs."""
    graph = graph_module.graph
    inputs = [n for n in part.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, fx.Node] = dict(zip(inputs, given, strict=True))
    with graph.inserting_before(node):
        for own in part.graph.nodes:
            if own.op == "get_attr":  # a branch of torch.cond, for one
                path = free_path(graph_module, f"{node.name}_{own.target}".replace(".", "_"))
                values[own] = graph.get_attr(attach(graph_module, path, attribute(part, str(own.target))))
                values[own].meta.update(own.meta)
        outputs = graph.graph_copy(part.graph, values)
    assert isinstance(outputs, tuple | list)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _refuse_lower_precision(node: fx.Node) -> None:
    if node.target is AUTOCAST and node.args[2]:
        device, dtype = node.args[:2]
        raise InputError(
            f'capture: a part of forward is computed under torch.autocast("{device}", {dtype}). A graph does not say '
            'where its types change; leave it out of forward, or give it enabled=False (precision = "bf16" in a '
            "distill pass trains in bfloat16)"
        )
