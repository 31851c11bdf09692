"""One form in the captured graph for what can be written in several ways.

Each form is the one that has an integer kernel: `x * sigmoid(x)` for SiLU, a global pool that keeps its axes for a mean
over pixels, plain matmuls for attention, a two-dimensional product for every linear layer.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from pqk.core.aten import CLAMPS, aten
from pqk.core.graph import (
    arguments,
    attach,
    attribute,
    call,
    calls,
    free_path,
    move_points,
    operand,
    replace,
    shape,
    tensor_node,
)
from pqk.core.reshapes import as_rows, spelled_sizes
from pqk.passes.capture.attention import plain_attention
from pqk.passes.capture.rms_norm import join_rms_norm


def canonical_forms(graph_module: fx.GraphModule) -> None:
    """Rewrite every operator that has several spellings into the one that passes and runtimes know."""
    graph = graph_module.graph
    for node in calls(graph, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding):
        _explicit_padding(node)
    for node in calls(graph, aten.adaptive_avg_pool2d.default):
        if all(size == 1 for size in node.args[1]):  # type: ignore[union-attr]
            node.target, node.args = aten.mean.dim, (node.args[0], [2, 3], True)
    for node in calls(graph, aten.mean.dim):
        _pool_then_flatten(graph_module, node)
    for node in calls(graph, aten.rrelu.default, aten.rrelu_with_noise_functional.default):
        _mean_slope(graph_module, node)
    for node in calls(graph, aten.silu.default, aten.hardsigmoid.default, aten.hardswish.default):
        _gate(graph_module, node)
    for node in calls(graph, aten.rsqrt.default):
        join_rms_norm(graph_module, node)
    for node in calls(graph, aten.clamp.Tensor):
        _clamp_by_numbers(graph_module, node)
    for node in calls(graph, aten.cat.default):
        _without_nothing(graph_module, node)
    for node in calls(graph, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        _slices(graph_module, node)
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        plain_attention(graph_module, node)
    for node in calls(graph, aten.matmul.default, aten.mm.default, aten.addmm.default):
        _as_linear(graph_module, node)
    for node in calls(graph, aten.linear.default):
        _two_dimensional(graph_module, node)
    for node in calls(graph, aten.reshape.default):
        _one_reshape(graph_module, node)
    _compute_once(graph_module)


def _compute_once(graph_module: fx.GraphModule) -> None:
    """Two nodes that compute the same from the same are one: an exporter would merge them, and their quantizers."""
    nodes: dict[str, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        tags = getattr(node.target, "tags", ())
        if node.op not in ("get_attr", "call_function") or torch.Tag.nondeterministic_seeded in tags:
            continue
        first = nodes.setdefault(repr((node.op, str(node.target), node.args, sorted(node.kwargs.items()))), node)
        if first is not node:
            replace(graph_module, node, first)


def _explicit_padding(node: fx.Node) -> None:
    a = arguments(node)
    kernel = shape(a["weight"])[2:]
    total = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(a["dilation"], kernel, strict=True)]  # type: ignore[operator]
    if all(t % 2 == 0 for t in total):
        node.target = getattr(aten, node.target._opname).default  # type: ignore[union-attr]
        padding = [t // 2 for t in total]
        node.args = (a["input"], a["weight"], a["bias"], a["stride"], padding, a["dilation"], a["groups"])
        node.kwargs = {}


def _pool_then_flatten(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """`x.mean((2, 3))` as a global pool that keeps its axes and a flatten."""
    a, rank = arguments(node), len(shape(node.args[0]))  # type: ignore[arg-type]
    if rank != 4 or sorted(d % rank for d in a["dim"] or ()) != [2, 3] or a["dtype"] is not None:
        return
    node.args, node.kwargs = (a["self"], [2, 3], True), {}
    if not a["keepdim"]:
        graph, flat = graph_module.graph, shape(node)
        with graph.inserting_after(node):
            flatten = call(graph, aten.flatten.using_ints, (node, 1), node, layer=f"{node.meta['layer']}.flatten")
        node.meta["shape"] = (*flat, 1, 1)
        node.replace_all_uses_with(flatten, delete_user_cb=lambda user: user is not flatten)
        move_points(graph_module, node, flatten)


def _gate(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """SiLU as `x * sigmoid(x)`; hard-swish as `x * clamp(x + 3, 0, 6) / 6` (MobileNetV3, Howard et al. 2019)."""
    graph, layer, x = graph_module.graph, node.meta["layer"], node.args[0]
    with graph.inserting_before(node):
        if node.target is aten.silu.default:
            gate = call(graph, aten.sigmoid.default, (x,), node, layer=f"{layer}.sigmoid")
        else:
            path = "constants.three"
            if free_path(graph_module, path) == path:
                attach(graph_module, path, torch.full((1,), 3.0))
            three = tensor_node(graph_module, path)
            shifted = call(graph, aten.add.Tensor, (x, three), node, layer=f"{layer}.add")
            clamp = call(graph, aten.hardtanh.default, (shifted, 0.0, 6.0), node, layer=f"{layer}.clamp")
            gate = call(graph, aten.mul.Tensor, (clamp, 1 / 6), node, layer=f"{layer}.sixth")
        result = gate
        if node.target is not aten.hardsigmoid.default:
            result = call(graph, aten.mul.Tensor, (x, gate), node)
    replace(graph_module, node, result)


def _mean_slope(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A leaky ReLU whose slope is drawn in training has the mean of its bounds in evaluation mode."""
    a, graph = arguments(node), graph_module.graph
    result = node
    if node.target is not aten.rrelu.default:  # in place it has two results: the values, and the slopes
        (result,) = (user for user in node.users if user.args[1] == 0)
    with graph.inserting_before(node):
        slope = (float(a["lower"]) + float(a["upper"])) / 2
        leaky = call(graph, aten.leaky_relu.default, (a["self"], slope), result)
    replace(graph_module, result, leaky)
    if result is not node and not node.users:
        graph.erase_node(node)


