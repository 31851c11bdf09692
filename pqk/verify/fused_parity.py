"""The parity contract of the fused student: on the same integers, every launch gives what its layers give unfused.

A launch knows the node of the INT8 graph that it stands for. It is run on the values that the INT8 graph computed and
its result is held against that node's; then the graph's own value goes on, so that differences do not add up. On a CPU
the operators run their reference bodies; that the Triton kernels equal those is the kernels' own test.

A launch may round in registers before it rounds its result: an accumulator that the float graph put on the other side
of a tie moves such a value by one step, which may be more than one step of the result. That many are allowed, and no
fewer than one; products are still equal on 99.9 %.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.graph import operand
from pqk.kernels.common.epilogue import MAX_STEPS, rows_of
from pqk.passes.fuse.fuse import stands_for
from pqk.quant.noise import sqnr
from pqk.report.schema import LayerParity, Parity
from pqk.task.task import Task
from pqk.verify.interpreters import Recorder, Ties
from pqk.verify.verdict import EXACT_SHARE, MAX_LSB, RELATIVE, ModelFunction, compare_ends, verdict

GATED = "int8_gated_linear"
PRODUCTS = ("int8_linear", GATED, "int8_conv2d", "int8_depthwise_conv2d", "int8_linear_into", "int8_conv2d_into")
APPROXIMATE = {"int8_attention": 30.0}
"""operators that are not the graph's arithmetic -> the least SQNR in dB that they owe (their decisions must agree)"""


def check_fused_parity(
    fake_quant: nn.Module,
    int8_graph: fx.GraphModule,
    fused: fx.GraphModule,
    deployed: ModelFunction,
    task: Task,
    *,
    samples: int | None = None,
    layer_samples: int = 16,
) -> Parity:
    """Check the contract of a fused student: layers on validation samples, both ends on evaluation samples.

    `deployed` is what is run end to end: the module that `student.pt2` loads as.
    """
    layers = check_launches(int8_graph, fused, next(task.calibration(layer_samples)))
    return verdict(layers, compare_ends(fake_quant, deployed, task, samples=samples), "reference")


