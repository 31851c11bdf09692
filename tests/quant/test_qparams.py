"""The arithmetic of scales and rounding, against ONNX Runtime and known answers; its gradient against autograd."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

import pqk.quant.ops
from pqk.quant.autograd import LearnedStep, LearnedStepPerChannel, StraightThroughBias
from pqk.quant.qparams import (
    BIAS_LEVELS,
    Grid,
    QParams,
    choose,
    dequantize,
    fake_quantize,
    from_range,
    quantize,
    quantize_bias,
)
from pqk.target.target import TARGETS

U8, S8 = Grid("uint8", 0, 255, symmetric=False), Grid("int8", -128, 127, symmetric=False)
S7 = Grid("int8", -64, 64, symmetric=True)
SEEDS = st.integers(0, 99)
GRIDS = sorted({g for t in TARGETS for g in (t.activation, t.weight)}, key=repr)


def per_tensor(scale: float, zero_point: int, grid: Grid) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), grid)


def test_ties_go_to_even_and_clamping_comes_after_the_zero_point() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 300.0, -300.0])
    assert quantize(x, per_tensor(1.0, 10, U8)).tolist() == [8, 10, 10, 12, 12, 255, 0]
    assert quantize(x, per_tensor(1.0, 0, S7)).tolist() == [-2, 0, 0, 2, 2, 64, -64]


def test_division_is_a_true_one() -> None:
    """A multiplication by the reciprocal puts some ties on the other side."""
    scale = torch.tensor(0.037)
    x = (torch.arange(255) + 0.5) * scale
    exact = torch.round(x / scale)
    assert (exact != torch.round(x * (1 / scale))).any()
    assert torch.equal(quantize(x, per_tensor(0.037, 0, U8)).float(), exact)


@settings(max_examples=60, deadline=None)
@given(scale=st.floats(2**-20, 1024, width=32), zero_point=st.integers(0, 255), grid=st.sampled_from(GRIDS), seed=SEEDS)
def test_fake_quantize_is_dequantize_of_quantize(scale: float, zero_point: int, grid: Grid, seed: int) -> None:
    zero_point = 0 if grid.symmetric else max(grid.qmin, min(zero_point, grid.qmax))
    qparams = per_tensor(scale, zero_point, grid)
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)) * scale * 200
    q = quantize(x, qparams)
    assert q.dtype == grid.torch_dtype and grid.qmin <= int(q.min()) and int(q.max()) <= grid.qmax
    assert torch.equal(fake_quantize(x, qparams), dequantize(q, qparams))
    assert torch.equal(fake_quantize(dequantize(q, qparams), qparams), dequantize(q, qparams)), "not idempotent"


@pytest.mark.parametrize("grid", [U8, S8], ids=lambda g: g.dtype)
def test_onnx_runtime_computes_the_same_integers(grid: Grid) -> None:
    kind = TensorProto.UINT8 if grid.dtype == "uint8" else TensorProto.INT8
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("z", kind, []),
        ],
        [helper.make_tensor_value_info("q", kind, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 0.037, 1.0, 3e-5):
        zero_point = (grid.qmin + grid.qmax) // 3
        ties = (torch.arange(-300, 300) + 0.5) * torch.tensor(scale)
        x = torch.cat([ties, torch.randn(5000, generator=generator) * scale * 100])
        feed = {"x": x.numpy(), "s": np.array(scale, dtype="float32"), "z": np.array(zero_point, dtype=grid.dtype)}
        (theirs,) = session.run(None, feed)
        assert np.array_equal(theirs, quantize(x, per_tensor(scale, zero_point, grid)).numpy())


@settings(max_examples=60, deadline=None)
@given(low=st.floats(-100, 100, width=32), span=st.floats(0, 100, width=32), grid=st.sampled_from(GRIDS))
def test_every_range_holds_zero_exactly_and_covers_its_ends(low: float, span: float, grid: Grid) -> None:
    ends = torch.tensor([low, low + span])
    qparams = from_range(ends[0], ends[1], grid)
    assert float(fake_quantize(torch.zeros(1), qparams)) == 0
    error = (fake_quantize(ends, qparams) - ends).abs().max()
    assert float(error) <= float(qparams.scale) * 1.001 + 1e-6
    assert not grid.symmetric or int(qparams.zero_point) == 0


def test_a_grid_that_never_goes_below_zero_is_used_whole() -> None:
    half = Grid("int8", 0, 127, symmetric=True)
    assert float(from_range(torch.tensor(0.0), torch.tensor(12.7), half).scale) == pytest.approx(0.1)


def squared_error(x: Tensor, qparams: QParams) -> float:
    return float((fake_quantize(x, qparams) - x).square().sum())


def test_calibration_by_percentile_drops_outliers_and_by_mse_is_never_worse_than_min_max() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20000, generator=generator)
    x[7] = 400.0
    everything, tails, least = (choose(x, U8, m, None, 99.9) for m in ("minmax", "percentile", "mse"))  # type: ignore[arg-type]
    assert float(tails.scale) < 0.04 < 1 < float(everything.scale)
    assert squared_error(x, least) <= squared_error(x, everything)
    weight = torch.randn(6, 50, generator=generator) * torch.logspace(-3, 2, 6)[:, None]
    for method in ("minmax", "percentile", "mse"):
        qparams = choose(weight, S7, method, axis=0)  # type: ignore[arg-type]
        assert qparams.scale.shape == (6,) and (qparams.scale.diff() > 0).all()
        assert float((fake_quantize(weight, qparams) - weight).norm() / weight.norm()) < 0.05


def learned_by_autograd(x: Tensor, s: Tensor, low: int, high: int, gain: float) -> Tensor:
    """LSQ as the paper writes it: straight-through rounding, the scale's gradient by the chain rule."""
    ratio = (x / s).clamp(low, high)
    return (ratio + (ratio.round() - ratio).detach()) * s * gain


