"""Capture: the float module becomes the ATen graph that will be deployed.

`torch.export` traces the student in eval mode with a dynamic batch, and whatever else the task calls free. Then
everything that inference does not need is taken out: guards, dropout, no-op slices and copies, and batch norm, which is
folded into the convolution or linear layer before it (a batch norm with none before it becomes a depthwise 1x1
convolution, for which runtimes have an integer kernel). Parameters keep their module paths, so the saved tensors read
like the model they came from.
"""

from __future__ import annotations

import contextlib
import operator
import re
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import fx, nn

from pqk.core.aten import GUARDS, NO_OPS, aten
from pqk.core.graph import (
    arguments,
    attach,
    attribute,
    calls,
    finish,
    free_path,
    quiet_export,
    replace,
    shape,
    tensor_node,
)
from pqk.core.modes import fused_layers
from pqk.core.program import CONFIG, Example, Pass, Program, RewriteFunction, Stage
from pqk.errors import InputError
from pqk.passes.capture.batch_norm import fold_batch_norms
from pqk.passes.capture.canonicalize import canonical_forms
from pqk.passes.capture.writes import plain_writes
from pqk.task.axes import Axes, free_axes
from pqk.task.task import Task


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Capture(Pass):
    """Turn the float module into the ATen graph that will be deployed, batch norm folded."""

    name: ClassVar[str] = "capture"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.MODULE})
    produces: ClassVar[Stage | None] = Stage.GRAPH

    def timed_form(self, floats: tuple[str, ...]) -> Pass | None:
        return self

    def apply(self, program: Program, task: Task) -> Program:
        axes = [list(a) for a in task.axes]
        program = program.rewrite(capture, task.example, input_names=list(task.input_names), axes=axes)
        graph = program.student.graph
        return program.note(operators=sum(n.op == "call_function" for n in graph.nodes))  # type: ignore[union-attr]


def capture(
    student: nn.Module, example: Example, *, input_names: Sequence[str] | None = None, axes: Axes | None = None
) -> nn.Module:
    """The inference graph of `student` (changed to eval mode) as an `fx.GraphModule` that trains, batch dynamic.

    `example` are inputs whose first axis is the batch, of at least 2; their layers are called by `input_names`, or by
    the names of the arguments of `forward`. `axes` names the free axes of each input, the batch alone by default.
    Raises `InputError` naming the construct and the line of the user's code where the model cannot be traced.
    """
    exported = _export(student.eval(), example, axes)
    _plain_signature(exported.graph)
    _spell_sizes(exported.graph)
    graph_module = fx.GraphModule(exported, exported.graph)
    _describe(graph_module, input_names)
    _drop_no_ops(graph_module)
    plain_writes(graph_module)
    _fold_constants(graph_module)
    fold_batch_norms(graph_module)
    canonical_forms(graph_module)
    for parameter in finish(graph_module).parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return graph_module


# ---- tracing


def _export(student: nn.Module, example: Example, axes: Axes | None) -> fx.GraphModule:
    try:
        with quiet_export(), fused_layers(False):
            free = free_axes(student, example, axes)
            program = torch.export.export(student, example, dynamic_shapes=free, strict=False)
            if any(_mutates(n) for n in program.graph.nodes):
                program = program.run_decompositions({})  # an empty table: only functionalizes
            return program.module(check_guards=False)
    except Exception as error:  # whatever the user's code or the tracer raised
        message = str(error).strip().partition("\n")[0]
        if "specialized" in str(error) or "Constraints violated" in str(error):
            match = re.search(r"size\(\)\[(\d+)\]", str(error))
            axis = int(match[1]) if match else 0
            name, size = (axes[0][axis] if axes and axis else "batch"), example[0].shape[axis]
            message = f"the {name} size is fixed to {size} somewhere; use x.shape[{axis}] or -1, not a number"
            where = _fixed_size(student, example, size)
        else:
            where = _user_line(error)
        raise InputError(
            f"capture: torch.export cannot trace {type(student).__name__}: {message}{where}. A model must be one "
            "graph: no branches on tensor values, no .item(), no work outside torch"
        ) from error


def _plain_signature(graph: fx.Graph) -> None:
    """Tensors in, and the tensor, tuple or dict of the original out, without pytree calls around every forward."""
    output = graph.output_node()
    structure = torch.utils._pytree.tree_unflatten(output.args[0], graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined,arg-type]
    output.args = (dict(structure) if isinstance(structure, dict) else structure,)
    graph.set_codegen(fx.graph.CodeGen())


