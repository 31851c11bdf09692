"""The latency table: its laws hold whatever is measured, its cache is kept, and its samples are what they say."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pqk.bench.latency.executed import LayerShape, LightKind, executed_nodes
from pqk.bench.latency.prediction import layer_times, predict
from pqk.bench.latency.samples import input_shape, layer_sample, light_sample, light_shape
from pqk.bench.latency.table import FEW, MANY, LatencyTable, cache_folder, corners, steps
from pqk.files import read_json

ROOT = Path(__file__).parents[2]
CONVOLUTION = LayerShape(True, (3, 3), (1, 1), (1, 1), 1, (8, 8))
SHAPES = {
    "int8": CONVOLUTION,
    "float": LayerShape(False, (3, 3), (2, 2), (1, 1), 1, (8, 8)),
    "depthwise": LayerShape(True, (3, 3), (1, 1), (1, 1), 0, (8, 8)),
    "groups": LayerShape(True, (3, 3), (1, 1), (1, 1), 2, (8, 8)),
    "signal": LayerShape(True, (5,), (2,), (1,), 1, (32,)),
    "linear": LayerShape(True, (), (), (), 1, (4,)),
    "float linear": LayerShape(False, (), (), (), 1, (4,)),
}


def macs_of(file: bytes) -> float:
    """Weights of a sample: what its layers would take if time were nothing else."""
    graph = onnx.load_from_string(file).graph
    return float(sum(np.prod(t.dims) for t in graph.initializer if len(t.dims) > 1))


class Clock:
    """A timing that takes what is in a file for its milliseconds, and counts how often it is asked."""

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.asked, self.draw = noise, 0, random.Random(0)

    def __call__(self, files: Sequence[bytes], feeds: Mapping[str, Any]) -> list[float]:
        self.asked += 1
        factor = 1 + self.noise * self.draw.uniform(-1, 1)
        nodes = [len(onnx.load_from_string(f).graph.node) for f in files]
        return [factor * 1e-3 * macs_of(f) + 0.01 * n for f, n in zip(files, nodes, strict=True)]


@pytest.mark.parametrize("name", SHAPES)
def test_narrower_is_never_slower(name: str, tmp_path: Path) -> None:
    """However noisy the clock is."""
    table = LatencyTable(folder=tmp_path, timing=Clock(noise=0.8))
    unit = max(1, SHAPES[name].groups)
    channels = [unit * c for c in (1, 3, 5, 8, 14, 16, 20)]
    pairs = [(c, c) for c in channels] if SHAPES[name].groups == 0 else [*itertools.product(channels, repeat=2)]
    table.prepare((SHAPES[name], pair) for pair in pairs)
    times = {pair: table.layer(SHAPES[name], pair) for pair in pairs}
    for (a, fast), (b, slow) in itertools.permutations(times.items(), 2):
        if a[0] <= b[0] and a[1] <= b[1]:
            assert fast <= slow + 1e-12, (a, b)


def test_between_measured_widths_lies_the_line(tmp_path: Path) -> None:
    table = LatencyTable(folder=tmp_path, timing=Clock())
    at = {channels: table.layer(CONVOLUTION, channels) for channels in itertools.product((16, 20, 24), repeat=2)}
    assert set(table.layers[str(CONVOLUTION)]) == {*itertools.product((16, 24), repeat=2)}
    assert at[20, 16] == pytest.approx((at[16, 16] + at[24, 16]) / 2)
    assert at[20, 20] == pytest.approx(sum(at[pair] for pair in itertools.product((16, 24), repeat=2)) / 4)
    assert at[16, 16] < at[20, 16] < at[24, 16]


def test_rungs_are_around_a_number() -> None:
    assert [steps(c) for c in (1, 3, 4, 6, 12, 20, 64, 100)] == [
        (1, 1), (3, 3), (4, 4), (4, 8), (12, 12), (16, 24), (64, 64), (96, 128),
    ]  # fmt: skip
    assert steps(12, 4) == (12, 12) and steps(20, 4) == (16, 32)
    assert corners(CONVOLUTION, (16, 20)) == [(16, 16), (16, 24)]
    assert corners(SHAPES["depthwise"], (20, 20)) == [(16, 16), (24, 24)]


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    clock = Clock()
    first = LatencyTable(folder=tmp_path, timing=clock)
    first.prepare([(CONVOLUTION, (16, 16))])
    asked, known = clock.asked, first.layer(CONVOLUTION, (16, 16))
    assert asked and first.measured
    again = LatencyTable(folder=tmp_path, timing=clock)
    again.prepare([(CONVOLUTION, (16, 16))])
    assert clock.asked == asked and again.measured == 0
    assert again.layer(CONVOLUTION, (16, 16)) == known and again.call == first.call
    other = LatencyTable(threads=1, folder=tmp_path, timing=clock)
    other.prepare([(CONVOLUTION, (16, 16))])
    assert clock.asked == 2 * asked and len([*tmp_path.iterdir()]) == 2


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, other = (LatencyTable(folder=tmp_path, timing=Clock()) for _ in range(2))
    one.prepare([(CONVOLUTION, (16, 16))])
    other.prepare([(CONVOLUTION, (32, 32))])
    both = LatencyTable(folder=tmp_path, timing=Clock())
    both.prepare([(CONVOLUTION, (16, 16)), (CONVOLUTION, (32, 32))])
    assert both.measured == 0


@pytest.mark.parametrize("fault", ["", "{", "[1, 2]", '{"format": 1}', "changed", "sealed by nobody"])
def test_half_a_file_is_measured_anew(fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = LatencyTable(folder=tmp_path, timing=Clock())
    table.prepare([(CONVOLUTION, (16, 16))])
    known = read_json(table.path)
    if fault == "changed":
        known["lines"]["call"] = 99.0
        fault = json.dumps(known)
    elif fault == "sealed by nobody":
        del known["sha256"]
        fault = json.dumps(known)
    table.path.write_text(fault)
    with caplog.at_level(logging.WARNING):
        again = LatencyTable(folder=tmp_path, timing=Clock())
    assert "measured anew" in caplog.text and not again.layers
    again.prepare([(CONVOLUTION, (16, 16))])
    assert again.measured and LatencyTable(folder=tmp_path).layers == again.layers


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    table = LatencyTable(folder=tmp_path / "file", timing=Clock())
    table.prepare([(CONVOLUTION, (16, 16))])
    assert "not kept" in caplog.text and table.layer(CONVOLUTION, (16, 16)) > 0


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pqk"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pqk"


@pytest.mark.parametrize("name", SHAPES)
def test_a_sample_executes_copies_of_its_layer(name: str, tmp_path: Path) -> None:
    """What the runtime makes of it is the layer's own kernel, so often, and in integers where it should be."""
    shape, channels = SHAPES[name], (16, 16) if SHAPES[name].groups == 0 else (16, 32)
    (tmp_path / "sample.onnx").write_bytes(layer_sample(shape, channels, FEW))
    dtype = np.uint8 if shape.integer else np.float32
    feeds = {"x": np.ones(input_shape(shape, channels[0]), dtype)}
    nodes = executed_nodes(tmp_path / "sample.onnx", feeds, threads=1)
    layers = [n for n in nodes if n.shape is not None]
    assert [(n.shape, n.channels) for n in layers] == [(shape, channels)] * FEW
    assert not any(n.kind == "rounding" for n in nodes if n.shape is None)


