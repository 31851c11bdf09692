"""What the manifest says of inputs, outputs and free axes, and what an artifact takes, of models of many shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from evaluations import UNTIMED
from torch import Tensor, fx, nn

from pqk import Artifact, Recipe, Task, compress
from pqk.bench.artifact import benchmark
from pqk.bench.measure import QUICK
from pqk.core.onnxruntime_session import OnnxModel
from pqk.data.data import ArrayData
from pqk.deploy.interface import describe_interface
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import InputError
from pqk.knowledge import CrossEntropy, KLDivergence
from pqk.passes import Capture, Convert, Distill, Fuse, Quantize
from pqk.passes.capture.capture import capture
from pqk.task.metrics import Metric


@dataclass
class Answer:
    """As Hugging Face's models return: fields, of which some are not there, and a tuple."""

    logits: Tensor
    loss: Tensor | None = None
    states: tuple[Any, ...] = ()


class Tokens(nn.Module):
    """Twelve positions; two tokens are read at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 8), nn.Embedding(12, 8)
        self.mix, self.head = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Answer:
        x = (self.words(ids) + self.places(torch.arange(ids.shape[1]))) * mask.unsqueeze(-1)
        x = self.mix(x.reshape(x.shape[0], -1, 16)).relu()
        return Answer(self.head(x.mean(1)), None, (x, [x.amax(1)]))


def loss(answer: Answer, labels: Tensor) -> Tensor:
    return F.cross_entropy(answer.logits, labels, reduction="none")


def tokens_task() -> Task:
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(7, 33, (32, 8), generator=g), torch.randint(0, 2, (32, 8), generator=g)
    data = ArrayData((ids, mask), torch.arange(32) % 5, 8)
    free = {0: "batch", 1: "sequence"}
    return Task(
        data,
        data,
        validation=data,
        loss=loss,
        metric=Metric("accuracy", "share", lambda a, y: float((a.logits.argmax(-1) == y).double().mean())),
        decision=lambda a: a.logits.argmax(-1),
        input_names=("ids", "mask"),
        dynamic_axes={"ids": free, "mask": free},
    )


@pytest.fixture(scope="module", params=["x86-avx2", "cuda-sm80"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    fused = [Fuse()] if request.param.startswith("cuda") else []
    terms = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9, output="logits"))
    trained = [] if fused else [Distill(epochs=1, learning_rate=1e-3, terms=terms)]
    recipe = Recipe(passes=(Capture(), Quantize(samples=16), *trained, Convert(), *fused))
    out = tmp_path_factory.mktemp("interface") / "out"
    return compress(Tokens().eval(), tokens_task(), recipe, request.param, out, evaluation=UNTIMED)


@pytest.mark.slow
def test_the_manifest_has_names_by_path_and_sizes_and_ranges(artifact: Artifact) -> None:
    assert artifact.manifest["inputs"] == [
        {"name": "ids", "shape": ["batch", "sequence"], "dtype": "int64", "range": [7, 32], "below": 40},
        {"name": "mask", "shape": ["batch", "sequence"], "dtype": "int64", "range": [0, 1]},
    ]
    assert [(o["name"], o["shape"]) for o in artifact.manifest["outputs"]] == [
        ("logits", ["batch", 5]),
        ("states_0", ["batch", "(sequence//2)", 8]),
        ("states_1_0", ["batch", 8]),
    ]
    assert artifact.manifest["axes"]["sequence"] == {"least": 2, "most": 12, "step": 2, "example": 8}


@pytest.mark.slow
def test_its_example_is_one_that_it_takes(artifact: Artifact) -> None:
    feeds = artifact.example(3)
    assert feeds["ids"].shape == (3, 8) and feeds["ids"].min() >= 7 and feeds["ids"].max() <= 32
    assert artifact.run(*feeds.values())["states_0"].shape == (3, 4, 8)
    if "model.onnx" in artifact.manifest["files"]:
        assert benchmark(artifact, threads=1, timing=QUICK)
    assert isinstance(artifact.rebuild(Tokens())(*map(torch.from_numpy, feeds.values())), Answer)


@pytest.mark.slow
def test_every_size_that_the_manifest_allows_is_right_and_others_are_refused(artifact: Artifact) -> None:
    student = artifact.rebuild(Tokens())
    for n in (2, 6, 12):
        ids, mask = torch.randint(7, 33, (3, n)), torch.ones(3, n, dtype=torch.long)
        with torch.no_grad():
            want = student(ids, mask).logits
        got = artifact.run(ids, mask)["logits"]
        assert np.abs(got - want.numpy()).max() < 0.1 * want.std()
    ids = torch.ones(2, 14, dtype=torch.long)
    with pytest.raises(InputError, match=r"sequence is 14 in ids; the model takes 2, 4, 6 … up to 12"):
        artifact.run(ids, ids)
    with pytest.raises(InputError, match="sequence is 7 in ids; the model takes 2, 4, 6"):
        artifact.run(ids[:, :7], ids[:, :7])
    with pytest.raises(InputError, match="sequence is 4 in ids and 6 in mask; it must be the same"):
        artifact.run(ids[:, :4], ids[:, :6])


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [-1, 40, 2**32 + 7])
def test_numbers_of_rows_that_its_table_does_not_have_are_refused(artifact: Artifact, wrong: int) -> None:
    """ONNX Runtime counts negative ones from the end, and its GatherBlockQuantized takes any."""
    feeds = artifact.example(2)
    feeds["ids"][1, 3] = wrong
    with pytest.raises(InputError, match=r"ids has values from .* to .*, and the student takes 0 to 39; are they of"):
        artifact.run(*feeds.values())
    assert artifact.run(np.full_like(feeds["ids"], 39), feeds["mask"])["logits"].shape == (2, 5)


@pytest.mark.slow
def test_an_artifact_of_before_has_no_sizes_and_is_taken_as_it_was(artifact: Artifact) -> None:
    manifest = json.loads(json.dumps(artifact.manifest))
    del manifest["axes"]
    for described in manifest["inputs"]:
        described.pop("range", None)
        described.pop("below", None)
    old = Artifact(artifact.folder, manifest)
    assert old.example(2)["ids"].shape == (2, 16) and set(np.unique(old.example(2)["ids"])) == {0, 1}
    with pytest.raises(InputError, match=r"the student fails on ids \[2, 16\], mask \[2, 16\]: "):
        old.run(*old.example(2).values())


def test_an_interface_is_described_before_anything_is_written() -> None:
    task = tokens_task()
    graph = capture(Tokens().eval(), task.example, input_names=task.input_names, axes=task.axes)
    assert isinstance(graph, fx.GraphModule)
    described = describe_interface(graph, task)
    assert [(i["range"], i.get("below")) for i in described["inputs"]] == [([7, 32], 40), ([0, 1], None)]
    assert [(o["name"], o["shape"]) for o in described["outputs"]] == [
        ("logits", ["batch", 5]),
        ("states_0", ["batch", "(sequence//2)", 8]),
        ("states_1_0", ["batch", 8]),
    ]
    assert described["axes"] == {
        "batch": {"least": 0, "most": None, "step": 1, "example": 2},
        "sequence": {"least": 2, "most": 12, "step": 2, "example": 8},
    }


def opened(folder: Path, axes: dict[str, Any], shapes: list[list[int | str]]) -> Artifact:
    """An artifact whose model adds its two inputs, without a compile."""
    node = onnx.helper.make_node("Add", ["x", "y"], ["sum"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("x", "y", "sum")]
    graph = onnx.helper.make_graph([node], "sum", values[:2], values[2:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), folder / "model.onnx")
    inputs = [{"name": n, "shape": shape, "dtype": "float32"} for n, shape in zip("xy", shapes, strict=True)]
    return Artifact(folder, {"inputs": inputs, "outputs": [{"name": "sum"}], "axes": axes})


def test_sizes_that_are_not_allowed_are_refused(tmp_path: Path) -> None:
    axes = {
        "batch": {"least": 1, "most": None, "step": 1, "example": 2},
        "left": {"least": 4, "most": 12, "step": 4, "example": 8},
        "right": {"least": 4, "most": 12, "step": 4, "example": 8, "equals": "left"},
    }
    sum_ = opened(tmp_path, axes, [["batch", "left"], ["batch", "right"]])
    assert [x.shape for x in sum_.example(3).values()] == [(3, 8), (3, 8)]

    def run(*shapes: tuple[int, int]) -> Any:
        return sum_.run(*(np.ones(shape, np.float32) for shape in shapes))

    assert run((1, 12), (1, 12)).shape == (1, 12)
    for shapes, message in [
        (((0, 4), (0, 4)), "batch is 0 in x; the model takes at least 1"),
        (((1, 16), (1, 16)), "left is 16 in x; the model takes 4, 8, 12 … up to 12"),
        (((1, 6), (1, 6)), "left is 6 in x; the model takes 4, 8, 12"),
        (((1, 4), (1, 8)), "left is 4 in x and right is 8 in y; it must be the same"),
        (((1, 4), (2, 4)), "batch is 1 in x and 2 in y; it must be the same"),
    ]:
        with pytest.raises(InputError, match=message):
            run(*shapes)


def test_what_the_runtime_refuses_is_said_with_the_shapes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An artifact of before says nothing of sizes, so they are tried; the runtime prints nothing of its own."""
    sum_ = opened(tmp_path, {}, [["batch", "left"], ["batch", "right"]])
    assert sum_.example(2)["x"].shape == (2, 16)
    with pytest.raises(InputError, match=r"the student fails on x \[2, 3\], y \[2, 5\]: "):
        sum_.run(np.ones((2, 3), np.float32), np.ones((2, 5), np.float32))
    assert capfd.readouterr() == ("", "")


