"""Quantize: fake-quantizers on every edge that the runtime needs to stay in integers.

A runtime fuses DequantizeLinear -> op -> QuantizeLinear into an integer kernel, so an operator that lacks a quantizer
on one of its inputs or on its output becomes a float island. Three kinds of operator are told apart:

    heavy     convolutions, linear, matmul: always integer, unless left in float by name
    light     add, mul, concat, pooling, sigmoid: integer where a neighbour wants the result in integers, or where all
              inputs are integers anyway; elsewhere rounding twice costs more than a float operator
    movement  slice, pad, reshape, transpose, max-pool …: no quantizer of their own; `convert` lets them act on the
              integers of their input, with its scale

A ReLU or clamp, and a scaling by a constant, that a quantizer follows is taken over by it. Linear and matmul need no
quantizer on an output that only float operators read: the runtime has integer kernels that put out floats.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import fx, nn

from pqk.errors import InputError, nearest
from pqk.graph import arguments, attach, attribute, facts, finish, free_path, is_float, operand, replace, shape
from pqk.modules import ActivationFakeQuant, BiasFakeQuant, WeightFakeQuant, quantizers, set_mode
from pqk.passes._forms import CLAMPS, aten, move_points
from pqk.program import CONFIG, Example, Pass, Program, RewriteFunction, Stage
from pqk.qparams import Grid, Method
from pqk.task import Task

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
WEIGHTED = (*CONVOLUTIONS, aten.linear.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
HEAVY = (*WEIGHTED, *PRODUCTS)
FLOAT_OUTPUT = (aten.linear.default, *PRODUCTS)
"""heavy operators whose integer kernel can put out floats"""
LIGHT = (
    aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.mean.dim, aten.avg_pool2d.default, aten.sigmoid.default,
    aten.leaky_relu.default,
)  # fmt: skip
MOVEMENT = (
    aten.slice.Tensor, aten.select.int, aten.pad.default, aten.constant_pad_nd.default, aten.reshape.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.expand.default,
    aten.max_pool2d.default, aten.index_select.default,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class Quantize(Pass):
    """Put fake-quantizers on the target's integer grid on every edge that the runtime needs to stay in integers."""

    name: ClassVar[str] = "quantize"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.GRAPH})
    produces: ClassVar[Stage | None] = Stage.FAKE_QUANT

    calibration: Method = "mse"
    """how ranges are chosen from the observed values: all of them, all but the tails, or the least squared error"""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """for `percentile`: the share of values, in per cent, that the range covers"""
    samples: int = Field(default=512, gt=0)
    """validation samples that the ranges are chosen from"""
    learned_scales: bool = True
    """whether training may move the step sizes (LSQ)"""
    float_layers: tuple[str, ...] = ()
    """patterns (such as `layer3.*`) of layers to leave in float"""

    def apply(self, program: Program, task: Task) -> Program:
        student = program.student
        assert isinstance(student, fx.GraphModule)
        points, declined = placement(student, self.float_layers)
        target = program.target
        program = program.rewrite(
            insert_fake_quant,
            task.example,
            points=points,
            activation=asdict(target.activation),
            weight=asdict(target.weight),
            learned=self.learned_scales,
        )
        calibrate(program.student, task, self.calibration, self.percentile, self.samples)
        kinds = [type(q) for q in quantizers(program.student).values()]
        program = program.decline(self.name, declined)
        return program.note(activations=kinds.count(ActivationFakeQuant), weights=kinds.count(WeightFakeQuant))


# ---- where


def bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The constant bounds of a ReLU or clamp whose range includes 0; None for anything else."""
    if node.op != "call_function" or node.target not in CLAMPS:
        return None
    a = arguments(node)
    if node.target in (aten.relu.default, aten.relu6.default):
        low, high = 0.0, 6.0 if node.target is aten.relu6.default else None
    elif node.target is aten.hardtanh.default:
        low, high = a["min_val"], a["max_val"]
    else:
        low, high = a["min"], a.get("max")
    fixed = all(b is None or isinstance(b, int | float) for b in (low, high))
    return (low, high) if fixed and (low is None or low <= 0) and (high is None or high > 0) else None


def gain(node: fx.Node) -> float | None:
    """The positive constant that `node` multiplies its input by; None for anything else."""
    if node.op != "call_function" or node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) < 2:
        return None
    factor = node.args[1]
    if not isinstance(factor, int | float) or factor <= 0:
        return None
    return float(factor) if node.target is aten.mul.Tensor else 1 / factor


def absorbed(node: fx.Node) -> tuple[fx.Node, tuple[float | None, float | None], float]:
    """What a quantizer on `node` reads, and the bounds and the gain of the clamp and scaling that it takes over."""
    factor = gain(node)
    clamp = node if factor is None else operand(node)
    limits = bounds(clamp) if clamp is node or len(clamp.users) == 1 else None
    return operand(clamp) if limits else clamp, limits or (None, None), factor or 1.0


def tail(node: fx.Node) -> fx.Node:
    """The last of `node`, a clamp that alone reads it, and a constant scaling that alone reads that."""
    for follows in (bounds, gain):
        users = list(node.users)
        if len(users) == 1 and follows(users[0]) is not None:
            node = users[0]
    return node


def moves(node: fx.Node) -> bool:
    """Whether `node` only moves values (or picks the largest), so that it can act on integers as it does on floats."""
    if node.op != "call_function" or node.target not in MOVEMENT or not is_float(node):
        return False
    a = arguments(node)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return a.get("mode", "constant") == "constant" and not a["value"]
    return node.target is not aten.max_pool2d.default or not a["ceil_mode"]


def root(node: fx.Node) -> fx.Node:
    """The node whose quantizer `node`'s value has: itself, or where it was moved from."""
    while moves(node):
        node = operand(node)
    return node


