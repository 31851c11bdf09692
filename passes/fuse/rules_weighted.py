"""Rules for layers with weights: convolution and linear, with all that follows them up to integers that others read.

What is known now is computed now: the zero point of the input goes into the int32 bias, and the two scales of an
accumulator become one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pqk.core.aten import DEQUANTIZE, RESIDUAL_STEPS, aten
from pqk.core.graph import arguments, attribute, call, operand, shape
from pqk.errors import Reason
from pqk.kernels import int8_conv2d, int8_depthwise_conv2d, int8_linear
from pqk.kernels.common.conv import Conv
from pqk.kernels.common.epilogue import fold_bias
from pqk.passes.fuse.epilogue import Ending, Quantized, endings, quantized
from pqk.passes.fuse.nhwc import nhwc
from pqk.passes.fuse.rule import Match, Rule, as_end, epilogue, launch, like, pair, why_not_one_grid
from pqk.passes.fuse.shortcut import Shortcut, shortcut


@dataclass(frozen=True)
class Weights:
    """int8 [N, …], the int32 bias [N] with the input's zero point folded in, and the accumulator's scale [N]."""

    weight: Tensor
    bias: Tensor
    scale: Tensor


def weights(root: fx.GraphModule, node: fx.Node, x: Quantized) -> Weights | str:
    """The constants of a convolution or linear layer on `x`, or why they are not those of an integer layer."""
    a = arguments(node)
    integers_and_scale = constant(root, a["weight"])
    if integers_and_scale is None:
        return "its weight is float"
    weight, scale = integers_and_scale
    accumulator = torch.tensor(x.scale, dtype=torch.float32) * scale.expand(len(weight))
    bias = None
    if a["bias"] is not None:
        stored = constant(root, a["bias"])
        if stored is None:
            return "its bias is float"
        bias, bias_scale = stored
        if not torch.allclose(bias_scale, accumulator, rtol=1e-6, atol=0):
            return "its bias is not on the scale of its accumulator"
    dtype = x.integers.meta["dtype"]
    return Weights(weight, fold_bias(bias, weight, x.zero_point, dtype), accumulator.contiguous())


def constant(root: fx.GraphModule, node: object) -> tuple[Tensor, Tensor] | None:
    """Integers and scale of a stored tensor that `node` dequantizes along its first axis, with zero point 0."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE or operand(node).op != "get_attr":
        return None
    integers, scale, zero_point = (attribute(root, str(operand(node, i).target)) for i in range(3))
    return None if bool(zero_point.any()) else (integers, scale)


class WeightedRule(Rule):
    """A layer with weights, and everything up to the integers (or floats) that others read."""

    target: Any

    def matches(self, root: fx.GraphModule, node: fx.Node) -> Sequence[Match]:
        value = quantized(root, node.args[0]) if node.target is self.target else None
        if value is None:
            return ()
        constants = weights(root, node, value)
        return [Match(node, (value,), ending, {"weights": constants}) for ending in endings(root, node)]

    def why_not_fused(self, root: fx.GraphModule, match: Match) -> Reason | None:
        constants = match.facts["weights"]
        return constants if isinstance(constants, str) else why_not_one_grid(match) or self.why_not_weighted(match)

    @abstractmethod
    def why_not_weighted(self, match: Match) -> Reason | None:
        """Why the kernel cannot run this layer, whatever follows it."""


class LinearRule(WeightedRule):
    """`pqk::int8_linear`: [..., K] and weights [N, K]."""

    target = aten.linear.default

    def why_not_weighted(self, match: Match) -> Reason | None:
        return int8_linear.why_not_supported(like(match.inputs[0].integers), match.facts["weights"].weight)

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        w, size = match.facts["weights"], shape(match.anchor)
        x, weight = match.inputs[0].integers, w.weight
        if x.target is aten.flatten.using_ints and len(shape(operand(x))) == 4:
            x, weight = self.pixels_first(x, weight)
        keywords = {"x": x, "weight": weight, "bias": w.bias, "scale": w.scale}
        result = launch(root, "int8_linear", match, size, **keywords, **epilogue(match, size))
        return as_end(match, result)

    @staticmethod
    def pixels_first(flat: fx.Node, weight: Tensor) -> tuple[fx.Node, Tensor]:
        """A flattened image and its weights with the columns in NHWC order, so that the image need not be turned."""
        image = operand(flat)
        columns = weight.unflatten(1, shape(image)[1:]).permute(0, 2, 3, 1)
        return call(flat.graph, flat.target, (nhwc(image), *flat.args[1:]), flat), columns.flatten(1).contiguous()


class ConvolutionRule(WeightedRule):
    """`pqk::int8_conv2d` in NHWC, or, with one channel a group, `pqk::int8_depthwise_conv2d`."""

    target = aten.conv2d.default

    def why_not_weighted(self, match: Match) -> Reason | None:
        w, value = match.facts["weights"], match.inputs[0]
        kernel, geometry = self.form(match)
        x, weight = like(value.integers), w.weight.permute(0, 2, 3, 1)
        operands = (x, weight, w.bias, w.scale, w.scale, None, "", value.zero_point)
        return kernel.why_not_supported(Conv(*operands, **geometry, out_dtype=torch.float32))

    @staticmethod
    def form(match: Match) -> tuple[Any, dict[str, Any]]:
        """The kernel's module, and stride, padding, dilation and groups."""
        a, channels = arguments(match.anchor), shape(match.inputs[0].integers)[1]
        geometry = {k: pair(a[k]) for k in ("stride", "padding", "dilation")}
        depthwise = a["groups"] == channels != 1
        return int8_depthwise_conv2d if depthwise else int8_conv2d, {**geometry, "groups": a["groups"]}

    def rewrite(self, root: fx.GraphModule, match: Match) -> fx.Node:
        w, value = match.facts["weights"], match.inputs[0]
        n, o, height, width = shape(match.anchor)
        size = (n, height, width, o)
        kernel, geometry = self.form(match)
        keywords: dict[str, Any] = {"x": nhwc(value.integers), "bias": w.bias, "scale": w.scale, **geometry}
        keywords |= {"weight": w.weight.permute(0, 2, 3, 1).contiguous(), "zero_point": value.zero_point}
        if kernel is int8_depthwise_conv2d:
            keywords["weight"] = int8_depthwise_conv2d.taps_first(keywords["weight"])
            ending = epilogue(match, size)
            return as_end(match, launch(root, "int8_depthwise_conv2d", match, size, **keywords, **ending))
        moved_residual = residual_shortcut(root, match.ending)
        if moved_residual is None:
            return as_end(match, launch(root, "int8_conv2d", match, size, **keywords, **epilogue(match, size)))
        keywords |= epilogue(match, size, nhwc(moved_residual.source))
        keywords |= {"residual_channels": moved_residual.channels, "residual_stride": moved_residual.stride}
        return as_end(match, launch(root, "int8_conv2d", match, size, **keywords))


def residual_shortcut(root: fx.GraphModule, ending: Ending) -> Shortcut | None:
    """The residual as a shortcut that the launch can read, if it is one."""
    if ending.residual is None or ending.residual.meta["dtype"].is_floating_point:
        return None
    row = next(r for name, r in zip(ending.steps, ending.params, strict=True) if name in RESIDUAL_STEPS.values())
    return shortcut(root, ending.residual, int(row[1]))