class Strided(nn.Module):
    """A length that is even, in two of three outputs and halved in one."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv1d(4, 8, 3, 2, 1), nn.ConvTranspose1d(8, 4, 2, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.down(x)
        return self.head(y.mean(-1)), [y, torch.cat([x, self.up(y)], 1)]


def strided_task(**changes: Any) -> Task:
    data = ArrayData(torch.randn(16, 4, 16, generator=torch.Generator().manual_seed(0)), None, 8)
    metric = Metric("mean", "share", lambda o, _: 0.5)
    settings: dict[str, Any] = {"dynamic_axes": {"input": {2: "time"}}, "decision": lambda o: o[0].argmax(-1)}
    return Task(None, data, validation=data, metric=metric, **settings | changes)


@pytest.mark.slow
def test_nested_outputs_and_strides_compile(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = Recipe(passes=(Capture(), Quantize(samples=16), Convert()))
    artifact = compress(Strided().eval(), strided_task(), recipe, "x86-avx2", tmp_path / "out", evaluation=UNTIMED)
    shapes = {o["name"]: o["shape"] for o in artifact.manifest["outputs"]}
    assert list(shapes) == ["output_0", "output_1_0", "output_1_1"]
    assert shapes["output_1_1"] == ["batch", 8, "time"]
    assert artifact.manifest["axes"]["time"] == {"least": 2, "most": None, "step": 2, "example": 16}
    assert artifact.run(torch.randn(3, 4, 22))["output_1_1"].shape == (3, 8, 22)
    assert artifact.run(torch.randn(0, 4, 22))["output_1_0"].shape == (0, 8, 11), "as its teacher's file does"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: (x, x.mean()), "its output 1 is one number for the whole batch"),
        (lambda x: {"y": x, "cache": object()}, "its output cache is of type object"),
    ],
)
def test_outputs_that_no_file_holds_are_refused_before_anything_runs(
    outputs: Callable[[Tensor], Any], message: str, tmp_path: Path
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Any:
            return outputs(self.linear(x))

    with pytest.raises(InputError, match=message):
        compress(Model(), strided_task(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_axis_has_one_name_everywhere_in_the_file(tmp_path: Path) -> None:
    """Sizes that follow from it are unknown: no reader takes `s27//2` for an axis of its own."""
    x, path = torch.randn(2, 4, 16), tmp_path / "model.onnx"
    emit_onnx(Strided(), (x,), path, ["x"], axes=[["batch", None, "time"]])
    graph = onnx.load(path).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    assert {d.dim_param for v in values for d in v.type.tensor_type.shape.dim if d.dim_param} == {"batch", "time"}


def test_names_that_are_taken_are_not_given_again(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x * 2, "y": x}

    emit_onnx(Same(), (torch.randn(2, 4),), tmp_path / "model.onnx", ["x"])
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [v.name for v in graph.input] == ["x"] and [v.name for v in graph.output] == ["x_1", "y"]


class Operators(nn.Module):
    """Outputs that are called as operators, layers and weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bias = nn.Linear(8, 5), nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x + self.bias).relu()
        return {"add": y.tanh(), "relu": y.unsqueeze(1) * 2, "linear": y + 1, "fc.weight": y - 1, "fc_q": y * 3}


@pytest.mark.parametrize("name", ["x", "bias", "tanh"])
@pytest.mark.parametrize("captured", [False, True])
def test_names_of_inputs_and_outputs_may_be_those_of_operators_and_weights(
    name: str, captured: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 8), Operators().eval()
    form = capture(model, (x,), input_names=[name]) if captured else model
    emit_onnx(form, (x,), tmp_path / "model.onnx", [name])
    session = OnnxModel(tmp_path / "model.onnx", model(x))
    assert [o.name for o in onnx.load(tmp_path / "model.onnx").graph.output] == [*model(x)]
    for got, want in zip(session(x).values(), model(x).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