@pytest.mark.parametrize("gain", [1.0, 1 / 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_learned_step_has_the_gradient_of_the_paper(gain: float, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(1)
    low, high = -100, 155
    x = (torch.randn(4, 6, 5, 5, generator=generator) * 3).contiguous(memory_format=layout).requires_grad_()
    s = torch.tensor(0.02, requires_grad=True)
    upstream = torch.randn(4, 6, 5, 5, generator=generator)
    expected = torch.autograd.grad(learned_by_autograd(x, s, low, high, gain), (x, s), upstream)
    got = torch.autograd.grad(LearnedStep.apply(x, s, low, high, float("inf"), gain), (x, s), upstream)
    assert torch.allclose(got[0], expected[0])
    factor = 1 / (x.numel() * high) ** 0.5
    assert float(got[1]) == pytest.approx(float(expected[1]) * factor, rel=1e-3)


def test_a_scale_outside_its_bounds_is_used_at_the_bound_and_still_learns() -> None:
    x = torch.tensor([0.3, 5.0, 9.0], requires_grad=True)
    for start in (10.0, -3.0):
        s = torch.tensor(start, requires_grad=True)
        y = LearnedStep.apply(x, s, 0, 255, 6 / 255, 1.0)
        assert float(y.detach().max()) <= 6.0 + 1e-6
        assert torch.autograd.grad(y.sum(), s)[0].isfinite()


def test_the_gradient_of_channel_steps_is_that_of_each_channel_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(3, 4, 2, 2, generator=generator, requires_grad=True)
    s = torch.tensor([0.01, 0.02, 0.05], requires_grad=True)
    upstream = torch.randn(3, 4, 2, 2, generator=generator)
    got = torch.autograd.grad(LearnedStepPerChannel.apply(w, s, -64, 64), (w, s), upstream)
    for channel in range(3):
        expected = torch.autograd.grad(
            learned_by_autograd(w[channel], s[channel], -64, 64, 1.0), (w, s), upstream[channel], retain_graph=True
        )
        assert torch.allclose(got[0][channel], expected[0][channel])
        assert float(got[1][channel]) == pytest.approx(float(expected[1][channel]) / (16 * 64) ** 0.5, rel=1e-3)


def test_a_bias_is_a_whole_number_of_accumulator_steps_and_fits_int32() -> None:
    bias, scale = torch.tensor([0.31, -2.0, 1e9], requires_grad=True), torch.tensor([0.01, 0.03, 1e-9])
    rounded = StraightThroughBias.apply(bias, scale)
    steps = quantize_bias(bias.detach(), scale)
    assert steps.tolist() == [31, -67, BIAS_LEVELS] and torch.equal(rounded, steps * scale)
    assert torch.autograd.grad(rounded.sum(), bias)[0].tolist() == [1, 1, 1]


def test_the_custom_ops_are_sound() -> None:
    """torch's own checks: schema, fake implementation against the real one, under export with dynamic shapes."""
    x, scale = torch.randn(3, 4), torch.tensor(0.1)
    checks = ("test_schema", "test_faketensor")
    for zero_point in (torch.tensor(7, dtype=torch.uint8), torch.tensor(-7, dtype=torch.int8)):
        torch.library.opcheck(torch.ops.pqk.quantize.default, (x, scale, zero_point, -128, 255), test_utils=checks)
    q, zeros = torch.randint(-64, 65, (4, 3), dtype=torch.int8), torch.zeros(4, dtype=torch.int8)
    torch.library.opcheck(torch.ops.pqk.dequantize.default, (q, torch.rand(4), zeros, 0), test_utils=checks)


@pytest.mark.slow
def test_importing_twice_registers_the_ops_once() -> None:
    """In a process of its own: the second registration replaces the first, and goes when its module is collected. In
    this one, whatever called the operators afterwards would crash, some time later."""
    code = f"""
import importlib.util, sys, torch, pqk.quant.ops
spec = importlib.util.spec_from_file_location("again", {pqk.quant.ops.__file__!r})
again = sys.modules["again"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(again)
zero_point = torch.tensor(3, dtype=torch.uint8)
print(torch.ops.pqk.quantize(torch.ones(2), torch.tensor(0.5), zero_point, 0, 255).tolist())
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[5, 5]"), done.stderr
