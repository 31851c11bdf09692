"""What is deployed, at sizes other than the example's: a file that keeps one is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx import helper
from torch import Tensor, fx, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.passes import Capture, Convert, Fuse, Quantize
from pqk.target.target import Target
from pqk.task.axes import Sizes
from pqk.task.task import Task
from pqk.verify.no_samples import takes_no_samples
from pqk.verify.other_sizes import answers_none, other_sizes, why_not_at_other_sizes, why_not_the_teacher


class Pooled(nn.Module):
    """[B, 4, T] to [B, 5]: its outputs have one shape at every length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean(-1))


@pytest.fixture(scope="module")
def compiled() -> tuple[Program, Task]:
    torch.manual_seed(0)
    teacher, data = Pooled().eval(), ArrayData(torch.randn(32, 4, 16), torch.arange(32) % 5, 8)
    task = Task(None, data, validation=data, dynamic_axes={"input": {2: "time"}})
    program = Program(teacher, Pooled(), Stage.MODULE, Target.named("x86-avx2"), RunContext())
    program.student.load_state_dict(teacher.state_dict())
    for step in (Capture(), Quantize(samples=16), Convert(), Fuse()):
        program = replace(step.apply(program, task), stage=step.result_stage(program.stage))
    return program, task


def spoiled(path: Path, nodes: Callable[[str], list[onnx.NodeProto]]) -> Path:
    """The file with `nodes` between its input and what reads it; they make `changed` of it."""
    model = onnx.load(path)
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["changed" if i == name else i for i in node.input]
    new = nodes(name)
    for position, node in enumerate(new):
        model.graph.node.insert(position, node)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.array(value), key)
        for key, value in {"begin": [0], "end": [16], "axis": [2], "sixteen": np.float32(16)}.items()
    )
    onnx.save(model, path)
    return path


def cropped(name: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Slice", [name, "begin", "end", "axis"], ["changed"])]


def scaled(name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Shape", [name], ["shape"], start=2),
        helper.make_node("Cast", ["shape"], ["length"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Div", ["length", "sixteen"], ["factor"]),
        helper.make_node("Mul", [name, "factor"], ["changed"]),
    ]


@pytest.mark.slow
def test_files_that_are_right_have_no_reason(compiled: tuple[Program, Task], tmp_path: Path) -> None:
    program, task = compiled
    graph = program.student
    assert isinstance(graph, fx.GraphModule)
    emit_onnx_for(graph, task, tmp_path / "model.onnx")
    emit_onnx_for(program.teacher, task, tmp_path / "teacher.onnx")
    where = {"onnx": tmp_path / "model.onnx", "fused": program.fused}
    assert why_not_at_other_sizes(program.teacher, graph, task, **where) is None  # type: ignore[arg-type]
    assert why_not_the_teacher(program.teacher, tmp_path / "teacher.onnx", task, graph.meta["sizes"]) is None
    assert answers_none(graph, tmp_path / "model.onnx", task)


@pytest.mark.parametrize("nodes", [cropped, pytest.param(scaled, marks=pytest.mark.slow)])
def test_a_file_that_keeps_the_example_s_length_is_found_out(
    compiled: tuple[Program, Task], tmp_path: Path, nodes: Callable[[str], list[onnx.NodeProto]]
) -> None:
    program, task = compiled
    graph = program.student
    assert isinstance(graph, fx.GraphModule)
    emit_onnx_for(graph, task, tmp_path / "model.onnx")
    emit_onnx_for(program.teacher, task, tmp_path / "teacher.onnx")
    reason = why_not_at_other_sizes(program.teacher, graph, task, onnx=spoiled(tmp_path / "model.onnx", nodes))
    assert reason is not None and "model.onnx is wrong at time" in reason and "of their RMS" in reason, reason
    teacher = spoiled(tmp_path / "teacher.onnx", nodes)
    reason = why_not_the_teacher(program.teacher, teacher, task, graph.meta["sizes"])
    assert reason is not None and "teacher.onnx is wrong at time 17" in reason, reason


def test_a_student_of_other_shapes_than_its_teacher_s_is_found_out(compiled: tuple[Program, Task]) -> None:
    program, task = compiled
    graph = program.student
    assert isinstance(graph, fx.GraphModule)

    class Longer(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).repeat(1, x.shape[2] // 16)

    reason = why_not_at_other_sizes(Longer(), graph, task, fused=program.fused)
    assert reason == "the student is wrong at time 32: its outputs are [(2, 5)] and the teacher's [(2, 10)]"


def test_other_sizes_are_legal() -> None:
    example = {"batch": 2, "a": 8, "b": 8, "c": 12, "d": 4}
    sizes = {"batch": Sizes(0), "a": Sizes(4, step=4), "b": Sizes(1, 8), "c": Sizes(12, 12), "d": Sizes(2, 5)}
    assert other_sizes(sizes, example) == [
        {"batch": 3}, {"batch": 4}, {"a": 12}, {"a": 16}, {"b": 7}, {"b": 6}, {"d": 5}, {"d": 3},
    ]  # fmt: skip
    free = {"batch": Sizes(0), "height": Sizes(1), "width": Sizes(4, step=4)}
    assert other_sizes(free, {"batch": 2, "height": 6, "width": 8})[-1] == {"height": 12, "width": 16}


def test_a_file_that_does_not_take_a_batch_of_none_is_found_out(tmp_path: Path) -> None:
    """In a process of its own, whose end is an answer, too."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    shape = onnx.numpy_helper.from_array(np.array([-1, 4]), "shape")
    model = helper.make_model(
        helper.make_graph(nodes, "reshaped", values[:1], values[1:], [shape]),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"x": ([0, 4], "float32")}
    assert takes_no_samples(tmp_path / "model.onnx", inputs, [[0, 4]])
    assert not takes_no_samples(tmp_path / "model.onnx", inputs, [[0, 2]])
    assert not takes_no_samples(tmp_path / "none.onnx", inputs, [[0, 4]])