def inputs(node: fx.Node) -> list[fx.Node]:
    """The values that `node` computes with, weights and biases of layers aside."""
    if node.target in WEIGHTED:
        return [operand(node)]
    if node.target is aten.cat.default:
        return list(node.args[0])  # type: ignore[arg-type]
    return [a for a in node.args if is_float(a)]  # type: ignore[misc]


class Placement:
    """Which operators compute in integers and which values have a quantizer. The module's docstring has the rules."""

    def __init__(self, graph_module: fx.GraphModule, float_layers: tuple[str, ...]) -> None:
        self.nodes = [n for n in graph_module.graph.nodes if n.op != "output" and is_float(n)]
        self.named = {n for n in self.nodes for p in float_layers if fnmatch.fnmatchcase(n.meta["layer"], p)}
        self.integer = {n for n in self.nodes if n.target in HEAVY and self.capable(n)}
        for node in reversed(self.nodes):
            if self.light(node) and self.wanted(tail(node)):
                self.integer.add(node)
        self.values = {value for value in map(self.value, self.nodes) if value is not None}
        for node in self.nodes:
            pools = node.target in (aten.add.Tensor, aten.mean.dim, aten.avg_pool2d.default)
            if pools and self.light(node) and all(root(i) in self.values for i in inputs(node)):
                self.integer.add(node)
                self.values.add(tail(node))

    def capable(self, node: fx.Node) -> bool:
        """Whether a heavy operator can compute in integers: its weight is a parameter, or both factors are values."""
        if node in self.named or node.meta["dtype"] != torch.float32:
            return False
        if node.target in WEIGHTED:
            return isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
        return len(inputs(node)) == 2

    def light(self, node: fx.Node) -> bool:
        """Whether `node` is a light operator in a form that has an integer kernel."""
        if node.op != "call_function" or node.target not in LIGHT or node in self.named:
            return False
        a = arguments(node)
        if node.target is aten.mean.dim:
            rank = len(shape(a["self"]))
            return rank == 4 and a["keepdim"] and sorted(d % rank for d in a["dim"]) == [2, 3]
        if node.target in (aten.add.Tensor, aten.mul.Tensor):
            return len(inputs(node)) == 2 and a.get("alpha", 1) == 1
        return node.meta["dtype"] == torch.float32

    def wanted(self, node: fx.Node) -> bool:
        """Whether some integer operator reads `node`, perhaps after movement."""
        return any((u in self.integer and node in inputs(u)) or (moves(u) and self.wanted(u)) for u in node.users)

    def value(self, node: fx.Node) -> fx.Node | None:
        """The value of `node` that has a quantizer: its own, or that of the clamp and scaling after it; None: none."""
        if node in self.integer and (node.target not in FLOAT_OUTPUT or self.wanted(tail(node))):
            return tail(node)
        return node if not moves(node) and self.wanted(node) else None


