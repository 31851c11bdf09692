"""Fuse: the INT8 graph as a program of Triton operators, in which one launch does a whole layer.

A convolution or linear layer takes in its bias, its activation, the quantize behind it, the residual addition behind
that, and the quantize behind that one; everything is repeated in registers, rounding for rounding, so the fused
student computes what the INT8 graph computes. Between launches there are integers, in NHWC.

The student stays the INT8 graph. What `fuse` makes is `program.fused`, which `emit_torch` writes; it is derived from
the student, so it is made again, not saved, when a run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import fx

from pqk.copies import copy_of
from pqk.core.aten import DEQUANTIZE, VIEWS, aten
from pqk.core.graph import attribute, calls, finish, operand
from pqk.core.graph import replace as replace_node
from pqk.core.launches import LaunchedOp, launches, traffic
from pqk.core.program import Pass, Program, Stage
from pqk.kernels.common.epilogue import rows_of
from pqk.passes.fuse.concat import join
from pqk.passes.fuse.epilogue import quantized
from pqk.passes.fuse.nhwc import settle
from pqk.passes.fuse.rule import Match, Rule
from pqk.passes.fuse.rules_attention import AttentionRule, NormRule, SiblingsRule
from pqk.passes.fuse.rules_causal import CausalAttentionRule
from pqk.passes.fuse.rules_elementwise import AddRule, ConcatRule, MaxPoolRule, MulRule, PoolRule, QuantizeRule
from pqk.passes.fuse.rules_embedding import EmbeddingRule
from pqk.passes.fuse.rules_gated import GatedRule
from pqk.passes.fuse.rules_rotary import RotaryRule
from pqk.passes.fuse.rules_weighted import ConvolutionRule, LinearRule
from pqk.settings import settings
from pqk.task.task import Task

__all__ = ["Fuse", "LaunchedOp", "fuse", "launches", "stands_for"]

RULES: tuple[Rule, ...] = (
    AttentionRule(), CausalAttentionRule(), RotaryRule(), GatedRule(), SiblingsRule(), ConvolutionRule(), LinearRule(),
    EmbeddingRule(), NormRule(), AddRule(), MulRule(), PoolRule(), MaxPoolRule(), ConcatRule(), QuantizeRule(),
)  # fmt: skip
"""those that take in the most first"""
RANGES = "the range of what it multiplies is that of a whole tensor at run time, and a launch has fixed scales"
BLOCKS = "it has a scale for every block of 32, and no launch has more than one a row of the weight"
WITHOUT_KERNEL = {
    "quantize_dynamic_linear": RANGES,
    "matmul_integer_to_float": RANGES,
    "matmul_nbits": BLOCKS,
    "gather_block_quantized": BLOCKS,
}
"""operators of graphs for ONNX Runtime that run their references on a GPU, too -> why"""


@settings
class Fuse(Pass):
    """Lower the INT8 student to fused Triton kernels: one launch a layer, emitted as `student.pt2`."""

    tuning: str = ""
    """a file of measured kernel configurations to store with the artifact: what `pqk benchmark --device cuda --json`
    wrote; without one those that the kernels choose by rule are stored"""
    name: ClassVar[str] = "fuse"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.INT8})

    def apply(self, program: Program, task: Task) -> Program:
        student = program.student
        assert isinstance(student, fx.GraphModule)
        fused, declined = fuse(student)
        one = tuple(x[:1] if x.ndim else x for x in task.example)
        before, after = traffic(student, one), traffic(fused, one)
        program = replace(program, fused=fused).decline(self.name, declined)
        return program.note(
            launches_before=before.launches,
            launches_after=after.launches,
            bytes_before=before.bytes,
            bytes_after=after.bytes,
        )

    def derive(self, program: Program) -> Program:
        student = program.student
        assert isinstance(student, fx.GraphModule)
        return replace(program, fused=fuse(student)[0])


def stands_for(node: fx.Node) -> str | None:
    """The name of the node of the INT8 graph whose value a launch gives; None where `node` is no launch."""
    return node.meta.get("stands_for")


def fuse(int8_graph: fx.GraphModule) -> tuple[fx.GraphModule, list[tuple[str, str]]]:
    """A fused copy of an INT8 graph, and `(layer, reason)` of what was left out or ends sooner than it might."""
    fused = copy_of(int8_graph, "student")
    reasons: dict[tuple[str, str], None] = {}
    for rule in RULES:
        for node in _alive(fused.graph):
            for match in rule.matches(fused, node):
                reason = rule.why_not_fused(fused, match)
                if reason is None:
                    _apply(fused, rule, match)
                    break
                reasons[node.meta["layer"], reason] = None
    settle(fused)
    fused.graph.eliminate_dead_code()
    for node in calls(fused.graph, DEQUANTIZE):
        _end_in_float(fused, node)
    reasons |= dict.fromkeys(join(fused))
    finish(fused)
    reasons |= dict.fromkeys(_left_out(fused))
    return fused, list(reasons)


def _alive(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph that loses some of those to come."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node in graph.find_nodes(op="call_function", target=node.target, sort=False):
            yield node


def _apply(fused: fx.GraphModule, rule: Rule, match: Match) -> None:
    end = match.ending.end
    with fused.graph.inserting_before(end):
        replace_node(fused, end, rule.rewrite(fused, match))
    fused.graph.eliminate_dead_code()


def _end_in_float(fused: fx.GraphModule, node: fx.Node) -> None:
    """Let the launch whose integers are only dequantized give the floats itself."""
    value, views = quantized(fused, node), []
    source = operand(node)
    while len(source.users) == 1 and source.target in VIEWS:
        views.append(source)
        source = operand(source)
    if value is None or len(source.users) != 1 or not str(source.kwargs.get("steps", "")).endswith("quantize"):
        return
    path, steps = str(source.kwargs["params"].target), str(source.kwargs["steps"])  # type: ignore[union-attr]
    rows_of(steps, attribute(fused, path))[-1, 4] = value.scale
    words = steps.split(",")
    source.kwargs = {**source.kwargs, "steps": ",".join([*words[:-1], "requantize"]), "out_dtype": torch.float32}
    for changed in (source, *views):
        changed.meta["dtype"] = torch.float32
    replace_node(fused, node, operand(node))


def _left_out(fused: fx.GraphModule) -> Iterator[tuple[str, str]]:
    computed: set[fx.Node] = set()
    for node in fused.graph.nodes:
        if node.op != "placeholder" and not any(n in computed for n in node.all_input_nodes):
            continue  # computed from constants alone
        computed.add(node)
        name = str(getattr(node.target, "_opname", ""))
        if name in WITHOUT_KERNEL:
            yield node.meta["layer"], f"{name}: no kernel: {WITHOUT_KERNEL[name]}; its reference runs"
        of_torch = node.op == "call_function" and getattr(node.target, "namespace", "") == "aten"
        if of_torch and "dtype" in node.meta and node.target not in (*VIEWS, aten.contiguous.default):
            operator = getattr(node.target, "_opname", str(node.target))
            yield node.meta["layer"], f"{operator}: no rule makes it part of a launch; torch runs it"