def check_launches(int8_graph: fx.GraphModule, fused: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[LayerParity]:
    """Every launch of `fused` against the node of `int8_graph` that it stands for, on the graph's own values."""
    names = {name for node in fused.graph.nodes if (name := stands_for(node)) is not None}
    with torch.inference_mode():
        recorder = _Values(int8_graph, names)
        recorder.run(*inputs)
        ties = Ties(int8_graph, recorder.integers)
        ties.run(*inputs)
        comparison = _Comparison(fused, recorder.values, ties)
        comparison.run(*inputs)
    return comparison.rows


class _Values(Recorder):
    """Runs the INT8 graph and keeps the values of the nodes that launches stand for."""

    def __init__(self, graph: fx.GraphModule, names: set[str]) -> None:
        super().__init__(graph)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.values[n.name] = result
        return result


class _Comparison(fx.Interpreter):
    def __init__(self, fused: fx.GraphModule, values: dict[str, Tensor], ties: Ties) -> None:
        super().__init__(fused, garbage_collect_values=False)  # a view of a launch is judged by the launch's arguments
        self.values = values
        self.halves = {n.name: t for n, t in ties.masks.items()}
        self.exact = {n.name: t for n, t in ties.exact.items()}
        self.rows: list[LayerParity] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = stands_for(n)
        if name is None:
            return result
        launch = n if getattr(n.target, "namespace", "") == "pqk" else operand(n)
        columns = n.meta.get("columns")
        if columns is not None:  # it wrote to an argument
            result = self.env[n.kwargs["out"]]  # type: ignore[index]
        expected = laid_out_as(self.values[name], result, n.meta["image"], columns)
        if not expected.is_floating_point() and result.is_floating_point():  # a last requantize: the integers in float
            zero_point, out_scale = self._rows(launch)[-1, [1, 4]]
            expected = (expected.float() - zero_point) * out_scale
        halves, exact = (
            laid_out_as(table[name], result, n.meta["image"], columns) if name in table else None
            for table in (self.halves, self.exact)
        )
        self.rows.append(self._compare(n.meta["layer"], launch, result, expected, halves, exact))
        return expected if columns is None else result.copy_(expected)

    def _compare(
        self, layer: str, node: fx.Node, got: Tensor, expected: Tensor, halves: Tensor | None, integers: Tensor | None
    ) -> LayerParity:
        op, steps = str(node.target._opname), str(node.kwargs.get("steps") or "")  # type: ignore[union-attr]
        name = f"pqk::{op} {steps}".strip()
        if op in APPROXIMATE:
            zero_point = self._rows(node)[-1, 1].item() if steps.endswith(",quantize") or steps == "quantize" else 0
            return _by_sqnr(layer, name, got.double() - zero_point, expected.double() - zero_point, APPROXIMATE[op])
        if name.endswith("requantize"):  # floats on a grid: a tie that falls the other way is a step, not an error
            step = self._rows(node)[-1, 4]
            got, expected = (got / step).round(), (expected / step).round()
        elif got.is_floating_point():
            worst = _relative(got, expected)
            exact = float((got == expected).double().mean()) if got.numel() else 1.0
            return LayerParity(
                name=layer, op=name, max_lsb=None, exact=exact, max_relative=worst, passed=worst <= RELATIVE
            )
        difference = (got.int() - expected.int()).abs()
        product, equal = op in PRODUCTS, difference == 0
        if product and integers is not None and not name.endswith("requantize"):
            equal |= got.int() == integers.int()  # right where exact arithmetic has it, as in ONNX Runtime
        compared = equal if halves is None else equal[~halves]
        exact = float(compared.double().mean()) if compared.numel() else 1.0
        worst = int(difference.max()) if difference.numel() else 0
        allowed = self._allowed(node)
        passed = worst <= allowed and (exact >= EXACT_SHARE or not product)
        return LayerParity(name=layer, op=name, max_lsb=worst, exact=exact, passed=passed)

    def _params(self, node: fx.Node) -> Tensor:
        params: Tensor = self.fetch_args_kwargs_from_env(node)[1]["params"]
        return params

    def _rows(self, node: fx.Node) -> Tensor:
        return rows_of(str(node.kwargs["steps"]), self._params(node))

    def _allowed(self, node: fx.Node) -> int:
        """Steps of the result that one step of a value rounded in registers is, at least 1."""
        if node.target._opname == GATED:  # type: ignore[union-attr]
            return self._allowed_of_product(node)
        names = str(node.kwargs.get("steps", "")).split(",")
        if {"requantize", "table"}.isdisjoint(names):
            return MAX_LSB
        rows = self._rows(node)
        steps = [float(rows[i, 4] / rows[-1, 0]) for i, name in enumerate(names[:-1]) if name == "requantize"]
        if "table" in names:
            row = rows[names.index("table")]
            table = self._params(node)[MAX_STEPS:].flatten()[: int(row[3] - row[2]) + 1]
            steps.append(float(table.diff().abs().max() / rows[-1, 0]))
        return max([MAX_LSB, *map(math.ceil, steps)])

    def _allowed_of_product(self, node: fx.Node) -> int:
        """Steps of a gated unit that one step of its gate and one of what is gated are."""
        arguments = self.fetch_args_kwargs_from_env(node)[1]
        gate, up = (_rounding(arguments[f"{name}_steps"], arguments[f"{name}_params"]) for name in ("gate", "up"))
        moved = gate[0] * up[1] + up[0] * gate[1]
        rows = self._rows(node)
        return max(MAX_LSB, math.ceil(moved / float(rows[-1, 0]))) if len(rows) else MAX_LSB


def _rounding(steps: str, params: Tensor) -> tuple[float, float]:
    """The step in which a program rounds and the largest number that it gives; zeros where it does not round."""
    step = size = 0.0
    for name, row in zip(steps.split(",") if steps else (), rows_of(steps, params).tolist(), strict=True):
        if name == "requantize":
            _, zero_point, qmin, qmax, out_scale = row
            step, size = step + out_scale, max(qmax - zero_point, zero_point - qmin) * out_scale
        if name == "table":
            table = params[MAX_STEPS:].flatten()[: int(row[3] - row[2]) + 1]
            step, size = float(table.diff().abs().max()), float(table.abs().max())
    return step, size


def laid_out_as(value: Tensor, like: Tensor, image: bool, columns: tuple[int, int] | None = None) -> Tensor:
    """A value of the INT8 graph, or some of its channels, in the layout of what stands for it: an image in NHWC."""
    if image:
        value = value.permute(0, 2, 3, 1)
    if columns is not None:
        value = value[..., slice(*columns)]
    return value.reshape(like.shape).contiguous()


def _relative(got: Tensor, expected: Tensor) -> float:
    size = max(float(expected.abs().max()) if expected.numel() else 0.0, torch.finfo(torch.float32).tiny)
    return float((got.double() - expected.double()).abs().max() / size) if got.numel() else 0.0


def _by_sqnr(layer: str, name: str, got: Tensor, expected: Tensor, least: float) -> LayerParity:
    """Signal to quantization noise, of integers and floats alike."""
    decibels = sqnr(expected, got)
    exact = float((got == expected).double().mean()) if got.numel() else 1.0
    return LayerParity(
        name=layer, op=name, max_lsb=None, exact=exact, max_relative=10 ** (-decibels / 20), passed=decibels >= least
    )
