"""The rule for attention of a model that keeps keys and values: two float products with the sight of tokens between.

    softmax(cat of heads (q * c) kᵀ + sight) v           or q kᵀ * c

What a token sees stands in the graph as numbers that are added to the scores, computed from the mask that the model is
given. That they are what the kernel computes from that mask is not read off their operators but tried on masks with
padding and several texts, so whatever writes them (a model of its own, the form with a cache) is taken where it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import RESHAPES, aten
from pqk.core.attention import SOFTMAX
from pqk.core.graph import arguments, attribute, operand, shape
from pqk.errors import Reason
from pqk.kernels.causal_attention import CausalAttention, visible, why_not_supported
from pqk.passes.fuse.epilogue import endings
from pqk.passes.fuse.rule import Match, Rule, launch, plain_epilogue, stand, why_not_one_grid

NEW, PAST = 7, 4
"""tokens of the masks that a sight is tried on, and those before them where there can be any; free lengths alone"""
LONGEST = 4096
"""the longest window that is tried: masks are a little longer than it"""
HIDDEN = -1e8
"""numbers below this, added to a score, leave nothing of its share"""


@dataclass(frozen=True)
class Products:
    """An attention in float: queries [B, H, S, D], keys [B, G, T, D], values [B, G, T, E], what is added to scores."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    added: fx.Node
    scale: float


@dataclass(frozen=True)
class SightOf:
    """What tokens see, as the kernel counts it from a mask."""

    mask: fx.Node
    texts: bool
    window: int


