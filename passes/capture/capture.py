"""Capture: the float module becomes the ATen graph that will be deployed.

Modules that train in one form and are deployed in another take the second (`for_inference`). `torch.export` traces the
student in eval mode with a dynamic batch, and whatever else the task calls free. Then everything that inference does
not need is taken out: guards, dropout, no-op slices and copies, and batch norm, which is folded into the convolution or
linear layer before it (a batch norm with none before it becomes a depthwise 1x1 convolution, for which runtimes have an
integer kernel). Parameters keep their module paths, so the saved tensors read like the model they came from.
"""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx, nn

from pqk.core.aten import GUARDS, NO_OPS, RECURRENT, aten
from pqk.core.graph import (
    StructuredCode,
    arguments,
    attach,
    attribute,
    calls,
    finish,
    free_path,
    operand,
    quiet_export,
    register_containers,
    replace,
    shape,
    tensor_node,
)
from pqk.core.modes import fused_layers
from pqk.core.program import Example, Pass, Program, RewriteFunction, Stage
from pqk.data.structures import members, plain_structure, refilled
from pqk.errors import InputError
from pqk.passes.capture.batch_norm import fold_batch_norms
from pqk.passes.capture.canonicalize import canonical_forms
from pqk.passes.capture.deployed_forms import take_deployed_forms
from pqk.passes.capture.draws import refuse_draws
from pqk.passes.capture.free_sizes import check_free_sizes
from pqk.passes.capture.regions import inline_regions
from pqk.passes.capture.traced_axes import SpelledSizes, TracedAxes, fixing_line, literal_line, user_inputs
from pqk.passes.capture.writes import plain_writes
from pqk.settings import settings
from pqk.task.axes import BATCH, Axes, batch_axes, free_axes
from pqk.task.task import Task

VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@settings
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
    """The inference graph of `student` as an `fx.GraphModule` that trains, batch dynamic.

    `student` is changed to eval mode, and its parts to what they are for inference.

    `example` are inputs whose first axis is the batch, of at least 2; their layers are called by `input_names`, or by
    the names of the arguments of `forward`. `axes` names the free axes of each input, the batch alone by default.
    Raises `InputError` naming the construct and the line of the user's code where the model cannot be traced, or where
    it keeps something of the example's size of a free axis.
    """
    axes = axes or batch_axes(example)
    example = tuple(t.clone() for t in example)  # one tensor twice would be one input to the exporter
    student = take_deployed_forms(student.eval(), example)
    exported, traced = _export(student, example, axes)
    refuse_draws(exported.graph)
    structure = _plain_signature(exported.graph)
    _spell_sizes(exported.graph)
    graph_module = fx.GraphModule(exported, exported.graph)
    outputs = traced.output_sizes(exported.graph)
    if structure is not None:
        graph_module.meta["structure"] = structure
    _describe(graph_module, input_names)
    _refuse_free_steps(graph_module)
    _drop_no_ops(graph_module)
    plain_writes(graph_module)
    _fold_constants(graph_module)
    fold_batch_norms(graph_module)
    canonical_forms(graph_module)
    for parameter in finish(graph_module).parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    sizes, shapes = check_free_sizes(student, graph_module, example, axes, traced, outputs)
    graph_module.meta.update(sizes=sizes, outputs=shapes)
    return graph_module


# ---- tracing


def _export(student: nn.Module, example: Example, axes: Axes) -> tuple[fx.GraphModule, TracedAxes]:
    """The traced graph without guards, and what the tracer took for granted of free axes, which the guards said."""
    try:
        with quiet_export(), fused_layers(False), torch.no_grad():
            register_containers(student(*example))
        with quiet_export(), fused_layers(False):
            free = free_axes(student, example, axes)
            program = torch.export.export(student, example, dynamic_shapes=free, strict=False)
            inline_regions(program.graph_module)
            traced = TracedAxes.of(program, axes)
            if any(_mutates(n) for n in program.graph.nodes):
                program = program.run_decompositions({})  # an empty table: only functionalizes
            return program.module(check_guards=False), traced
    except InputError:
        raise
    except Exception as error:  # whatever the user's code or the tracer raised
        message = str(error).strip().partition("\n")[0]
        if "specialized" in str(error) or "Constraints violated" in str(error):
            message, where = fixed_size(student, example, axes)
        else:
            where = _user_line(error)
        raise InputError(
            f"capture: torch.export cannot trace {type(student).__name__}: {message}{where}. A model must be one "
            "graph: no branches on tensor values, no .item(), no work outside torch"
        ) from error


def _plain_signature(graph: fx.Graph) -> Any | None:
    """Tensors in, and the original's structure of tensors out, without pytree calls around every forward.

    Returns the structure where it is not of dicts, tuples and lists alone; the graph's own code then makes it of them.
    """
    output = graph.output_node()
    structure = torch.utils._pytree.tree_unflatten(output.args[0], graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined,arg-type]
    output.args = (plain_structure(structure),)
    if _containers(structure) == _containers(output.args[0]):
        graph.set_codegen(fx.graph.CodeGen())
        return None
    empty = _emptied(structure)
    graph.set_codegen(StructuredCode(empty))
    return empty


