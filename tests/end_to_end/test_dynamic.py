"""Dynamic quantization: the range of each tensor at run time, in training, in the INT8 graph and in ONNX Runtime."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from evaluations import UNTIMED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pqk import Recipe, compress
from pqk.core.aten import quantized_tensors
from pqk.core.onnxruntime_session import session
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.passes import Capture, Convert, Distill, Fuse, Prune, Quantize
from pqk.passes.convert.convert import DYNAMIC
from pqk.quant.fake_quant import ActivationFakeQuant, DynamicFakeQuant, set_mode
from pqk.quant.ops import quantize_dynamic_op
from pqk.quant.qparams import dequantize, dynamic_qparams, quantize
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.verify.coverage import integer_coverage
from pqk.verify.parity import check_parity

pytestmark = pytest.mark.slow


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mixer(nn.Module):
    """Two readers of one value, a value that is moved, a product of values, a head on a matrix, layers without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.norm = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.LayerNorm(32)
        self.wide, self.narrow, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.query(x) @ self.key(x).transpose(1, 2) / 32
        x = self.norm(x + mixed.softmax(-1) @ x)
        return self.head((x + self.narrow(F.gelu(self.wide(x)))).mean(1))


def program(target: str = "x86-avx2", **settings: Any) -> tuple[Program, Program, Task]:
    """The FAKE_QUANT and the INT8 program of a `Mixer`, and its task."""
    torch.manual_seed(0)
    model, part = Mixer().eval(), ArrayData(drawn((64, 6, 32)), None, 16)
    task = Task(None, part, validation=part, example=drawn((2, 6, 32)), dynamic_axes={"input": {1: "tokens"}})
    start = Program(model, model, Stage.MODULE, Target.named(target), RunContext())
    fake = Quantize(activations="dynamic", **settings).apply(Capture().apply(start, task), task)
    return fake, Convert().apply(replace(fake, student=copy.deepcopy(fake.student)), task), task


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@example([2.0**-149])
@example([-(2.0**-149)])
@example([2.0**-126, -(2.0**-130)])
def test_ranges_and_integers_are_those_of_onnx_runtime(values: list[float]) -> None:
    """Scale and zero point bit for bit and integers too, for any values, of one sign, equal or all zero."""
    x = torch.tensor(values)
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("x", 1, [None])], [onnx.ValueInfoProto(name=n) for n in "qsz"]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    q, s, z = session(model.SerializeToString()).run(None, {"x": x.numpy()})
    ours = [t.numpy() for t in quantize_dynamic_op(x)]
    assert ours[1] == s and ours[2] == z and ours[0].dtype == np.uint8
    np.testing.assert_array_equal(ours[0], q)
    if s == 0:  # all integers mean 0 then, and no step bounds how far that is
        return
    qparams = dynamic_qparams(x)
    assert (dequantize(quantize(x, qparams), qparams) - x).abs().max() <= 0.5001 * float(s) + 1e-6 * x.abs().max()


def test_only_linear_layers_have_quantizers_and_the_rest_says_why() -> None:
    fake, _, _ = program()
    kinds = [type(m) for m in fake.student.modules()]
    assert kinds.count(DynamicFakeQuant) == 4 and ActivationFakeQuant not in kinds  # query and key share one
    assert fake.details == fake.details | {"activations": 4, "weights": 5}
    reasons = {d.reason for d in fake.declined}
    assert any("matmul: of what computes, only linear layers" in r for r in reasons)
    named, _, _ = program(float_layers=("head",))
    assert {d.layer for d in named.declined if "by name" in d.reason} == {"head"}


def test_training_sees_what_is_deployed_and_gradients_pass() -> None:
    fake, int8, task = program()
    x = task.example[0]
    with torch.no_grad():
        torch.testing.assert_close(int8.student(x), fake.student(x), atol=1e-5, rtol=1e-5)
        on = fake.student(x)
        set_mode(fake.student, "off")
        torch.testing.assert_close(fake.student(x), fake.teacher(x), atol=1e-5, rtol=1e-5)
        assert not torch.equal(fake.student(x), on)
        set_mode(fake.student, "on")
    x = drawn((3, 32), 5).requires_grad_()
    quantizer = DynamicFakeQuant()
    quantizer(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())
    for p in fake.student.parameters():
        p.grad = None
    fake.student(task.example[0]).square().sum().backward()
    assert all(p.grad is not None for n, p in fake.student.named_parameters() if "weight" in n and "quant" not in n)