def _spell_sizes(graph: fx.Graph) -> None:
    """A -1 in a view that is a free size of an input becomes that size: as a quotient it grows from layer to layer."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    free = {str(s): (n, i) for n in inputs for i, s in enumerate(n.meta["val"].shape) if not isinstance(s, int)}
    nodes: dict[str, fx.Node] = {}
    for node in calls(graph, aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        size = str(node.meta["val"].shape[sizes.index(-1)]) if -1 in sizes else ""
        if size in free and any(isinstance(s, fx.Node) for s in sizes):
            if size not in nodes:
                with graph.inserting_after(inputs[-1]):
                    nodes[size] = graph.call_function(aten.sym_size.int, free[size])
            sizes[sizes.index(-1)] = nodes[size]
            node.args = (node.args[0], sizes)


def _mutates(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _user_line(error: BaseException) -> str:
    """`, at FILE:LINE: 'code'` of the deepest frame outside torch and pqk, or nothing."""
    internal = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*internal, "<"))]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}: '{frames[-1].line}'" if frames else ""


def _fixed_size(student: nn.Module, example: Example, size: int) -> str:
    """Where a literal equal to a free size enters a shape: found by tracing once more with every size fixed."""
    try:
        with quiet_export(), fused_layers(False):
            unmarked = tuple(t.clone() for t in example)  # a failed export leaves its marks of free axes on the tensors
            graph = torch.export.export(student, unmarked, strict=False).graph
    except Exception:  # what is wrong with the model is reported without a line, not hidden behind this search
        return ""
    for node in graph.nodes:
        if size in (a for b in node.args if isinstance(b, list | tuple) for a in b if isinstance(a, int)):
            lines = [text.strip() for text in node.meta.get("stack_trace", "").strip().splitlines()]
            files = [i for i, text in enumerate(lines) if text.startswith("File ") and "/torch/" not in text]
            if files:
                file, number = lines[files[-1]].split('"')[1], lines[files[-1]].split("line ")[1].split(",")[0]
                return f", at {Path(file).name}:{number}: '{lines[files[-1] + 1]}'"
    return ""


# ---- what each node is


def _describe(graph_module: fx.GraphModule, input_names: Sequence[str] | None) -> None:
    """Replace the tracer's metadata (fake tensors, source paths) by plain facts, and note every module's output."""
    points: dict[str, str] = {}
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    input_layers = dict(zip(inputs, input_names or [str(n.target) for n in inputs], strict=True))
    layers = set(input_layers.values())
    stacks = {node: _stack(node) for node in graph_module.graph.nodes}
    owners = Counter(stack[-1] for node, stack in stacks.items() if stack and "val" in node.meta)
    for node, stack in stacks.items():
        value = node.meta.get("val")
        if node.op == "get_attr":
            value = attribute(graph_module, str(node.target))
        node.meta.clear()
        if isinstance(value, torch.Tensor):
            node.meta["shape"] = tuple(s if isinstance(s, int) else None for s in value.shape)
            node.meta["dtype"] = value.dtype
        node.meta["layer"] = input_layers.get(node) or _layer(node, stack, owners, layers)
        if node.op == "call_function" and "shape" in node.meta:
            points.update((path, node.name) for path in stack if path)
    graph_module.meta["points"] = points


def _stack(node: fx.Node) -> list[str]:
    """The paths of the modules that `node` was traced in, outermost first."""
    paths = [path.partition("@")[0] for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path for path in paths if not path.startswith("_empty")]


def _layer(node: fx.Node, stack: list[str], owners: Counter[str], layers: set[str]) -> str:
    """The path of the module if the node is all that it does, else with the operator's name; numbered if taken."""
    if node.op != "call_function":
        return str(node.target)
    operator = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    path = stack[-1] if stack else ""
    name = path if path and owners[path] == 1 else f"{path}.{operator}".lstrip(".")
    base, count = name, 0
    while name in layers:
        count += 1
        name = f"{base}_{count}"
    layers.add(name)
    return name


# ---- cleaning


def _drop_no_ops(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    for node in calls(graph, aten.copy_.default):  # what a buffer is given for the next call; no output depends on it
        if not node.users and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            graph.erase_node(node)
    for node in list(graph.nodes):
        if (node.op == "call_function" and node.target in GUARDS) or str(node.target).startswith("_guards"):
            node.replace_all_uses_with(None) if node.users else None
            graph.erase_node(node)
    for node in calls(graph, aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default  # without the copies, what is viewed need not be contiguous
    casts = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default)
    for node in calls(graph, *NO_OPS, *casts, aten.slice.Tensor, aten.expand.default):
        if node.target in NO_OPS or _keeps_everything(node):
            replace(graph_module, node, node.args[0])  # type: ignore[arg-type]


def _keeps_everything(node: fx.Node) -> bool:
    source, a = node.args[0], arguments(node)
    if node.target is aten.slice.Tensor:
        size = shape(source)[a["dim"]]  # type: ignore[arg-type]
        end = 1 << 62 if a["end"] is None else a["end"]
        return not a["start"] and a["step"] == 1 and isinstance(end, int) and end >= (size or 1 << 62)
    if node.target is aten.expand.default:
        return shape(node) == shape(source) and all(not isinstance(s, fx.Node) for s in a["size"])  # type: ignore[arg-type]
    return node.meta["dtype"] == source.meta["dtype"]  # type: ignore[union-attr]


def _fold_constants(graph_module: fx.GraphModule) -> None:
    """Compute what depends on parameters only (parametrized weights, position tables) once, now."""
    graph, values, trained = graph_module.graph, dict[fx.Node, Any](), set[fx.Node]()
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = attribute(graph_module, str(node.target))
            trained |= {node} if isinstance(values[node], nn.Parameter) else set()
        constant = node.op == "call_function" and all(n in values for n in node.all_input_nodes)
        if not constant or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem:
            with torch.no_grad():
                value = node.target(*fx.map_arg(node.args, values.get), **fx.map_arg(node.kwargs, values.get))
            trained |= {node} if trained.intersection(node.all_input_nodes) else set()
            if not isinstance(value, torch.Tensor) or "shape" not in node.meta:
                if node.all_input_nodes:  # several results, of which each is asked for by its index
                    values[node] = value
                continue
            value = value.clone()
            if node in trained and value.is_floating_point():
                value = nn.Parameter(value)
            path = attach(graph_module, free_path(graph_module, f"constants.{node.name}"), value)
            with graph.inserting_before(node):
                weight = tensor_node(graph_module, path)
            values[weight] = value
            trained |= {weight} if node in trained else set()
            replace(graph_module, node, weight)


REWRITES: tuple[RewriteFunction, ...] = (capture,)
Capture.rewrites = REWRITES