class CausalAttentionRule(Rule):
    """`pqk::causal_attention`: up to the result with tokens before heads, quantized where the graph does so."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        products = _products(node)
        if products is None:
            return ()
        if "sight" not in products.added.meta:  # the same for many layers
            products.added.meta["sight"] = sight(root, products.added)
        facts = {"products": products, "sight": products.added.meta["sight"]}
        found = []
        for ending in endings(root, node):
            turned = _tokens_before_heads(ending.end, shape(products.q)[1])
            if ending.residual is None and turned is not None:
                found.append(Match(node, (), replace(ending, end=turned), facts))
        return found

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        products: Products = match.facts["products"]
        found: SightOf | str = match.facts["sight"]
        if isinstance(found, str):
            return f"attention: {found}"
        q, k, v = (
            torch.empty([1 if n is None else n for n in shape(node)], dtype=node.meta["dtype"], device="meta")
            for node in (products.q, products.k, products.v)
        )
        params = torch.empty(0, 5, device="meta")
        reason = why_not_supported(
            CausalAttention(q, k, v, None, found.texts, found.window, products.scale, params, "", torch.float32)
        )
        return f"attention: {reason}" if reason is not None else why_not_one_grid(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        products: Products = match.facts["products"]
        seen: SightOf = match.facts["sight"]
        node = launch(
            root, "causal_attention", match, shape(match.ending.end), q=products.q, k=products.k, v=products.v,
            mask=seen.mask, texts=seen.texts, window=seen.window, scale=products.scale, **plain_epilogue(match),
        )  # fmt: skip
        return stand(node, match.ending.end)


def _products(node: fx.Node) -> Products | None:
    """The attention whose last product is `node`; None for any other node."""
    if node.target is not aten.matmul.default or len(shape(node)) != 4:
        return None
    soft, v = node.args
    if not isinstance(soft, fx.Node) or soft.target is not SOFTMAX or soft.args[1] not in (-1, 3):
        return None
    total = operand(soft)
    if total.target is not aten.add.Tensor or len(total.args) != 2 or not isinstance(total.args[1], fx.Node):
        return None
    scores, added = operand(total), operand(total, 1)
    scores, scale = _scaled(scores)
    if scores.target is not aten.matmul.default:
        return None
    q, more = _scaled(operand(scores))
    turned = operand(scores, 1)
    if turned.target is not aten.transpose.int or {d % 4 for d in turned.args[1:3]} != {2, 3}:  # type: ignore[operator]
        return None
    while q.target in RESHAPES and len(shape(operand(q))) == 4:  # the heads of a group one after the other
        q = operand(q)
    assert isinstance(v, fx.Node)
    return Products(q, operand(turned), v, _of_one_head(added), scale * more)


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """What a number multiplies or divides, and by how much it grows."""
    if node.target is aten.mul.Tensor and isinstance(node.args[1], float | int):
        return operand(node), float(node.args[1])
    if node.target is aten.div.Tensor and isinstance(node.args[1], float | int):
        return operand(node), 1 / node.args[1]
    return node, 1.0


def _of_one_head(added: fx.Node) -> fx.Node:
    """What is added for one of the heads of a group, where it is the same for all."""
    if added.target is aten.cat.default and arguments(added)["dim"] % 4 == 2:
        parts = added.args[0]
        if isinstance(parts, list | tuple) and all(p is parts[0] for p in parts) and isinstance(parts[0], fx.Node):
            return parts[0]
    return added


def _tokens_before_heads(end: fx.Node, heads: int | None) -> fx.Node | None:
    """The node behind `end` that has its values as [B, S, H, E], if that is all that reads it."""
    node = end
    while len(node.users) == 1 and node.target is not aten.transpose.int:
        (node,) = node.users
        if node.target not in (*RESHAPES, aten.transpose.int) or len(shape(node)) != 4:
            return None
    a = arguments(node) if node.target is aten.transpose.int else None
    if a is None or {a["dim0"] % 4, a["dim1"] % 4} != {1, 2} or shape(node)[2] != heads:
        return None
    return node


# ---- what a token sees


def sight(root: fx.GraphModule, added: fx.Node) -> SightOf | str:
    """How the kernel counts from a mask what `added` hides, or why it cannot."""
    above = _above(added)
    inputs = [n for n in above if n.op == "placeholder"]
    masks = [n for n in inputs if any(u.target is not aten.sym_size.int for u in n.users if u in above)]
    if len(masks) != 1 or len(shape(masks[0])) != 2 or masks[0].meta["dtype"] != torch.int64:
        return "what is added to its scores is computed from other things than one mask int64 [batch, tokens]"
    numbers = _numbers(root, above)
    if max(numbers, default=0) > LONGEST:
        return f"what is added to its scores may be a window of {max(numbers)} tokens; up to {LONGEST} are tried"
    fixed = shape(masks[0])[1]
    windows = range(1, fixed) if fixed is not None else sorted(numbers)
    tried = [SightOf(masks[0], texts, window) for texts in (True, False) for window in (0, *windows)]
    reasons = []
    for candidate in tried:
        reason = _why_not_the_same(root, above, added, candidate, numbers)
        if reason is None:
            return candidate
        reasons.append(reason)
    return f"what is added to its scores is not what a causal mask hides: {reasons[0]}"


def _numbers(root: fx.GraphModule, above: list[fx.Node]) -> set[int]:
    """The whole numbers above 1 in the graph, of which one may be a window."""
    found: set[int] = set()
    for node in above:
        if node.op == "get_attr" and (stored := attribute(root, str(node.target))).numel() == 1:
            found.add(int(stored.abs()))
        if node.op == "call_function" and node.target is not aten.slice.Tensor:
            found |= {abs(a) for a in node.args if isinstance(a, int) and not isinstance(a, bool)}
    return {n for n in found if n > 1}


def _above(node: fx.Node) -> list[fx.Node]:
    """`node` and all that it is computed from, in order."""
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return [n for n in node.graph.nodes if n in seen]


def _masks(batch: int, tokens: int) -> Iterator[Tensor]:
    """Masks [`batch`, `tokens`]: padding behind and in front, two texts in one, and padding between them."""
    plain = torch.ones(max(2, batch), tokens, dtype=torch.int64)
    padded, packed = plain.clone(), plain.clone()
    padded[0, -3:] = 0
    padded[1, :2] = 0
    packed[:, tokens // 2 :] = 2
    packed[1, tokens // 2 - 2 : tokens // 2] = 0
    for mask in (plain, padded, packed, padded.flip(0), packed.flip(0)):
        yield mask[:batch]


def _why_not_the_same(
    root: fx.GraphModule, above: list[fx.Node], added: fx.Node, candidate: SightOf, numbers: set[int]
) -> Reason | None:
    """Why `candidate` does not hide what `added` does, on some masks, also longer than any of `numbers`."""
    batch, fixed = shape(candidate.mask)
    batch, longer = batch or 2, max(numbers, default=0) + 2
    sizes = [(fixed or NEW, 0)]
    if fixed is None:
        sizes += [(NEW, PAST), (NEW, longer)] if _keeps(above) else [(longer, 0)] * (longer > NEW)
    for new, past in sizes:
        for value in _masks(batch, new + past):
            try:
                found = _evaluated(root, above, {candidate.mask: value}, (batch, new, past))[added]
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                return f"it cannot be computed for {new} tokens behind {past} ({type(error).__name__})"
            seen = visible(value, new, new + past, candidate.window, candidate.texts, value.device)[:, None]
            if found.shape[-2:] != seen.shape[-2:]:
                return f"its shape is {list(found.shape)} for {new} tokens behind {past}"
            if not bool(torch.where(seen, found == 0, found < HIDDEN).all()):
                return "it hides others, or adds more than zeros"
    return None


def _keeps(above: list[fx.Node]) -> bool:
    """Whether the graph has keys of tokens before: an input of four axes."""
    return any(n.op == "placeholder" and len(shape(n)) == 4 for n in above)


def _evaluated(
    root: fx.GraphModule, above: list[fx.Node], given: dict[fx.Node, Tensor], sizes: tuple[int, int, int]
) -> dict[fx.Node, Any]:
    """The values of the nodes in `above`: inputs that only say `sizes` (texts, new tokens, those before) are zeros."""
    batch, new, past = sizes
    values: dict[fx.Node, Any] = {}
    for node in above:
        if node in given:
            values[node] = given[node]
        elif node.op == "placeholder":
            free = iter((batch, past if len(shape(node)) == 4 else new))
            size = [next(free) if n is None else n for n in shape(node)]
            values[node] = torch.zeros(size, dtype=node.meta["dtype"])
        elif node.op == "get_attr":
            values[node] = attribute(root, str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values
