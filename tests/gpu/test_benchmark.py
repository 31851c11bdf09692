"""The benchmark of a GPU, on a device that is none: everything but the few lines of `pqk.gpu.device.Cuda` runs here."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import TABLE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pqk.bench.contenders import Contender, Skipped, Timer, timed
from pqk.bench.measure import TimingProtocol
from pqk.cli import app as cli
from pqk.cli import views as describe
from pqk.cli.console import CommandAnswer, write
from pqk.compiler import compress
from pqk.data.data import ArrayData
from pqk.deploy.artifact import Artifact
from pqk.deploy.tuning import Tuning
from pqk.errors import InputError, ParityError
from pqk.gpu import benchmark as benchmark_cuda
from pqk.gpu.autotune import choose_tuning
from pqk.gpu.benchmark import (
    COPIES,
    DeviceAgreement,
    at_its_best,
    benchmark,
    compare,
    contender,
    float32_products,
    gate,
    in_turn,
    input_bytes,
    rotated,
    rotation,
    share,
    teachers,
)
from pqk.gpu.device import Call, Ceilings, Cuda, Replay, why_not_present
from pqk.kernels.common.gpu import gpu_of
from pqk.models.resnet import resnet
from pqk.passes import Capture, Convert, Fuse, Quantize
from pqk.recipe.recipe import Recipe
from pqk.recipe.specs import TeacherSpec
from pqk.report.schema import LatencyRow
from pqk.task.task import Task

pytestmark = pytest.mark.slow

SHORT = TimingProtocol(rounds=5, burst=2, warm=2, pause=0.0)


class Pretended:
    """A device that is the CPU; it notes what it is asked for. Loading a module onto it can change its numbers."""

    name = "cpu"
    l2_bytes = 100_000

    def __init__(self) -> None:
        self.ballast: list[int] = []
        self.captures = 0

    def describe(self) -> dict[str, Any]:
        return {"name": "a pretended device", "capability": "0.0", "cuda": None, "l2_bytes": self.l2_bytes}

    def captured(self, call: Call) -> Call:
        call()
        self.captures += 1
        return call

    def timer(self, ballast: int) -> Timer:
        self.ballast.append(ballast)
        return timed

    def ceilings(self) -> Ceilings:
        return Ceilings(bandwidth=1e10, integer=1e11)


# Rotation


@given(st.integers(1, 10_000_000), st.integers(0, 100_000_000), st.integers(2, 20))
def test_twice_the_cache_passes_before_a_copy_is_used_again(size: int, cache: int, most: int) -> None:
    plan = rotation(size, cache, most)
    assert 2 <= plan.copies <= most and plan.ballast >= 0

    def passed(copies: int, ballast: int) -> int:
        return (copies - 1) * size + copies * ballast

    assert passed(plan.copies, plan.ballast) >= 2 * cache
    if plan.ballast:
        assert plan.copies == most and passed(plan.copies, plan.ballast - 1) < 2 * cache
    elif plan.copies > 2:
        assert passed(plan.copies - 1, 0) < 2 * cache


def test_copies_are_equal_and_apart() -> None:
    inputs = (torch.randn(2, 3), torch.arange(4))
    copies = rotated(inputs, 3)
    assert all(torch.equal(a, b) for each in copies for a, b in zip(inputs, each, strict=True))
    assert len({t.data_ptr() for each in (inputs, *copies) for t in each}) == 8
    assert input_bytes(inputs) == 6 * 4 + 4 * 8


def test_calls_walk_through_the_copies() -> None:
    seen: list[int] = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.data_ptr())
            return x

    device = Pretended()
    made = contender(device, "student", "triton", Looks(), (torch.zeros(4, 100),))
    assert isinstance(made, Contender) and made.batch == 4 and device.captures == COPIES
    plan = rotation(1600, device.l2_bytes)
    assert device.ballast == [plan.ballast] and plan.ballast > 0
    captured = seen.copy()
    for _ in range(2 * COPIES):
        made.call()
    assert seen[COPIES:] == captured + captured and len(set(seen)) == COPIES


def test_a_clock_of_the_device_takes_the_time() -> None:
    """A device's clock says 1 ms and 4 ms, whatever the wall clock says."""
    slow, fast = (
        Contender(v, "x", 1, 1, lambda: None, timer=lambda call, t=t: t)  # type: ignore[misc]
        for v, t in (("teacher_fp32", 4.0), ("student", 1.0))
    )
    rows = in_turn([slow, fast], SHORT)
    assert [row.median_ms for row in rows] == [4.0, 1.0] and rows[1].ratio == 4.0 and rows[1].significant


def test_the_baseline_is_the_fastest_teacher() -> None:
    times = {"fp32": 8.0, "fp16": 2.0, "tf32": 4.0}
    rivals = [
        Contender("teacher_fp32", name, 1, 1, lambda: None, timer=lambda call, t=t: t)  # type: ignore[misc]
        for name, t in times.items()
    ]
    student = Contender("student", "triton", 1, 1, lambda: None, timer=lambda call: 1.0)
    rows = in_turn([*rivals, student], SHORT)
    assert {row.runtime: row.ratio for row in rows} == {"fp32": 0.25, "fp16": 1.0, "tf32": 0.5, "triton": 2.0}
    (alone,) = in_turn([student], SHORT)
    assert alone.ratio is None and alone.verdict == "not compared"


