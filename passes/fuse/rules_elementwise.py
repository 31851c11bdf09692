"""Rules for what has no weights: sums, pools and concatenations of quantized values, and quantizing floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import fx

from pqk.core.aten import QUANTIZE, aten
from pqk.core.graph import arguments, attribute, operand, shape
from pqk.errors import Reason
from pqk.kernels.common.epilogue import program
from pqk.passes.fuse.epilogue import Ending, Quantized, endings, quantized
from pqk.passes.fuse.nhwc import nhwc, turned
from pqk.passes.fuse.rule import Match, Rule, as_end, launch, pair, plain_epilogue, why_not_one_grid


class PairRule(Rule):
    """A launch of two quantized values, which it reads as images in NHWC."""

    kernel: ClassVar[str]

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        a, b = match.inputs
        left, right = nhwc(a.integers), nhwc(b.integers)
        keywords = {
            "a": left, "b": right,
            "a_scale": a.scale, "a_zero_point": a.zero_point, "b_scale": b.scale, "b_zero_point": b.zero_point,
        }  # fmt: skip
        return as_end(match, launch(root, self.kernel, match, shape(left), **keywords, **plain_epilogue(match)))


class AddRule(PairRule):
    """`pqk::int8_add`: a sum of two quantized values that no layer takes in."""

    kernel = "int8_add"

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        a = arguments(node) if node.target is aten.add.Tensor else {}
        sides = [quantized(root, a.get(k)) for k in ("self", "other")]
        if None in sides or a["alpha"] != 1:
            return ()
        plain = [e for e in endings(root, node) if e.residual is None]
        return [Match(node, tuple(s for s in sides if s is not None), e) for e in plain]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        left, right = (s.integers for s in match.inputs)
        if shape(left) != shape(right):
            return f"it adds {list(shape(left))} and {list(shape(right))}, which are not of one shape"
        if any(n.op == "get_attr" for n in (left, right)):
            return "it adds a constant"
        return why_not_one_grid(match)


class MulRule(PairRule):
    """`pqk::int8_mul`: a product of two quantized values that no layer takes in, or an image and its gate."""

    kernel = "int8_mul"

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        sides = [quantized(root, a) for a in node.args] if node.target is aten.mul.Tensor else [None]
        values = [s for s in sides if s is not None]
        if len(values) < 2:
            return ()
        a, b = values if shape(values[0].integers) == shape(node) else values[::-1]
        return [Match(node, (a, b), e) for e in endings(root, node) if e.residual is None]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        a, b = (s.integers for s in match.inputs)
        image, gate = shape(a), shape(b)
        gates = len(image) == len(gate) == 4 and gate == (*image[:2], 1, 1)
        if image != shape(match.anchor) or (image != gate and not gates):
            return f"it multiplies {list(image)} by {list(gate)}, which is neither of one shape nor a gate"
        return "it multiplies by a constant" if "get_attr" in (a.op, b.op) else why_not_one_grid(match)


class PoolRule(Rule):
    """`pqk::int8_pool`: an average of a quantized value over windows or over all pixels."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        if node.target not in (aten.mean.dim, aten.avg_pool2d.default) or len(shape(operand(node))) != 4:
            return ()
        a, value = arguments(node), quantized(root, node.args[0])
        is_global = node.target is aten.mean.dim and a["keepdim"] and sorted(d % 4 for d in a["dim"]) == [2, 3]
        if value is None or not (is_global or node.target is aten.avg_pool2d.default):
            return ()
        return [Match(node, (value,), e) for e in endings(root, node) if e.residual is None]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        if arguments(match.anchor).get("divisor_override") is not None:
            return "avg_pool2d: it divides by a number of its own"
        return why_not_one_grid(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        a, value = arguments(match.anchor), match.inputs[0]
        window = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        flags = {"ceil_mode": False, "count_include_pad": True}
        if match.anchor.target is aten.avg_pool2d.default:
            kernel = pair(a["kernel_size"])
            window |= {"kernel": kernel, "stride": pair(a["stride"] or kernel), "padding": pair(a["padding"])}
            flags = {k: a[k] for k in flags}
        n, c, h, w = shape(match.anchor)
        kind = "global_average" if match.anchor.target is aten.mean.dim else "average"
        keywords = {"x": nhwc(value.integers), "scale": value.scale, "zero_point": value.zero_point, "kind": kind}
        ending = plain_epilogue(match)
        return as_end(match, launch(root, "int8_pool", match, (n, h, w, c), **keywords, **window, **flags, **ending))


class MaxPoolRule(Rule):
    """`pqk::int8_pool` of integers, whose scale does not matter: the largest value has the largest integer."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        integer = node.target is aten.max_pool2d.default and not node.meta["dtype"].is_floating_point
        return [Match(node, (Quantized(operand(node), 1.0, 0),), Ending(node))] if integer else ()

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        return None

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        a, limits = arguments(match.anchor), torch.iinfo(match.ending.dtype)
        kernel = pair(a["kernel_size"])
        steps, params = program(("quantize", 1.0, 0.0, limits.min, limits.max))
        n, c, h, w = shape(match.anchor)
        result = launch(
            root, "int8_pool", match, (n, h, w, c),
            x=nhwc(match.inputs[0].integers), params=params, steps=steps, kind="max", kernel=kernel,
            stride=pair(a["stride"] or kernel), padding=pair(a["padding"]), dilation=pair(a["dilation"]),
            ceil_mode=a["ceil_mode"], count_include_pad=True, scale=1.0, zero_point=0, out_dtype=match.ending.dtype,
        )  # fmt: skip
        return as_end(match, result)


class ConcatRule(Rule):
    """`pqk::int8_concat`: quantized values side by side along the channels."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        parts = [quantized(root, n) for n in node.args[0]] if node.target is aten.cat.default else []  # type: ignore[union-attr]
        values = tuple(p for p in parts if p is not None)
        if not values or len(values) < len(parts):
            return ()
        return [Match(node, values, e) for e in endings(root, node) if e.residual is None]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        rank = len(shape(match.anchor))
        channels = 1 if rank == 4 else rank - 1
        if arguments(match.anchor)["dim"] % rank != channels:
            return "cat: it joins along another axis than the channels"
        return why_not_one_grid(match)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        inputs = [nhwc(v.integers) for v in match.inputs]
        size = (*shape(inputs[0])[:-1], sum(shape(x)[-1] or 0 for x in inputs))
        scales, zero_points = [v.scale for v in match.inputs], [v.zero_point for v in match.inputs]
        keywords = {"inputs": inputs, "scales": scales, "zero_points": zero_points}
        return as_end(match, launch(root, "int8_concat", match, size, **keywords, **plain_epilogue(match)))


class QuantizeRule(Rule):
    """`pqk::quantize_static`: floats to integers; an NCHW image comes out as NHWC."""

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        return [Match(node, (), Ending(node))] if node.target is QUANTIZE else ()

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        return None

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        x, scale, zero_point, qmin, qmax = match.anchor.args
        assert isinstance(x, fx.Node)
        scale, zero_point = (attribute(root, str(operand(match.anchor, i).target)) for i in (1, 2))
        view = turned(x)
        keywords = {"scale": float(scale), "zero_point": int(zero_point), "qmin": qmin, "qmax": qmax}
        result = launch(root, "quantize_static", match, shape(view), x=view, **keywords, out_dtype=match.ending.dtype)
        return as_end(match, result)
