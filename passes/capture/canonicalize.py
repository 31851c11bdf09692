"""What `capture` leaves in the graph: batch norm folded, and one form for what can be written in several ways.

Each form is the one that has an integer kernel: `x * sigmoid(x)` for SiLU, a global pool that keeps its axes for a mean
over pixels, plain matmuls for attention, a two-dimensional product for every linear layer.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from pqk.core.graph import (
    arguments,
    attach,
    attribute,
    call,
    calls,
    free_path,
    is_float,
    operand,
    replace,
    shape,
    tensor_node,
)

aten = torch.ops.aten
OUTPUT_AXIS: dict[Any, int] = {
    aten.conv1d.default: 0, aten.conv2d.default: 0, aten.conv3d.default: 0, aten.linear.default: 0,
    aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 1, aten.conv_transpose3d.input: 1,
}  # fmt: skip
"""operators that batch norm folds into -> the axis of the weight that holds output channels"""
SAME_SHAPE = (
    aten.add.Tensor, aten.mul.Tensor, aten.layer_norm.default, aten.gelu.default, aten.relu.default, aten.tanh.default,
    aten.linear.default,
)  # fmt: skip
"""operators whose output has the axes of an input, but for the last"""
CLAMPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default)


# ---- one form for each thing


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
    for node in calls(graph, aten.silu.default, aten.hardsigmoid.default, aten.hardswish.default):
        _gate(graph_module, node)
    for node in calls(graph, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        _slices(graph_module, node)
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        _plain_attention(graph_module, node)
    for node in calls(graph, aten.matmul.default, aten.mm.default, aten.addmm.default):
        _as_linear(graph_module, node)
    for node in calls(graph, aten.linear.default):
        _two_dimensional(graph_module, node)
    for node in calls(graph, aten.reshape.default):
        _one_reshape(graph_module, node)
    _compute_once(graph_module)


def _compute_once(graph_module: fx.GraphModule) -> None:
    """Two nodes that compute the same from the same are one: an exporter would merge them, and their quantizers."""
    seen: dict[str, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        tags = getattr(node.target, "tags", ())
        if node.op not in ("get_attr", "call_function") or torch.Tag.nondeterministic_seeded in tags:
            continue
        first = seen.setdefault(repr((node.op, str(node.target), node.args, sorted(node.kwargs.items()))), node)
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
            raised = call(graph, aten.add.Tensor, (x, three), node, layer=f"{layer}.add")
            clamp = call(graph, aten.hardtanh.default, (raised, 0.0, 6.0), node, layer=f"{layer}.clamp")
            gate = call(graph, aten.mul.Tensor, (clamp, 1 / 6), node, layer=f"{layer}.sixth")
        result = gate
        if node.target is not aten.hardsigmoid.default:
            result = call(graph, aten.mul.Tensor, (x, gate), node)
    replace(graph_module, node, result)


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


def _plain_attention(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """`softmax(q @ kᵀ * scale + mask) @ v` from matmuls, which have integer kernels (the fused operator has none)."""
    a, graph, layer = arguments(node), graph_module.graph, node.meta["layer"]
    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    if a["is_causal"] or a["enable_gqa"] or a["dropout_p"] or (mask is not None and not is_float(mask)):
        return
    scores, swapped = (*shape(q)[:-1], shape(k)[-2]), (*shape(k)[:-2], shape(k)[-1], shape(k)[-2])
    scale = a["scale"] or 1 / math.sqrt(shape(q)[-1])  # type: ignore[arg-type]
    with graph.inserting_before(node):
        swap = call(graph, aten.transpose.int, (k, -2, -1), k, shape=swapped, layer=f"{layer}.transpose")
        score = call(graph, aten.matmul.default, (q, swap), node, shape=scores, layer=f"{layer}.scores")
        score = call(graph, aten.mul.Tensor, (score, scale), score, layer=f"{layer}.scale")
        if mask is not None:
            score = call(graph, aten.add.Tensor, (score, mask), score, layer=f"{layer}.mask")
        share = call(graph, aten.softmax.int, (score, -1), score, layer=f"{layer}.softmax")
        mixed = call(graph, aten.matmul.default, (share, v), node, layer=f"{layer}.values")
    replace(graph_module, node, mixed)


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
        flat = as_rows(x, f"{node.meta['layer']}.rows")
    node.args = (flat, *node.args[1:])
    last = node
    users = list(node.users)
    if len(users) == 1 and users[0].target in CLAMPS:
        last = users[0]  # a ReLU stays next to its layer, which folds it
    sizes = spelled_sizes(graph_module, x, result)
    with graph.inserting_after(last):
        whole = call(graph, aten.reshape.default, (last, sizes), last, layer=f"{last.meta['layer']}.reshape")
    for flattened in {node, last}:
        flattened.meta["shape"] = (None, result[-1])
    last.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)
    move_points(graph_module, last, whole)


def as_rows(x: fx.Node, layer: str) -> fx.Node:
    """`x` [..., C] as [N, C], at the insertion point."""
    columns = shape(x)[-1]
    return call(x.graph, aten.reshape.default, (x, [-1, columns]), x, shape=(None, columns), layer=layer)


def spelled_sizes(graph_module: fx.GraphModule, x: fx.Node, wanted: tuple[int | None, ...]) -> list[Any]:
    """`wanted` for a reshape to it, where the free sizes are those of `x`.

    Several free sizes are all said: what follows from a -1 is a quotient that grows from layer to layer.
    """
    free = [axis for axis, size in enumerate(wanted) if size is None]
    lengths = {axis: _length(graph_module, x, axis) if len(free) > 1 else -1 for axis in free}
    return [lengths.get(axis, size) for axis, size in enumerate(wanted)]


def _length(graph_module: fx.GraphModule, x: fx.Node, axis: int) -> fx.Node:
    """The node of a free size, read where it enters the graph: what lies between would be kept alive for it."""
    while True:
        if x.target is aten.reshape.default:
            size = arguments(x)["shape"][axis]
            if isinstance(size, fx.Node):
                return size
        if x.target is aten.embedding.default and axis < len(shape(operand(x, 1))):
            x = operand(x, 1)
            continue
        before = [n for n in x.all_input_nodes if x.target in SAME_SHAPE and _like(n, x, axis)]
        if not before:
            break
        x = before[0]
    graph = graph_module.graph
    behind = x if x.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(behind):
        node = graph.call_function(aten.sym_size.int, (x, axis))
    node.meta["layer"] = f"{x.meta['layer']}.size"
    return node


def _like(node: fx.Node, x: fx.Node, axis: int) -> bool:
    """Whether `node` has the axes of `x` as far as `axis`, of which `axis` is free in both."""
    return is_float(node) and len(shape(node)) == len(shape(x)) and shape(node)[axis] is None


def _one_reshape(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """A reshape of a reshape is one; a reshape to the shape that was there is none."""
    source = operand(node)
    if source.target is aten.reshape.default:
        source = operand(source)
        node.args = (source, *node.args[1:])
    unknown = sum(size is None for size in shape(node))
    if shape(node) == shape(source) and unknown <= 1:
        replace(graph_module, node, source)


def move_points(graph_module: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    """Module outputs that were `old`, which stays, are now `new`."""
    points = graph_module.meta["points"]
    points.update({path: new.name for path, name in points.items() if name == old.name})


# ---- batch norm


def fold_batch_norms(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in calls(graph, aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default):
        a = arguments(node)
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