def placement(
    graph_module: fx.GraphModule, float_layers: tuple[str, ...] = ()
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Where quantizers go (JSON, the `points` of `insert_fake_quant`), and `(layer, reason)` of what stays in float.

    Raises `InputError` where a pattern in `float_layers` names no layer.
    """
    layers = [n.meta["layer"] for n in graph_module.graph.nodes if n.op == "call_function" and is_float(n)]
    for pattern in float_layers:
        if not fnmatch.filter(layers, pattern):
            raise InputError(f'quantize: float_layers "{pattern}" matches no layer{nearest(pattern, layers)}')
    where = Placement(graph_module, float_layers)
    tails = {tail(n) for n in where.integer}
    points: list[dict[str, Any]] = []
    for node in where.nodes:
        if node in where.values:
            readers = [u.name for u in node.users if node in tails or u in where.integer or moves(u)]
            points.append({"kind": "activation", "node": node.name, "readers": readers})
    points += [{"kind": "weight", "node": n.name} for n in where.nodes if n in where.integer and n.target in WEIGHTED]
    return points, _reasons(where)


def _reasons(where: Placement) -> list[tuple[str, str]]:
    reasons = []
    taken_over = {n for n in where.values if bounds(n) or gain(n)}
    taken_over |= {operand(n) for n in taken_over if gain(n) and bounds(operand(n))}
    for node in where.nodes:
        operator = getattr(node.target, "_opname", str(node.target))
        if node.op != "call_function" or node in where.integer or node in taken_over or moves(node):
            continue
        if node in where.named:
            reason = "left in float by name (float_layers)"
        elif node.target in HEAVY:
            reason = f"{operator}: its weight is computed, not a parameter, or it is not float32"
        elif where.light(node) or bounds(node):
            reason = f"{operator}: no neighbour needs its result in integers"
        else:
            reason = f"{operator}: the runtime has no integer kernel for it"
        reasons.append((node.meta["layer"], reason))
    return reasons


# ---- the rewrite


def insert_fake_quant(
    student: nn.Module,
    example: Example,
    *,
    points: list[dict[str, Any]],
    activation: dict[str, Any],
    weight: dict[str, Any],
    learned: bool,
) -> nn.Module:
    """Insert fake-quantizers (uncalibrated) into a captured graph, which is changed and returned.

    Each point names a node. `activation`: its value, for the nodes in `readers`, goes through an `ActivationFakeQuant`
    on the grid `activation`; a clamp is replaced by it. `weight`: its weight and bias go through quantizers of the grid
    `weight` and of the accumulator.
    """
    assert isinstance(student, fx.GraphModule)
    nodes = {n.name: n for n in student.graph.nodes}
    for point in points:
        if point["kind"] == "activation":
            _insert_activation(student, nodes[point["node"]], point["readers"], Grid(**activation), learned)
    for point in points:
        if point["kind"] == "weight":
            _insert_weight(student, nodes[point["node"]], Grid(**weight), learned)
    return finish(student)


def _module_call(student: fx.GraphModule, name: str, module: nn.Module, source: fx.Node, layer: str) -> fx.Node:
    path = attach(student, free_path(student, f"quantizers.{name.replace('.', '_')}"), module)
    node = student.graph.create_node("call_module", path, (source,), name=path.replace(".", "_"))
    node.meta.update(facts(source) | {"layer": layer})
    return node


def _insert_activation(student: fx.GraphModule, node: fx.Node, readers: list[str], grid: Grid, learned: bool) -> None:
    source, limits, factor = absorbed(node)
    layer = source.meta["layer"] if len(source.users) == 1 else node.meta["layer"]
    module = ActivationFakeQuant(grid, *limits, gain=factor, learned=learned and source.op != "get_attr")
    with student.graph.inserting_after(node):
        fake = _module_call(student, layer, module, source, layer)
    if source is not node:
        replace(student, node, fake)
        return
    node.replace_all_uses_with(fake, delete_user_cb=lambda user: user is not fake and user.name in readers)
    if all(user is fake for user in node.users):
        move_points(student, node, fake)


def _insert_weight(student: fx.GraphModule, node: fx.Node, grid: Grid, learned: bool) -> None:
    a, layer = arguments(node), node.meta["layer"]
    activation = attribute(student, str(root(a["input"]).target))
    weight = WeightFakeQuant(grid, shape(a["weight"])[0], learned)  # type: ignore[arg-type]
    with student.graph.inserting_before(node):
        tensors = [_module_call(student, f"{layer}.weight", weight, a["weight"], f"{layer}.weight")]
        if a["bias"] is not None:
            bias = BiasFakeQuant(activation, weight)
            tensors.append(_module_call(student, f"{layer}.bias", bias, a["bias"], f"{layer}.bias"))
    node.args = (a["input"], *tensors, *node.args[1 + len(tensors) :])


# ---- the numbers


def calibrate(student: nn.Module, task: Task, method: Method, percentile: float, samples: int) -> None:
    """Choose every range of a FAKE_QUANT student from `samples` validation inputs, and turn its quantizers on."""
    assert isinstance(student, fx.GraphModule)
    was_training = student.training
    student.eval()
    set_mode(student, "observe")
    called = [(n, attribute(student, str(n.target))) for n in student.graph.nodes if n.op == "call_module"]
    with torch.no_grad():
        for batch in task.calibration(samples):
            student(*batch)
        for _, module in called:
            if isinstance(module, ActivationFakeQuant):
                module.calibrate(method, percentile)
        for node, module in called:
            if isinstance(module, WeightFakeQuant):
                module.calibrate(attribute(student, str(operand(node).target)), method, percentile)
            elif isinstance(module, BiasFakeQuant):
                module.fit(attribute(student, str(operand(node).target)))
    student.train(was_training)


REWRITES: tuple[RewriteFunction, ...] = (insert_fake_quant,)
Quantize.rewrites = REWRITES