def _containers(structure: Any) -> list[type]:
    inner = members(structure)
    return [] if inner is None else [type(structure), *(t for _, part in inner for t in _containers(part))]


def _emptied(structure: Any) -> Any:
    """The containers alone, with nothing of the graph in them."""
    inner = members(structure)
    if inner is None:
        return None if structure is None else True
    return refilled(structure, [_emptied(part) for _, part in inner])


def _spell_sizes(graph: fx.Graph) -> None:
    """A -1 in a view beside other free sizes becomes the size that it stands for.

    As a quotient it would grow from layer to layer, and beside a batch of none it cannot be found.
    """
    spelling = SpelledSizes(graph)
    for node in calls(graph, *VIEWS):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if -1 in sizes and any(isinstance(s, fx.Node) for s in sizes):
            at = sizes.index(-1)
            size = spelling.of(node.meta["val"].shape[at])
            sizes[at] = -1 if size is None else size
            node.args = (node.args[0], sizes)


def _mutates(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def _user_line(error: BaseException) -> str:
    """`, at FILE:LINE: 'code'` of the deepest frame outside torch and pqk, or nothing."""
    internal = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*internal, "<"))]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}: '{frames[-1].line}'" if frames else ""


def fixed_size(student: nn.Module, example: Example, axes: Axes) -> tuple[str, str]:
    """Which free axis the model fixes, and `, at FILE:LINE: 'code'` where: by tracing it with sizes that may be fixed.

    Where Python fixes a size (a loop, `len`, `float`), the tracer notes the line; else a number is looked for.
    """

    def may_be_fixed(shapes: Any) -> Any:
        if isinstance(shapes, dict):
            return dict.fromkeys(shapes, torch.export.Dim.AUTO)
        return tuple(may_be_fixed(s) for s in shapes)

    unmarked = tuple(t.clone() for t in example)  # a failed export leaves its marks of free axes on the tensors
    auto = may_be_fixed(free_axes(student, unmarked, axes))
    nothing = "a size that is free is fixed to the example's somewhere", ""
    try:
        with quiet_export(), fused_layers(False):
            program = torch.export.export(student, unmarked, dynamic_shapes=auto, strict=False)
    except Exception:  # what is wrong with the model is reported without a line, not hidden behind this search
        return nothing
    for number, (node, names) in enumerate(zip(user_inputs(program), axes, strict=True)):
        for axis, (name, size) in enumerate(zip(names, node.meta["val"].shape, strict=True)):
            if name and str(size).isdigit():  # also a symbol that has become a number
                where = fixing_line(program, number, axis) or literal_line(program.graph, int(size))
                if not where and name != BATCH and (layer := _recurrent_layer(student, program.graph)) is not None:
                    message = f"{layer}, a recurrent layer, is unrolled over the {size} steps of the example"
                    return f"the {name} size is fixed: {message}; leave it out of the task's dynamic_axes", ""
                message = f"the {name} size is fixed to {size} somewhere; use x.shape[{axis}] or -1, not a number"
                return message, f", at {where}" if where else ""
    limits = (g for g in TracedAxes.of(program, axes).guards if g.line and BATCH in g.axes)
    limit = next(limits, None)
    return nothing if limit is None else (f"it takes {limit.expression} for granted", f", at {limit.line}")


def _recurrent_layer(student: nn.Module, graph: fx.Graph) -> str | None:
    """The path of a recurrent layer that was traced."""
    recurrent = {path for path, module in student.named_modules() if isinstance(module, nn.RNNBase)}
    return next((path for node in graph.nodes for path in _stack(node) if path in recurrent), None)


def _refuse_free_steps(graph_module: fx.GraphModule) -> None:
    """Raises `InputError` where a recurrent layer runs over a free axis, whose steps a file has one by one."""
    for node in calls(graph_module.graph, *RECURRENT):
        if sum(size is None for size in shape(operand(node))) > 1:
            layer = str(node.meta["layer"]).removesuffix(f".{node.target._opname}")  # type: ignore[union-attr]
            raise InputError(
                f"capture: {layer}, a recurrent layer, is unrolled over the steps of the example, and "
                "their number follows from a free axis; leave that axis out of the task's dynamic_axes"
            )


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
            node.meta["shape"] = tuple(s if isinstance(s, int) else None for s in _sizes(node, value))
            node.meta["dtype"] = value.dtype
        node.meta["layer"] = input_layers.get(node) or _layer(node, stack, owners, layers)
        if node.op == "call_function" and "shape" in node.meta:
            points.update((path, node.name) for path in stack if path)
    graph_module.meta["points"] = points


def _sizes(node: fx.Node, value: torch.Tensor) -> Sequence[Any]:
    """The sizes of a value; a view's numbers as they were written, which the tracer has as quotients of free sizes."""
    if node.target not in VIEWS:
        return value.shape
    written = node.args[1]
    return [w if isinstance(w, int) and w >= 0 else s for w, s in zip(written, value.shape, strict=True)]  # type: ignore[arg-type]


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
