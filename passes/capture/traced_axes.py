"""What the tracer noted of free axes: the symbols of their sizes, and what it took for granted of them."""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from pqk.core.aten import aten
from pqk.data.structures import leaves
from pqk.errors import InputError
from pqk.task.axes import Axes

COMBINATIONS: dict[Any, Any] = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}
"""how the tracer writes sizes that follow from others, and what computes them"""
ARITHMETIC: dict[Any, Any] = {
    sympy.Add: lambda *parts: sum(parts),
    sympy.Mul: lambda *parts: math.prod(parts),
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    Max: max,
    Min: min,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
    sympy.And: lambda *parts: all(parts),
    sympy.Or: lambda *parts: any(parts),
}
"""Python's operators for those of expressions"""
Sized = Mapping[str, int]


def user_inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of a traced program that are its inputs, in order."""
    named = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    return [named[str(name)] for name in program.graph_signature.user_inputs]


def fixing_line(program: ExportedProgram, number: int, axis: int) -> str:
    """`FILE:LINE: 'code'` where an axis of an input was fixed: by Python, else by an operator with that number."""
    env, fixing = _shape_env(program), []
    if env is None:
        return ""
    name = str(user_inputs(program)[number].target)
    for guard in env.guards:
        sources = [s.name for symbol in guard.expr.free_symbols for s in env.var_to_sources.get(symbol, ())]
        texts = [text() if callable(text) else text for text in sources]
        if any(t.endswith(f".size()[{axis}]") and (f"'{name}'" in t or f"[{number}].size" in t) for t in texts):
            fixing.append(guard)
    lines = [_guard_line(guard.sloc) for guard in fixing]
    numbers = [n for guard in fixing if (n := _equal_number(guard.expr)) is not None]
    return next(filter(None, (*lines, *(literal_line(program.graph, n) for n in numbers))), "")


def _shape_env(program: ExportedProgram) -> Any | None:
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    return next((v.fake_mode.shape_env for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)


def literal_line(graph: fx.Graph, size: int) -> str:
    """`FILE:LINE: 'code'` of the first operator that a number equal to a size enters, or which takes apart an axis of
    that size, as a loop over a tensor does; or nothing."""
    for node in graph.nodes:
        numbers = [a for b in node.args for a in (b if isinstance(b, list | tuple) else [b]) if type(a) is int]
        apart = node.target is aten.unbind.int and len(node.meta["val"]) == size
        if node.op == "call_function" and (size in numbers or apart) and (line := node_line(node)):
            return line
    return ""


def node_line(node: fx.Node) -> str:
    """`FILE:LINE: 'code'` of what was traced to this node, or nothing."""
    lines = [text.strip() for text in node.meta.get("stack_trace", "").strip().splitlines()]
    files = [i for i, text in enumerate(lines) if text.startswith("File ") and "/torch/" not in text]
    if not files:
        return ""
    file, number = lines[files[-1]].split('"')[1], lines[files[-1]].split("line ")[1].split(",")[0]
    return f"{Path(file).name}:{number}: '{lines[files[-1] + 1]}'"


def _guard_line(location: Any) -> str:
    """`FILE:LINE: 'code'` of a guard, or nothing where it is torch's own."""
    frame = location.framework_loc
    if frame is None or isinstance(frame, str) or frame.filename.startswith(str(Path(torch.__file__).parent)):
        return ""
    return f"{Path(frame.filename).name}:{frame.lineno}: '{linecache.getline(frame.filename, frame.lineno).strip()}'"


@dataclass(frozen=True)
class Guard:
    """Something that was taken for granted of one or more free axes, in their names."""

    expression: sympy.Basic
    line: str
    """of Python code that took it; nothing where torch did"""
    operator_line: str = ""
    """where torch did: of an operator that has the number of this equation"""

    @cached_property
    def axes(self) -> frozenset[str]:
        return frozenset(str(s) for s in self.expression.free_symbols)

    def holds(self, sizes: Sized, values: dict[sympy.Basic, Any] | None = None) -> bool:
        """Whether it does there; `values` keeps what parts of guards are at the same sizes."""
        try:
            return bool(value_of(self.expression, sizes, {} if values is None else values))
        except Exception:  # sizes that make no sense, such as a quotient by none or a padding of less than nothing
            return False


def value_of(expression: sympy.Basic, sizes: Sized, values: dict[sympy.Basic, Any]) -> Any:
    """What an expression of the names of axes is at `sizes`; `values` are those of its parts that are known.

    Without sympy's own arithmetic, which takes minutes for the thousands of nested quotients of a network of windows.
    """
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol):
        return sizes[str(expression)]
    if expression not in values:
        combine = ARITHMETIC.get(expression.func)
        if combine is None:
            value: Any = expression.xreplace({s: sympy.Integer(sizes[str(s)]) for s in expression.free_symbols})
            values[expression] = int(value) if isinstance(value, sympy.Integer) else value
        else:
            values[expression] = combine(*(value_of(part, sizes, values) for part in expression.args))
    return values[expression]


