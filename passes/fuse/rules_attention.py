"""Rules for an encoder layer: queries, keys and values from one product, attention, and layer norm with its quantize.

    quantize -> QKV -> attention -> linear + residual -> layer norm + quantize -> linear + GELU -> linear + residual

The linear layers between take in their GELU or the residual addition behind them by their own rule.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from pqk.core.aten import NORMS, QUANTIZE, VIEWS, aten
from pqk.core.graph import arguments, call, operand, shape
from pqk.core.graph import replace as replace_node
from pqk.errors import Reason
from pqk.kernels import int8_attention, int8_linear
from pqk.kernels.common.norm import why_not_launched
from pqk.passes.fuse.epilogue import Ending, Quantized, endings, quantized
from pqk.passes.fuse.rule import Match, Rule, as_end, launch, like, plain_epilogue, stand, why_not_one_grid
from pqk.passes.fuse.rules_weighted import Weights, weights


class SiblingsRule(Rule):
    """Linear layers that read the same integers (queries, keys, values) as one `pqk::int8_linear` of all their rows.

    Each has an output grid of its own, and the epilogue one for all: the scale goes into that of the layer's
    accumulators, so that the epilogue only rounds, and zero points are added behind it, as a row of integers. Where all
    of them end in floats, as before rotary embeddings, there is no epilogue.
    """

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        value = quantized(root, node.args[0]) if node.target is aten.linear.default else None
        if value is None:
            return ()
        readers = [d for d in value.integers.users if quantized(root, d) == value]
        layers = [u for d in readers for u in d.users if u.target is aten.linear.default and u.args[0] is d]
        places = {n: i for i, n in enumerate(root.graph.nodes)}
        layers.sort(key=places.__getitem__)
        ends = [next((e for e in endings(root, n) if e.steps == ("quantize",)), None) for n in layers]
        if not any(ends):
            ends = [Ending(n) if _floats_as_they_are(root, n) else None for n in layers]
        parts = [(n, weights(root, n, value), e) for n, e in zip(layers, ends, strict=True) if e is not None]
        if len(parts) < 2 or len(parts) < len(layers) or node is not layers[0]:
            return ()
        first = min((e for _, _, e in parts), key=lambda e: places[e.end])
        return [Match(node, (value,), first, {"parts": parts})]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        parameters = [w for _, w, _ in match.facts["parts"]]
        if (reason := next((w for w in parameters if isinstance(w, str)), None)) is not None:
            return reason
        rows = [e.params[0] for _, _, e in match.facts["parts"] if e.steps]
        if any(row[2:4] != rows[0][2:4] for row in rows):
            return "layers that read the same integers stay apart: the ranges of their outputs differ"
        return int8_linear.why_not_supported(like(match.inputs[0].integers), torch.cat([w.weight for w in parameters]))

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        parts: list[tuple[fx.Node, Weights, Ending]] = match.facts["parts"]
        parameters = [w for _, w, _ in parts]
        quantized_ends = bool(match.ending.steps)
        scales = [w.scale / torch.tensor(e.params[0][0]) if quantized_ends else w.scale for _, w, e in parts]
        size = (*shape(match.anchor)[:-1], sum(len(w.weight) for w in parameters))
        zero_points = torch.cat([torch.full((len(w.weight),), e.params[0][1] if e.steps else 0.0) for _, w, e in parts])
        shifted = bool(zero_points.any())
        all_of_them = replace(match, ending=_rounding(match.ending, shifted)) if quantized_ends else match
        node = launch(
            root, "int8_linear", all_of_them, size, x=match.inputs[0].integers,
            residual=zero_points.to(match.ending.dtype) if shifted else None,
            weight=torch.cat([w.weight for w in parameters]), bias=torch.cat([w.bias for w in parameters]),
            scale=torch.cat(scales),
            **plain_epilogue(all_of_them),
        )  # fmt: skip
        begin, result = 0, node
        for layer, w, ending in parts:
            span = (len(size) - 1, begin, begin + len(w.weight))
            part = stand(call(root.graph, aten.slice.Tensor, (node, *span), ending.end), ending.end)
            part.meta.update(layer=layer.meta["layer"], shape=shape(layer))
            part = as_end(replace(match, ending=ending), part)
            begin += len(w.weight)
            if ending is match.ending:
                result = part
            else:
                replace_node(root, ending.end, part)
        del node.meta["stands_for"]
        return result


def _floats_as_they_are(root: fx.GraphModule, layer: fx.Node) -> bool:
    """Whether the floats of `layer` end its launch, and who reads them, through views, does so where they lie."""
    readers = set(layer.users)
    while views := [n for n in readers if n.target in VIEWS]:
        readers = readers.difference(views).union(*(n.users for n in views))
    return not endings(root, layer)[0].steps and all(n.target not in NORMS for n in readers)


def _rounding(one: Ending, shifted: bool) -> Ending:
    """One layer's quantize without its scale, and, `shifted`, with room for the zero points of all behind the rounding.

    That rounding is clamped to ±255, beyond which the second clamp gives its limit for every zero point.
    """
    _, _, qmin, qmax, _ = one.params[0]
    last = (1.0, 0.0, qmin, qmax, 0.0)
    if not shifted:
        return replace(one, params=(last,))
    rows = ((1.0, 0.0, -255.0, 255.0, 1.0), (1.0, 0.0, 0.0, 0.0, 0.0), last)
    return replace(one, steps=("requantize", "add", "quantize"), params=rows)


class AttentionRule(Rule):
    """`pqk::int8_attention`: softmax(q kᵀ c + mask) v of quantized q, k, v, scores and shares never written."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        shares, v = (quantized(root, a) for a in node.args[:2]) if node.target is aten.matmul.default else (None, None)
        if shares is None or v is None or shares.integers.target is not QUANTIZE or len(shape(v.integers)) != 4:
            return ()
        soft = operand(shares.integers)
        if soft.target is not aten.softmax.int or soft.args[1] not in (-1, 3):
            return ()
        scores, mask, factor = operand(soft), None, 1.0
        if scores.target is aten.add.Tensor:
            scores, mask = operand(scores), operand(scores, 1)
        if scores.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(scores.args[1], float | int):
            factor = float(scores.args[1]) if scores.target is aten.mul.Tensor else 1 / scores.args[1]
            scores = operand(scores)
        q, k = (quantized(root, a) for a in scores.args[:2]) if scores.target is aten.matmul.default else (None, None)
        if q is None or k is None or not _swaps(k.integers, 2, 3):
            return ()
        k = replace(k, integers=operand(k.integers))
        without_residual = [e for e in endings(root, node) if e.residual is None]
        return [Match(node, (q, k, v), e, {"mask": mask, "factor": factor}) for e in without_residual]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        mask, sizes = match.facts["mask"], [shape(i.integers) for i in match.inputs]
        if mask is not None and (len(shape(mask)) != 4 or shape(mask)[1:3] != (1, 1)):
            return f"attention: a mask of {list(shape(mask))}; the kernel reads one of [batch, 1, 1, keys]"
        q, k, v = (
            torch.empty([1 if n is None else n for n in size], dtype=i.integers.meta["dtype"], device="meta")
            for size, i in zip(sizes, match.inputs, strict=True)
        )
        params, turned = torch.empty(0, 5, device="meta"), [t.transpose(1, 2) for t in (q, k, v)]
        operands = int8_attention.Attention(
            turned[0], turned[1], turned[2], None, params, "", 1.0, 1.0, 0, 0, 0, torch.float32
        )
        return int8_attention.why_not_supported(operands) or why_not_one_grid(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        q, k, v = match.inputs
        mask, end = match.facts["mask"], match.ending.end
        if mask is not None:
            keys = (shape(mask)[0], shape(mask)[3])
            mask = call(root.graph, aten.squeeze.dims, (mask, [1, 2]), mask, shape=keys)
        b, heads, tokens, width = shape(match.anchor)
        operands = dict(zip("qkv", match.inputs, strict=True))
        keywords: dict[str, Any] = {name: heads_second(i.integers) for name, i in operands.items()}
        keywords |= {f"{name}_zero_point": i.zero_point for name, i in operands.items()}
        keywords |= {"mask": mask, "score_scale": q.scale * k.scale * match.facts["factor"], "value_scale": v.scale}
        size = (b, tokens, heads, width)
        node = launch(root, "int8_attention", match, size, **keywords, **plain_epilogue(match))
        del node.meta["stands_for"]
        return stand(heads_second(node), end)


def _swaps(node: fx.Node, one: int, other: int) -> bool:
    """Whether `node`, of four axes, is a transpose of these two."""
    if node.target is not aten.transpose.int:
        return False
    a = arguments(node)
    return {a["dim0"] % 4, a["dim1"] % 4} == {one, other}


def heads_second(node: fx.Node) -> fx.Node:
    """[B, heads, tokens, D] from [B, tokens, heads, D] or the other way round, at the insertion point."""
    if _swaps(node, 1, 2):
        return operand(node)
    b, one, two, width = shape(node)
    return call(node.graph, aten.transpose.int, (node, 1, 2), node, shape=(b, two, one, width))


def norm_kernel(node: fx.Node) -> str:
    """The fused operator of a norm: `layer_norm_quantize` of `layer_norm`."""
    return f"{node.target._opname}_quantize"  # type: ignore[union-attr]


class NormRule(Rule):
    """`pqk::layer_norm_quantize`, `pqk::rms_norm_quantize`: a norm and the quantize behind it; who reads the norm
    itself gets floats."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        return norm_endings(root, node) if node.target in NORMS else ()

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        return why_not_norm(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        a, anchor, graph = arguments(match.anchor), match.anchor, root.graph
        value = quantized(root, a["input"]) or Quantized(a["input"], 1.0, 0)
        with graph.inserting_before(anchor):
            x = call(graph, aten.contiguous.default, (value.integers,), value.integers)
            keywords: dict[str, Any] = {"x": x, "x_scale": value.scale, "x_zero_point": value.zero_point}
            keywords |= {"residual": None, "residual_scale": 1.0, "residual_zero_point": 0}
            keywords |= affine(match) | {"keep": "norm" if norm_is_read(match) else "nothing"}
            return both_results(root, match, launch(root, norm_kernel(anchor), match, shape(anchor), **keywords))


def norm_endings(root: fx.GraphModule, node: fx.Node) -> list[Match]:
    """The ways in which a launch of a norm may end: at its quantize, where others read it too."""
    quantizers = [u for u in node.users if u.target is QUANTIZE]
    if len(node.users) == 1 or len(quantizers) != 1:
        return [Match(node, (), e) for e in endings(root, node) if e.residual is None and not e.reshaped]
    scale, zero_point = (float(root.get_buffer(str(operand(quantizers[0], i).target))) for i in (1, 2))
    row = (scale, zero_point, *map(float, quantizers[0].args[3:5]), 0.0)  # type: ignore[arg-type]
    return [Match(node, (), Ending(node).then(quantizers[0], "quantize", row))]  # type: ignore[arg-type]


def why_not_norm(match: Match) -> Reason | None:
    """Why no kernel computes the norm of this match, whatever it reads."""
    a = arguments(match.anchor)
    if len(a["normalized_shape"]) != 1:
        return f"{norm_kernel(match.anchor)}: over {len(a['normalized_shape'])} axes; it norms over the last"
    return why_not_launched(1, a["normalized_shape"][0]) or why_not_one_grid(match)


def norm_is_read(match: Match) -> bool:
    """Whether others than the quantize behind it read the norm, in float."""
    return match.ending.end is not match.anchor and len(match.anchor.users) > 1


def affine(match: Match) -> dict[str, Any]:
    """The arguments of a norm that are its own, and its epilogue."""
    a = arguments(match.anchor)
    eps = a["eps"] if a["eps"] is not None else torch.finfo(match.anchor.meta["dtype"]).eps
    return {"weight": a["weight"], "bias": a.get("bias"), "eps": eps} | plain_epilogue(match)


def both_results(root: fx.GraphModule, match: Match, node: fx.Node) -> fx.Node:
    """The first result of the launch `node` as the match's end; the second takes the place of a norm that is read."""
    anchor, end, graph = match.anchor, match.ending.end, root.graph
    del node.meta["stands_for"]
    result = stand(call(graph, operator.getitem, (node, 0), end, layer=anchor.meta["layer"]), end)
    if norm_is_read(match):
        floats = call(graph, operator.getitem, (node, 1), anchor)
        replace_node(root, anchor, stand(floats, anchor))
    return result
