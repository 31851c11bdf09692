"""Outliers of activations moved into weights before quantization (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438).

A per-tensor grid is as coarse as its largest channel. A linear layer computes the same with input channel j divided by
s_j and column j of its weight multiplied by it; the division is folded into what makes the input: a layer norm's gain
and offset, or the rows of an earlier linear layer. Equation 4, with the factors rounded to powers of two, by which
floats are scaled exactly, so that the float network stays what it was:

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

Nothing may read the input beside linear layers. In a post-norm encoder (BERT) the residual stream reads the output of
every norm as well, and what is left to smooth there are the values on their way through attention.

It is ours because it works on the captured graph that will be deployed and trained on: neural-compressor 3's observes
and converts the model by Intel's extension for PyTorch, without which it does not import.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import PRODUCTS, aten, moves
from pqk.core.graph import arguments, attribute, operand, shape
from pqk.core.program import Example
from pqk.data.structures import tensors

SAME = 1e-5
"""largest change of an output, over the largest output, that scaling may make: that of sums in another order"""


@dataclass(frozen=True)
class SmoothedPair:
    """What makes channels, and the linear layers that alone read them."""

    source: fx.Node
    readers: tuple[fx.Node, ...]


def smooth(
    student: fx.GraphModule, batches: Iterable[Example], alpha: float
) -> tuple[list[str], list[tuple[str, str]]]:
    """Smooth a captured graph in place. Returns the layers that now read smoother inputs, and (layer, reason) for
    norms that linear layers read and that stand as they were."""
    pairs, declined = find_pairs(student)
    inputs = list(batches)
    largest = _largest_inputs(student, {operand(p.readers[0]) for p in pairs}, inputs)
    with torch.no_grad():
        want = tensors(student(*inputs[0]))
    smoothed = []
    for pair in pairs:
        weights = [_parameter(student, r, "weight") for r in pair.readers]
        factors = _factors(largest[operand(pair.readers[0])], weights, alpha)
        source_parameters = [_parameter(student, pair.source, name) for name in ("weight", "bias")]
        _scale(source_parameters, weights, factors)
        with torch.no_grad():
            got = tensors(student(*inputs[0]))
        if all(float((g - w).abs().max()) <= SAME * float(w.abs().max()) for g, w in zip(got, want, strict=True)):
            smoothed += [r.meta["layer"] for r in pair.readers]
        else:
            _scale(source_parameters, weights, 1 / factors)
            declined.append((pair.source.meta["layer"], "not smoothed: its channels are not those of what reads it"))
    return smoothed, declined


def find_pairs(student: fx.GraphModule) -> tuple[list[SmoothedPair], list[tuple[str, str]]]:
    """What can be smoothed, and (layer, reason) for norms that linear layers read and that cannot."""
    users: dict[str, int] = {}
    for node in student.graph.nodes:
        if node.op == "get_attr":
            users[str(node.target)] = users.get(str(node.target), 0) + len(node.users)
    pairs, declined = [], []
    for node in student.graph.nodes:
        if node.op != "call_function" or node.target not in (aten.layer_norm.default, aten.linear.default):
            continue
        readers = _readers(node, through=node.target is aten.linear.default)
        linear = tuple(r for r in readers if r.target is aten.linear.default)
        if not linear:
            continue
        reason = None
        if len(linear) < len(readers):
            other = next(r for r in readers if r not in linear)
            reason = f"not smoothed: {getattr(other.target, '_opname', other.op)} reads its output as well"
        elif not all(_own(n, users) for n in (node, *linear)):
            reason = "not smoothed: its parameters, or those of what reads it, are computed or shared"
        if reason is None:
            pairs.append(SmoothedPair(node, linear))
        elif node.target is aten.layer_norm.default:
            declined.append((node.meta["layer"], reason))
    return pairs, declined


def _readers(node: fx.Node, through: bool) -> list[fx.Node]:
    """Who reads `node`, behind movement, and `through` the products that weigh it by attention."""
    readers: list[fx.Node] = []
    for user in node.users:
        is_weighing = through and user.target in PRODUCTS and user.args[1] is node
        readers += _readers(user, through) if is_weighing or moves(user) else [user]
    return list(dict.fromkeys(readers))


def _own(node: fx.Node, users: dict[str, int]) -> bool:
    """Whether weight and bias are parameters that nothing else reads; a norm's are over the last axis."""
    a = arguments(node)
    if node.target is aten.layer_norm.default and (len(a["normalized_shape"]) != 1 or a["bias"] is None):
        return False
    parameters = [a["weight"], *([a["bias"]] if a["bias"] is not None else [])]
    return all(isinstance(t, fx.Node) and t.op == "get_attr" and users[str(t.target)] == 1 for t in parameters)


def _parameter(student: fx.GraphModule, node: fx.Node, name: str) -> Tensor | None:
    value = arguments(node)[name]
    return None if value is None else attribute(student, str(value.target))


def _factors(largest: Tensor, weights: Sequence[Tensor | None], alpha: float) -> Tensor:
    """s_j, powers of two; 1 for channels that are always 0 or that nothing weighs."""
    columns = torch.stack([w.detach().abs().amax(0) for w in weights if w is not None]).amax(0)
    logs = alpha * largest.log2() - (1 - alpha) * columns.log2()
    return torch.where((largest > 0) & (columns > 0), logs.round().exp2(), 1.0)


@torch.no_grad()
def _scale(divided: Sequence[Tensor | None], weights: Sequence[Tensor | None], factors: Tensor) -> None:
    for t in divided:
        if t is not None:
            t.div_(factors.view(-1, *[1] * (t.dim() - 1)))
    for w in weights:
        if w is not None:
            w.mul_(factors)


class _Watching(fx.Interpreter):
    """Runs a graph and keeps the largest magnitude of each channel (last axis) of some values."""

    def __init__(self, student: fx.GraphModule, watched: set[fx.Node]) -> None:
        super().__init__(student)
        self.largest = {n: torch.zeros(shape(n)[-1] or 0) for n in watched}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.largest:
            magnitudes = value.abs().reshape(-1, value.shape[-1]).amax(0)
            self.largest[n] = torch.maximum(self.largest[n].to(magnitudes.device), magnitudes)
        return value


@torch.no_grad()
def _largest_inputs(student: fx.GraphModule, watched: set[fx.Node], inputs: list[Example]) -> dict[fx.Node, Tensor]:
    watching = _Watching(student, watched)
    for batch in inputs:
        watching.run(*batch)
    return watching.largest