EXECUTED: dict[LightKind, set[str]] = {
    "integer": {"QLinearAdd"},
    "movement": {"Pad", "Slice"},
    "rounding": {"QuantizeLinear", "DequantizeLinear", "Gelu"},
    "float": {"Add"},
    "function": {"Gelu"},
    "softmax": {"Softmax"},
    "norm": {"LayerNormalization"},
    "sum and norm": {"SkipLayerNormalization"},
}


@pytest.mark.parametrize("kind", EXECUTED)
def test_a_chain_executes_its_operators(kind: LightKind, tmp_path: Path) -> None:
    (tmp_path / "chain.onnx").write_bytes(light_sample(kind, 256, MANY))
    dtype = np.uint8 if kind in ("integer", "movement") else np.float32
    nodes = executed_nodes(tmp_path / "chain.onnx", {"x": np.ones(light_shape(256), dtype)}, threads=1)
    assert Counter(n.operator for n in nodes) == dict.fromkeys(EXECUTED[kind], MANY)
    assert kind in {n.kind for n in nodes}


def test_a_network_is_the_sum_of_what_it_executes(tmp_path: Path) -> None:
    """A committed student: its layers by name, and what it takes with fewer channels."""
    feeds = {"x": np.zeros((1, 3, 32, 32), np.float32)}
    model = ROOT / "models" / "results" / "resnet20_cifar10.onnx"
    feeds = {i.name: feeds["x"] for i in onnx.load(model).graph.input}
    nodes = executed_nodes(model, feeds, threads=1)
    table = LatencyTable(folder=tmp_path, timing=Clock())
    heavy = [n for n in nodes if n.shape is not None]
    assert {n.operator for n in heavy} == {"QLinearConv", "QGemm"}
    layer = next(n for n in heavy if n.channels == (16, 16))
    times = layer_times(table, nodes, {layer.layer: [layer.channels, (16, 8), (8, 8)]})
    whole, narrower, narrowest = times.layers[layer.layer]
    assert narrowest < narrower < whole
    assert times.rest + whole == pytest.approx(predict(table, nodes))


def test_the_committed_errors_are_within_their_bound() -> None:
    result = read_json(ROOT / "models" / "results" / "latency_table.json")
    errors = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in result["networks"]]
    assert sum(errors) / len(errors) == pytest.approx(result["mean_absolute_error"])
    assert result["mean_absolute_error"] <= result["bound_of_the_mean"]
    assert {row["form"] for row in result["networks"]} == {"FP32", "INT8"} and result["machine"]["isa"]
