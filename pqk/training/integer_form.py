"""Training whose convolutions and linear layers multiply integers on the way forward, as the runtime will.

What such a layer of a FAKE_QUANT student reads are integers times a step, so the product of the integers, times both
steps, is the product of the floats, rounded once. torch's integer kernels (oneDNN) find it in a third to a fifth of the
time. The way back is that of the floats: gradients of the same rounded values (Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.aten import aten, root
from pqk.core.convolutions import pair, strides_of_few
from pqk.core.graph import StructuredCode, arguments, attribute, finish, free_path, operand, same_graph
from pqk.errors import Reason
from pqk.quant.fake_quant import ActivationFakeQuant, WeightFakeQuant
from pqk.target.target import S7_SYMMETRIC, VNNI, cpu_flags

log = logging.getLogger(__name__)

CONVOLUTION = ("stride", "padding", "dilation")
"""what an integer convolution is given beside its tensors"""
LEAST_ROWS = 512
"""rows of a linear layer's input from which on it pays to lay out the weight for an integer kernel: on AVX512-VNNI that
takes as long as 270 rows save, for each step anew"""


def integer_form(student: nn.Module, device: torch.device) -> nn.Module:
    """A FAKE_QUANT student, with its layers multiplying integers where this CPU can; else `student` itself.

    It is another graph over the same parameters and quantizers: what trains in the one trains in the other.
    """
    reason = why_not_in_integers(student, device)
    if reason is not None:
        log.debug("products stay in float: %s", reason)
        return student
    assert isinstance(student, fx.GraphModule)
    form = same_graph(student)
    if (structure := student.meta.get("structure")) is not None:
        form.graph.set_codegen(StructuredCode(structure))
    form.meta.update(student.meta)
    taken = 0
    for node in form.graph.nodes:
        product = _product(form, node)
        if product is not None:
            a, path = arguments(node), free_path(form, f"integer_product_{taken}")
            form.add_submodule(path, product)
            node.op, node.target, node.args, node.kwargs = "call_module", path, (a["input"], a["weight"], a["bias"]), {}
            taken += 1
    if not taken:
        return student
    log.info("%d convolutions and linear layers train on integer products", taken)
    return finish(form)


def why_not_in_integers(student: nn.Module, device: torch.device) -> Reason | None:
    """Why nothing of `student` can multiply integers in training here, else None."""
    weights = [m for m in student.modules() if isinstance(m, WeightFakeQuant)]
    if not isinstance(student, fx.GraphModule) or not weights:
        return "it is not quantized"
    if device.type != "cpu":
        return f"it trains on {device.type}"
    if "avx2" not in cpu_flags() or not torch.backends.mkldnn.is_available():
        return "the integer kernels are oneDNN's, for x86 with AVX2"
    exact = cpu_flags() & VNNI or all(w.grid.qmax <= S7_SYMMETRIC.qmax for w in weights)
    return None if exact else "this CPU saturates products with weights of 8 bits"


def _product(form: fx.GraphModule, node: fx.Node) -> IntegerProduct | None:
    """What takes the place of `node`; None for all but layers with both quantizers that an integer kernel can be."""
    if node.op != "call_function" or node.target not in (aten.conv2d.default, aten.linear.default):
        return None
    a = arguments(node)
    quantizers = [attribute(form, str(n.target)) for n in (root(a["input"]), a["weight"]) if n.op == "call_module"]
    if [type(q) for q in quantizers] != [ActivationFakeQuant, WeightFakeQuant]:
        return None
    if node.target is aten.linear.default:
        return IntegerProduct(quantizers[0], quantizers[1])
    weight = attribute(form, str(operand(a["weight"]).target))
    if a["groups"] != 1 or strides_of_few(weight, a["stride"], a["padding"], 1) is not None:
        return None
    return IntegerProduct(quantizers[0], quantizers[1], tuple(pair(a[name]) for name in CONVOLUTION))


class IntegerProduct(nn.Module):
    """A convolution [B, C, H, W] or linear layer [..., C] of float32 values that two quantizers have rounded.

    The quantizers are borrowed: they are not submodules, so no tensor is saved twice.
    """

    def __init__(
        self,
        activation: ActivationFakeQuant,
        weight: WeightFakeQuant,
        convolution: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        """`convolution`: stride, padding and dilation, each of both axes; None for a linear layer."""
        super().__init__()
        self._borrowed, self.convolution = (activation, weight), convolution

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rounding = all(q.mode == "on" for q in self._borrowed)
        if self.convolution is not None:
            if not rounding:
                return aten.conv2d.default(x, weight, bias, *self.convolution)
            return IntegerConvolution.apply(x, weight, bias, *self._steps(), *self.convolution)
        if not rounding or x.numel() < LEAST_ROWS * x.shape[-1]:
            return aten.linear.default(x, weight, bias)
        return IntegerLinear.apply(x, weight, bias, *self._steps())

    def _steps(self) -> tuple[float, int, Tensor]:
        """Step and zero point of the input as uint8, and the weight's steps [C]."""
        activation, weight = self._borrowed
        qparams = activation.qparams()
        shifted = 128 if activation.grid.dtype == "int8" else 0
        return float(activation.output_scale()), int(qparams.zero_point) + shifted, weight.qparams().scale


class IntegerConvolution(torch.autograd.Function):
    """`conv2d` by an integer kernel, its gradient that of `conv2d` on the same values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: float, zero_point: int, steps: Tensor,
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.settings = stride, padding, dilation
        integers, weights = _uint8(x, step, zero_point), _int8(weight, steps)
        layout = stride, padding, dilation, 1
        packed = torch.ops.onednn.qconv_prepack(weights, steps, step, zero_point, *layout, [*x.shape])
        result: Tensor = torch.ops.onednn.qconv2d_pointwise(
            integers, step, zero_point, packed, steps, _no_zero_points(steps), bias, *layout,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        asked = ctx.needs_input_grad[:3]
        sizes = [weight.shape[0]] if asked[2] else None
        found = aten.convolution_backward(g, x, weight, sizes, *ctx.settings, False, [0, 0], 1, asked)
        return (*found, None, None, None, None, None, None)


class IntegerLinear(torch.autograd.Function):
    """`linear` by an integer kernel, its gradient that of `linear` on the same values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: float, zero_point: int, steps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        packed = torch.ops.onednn.qlinear_prepack(_int8(weight, steps), [*rows.shape])
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            _uint8(rows, step, zero_point), step, zero_point, packed, steps, _no_zero_points(steps), bias,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, asked = g.reshape(-1, g.shape[-1]), ctx.needs_input_grad
        of_x = (rows @ weight).view(x.shape) if asked[0] else None
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if asked[1] else None
        return of_x, of_weight, rows.sum(0) if asked[2] else None, None, None, None


def _uint8(x: Tensor, step: float, zero_point: int) -> Tensor:
    """The integers of values that lie on the grid, as uint8 in the layout of `x`.

    `x` is a multiple of `step` to float32's precision, so a product with the reciprocal rounds to the same integer. By
    way of int16, which torch converts to in vectors, and to uint8 value by value.
    """
    return torch.add(torch.tensor(zero_point + 0.5), x, alpha=1 / step).to(torch.int16).to(torch.uint8)


def _int8(weight: Tensor, steps: Tensor) -> Tensor:
    """The integers of a weight [C, …] that lies on the grid of `steps` [C]."""
    return torch.div(weight, steps.view(-1, *[1] * (weight.dim() - 1))).round_().to(torch.int8)


def _no_zero_points(steps: Tensor) -> Tensor:
    return torch.zeros(len(steps), dtype=torch.int64)