def _clamp_by_numbers(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A clamp by constant tensors of one value as one by numbers, which quantizers take over; none by infinities."""
    a = arguments(node)
    numbers: list[float | None] = []
    for name, nothing in (("min", -math.inf), ("max", math.inf)):
        bound = a[name]
        if bound is not None:
            value = attribute(graph_module, str(bound.target)) if bound.op == "get_attr" else None
            if value is None or value.numel() != 1 or isinstance(value, nn.Parameter) or len(shape(bound)) > 1:
                return
            bound = float(value)
        numbers.append(None if bound in (None, nothing) else bound)
    if numbers == [None, None]:
        replace(graph_module, node, a["self"])
    else:
        node.target, node.args, node.kwargs = aten.clamp.default, (a["self"], *numbers), {}


def _without_nothing(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A concatenation without the parts that have no values, such as the keys of an empty cache."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    full = [part for part in parts if 0 not in shape(part)]
    if full and len({part.meta["dtype"] for part in parts}) == 1:
        node.args = (full, *node.args[1:])
        if len(full) == 1:
            replace(graph_module, node, full[0])


def _slices(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """The parts of a split as slices, which act on integers."""
    a, graph = arguments(node), graph_module.graph
    source, axis = a["self"], a["dim"] % len(shape(a["self"]))
    parts = {int(str(u.args[1])): u for u in node.users if u.target is operator.getitem}
    if len(parts) != len(node.users) or shape(source)[axis] is None:
        return
    for index, part in parts.items():
        with graph.inserting_before(part):
            if node.target is aten.unbind.int:
                piece = call(graph, aten.select.int, (source, axis, index), part)
            else:
                length = shape(part)[axis]
                start = sum(a["split_sizes"][:index]) if "split_sizes" in a else index * _part_length(a, source, axis)
                piece = call(graph, aten.slice.Tensor, (source, axis, start, start + length), part)
        replace(graph_module, part, piece)
    graph.erase_node(node)


def _part_length(a: dict[str, Any], source: fx.Node, axis: int) -> int:
    size = shape(source)[axis]
    assert size is not None
    return -(-size // a["chunks"]) if "chunks" in a else a["split_size"]


def _as_linear(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A product with a constant matrix is a linear layer: its weight is quantized per channel."""
    bias, x, weight = (None, *node.args[:2]) if node.target is not aten.addmm.default else node.args[:3]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(shape(weight)) != 2 or len(node.kwargs):
        return
    if isinstance(bias, fx.Node) and (bias.op != "get_attr" or len(shape(bias)) != 1):
        return
    value = attribute(graph_module, str(weight.target)).detach().t().contiguous()
    path = attach(graph_module, free_path(graph_module, f"{node.meta['layer']}.weight"), nn.Parameter(value))
    with graph_module.graph.inserting_before(node):
        transposed = tensor_node(graph_module, path)
    node.target, node.args = aten.linear.default, (x, transposed, bias)


def _two_dimensional(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer on [B, T, K] as one on [B*T, K]: the integer kernel with an int32 bias takes two axes."""
    x, graph, result = node.args[0], graph_module.graph, shape(node)
    assert isinstance(x, fx.Node)
    if len(result) <= 2:
        return
    with graph.inserting_before(node):
        rows = as_rows(x, f"{node.meta['layer']}.rows")
    node.args = (rows, *node.args[1:])
    last = node
    users = list(node.users)
    if len(users) == 1 and users[0].target in CLAMPS:
        last = users[0]  # a ReLU stays next to its layer, which folds it
    sizes = spelled_sizes(graph_module, x, result)
    with graph.inserting_after(last):
        reshaped = call(graph, aten.reshape.default, (last, sizes), last, layer=f"{last.meta['layer']}.reshape")
    for flattened in {node, last}:
        flattened.meta["shape"] = (None, result[-1])
    last.replace_all_uses_with(reshaped, delete_user_cb=lambda user: user is not reshaped)
    move_points(graph_module, last, reshaped)


def _one_reshape(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A reshape of a reshape is one; a reshape to the shape that was there is none."""
    source = operand(node)
    if source.target is aten.reshape.default:
        source = operand(source)
        node.args = (source, *node.args[1:])
    unknown = sum(size is None for size in shape(node))
    if shape(node) == shape(source) and unknown <= 1:
        replace(graph_module, node, source)
