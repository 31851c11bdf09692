"""Quantize: fake-quantizers on the target's integer grid, with ranges chosen from data.

Where they go is told in `placement`. A layer is left in float by name, because it is too sensitive (quantized alone it
hurts the outputs by more than is allowed) or because the deployed student is faster for it; the reason is recorded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import fx, nn

from pqk.copies import copy_of
from pqk.core.aten import HEAVY, root
from pqk.core.attention import sites
from pqk.core.graph import arguments, attribute, finish, move_points, operand, replace, shape
from pqk.core.modes import evaluating
from pqk.core.program import Example, Pass, Program, RewriteFunction, Stage
from pqk.errors import InputError, Reason
from pqk.passes.quantize.blocks import insert_blocks, why_not_in_blocks
from pqk.passes.quantize.embeddings import call_quantizer, insert_table, table_of
from pqk.passes.quantize.placement import Activations, Placement, absorbed, named_layers, placement
from pqk.passes.quantize.points import (
    ActivationPoint,
    BlockPoint,
    BlockTablePoint,
    Point,
    TablePoint,
    WeightPoint,
    parse_point,
)
from pqk.passes.quantize.sensitivity import sensitivity
from pqk.passes.quantize.smoothing import smooth
from pqk.quant.block_fake_quant import BlockFakeQuant, BlockWeightFakeQuant
from pqk.quant.blocks import WeightBits
from pqk.quant.fake_quant import (
    ActivationFakeQuant,
    BiasFakeQuant,
    CacheFakeQuant,
    DynamicFakeQuant,
    WeightFakeQuant,
    set_mode,
)
from pqk.quant.qparams import Grid, Method
from pqk.settings import settings
from pqk.target.target import Target
from pqk.task.task import Task

KvCache = Literal["float", "int8"]

CACHE = Grid("int8", -128, 127, symmetric=True)
"""the integers that `GroupQueryAttention` keeps of keys and values"""
TIMED_SAMPLES = 32
"""samples that ranges are taken from where only the latency counts, which does not depend on the scales"""


@settings
class Quantize(Pass):
    """Put fake-quantizers on the target's integer grid on every edge that the runtime needs to stay in integers."""

    name: ClassVar[str] = "quantize"
    consumes: ClassVar[frozenset[Stage]] = frozenset({Stage.GRAPH})
    produces: ClassVar[Stage | None] = Stage.FAKE_QUANT

    activations: Activations = "static"
    """on which ranges activations are rounded: on fixed ones, chosen from data, or on that which each tensor has at run
    time. dynamic quantizes the inputs of linear layers alone, needs no calibration and survives inputs of another
    range; it costs a pass over each input, and a range is that of a whole batch. blockwise does so for every block of
    32 values of a row, and has a scale for each block of a weight: the grid of ONNX Runtime's MatMulNBits with
    accuracy_level 4, for x86"""
    weight_bits: WeightBits = 8
    """bits of weights where activations are blockwise; a weight that is an embedding table, too, keeps 8"""
    calibration: Method = "mse"
    """how ranges are chosen from the observed values: all of them, all but the tails, or the least squared error"""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """for `percentile`: the share of values, in per cent, that the range covers"""
    kv_cache: KvCache = "float"
    """how a decoder keeps keys and values for the tokens that follow: as they are, or in 8 bits, with one fixed step
    for the keys of a layer and one for its values; attention multiplies floats either way. For tasks that generate,
    on x86 with dynamic activations or blocks"""
    samples: int = Field(default=512, gt=0)
    """validation samples that the ranges are chosen from, and sensitivity is measured on"""
    smooth: float | None = Field(default=None, ge=0, le=1)
    """first migrate outliers of activations into the weights that read them (SmoothQuant): alpha, the share of the
    range that goes; 0.5 is the authors'. The float network stays what it is; norms that cannot take part say why"""
    learned_scales: bool = True
    """whether training may move the step sizes (LSQ)"""
    float_layers: tuple[str, ...] = ()
    """patterns (such as `layer3.*`) of layers to leave in float"""
    least_sqnr: float | None = Field(default=None, gt=0)
    """a layer stays in float where quantizing it alone leaves less signal over noise in the outputs than this, in
    decibels, before training: each output's squares over those of its error. 20 is a usual bar; by default none is"""
    faster_float: bool = False
    """leave a layer that multiplies in float where the deployed student is significantly faster for it, each measured
    in turn in the target's runtime at batch 1; needs a machine that is the target"""

    def __post_init__(self) -> None:
        if self.weight_bits != 8 and self.activations != "blockwise":
            raise InputError(
                f'weight_bits = {self.weight_bits} is for activations = "blockwise": of the kernels that integer '
                "products run in, only MatMulNBits has weights of fewer than 8 bits"
            )
        if self.smooth is not None and self.activations == "blockwise":
            raise InputError(
                'smooth moves outliers out of ranges that many channels share, and activations = "blockwise" has a '
                "range for every 32; leave one of the two out"
            )

    @property
    def dynamic(self) -> bool:
        return self.activations == "dynamic"

    def timed_form(self, floats: tuple[str, ...]) -> Pass | None:
        """Ranges by min-max of few samples: a latency does not depend on the scales."""
        return dataclasses.replace(
            self, calibration="minmax", samples=TIMED_SAMPLES, least_sqnr=None, faster_float=False, smooth=None,
            float_layers=(*self.float_layers, *floats),
        )  # fmt: skip

    def why_not_for(self, target: Target) -> Reason | None:
        if self.activations == "blockwise" and (reason := why_not_in_blocks(target)) is not None:
            return f'quantize: activations = "blockwise" is not for {target.name}: {reason}; use "static"'
        if self.kv_cache == "int8" and target.runtime != "onnxruntime":
            return f'quantize: kv_cache = "int8" is for ONNX Runtime: student.pt2, for {target.name}, keeps nothing'
        if self.kv_cache == "int8" and self.activations == "static" and target.activation.qmin == 0:
            return (
                f'quantize: kv_cache = "int8" with activations = "static" is not for {target.name}: ONNX Runtime makes '
                "uint8 of int8 there, as static activations are, and refuses the file; "
                'use activations = "dynamic" or "blockwise"'
            )
        if not self.faster_float or (reason := target.why_not_measured()) is None:
            return None
        return f"quantize.faster_float times layers, but {reason}; set it to false, or compile on the target"

    def apply(self, program: Program, task: Task) -> Program:
        """Raises `InputError` for a pattern that names no layer, a target without the grid, and where speed cannot be
        measured here."""
        wants = self.activations == "blockwise" or self.kv_cache == "int8"
        if wants and (reason := self.why_not_for(program.target)) is not None:
            raise InputError(reason)
        if self.dynamic and program.target.runtime == "triton":
            raise InputError(
                f'quantize: activations = "dynamic" is for ONNX Runtime, and {program.target.name} runs student.pt2, '
                'whose fused kernels have fixed scales; use "static"'
            )
        if self.kv_cache == "int8" and (not task.generates or task.seq2seq):
            raise InputError(
                'quantize: kv_cache = "int8" is for causal models, Task(generates=True), and this task is of none; '
                "leave it out"
            )
        if self.smooth is not None:
            program = self._smooth(program, task, self.smooth)
        student = program.student
        assert isinstance(student, fx.GraphModule)
        floats = named_layers(student, self.float_layers)
        if task.generates:
            floats = kept_in_float(student, self.kv_cache) | floats
        if self.least_sqnr is not None:
            floats |= self._sensitive(program, task, floats)
        if self.faster_float:
            floats |= self._faster(program, floats)
        points, declined = placement(student, floats, self.activations, self.weight_bits)
        program = program.rewrite(insert_fake_quant, task.example, **self._arguments(program, points))
        if self.kv_cache == "int8":
            program = program.rewrite(insert_cache_fake_quant, task.example, learned=self.learned_scales)
        self._calibrate(program.student, task)
        kinds = Counter(type(m) for m in program.student.modules())
        activation, weight = {
            "static": (ActivationFakeQuant, WeightFakeQuant),
            "dynamic": (DynamicFakeQuant, WeightFakeQuant),
            "blockwise": (BlockFakeQuant, BlockWeightFakeQuant),
        }[self.activations]
        program = program.decline(self.name, declined)
        kept = {"keys_and_values": kinds[CacheFakeQuant]} if self.kv_cache == "int8" else {}
        return program.note(activations=kinds[activation], weights=kinds[weight], **kept)

    def _smooth(self, program: Program, task: Task, alpha: float) -> Program:
        """With smoother inputs: only values change, so the plan needs no line for it."""
        student = copy_of(program.student, "student").eval()
        assert isinstance(student, fx.GraphModule)
        smoothed, declined = smooth(student, task.calibration(self.samples), alpha)
        return dataclasses.replace(program, student=student).decline(self.name, declined).note(smoothed=smoothed)

    def _arguments(self, program: Program, points: Sequence[Point]) -> dict[str, Any]:
        """The JSON arguments of `insert_fake_quant`."""
        grids = {"activation": asdict(program.target.activation), "weight": asdict(program.target.weight)}
        return {"points": [point.to_json() for point in points], "learned": self.learned_scales, **grids}

    def _calibrate(self, student: nn.Module, task: Task) -> None:
        calibrate(student, task, self.calibration, self.percentile, self.samples)

    def _sensitive(self, program: Program, task: Task, floats: dict[str, str]) -> dict[str, str]:
        """The layers whose quantization alone costs too much, and what it costs."""

        def measure() -> dict[str, float]:
            trial = copy_of(program.student, "student")
            assert isinstance(trial, fx.GraphModule)
            layers = {n.meta["layer"] for n in Placement(trial, floats, self.activations).integer}
            points = placement(trial, floats, self.activations, self.weight_bits)[0]
            insert_fake_quant(trial, task.example, **self._arguments(program, points))
            self._calibrate(trial, task)
            return sensitivity(trial, layers, task.calibration(self.samples))

        bar = self.least_sqnr or 0.0
        return {
            layer: f"too sensitive: quantized alone it leaves {sqnr:.1f} dB of signal over noise (least_sqnr = {bar:g})"
            for layer, sqnr in program.run.decide("sensitivity", measure).items()
            if sqnr < bar
        }

    def _faster(self, program: Program, floats: dict[str, str]) -> dict[str, str]:
        """The layers that the deployed student is faster for in float, one after the other, and by how much."""
        student, run, reasons = program.student, program.run, dict[str, str]()
        assert isinstance(student, fx.GraphModule)
        where = Placement(student, floats, self.activations)
        layers = [n.meta["layer"] for n in where.nodes if n in where.integer and n.target in HEAVY]
        with run.observer.task(f"{run.scope}: timing layers in float", len(layers)) as advance:
            for layer in layers:
                ratio, low, high = self._float_gain(program, (*floats, *reasons), layer)
                if low > 1:
                    reasons[layer] = f"faster in float: the student runs {ratio:.2f}x as fast ({low:.2f} to {high:.2f})"
                advance(1, f"{layer}: {ratio:.2f}x in float")
        return reasons

    def _float_gain(self, program: Program, floats: tuple[str, ...], layer: str) -> list[float]:
        """How much faster the student with `floats` in float is with `layer` in float, too: journaled."""
        student, run = program.student, program.run
        return run.decide(f"float/{layer}", lambda: run.float_gain(student, floats, layer, "quantize.faster_float"))