def test_the_file_runs_in_integers_on_any_shape_and_keeps_the_contract(tmp_path: Path) -> None:
    fake, int8, task = program()
    graph = int8.student
    assert isinstance(graph, fx.GraphModule)
    assert [n.target for _, n in quantized_tensors(graph)] == [DYNAMIC] * 4
    path = tmp_path / "model.onnx"
    emit_onnx(graph, task.example, path, task.input_names, task.output_names, task.axes)
    stored = {i.data_type for i in onnx.load(path).graph.initializer if len(i.dims) == 2}
    assert stored == {onnx.TensorProto.INT8}
    coverage = integer_coverage(path, task.feeds(2))
    assert {la.name for la in coverage.layers if la.integer} >= {"query", "key", "wide", "narrow", "head"}
    assert {la.op for la in coverage.layers if la.integer} == {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    parity = check_parity(fake.student, graph, path, task)
    assert parity.passed, parity.first_divergence
    products = [la for la in parity.layers if la.max_lsb is not None]
    assert len(products) == 4 and any(la.accumulators for la in parity.layers)
    x = drawn((3, 9, 32), 7)
    with torch.no_grad():
        want = graph(x).numpy()
    np.testing.assert_allclose(session(path).run(None, {task.input_names[0]: x.numpy()})[0], want, atol=2e-2)


def test_a_broken_weight_is_found_by_the_layers_contract(tmp_path: Path) -> None:
    fake, int8, task = program()
    path = tmp_path / "model.onnx"
    emit_onnx(int8.student, task.example, path, task.input_names, task.output_names, task.axes)
    model = onnx.load(path)
    weight = next(i for i in model.graph.initializer if "narrow" in i.name and len(i.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:, 3] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    assert isinstance(int8.student, fx.GraphModule)
    parity = check_parity(fake.student, int8.student, path, task)
    assert not parity.passed and parity.first_divergence is not None


def test_fused_kernels_have_fixed_scales() -> None:
    with pytest.raises(InputError, match='"dynamic" is for ONNX Runtime, and cuda-sm80'):
        program("cuda-sm80")
    _, int8, task = program()
    fused = Fuse().apply(int8, task)
    assert fused.fused is not None
    with torch.no_grad():
        torch.testing.assert_close(fused.fused(task.example[0]), int8.student(task.example[0]), atol=1e-4, rtol=1e-4)


def test_a_student_is_trained_compiled_and_rebuilt(tmp_path: Path) -> None:
    """The whole way with a budget, distillation on dynamic quantizers, sensitivity and the report."""
    torch.manual_seed(0)
    model, part = Mixer().eval(), ArrayData(drawn((64, 6, 32)), drawn((64, 5), 1).argmax(1), 16)
    task = Task(part, part, validation=part, example=drawn((2, 6, 32)), dynamic_axes={"input": {1: "tokens"}})
    passes = (
        Prune(parameters_ratio=1.2, multiple=4, importance="activation"),
        Capture(),
        Quantize(activations="dynamic", least_sqnr=1.0),
        Distill(epochs=1.0, learning_rate=1e-3),
        Convert(),
    )
    artifact = compress(model, task, Recipe(passes=passes), "x86-avx2", tmp_path / "out", evaluation=UNTIMED)
    report = artifact.report
    assert report.parity is not None and report.parity.passed
    with torch.no_grad():
        want = artifact.rebuild(model)(*task.example)
    # A tie that falls the other way moves one input by a step, and with it all outputs a little.
    torch.testing.assert_close(torch.from_numpy(artifact.run(*task.example)), want, atol=2e-2, rtol=0)
    pruned = report.passes[0].details
    assert report.passes[2].details["activations"] == 4
    assert pruned["before"]["parameters"] >= 1.2 * pruned["after"]["parameters"]