@dataclass(frozen=True)
class TracedAxes:
    """The names of the symbols of a traced graph, and the guards on them."""

    names: Mapping[sympy.Symbol, sympy.Symbol]
    """a symbol of the tracer -> one with the name of the axis"""
    guards: tuple[Guard, ...]
    first: Mapping[str, str]
    """the name of an axis -> the first name of those that must have its size"""

    @staticmethod
    def of(program: ExportedProgram, axes: Axes) -> TracedAxes:
        labels: dict[sympy.Basic, str] = {}
        first: dict[str, str] = {}
        for node, names in zip(user_inputs(program), axes, strict=True):
            for name, size in zip(names, getattr(node.meta["val"], "shape", ()), strict=False):
                if name and isinstance(size, torch.SymInt):
                    label = labels.setdefault(size.node.expr, first.get(name, name))
                    first.setdefault(name, label)
        symbols = {
            symbol: sympy.Symbol(first[label], integer=True, positive=True)
            for symbol, label in labels.items()
            if isinstance(symbol, sympy.Symbol)
        }
        env, guards = _shape_env(program), dict[sympy.Basic, Guard]()
        for guard in () if env is None else env.guards:
            expression = guard.expr.xreplace(symbols)
            if expression.free_symbols and expression.free_symbols <= set(symbols.values()):
                line, number = _guard_line(guard.sloc), _equal_number(expression)
                near = "" if line or number is None else literal_line(program.graph, number)
                guards.setdefault(expression, Guard(expression, line, near))
        return TracedAxes(symbols, tuple(guards.values()), first)

    def output_sizes(self, graph: fx.Graph) -> list[list[int | sympy.Basic]]:
        """For each output the sizes of its axes: numbers, and expressions of the names of free axes.

        Raises `InputError` naming the line where a size depends on values, as that of what a mask selects does.
        """
        for name, node in leaves(graph.output_node().args[0]):
            sizes = node.meta["val"].shape if isinstance(node, fx.Node) else ()
            if any(free_unbacked_symbols(size) for size in sizes):
                what, line = f"the output {name}".strip(), node_line(node)
                raise InputError(
                    f"capture: the size of {what} depends on the values of the inputs{line and f', at {line}'}, as "
                    "that of what a mask selects does; return everything, and the mask beside it"
                )
        return [
            [s if isinstance(s, int) else s.node.expr.xreplace(self.names) for s in node.meta["val"].shape]
            for _, node in leaves(graph.output_node().args[0])
            if isinstance(node, fx.Node)
        ]


def _equal_number(expression: sympy.Basic) -> int | None:
    """The number of an equation such as `Eq(time, 16)`; of other guards None, and of equations with one."""
    numbers = [int(a) for a in expression.args if isinstance(a, sympy.Integer) and int(a) > 1]
    return numbers[0] if isinstance(expression, sympy.Eq) and numbers else None


class SpelledSizes:
    """Nodes of a graph that compute sizes from those of its inputs, each once."""

    def __init__(self, graph: fx.Graph) -> None:
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        self.graph, self.inputs_end = graph, inputs[-1]
        self.free = {
            s.node.expr: (n, i)
            for n in inputs
            for i, s in enumerate(getattr(n.meta["val"], "shape", ()))
            if isinstance(s, torch.SymInt)
        }
        self.nodes: dict[sympy.Basic, fx.Node] = {}
        self.end: fx.Node | None = None

    def of(self, size: int | torch.SymInt) -> int | fx.Node | None:
        """The node, or the number; None for what is not made of sums, products and quotients of the inputs' sizes."""
        return size if isinstance(size, int) else self._built(size.node.expr)

    def _built(self, expression: sympy.Basic) -> int | fx.Node | None:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if expression in self.free and expression not in self.nodes:
            with self.graph.inserting_after(self.inputs_end):
                self.nodes[expression] = self.graph.call_function(aten.sym_size.int, self.free[expression])
            self.end = self.end or self.nodes[expression]
        if expression not in self.nodes:
            combine = COMBINATIONS.get(expression.func)
            parts = [self._built(part) for part in expression.args]
            if combine is None or any(part is None for part in parts) or self.end is None:
                return None
            whole = parts[0]
            for part in parts[1:]:
                with self.graph.inserting_after(self.end):
                    whole = self.end = self.graph.call_function(combine, (whole, part))
            self.nodes[expression] = self.end
        return self.nodes[expression]