def kept_in_float(student: fx.GraphModule, kv_cache: KvCache = "float") -> dict[str, str]:
    """The products of attention in a decoder, which are of floats, and how what they read is kept for later tokens.

    Raises `InputError` where attention has another form than a cache is known for.
    """
    layers = [product.meta["layer"] for site in sites(student) for product in site.products]
    how = {"float": "in float", "int8": "in 8 bits, and made floats again for the products of attention"}[kv_cache]
    return dict.fromkeys(layers, f"matmul: keys and values are kept for the tokens that follow, {how}")


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

    `points` are JSON, as `to_json` of a point writes it. An activation's value, for the nodes in `readers`, goes
    through an `ActivationFakeQuant` on the grid `activation`, which replaces a clamp; a dynamic one's through a
    `DynamicFakeQuant`. Weights and biases go through quantizers of the grid `weight` and of the accumulator; with a
    dynamic input the bias stays float. The rows of a table go through a `TableFakeQuant`. In blocks, inputs go through
    a `BlockFakeQuant` and weights, of which a table can be one, through a `BlockWeightFakeQuant`.
    """
    assert isinstance(student, fx.GraphModule)
    nodes = {n.name: n for n in student.graph.nodes}
    parsed = [(point, nodes[point.node]) for point in map(parse_point, points)]
    for point, node in parsed:
        if isinstance(point, ActivationPoint) and point.dynamic:
            _insert_dynamic(student, node, point.readers)
        elif isinstance(point, ActivationPoint):
            _insert_activation(student, node, point.readers, Grid(**activation), learned)
    for point, node in parsed:
        if isinstance(point, WeightPoint):
            _insert_weight(student, node, Grid(**weight), learned)
        elif isinstance(point, TablePoint):
            insert_table(student, node, learned)
    insert_blocks(
        student,
        [(point, node) for point, node in parsed if isinstance(point, BlockPoint)],
        [node for point, node in parsed if isinstance(point, BlockTablePoint)],
        learned,
    )
    return finish(student)


def insert_cache_fake_quant(student: nn.Module, example: Example, *, learned: bool) -> nn.Module:
    """Insert a `CacheFakeQuant` (uncalibrated) behind the keys and values of every attention of a captured decoder."""
    assert isinstance(student, fx.GraphModule)
    for site in sites(student):
        readers = (operand(site.products[0], 1), site.products[1])
        for node, reader, name in zip((site.key, site.value), readers, ("key", "value"), strict=True):
            layer = f"{site.products[0].meta['layer']}.{name}"
            with student.graph.inserting_after(node):
                fake = call_quantizer(student, layer, CacheFakeQuant(CACHE, learned=learned), node, layer)
            reader.replace_input_with(node, fake)
    return finish(student)


def _insert_activation(
    student: fx.GraphModule, node: fx.Node, readers: Sequence[str], grid: Grid, learned: bool
) -> None:
    source, limits, factor = absorbed(node)
    layer = source.meta["layer"] if len(source.users) == 1 else node.meta["layer"]
    module = ActivationFakeQuant(grid, *limits, gain=factor, learned=learned and source.op != "get_attr")
    with student.graph.inserting_after(node):
        fake = call_quantizer(student, layer, module, source, layer)
    if source is not node:
        replace(student, node, fake)
        return
    node.replace_all_uses_with(fake, delete_user_cb=lambda user: user is not fake and user.name in readers)
    if all(user is fake for user in node.users):
        move_points(student, node, fake)


def _insert_dynamic(student: fx.GraphModule, node: fx.Node, readers: Sequence[str]) -> None:
    with student.graph.inserting_after(node):
        fake = call_quantizer(student, node.meta["layer"], DynamicFakeQuant(), node, node.meta["layer"])
    node.replace_all_uses_with(fake, delete_user_cb=lambda user: user.name in readers)


def _insert_weight(student: fx.GraphModule, node: fx.Node, grid: Grid, learned: bool) -> None:
    a, layer = arguments(node), node.meta["layer"]
    activation = attribute(student, str(root(a["input"]).target))
    weight = WeightFakeQuant(grid, shape(a["weight"])[0], learned)  # type: ignore[arg-type]
    with student.graph.inserting_before(node):
        tensors = [call_quantizer(student, f"{layer}.weight", weight, a["weight"], f"{layer}.weight")]
        if a["bias"] is not None and isinstance(activation, ActivationFakeQuant):  # an accumulator of a known step
            bias = BiasFakeQuant(activation, weight)
            tensors.append(call_quantizer(student, f"{layer}.bias", bias, a["bias"], f"{layer}.bias"))
    node.args = (a["input"], *tensors, *node.args[1 + len(tensors) :])


# ---- the numbers


def calibrate(student: nn.Module, task: Task, method: Method, percentile: float, samples: int) -> None:
    """Choose every range of a FAKE_QUANT student from `samples` validation inputs, and turn its quantizers on."""
    assert isinstance(student, fx.GraphModule)
    set_mode(student, "observe")
    called = [(n, attribute(student, str(n.target))) for n in student.graph.nodes if n.op == "call_module"]
    with evaluating(student), torch.no_grad():
        observers = [module for _, module in called if isinstance(module, ActivationFakeQuant)]
        for batch in task.calibration(samples if observers else 0):  # the other grids take each value's own range
            student(*batch)
        for module in observers:
            module.calibrate(method, percentile)
        for node, module in called:
            if isinstance(module, WeightFakeQuant):
                module.calibrate(attribute(student, str(table_of(node).target)), method, percentile)
            elif isinstance(module, BiasFakeQuant):
                module.fit(attribute(student, str(operand(node).target)))
    set_mode(student, "on")


REWRITES: tuple[RewriteFunction, ...] = (insert_fake_quant, insert_cache_fake_quant)
Quantize.rewrites = REWRITES