def test_what_cannot_be_captured_is_left_out_with_its_reason() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("not for half")

    made = contender(Pretended(), "teacher_fp32", "torch.compile, fp16", Broken(), (torch.zeros(1, 1),))
    assert made == Skipped("teacher_fp32", "torch.compile, fp16", "NotImplementedError: not for half")


# The teacher's precisions


def test_each_precision_sees_its_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            kinds = {torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision}
            seen.append((x.dtype, self.linear.weight.dtype, ids.dtype, *kinds, torch.backends.cudnn.benchmark))
            return self.linear(x)

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    teacher = Looks()
    rows = teachers(Pretended(), teacher, (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)))
    assert [row.runtime.rpartition(" ")[2] for row in rows] == ["fp32", "tf32", "fp16", "bf16"]
    assert all(isinstance(row, Contender) for row in rows)
    f32, f16, b16, i64 = torch.float32, torch.float16, torch.bfloat16, torch.int64
    assert list(dict.fromkeys(seen)) == [
        (f32, f32, i64, "ieee", True),
        (f32, f32, i64, "tf32", True),
        (f16, f16, i64, "tf32", True),
        (b16, b16, i64, "tf32", True),
    ]
    assert teacher.linear.weight.dtype == f32 and not torch.backends.cudnn.benchmark
    assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)


def test_settings_are_restored_after_an_error() -> None:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    def now() -> tuple[Any, ...]:
        kinds = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
        return (*kinds, inductor.freezing, dynamo.recompile_limit, torch.backends.cudnn.benchmark)

    before = now()
    with pytest.raises(KeyError), at_its_best(), float32_products("ieee"):
        assert now()[:3] == ("ieee", "ieee", True) and dynamo.fail_on_recompile_limit_hit
        raise KeyError
    assert now() == before


# The gate


def test_agreement_known_answers() -> None:
    a = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert compare([a], [a.clone()]) == DeviceAgreement(2, None, 2) and compare([a], [a.clone()]).reason is None
    off = a + torch.tensor([[0.0, 0.0], [0.1, 0.0]])
    found = compare([a], [off])
    assert found.sqnr_db == pytest.approx(10 * np.log10(14 / 0.01), abs=1e-4) and found.reason is None
    noisy = compare([a], [a * 1.1])
    assert noisy.sqnr_db == pytest.approx(20.0, abs=1e-4) and "SQNR 20.0 dB" in str(noisy.reason)


def test_decisions_count_where_noise_does_not() -> None:
    """Two classes a hair apart: hardly any noise, and every one of the swapped samples is decided differently."""
    a = torch.ones(1000, 2) + torch.tensor([1e-3, 0])
    for swapped, passes in ((5, True), (6, False)):
        b = a.clone()
        b[:swapped] = b[:swapped].flip(1)
        found = compare([a], [b])
        assert (found.reason is None) is passes and found.alike == 1000 - swapped
    b = a[:64].clone()
    b[0] = b[0].flip(0)
    assert compare([a[:64]], [b]).reason is None, "one sample is never too many"


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ([torch.zeros(2, 3)], "the outputs on the device are"),
        ([torch.zeros(2, 2, dtype=torch.float64)], "the outputs on the device are"),
        ([torch.tensor([[0.0, float("nan")], [0, 0]])], "not finite"),
        ([], "the outputs on the device are"),
    ],
)
def test_outputs_that_no_tolerance_covers(found: list[Tensor], reason: str) -> None:
    with pytest.raises(ParityError, match=reason):
        compare([torch.zeros(2, 2)], found)


def test_the_gate_runs_both_and_stops_what_differs() -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    inputs = (torch.randn(64, 8),)
    assert gate(net, net, inputs, "cpu") == DeviceAgreement(64, None, 64)
    with pytest.raises(ParityError, match=r"SQNR .* No speed is measured"):
        gate(net, nn.Linear(8, 4), inputs, "cpu")


# Shares


def test_share_known_answers() -> None:
    """2 ms: 4 MB is 2 GB/s, a tenth of 20; 3 million MACs are 3 G operations a second, 3 % of 100."""
    found = share(8, 4_000_000, 3_000_000, 2.0, Ceilings(bandwidth=20e9, integer=100e9))
    assert (found.batch, found.bytes, found.operations) == (8, 4_000_000, 6_000_000)
    assert found.bandwidth == pytest.approx(0.1) and found.integer == pytest.approx(0.03)


# A whole run


ARGUMENTS: dict[str, Any] = {"blocks": [1, 1], "width": 16, "classes": 4}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a cuda target, quantized after training."""
    torch.manual_seed(0)
    x = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    part = ArrayData(x, torch.arange(48) % 4, 16)
    task = Task(part, part, validation=part, input_names=("image",), output_names=("logits",))
    passes = (Capture(), Quantize(samples=16), Convert(), Fuse())
    spec = TeacherSpec(factory="pqk.models.resnet:resnet", arguments=ARGUMENTS)
    out = tmp_path_factory.mktemp("fused") / "out"
    compress(resnet(**ARGUMENTS), task, Recipe(passes=passes, teacher=spec), "cuda-sm80", out, evaluation=TABLE)
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled."""
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)


