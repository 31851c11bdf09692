"""Reading and editing the captured ATen graph.

Every node carries three plain facts in `node.meta`, which survive copies and rewrites:

    shape   tuple of int, None where the axis is free: the batch, or a length
    dtype   torch.dtype
    layer   a name a user knows: `layer1.0.conv1`, or `layer1.0.add` for an operator in a forward method

Only tensor-valued nodes have a shape. `graph_module.meta` has, beside,

    points      a module's path -> its output's node
    outputs     for each output the sizes of its axes: a number, the name of a free axis, or an expression of names
    sizes       a free axis of the inputs -> the `Sizes` that it may have
    structure   the containers of the outputs, where they are not dicts, tuples and lists
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.data.structures import members, recast
from pqk.quiet import quiet


class StructuredCode(fx.graph.CodeGen):
    """The code of a graph whose outputs are in other containers than dicts, tuples and lists, such as dataclasses."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.structure = structure

    def generate_output(self, output_args: Any, **options: Any) -> str:
        return f"return _structured({super().generate_output(output_args, **options).removeprefix('return ')})"

    def process_outputs(self, outputs: Any) -> Any:
        return recast(self.structure, outputs)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [("_structured", self.process_outputs)]


FACTS = ("shape", "dtype", "layer")


def facts(node: fx.Node) -> dict[str, Any]:
    """The facts of `node`, to give to a node that takes its place."""
    return {key: node.meta[key] for key in FACTS if key in node.meta}


def shape(node: fx.Node) -> tuple[int | None, ...]:
    """The shape of a tensor-valued node; None stands for the batch or another free axis."""
    return node.meta["shape"]


def is_float(node: Any) -> bool:
    """Whether `node` is a node whose value is a float tensor."""
    return isinstance(node, fx.Node) and "shape" in node.meta and node.meta["dtype"].is_floating_point


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: values.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """The argument of `node` at `index`, which is a node."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node)
    return argument


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """The nodes that call one of `targets`, in order; the graph may be edited meanwhile."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def attribute(root: nn.Module, path: str) -> Any:
    """The tensor or module at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def attach(root: nn.Module, path: str, value: Tensor | nn.Module) -> str:
    """Put a parameter, buffer or module at a dotted path, making the modules on the way; returns the path."""
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)
    return path


def free_path(root: nn.Module, path: str) -> str:
    """`path`, or `path_1`, `path_2` … if something is there already."""
    candidate, count = path, 0
    while True:
        try:
            taken = attribute(root, candidate) is not None
        except AttributeError:
            taken = False
        if not taken:
            return candidate
        count += 1
        candidate = f"{path}_{count}"


def tensor_node(graph_module: fx.GraphModule, path: str) -> fx.Node:
    """A new `get_attr` node for the tensor at `path`, at the insertion point."""
    value = attribute(graph_module, path)
    node = graph_module.graph.create_node("get_attr", path, name=path.replace(".", "_"))
    node.meta.update(shape=tuple(value.shape), dtype=value.dtype, layer=path)
    return node


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: fx.Node, **changed: Any) -> fx.Node:
    """A new call at the insertion point, with the facts of `like` except those in `changed`."""
    node = graph.call_function(target, args)
    node.meta.update(facts(like) | changed)
    return node


def replace(graph_module: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place of `old`, which is erased; module outputs that were `old` are now `new`."""
    old.replace_all_uses_with(new)
    points = graph_module.meta.get("points", {})
    for path, name in points.items():
        if name == old.name:
            points[path] = new.name
    graph_module.graph.erase_node(old)


def same_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same tensors and modules, with the same names of nodes, whose outputs are in plain
    containers."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def finish(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop dead nodes, unused tensors and lost points, check the graph, and compile it."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    used = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    called = tuple(f"{n.target}." for n in graph.nodes if n.op == "call_module")
    for path in [p for p, _ in (*graph_module.named_parameters(), *graph_module.named_buffers())]:
        if path not in used and not path.startswith(called):
            parent, _, name = path.rpartition(".")
            delattr(attribute(graph_module, parent) if parent else graph_module, name)
    names = {n.name for n in graph.nodes}
    points = graph_module.meta.get("points", {})
    graph_module.meta["points"] = {path: name for path, name in points.items() if name in names}
    graph.lint()
    graph_module.recompile()
    return graph_module


def quiet_export() -> AbstractContextManager[None]:
    """Keeps torch.export quiet, which warns of its own internals, and logs and prints what it also raises."""
    return quiet("torch", level=logging.CRITICAL, printing=True)


def register_containers(outputs: Any) -> None:
    """Teaches `torch.export` the containers in outputs that it does not know: dataclasses, subclasses of dict.

    It takes them apart in the order of `members`, without what is None in a dataclass.
    """
    inner = members(outputs)
    if inner is None:
        return
    for _, part in inner:
        register_containers(part)
    kind = type(outputs)
    if kind in torch.utils._pytree.SUPPORTED_NODES or hasattr(outputs, "_fields"):
        return
    if dataclasses.is_dataclass(kind) and not isinstance(outputs, dict):
        torch.export.register_dataclass(kind)
        return

    def taken_apart(value: Any) -> tuple[list[Any], Any]:
        return [part for _, part in members(value) or ()], tuple(value) if isinstance(value, dict) else None

    def put_together(parts: Iterable[Any], keys: Any) -> Any:
        if keys is None:
            return kind(parts)
        named = dict(zip(keys, parts, strict=True))
        return kind(**named) if dataclasses.is_dataclass(kind) else kind(named)

    torch.utils._pytree.register_pytree_node(kind, taken_apart, put_together)


def move_points(graph_module: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    """Module outputs that were `old`, which stays, are now `new`."""
    points = graph_module.meta["points"]
    points.update({path: new.name for path, name in points.items() if name == old.name})
