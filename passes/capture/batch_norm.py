"""Folds batch norm into the layer before it, or into a depthwise convolution of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from pqk.core.aten import OUTPUT_AXIS, aten
from pqk.core.graph import arguments, attach, attribute, call, calls, free_path, replace, shape, tensor_node


def fold_batch_norms(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in calls(graph, aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
        a = arguments(node)
        if a.get("training"):  # it has no statistics of its own, and takes those of what it reads
            continue
        gain, offset = _affine(graph_module, a)
        before = a["input"]
        if node.target is aten._native_batch_norm_legit_no_training.default:  # its first result is the value
            node = next(user for user in node.users if user.args[1] == 0)
        points = graph_module.meta["points"]
        foldable = before.op == "call_function" and before.target in OUTPUT_AXIS and len(before.users) == 1
        if foldable and before.args[1].op == "get_attr":
            for path in [p for p, name in points.items() if name == before.name]:
                del points[path]  # what this module put out is not in the graph any more
            _fold(graph_module, before, gain, offset)
            replace(graph_module, node, before)
        elif len(shape(before)) == 4:
            replace(graph_module, node, _depthwise(graph_module, node, before, gain, offset))


def _affine(graph_module: fx.GraphModule, a: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch norm in eval mode as `gain * x + offset`, float64 [C]."""

    def value(name: str, default: float) -> torch.Tensor:
        node = a[name]
        return (
            attribute(graph_module, str(node.target)).detach().double() if node is not None else torch.tensor(default)
        )

    gain = value("weight", 1.0) / torch.sqrt(value("running_var", 1.0) + a["eps"])
    return gain, value("bias", 0.0) - value("running_mean", 0.0) * gain


def _fold(graph_module: fx.GraphModule, node: fx.Node, gain: torch.Tensor, offset: torch.Tensor) -> None:
    """Multiply the weight of `node` by `gain` and move its bias, in new parameters where others share the old ones."""
    a, graph = arguments(node), graph_module.graph
    weight_path = str(a["weight"].target)
    weight, axis, groups = attribute(graph_module, weight_path), OUTPUT_AXIS[node.target], a.get("groups", 1)
    dtype = weight.dtype
    if axis == 1 and groups > 1:  # transposed: [in, out / groups, …]; the groups are laid along `in`
        rows = gain.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(*weight.shape[:2])
        scaled = weight.detach().double() * rows.reshape(*weight.shape[:2], *(1 for _ in weight.shape[2:]))
    else:
        scaled = weight.detach().double() * gain.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    bias = attribute(graph_module, str(a["bias"].target)).detach().double() if a["bias"] is not None else 0.0
    shared = sum(n.op == "get_attr" and n.target == weight_path for n in graph.nodes) > 1 or len(a["weight"].users) > 1
    stem = node.meta["layer"] if shared else weight_path.rpartition(".")[0]
    names = [f"{stem}.{name}" if stem else name for name in ("weight", "bias")]
    names = [free_path(graph_module, name) for name in names] if shared else names
    values = (scaled.to(dtype), (bias * gain + offset).to(dtype))
    with graph.inserting_before(node):
        new = [
            tensor_node(graph_module, attach(graph_module, n, nn.Parameter(v)))
            for n, v in zip(names, values, strict=True)
        ]
    node.args, node.kwargs = (
        (a["input"], *new, *node.args[3:]),
        {k: v for k, v in node.kwargs.items() if k not in ("weight", "bias")},
    )


def _depthwise(
    graph_module: fx.GraphModule, node: fx.Node, x: fx.Node, gain: torch.Tensor, offset: torch.Tensor
) -> fx.Node:
    stem = free_path(graph_module, node.meta["layer"] + "_affine")
    weight = attach(graph_module, f"{stem}.weight", nn.Parameter(gain.float().reshape(-1, 1, 1, 1)))
    bias = attach(graph_module, f"{stem}.bias", nn.Parameter(offset.float()))
    graph = graph_module.graph
    with graph.inserting_before(node):
        tensors = tensor_node(graph_module, weight), tensor_node(graph_module, bias)
        return call(graph, aten.conv2d.default, (x, *tensors, [1, 1], [0, 0], [1, 1], len(gain)), node)