@pytest.mark.usefixtures("quick")
def test_a_whole_run(fused: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = Artifact.load(fused)
    found = benchmark(artifact, Pretended(), batches=(1, 3), timing=SHORT, tune=False)
    expected = ["fp32", "tf32", "fp16", "bf16"]
    runtimes = [*(f"torch.compile, {name}" for name in expected), "torch, dequantized", "triton"]
    left_out = {s.runtime for s in found.skipped}
    assert [(r.batch, r.runtime) for r in found.latency] == [
        (batch, r) for batch, r in itertools.product((1, 3), runtimes) if r not in left_out
    ]
    assert not left_out & {"torch, dequantized", "triton", "torch.compile, fp32"}
    assert found.gate == DeviceAgreement(64, None, 64)
    assert [s.batch for s in found.shares] == [1, 3]
    assert found.shares[0].operations == 2 * artifact.report.macs
    weights = sum(t.numel() * t.element_size() for t in artifact.student().buffers())
    growth = found.shares[1].bytes - found.shares[0].bytes  # of two samples: activations alone
    assert 0 < found.shares[0].bytes - growth / 2 <= weights, "what does not grow with the batch is the weights"
    document = {"artifact": "x", "target": "cuda-sm80", **found.document()}
    text = json.dumps(document, allow_nan=False)
    assert [LatencyRow.model_validate(r) for r in json.loads(text)["latency"]] == found.latency
    write(CommandAnswer(document, describe.gpu(document)), as_json=False)
    shown = capsys.readouterr().out
    assert "triton" in shown and "equal outputs, 64 of 64" in shown and "10 GB/s and 0.1 TOPS" in shown
    assert "CUDA graph" in found.protocol and "for 5 rounds" in found.protocol


def test_no_speed_where_the_device_is_wrong(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that is loaded a second time, for the device, has a weight changed."""
    whole, loads = Artifact.student, itertools.count()

    def student(self: Artifact, device: str = "cpu") -> Any:
        module = whole(self, device)
        if next(loads):
            largest = max((t for t in module.buffers() if t.dtype == torch.int8), key=Tensor.numel)
            largest.copy_(largest.flip(0))
        return module

    monkeypatch.setattr(Artifact, "student", student)
    device = Pretended()
    with pytest.raises(ParityError, match="not the same network"):
        benchmark(Artifact.load(fused), device, tune=False)
    assert device.captures == 0


@pytest.mark.usefixtures("quick")
def test_without_a_factory_there_is_no_teacher(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = Artifact.load(fused).recipe
    monkeypatch.setattr(Artifact, "recipe", property(lambda self: Recipe(passes=nameless.passes)))
    found = benchmark(Artifact.load(fused), Pretended(), timing=SHORT, tune=False)
    assert [r.runtime for r in found.latency] == ["triton"] and found.latency[0].ratio is None
    assert ["no factory" in s.reason for s in found.skipped] == [True]


# The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_command_refuses_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no CUDA device" in str(why_not_present())
    with pytest.raises(InputError, match="no CUDA device"):
        Cuda()
    assert cli.run(["benchmark", str(tmp_path), "--device", "cuda"]) == 2
    assert "no CUDA device: torch" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_the_command_shows_what_was_found(
    fused: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pqk.gpu.device.why_not_present", lambda: None)
    monkeypatch.setattr("pqk.gpu.device.Cuda", Pretended)
    short: Callable[..., Any] = benchmark_cuda.benchmark
    monkeypatch.setattr(benchmark_cuda, "benchmark", lambda a, d, batches: short(a, d, batches, timing=SHORT))
    asked: list[tuple[int, ...]] = []

    def tuned(student: Any, inputs: tuple[Tensor, ...], device: Any) -> Tuning:
        asked.append(tuple(inputs[0].shape))
        return replace(choose_tuning(student, inputs, gpu_of(device.name)), measured=True)

    monkeypatch.setattr(benchmark_cuda, "measure_tuning", tuned)
    assert cli.run(["benchmark", str(fused), "--device", "cuda", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["target"] == "cuda-sm80" and document["latency"][-1]["runtime"] == "triton"
    assert document["gate"] == {"samples": 64, "sqnr_db": None, "alike": 64} and document["warnings"]
    assert [shape[0] for shape in asked] == [1] and document["tuning"]["measured"]
    assert "int8_conv2d" in document["tuning"]["choices"] or "int8_linear" in document["tuning"]["choices"]


def test_a_replay_keeps_what_the_graph_reads() -> None:
    class Graph:
        replays = 0

        def replay(self) -> None:
            self.replays += 1

    graph, start = Graph(), time.perf_counter
    replay = Replay(graph, start)
    replay()
    replay()
    assert graph.replays == 2 and replay.call is start
