"""Stored configurations: what is chosen or measured is what runs, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lowered import int8_graph
from torch import fx, nn

from pqk.bench.contenders import timed
from pqk.deploy.tuning import CHOICES, Tuning
from pqk.errors import InputError
from pqk.gpu.autotune import choose_tuning, gpu_for, measure_tuning, merge_tunings, read_tuning
from pqk.gpu.roofline import ARCHES, arch_named
from pqk.kernels import int8_linear, on_cuda
from pqk.kernels.common.configs import Config, noting, remember, trying
from pqk.kernels.common.gpu import gpu_of, planning_for
from pqk.kernels.common.launch import collecting
from pqk.kernels.common.triton import INTERPRETED, TRITON_MISSING
from pqk.passes import Fuse
from pqk.passes.fuse.fuse import fuse, launches

pytestmark = [pytest.mark.slow, pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))]
HERE = gpu_of("cpu")
KEY = "m=1 n=10 k=64 i8"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test remembers, others do not know."""
    with trying():
        yield


@pytest.fixture(scope="module")
def student() -> tuple[fx.GraphModule, torch.Tensor]:
    """A convolution, a depthwise one and a linear layer, for a GPU."""
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16))
    x = torch.randn(4, 3, 8, 8)
    net = nn.Sequential(convolutions, nn.Flatten(), nn.Linear(16 * 16, 5))
    return fuse(int8_graph(net, x, target="cuda-sm80"))[0], x[:1]


def run(config: Config | None = None) -> Config:
    """The block sizes that a linear layer of `KEY` is launched with; `config`: what is remembered for it."""
    if config is not None:
        remember(HERE, "int8_linear", KEY, config)
    arguments = int8_linear.Case(1, 10, 64, torch.int8, "", torch.int32).arguments("cpu")
    with collecting() as found:
        int8_linear.run(**arguments)
    (launch,) = found
    sizes = [launch.constexprs[f"BLOCK_{axis}"] for axis in "MNK"]
    return Config(*sizes, num_warps=launch.num_warps, num_stages=launch.num_stages)


def test_what_is_stored_is_what_runs(tmp_path: Path) -> None:
    other = int8_linear.SKINNY[-1]
    by_itself = run()
    assert by_itself != other
    tuning = Tuning(HERE, True, {"int8_linear": {KEY: other}})
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(tuning.document()))
    loaded = Tuning.load(path)
    assert loaded == tuning
    loaded.install()
    assert run() == other
    if INTERPRETED:
        arguments = int8_linear.Case(1, 10, 64, torch.int8, "", torch.int32).arguments("cpu")
        assert torch.equal(int8_linear.run(**arguments), int8_linear.reference(**arguments))
    with planning_for(replace(HERE, processors=7)):
        assert run() == by_itself, "another GPU chooses for itself"


def test_an_answer_of_benchmark_is_a_tuning(tmp_path: Path) -> None:
    tuning = Tuning(HERE, True, {"int8_linear": {KEY: int8_linear.SKINNY[0]}})
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"latency": [], "tuning": tuning.document()}))
    assert Tuning.load(path) == read_tuning([Fuse(tuning=str(path))]) == tuning
    assert read_tuning([Fuse()]) is None


SPOILED: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    ("is no configuration of int8_conv2d", lambda d: d.update(choices={"int8_conv2d": d["choices"]["int8_linear"]})),
    ("is no configuration of int8_add", lambda d: d.update(choices={"int8_add": d["choices"]["int8_linear"]})),
    ("format 2", lambda d: d.update(format=2)),
    ("'gpu'", lambda d: d.pop("gpu")),
    ("block_m", lambda d: d["choices"]["int8_linear"][KEY].update(block_m="16")),
    ("persistent", lambda d: d["choices"]["int8_linear"][KEY].update(persistent=1)),
    ("colour", lambda d: d["choices"]["int8_linear"][KEY].update(colour=3)),
    ("cannot be launched", lambda d: d["choices"]["int8_linear"][KEY].update(num_warps=3)),
    ("is no tuning", lambda d: d.update(choices=[1])),
]


@pytest.mark.parametrize(("says", "spoil"), SPOILED, ids=[s for s, _ in SPOILED])
def test_what_is_no_tuning_is_refused(tmp_path: Path, says: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    document = Tuning(HERE, False, {"int8_linear": {KEY: int8_linear.SKINNY[-1]}}).document()
    spoil(document)
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"tuning.json is no tuning.*{says}" if "tuning" not in says else says):
        Tuning.load(path)
    with pytest.raises(InputError):
        Tuning.load(tmp_path / "nowhere.json")


def test_every_choice_of_a_student_is_stored(student: tuple[fx.GraphModule, torch.Tensor]) -> None:
    fused, x = student
    for arch in ARCHES:
        tuning = choose_tuning(fused, (x,), arch.planned)
        kernels = {op: len(table) for op, table in tuning.choices.items()}
        assert kernels == {"int8_conv2d": 1, "int8_depthwise_conv2d": 1, "int8_linear": 1}
        assert not tuning.measured and tuning.gpu == arch.planned
        assert all(op in CHOICES for op in kernels)
    assert gpu_for("cuda-sm90") == arch_named("sm_90").planned or torch.cuda.is_available()
    assert gpu_for("x86-avx2") == ARCHES[0].planned or torch.cuda.is_available()


class Rigged:
    """A device that is the CPU, on which one configuration is the fastest and one cannot run."""

    name, l2_bytes = "cpu", 1000

    def __init__(self, fastest: Config, broken: Config) -> None:
        self.fastest, self.broken = fastest, broken

    def timer(self, ballast: int) -> Callable[[Callable[[], object]], float]:
        def clock(call: Callable[[], object]) -> float:
            with noting() as noted, collecting():
                call()
            if noted[0].config == self.broken:
                raise RuntimeError("out of resources")
            return 1.0 if noted[0].config == self.fastest else 2.0

        return clock


@pytest.mark.skipif(not INTERPRETED, reason="runs the CUDA bodies in Triton's interpreter")
def test_the_fastest_is_measured() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 40)
    fused, _ = fuse(int8_graph(nn.Linear(40, 24), x, target="cuda-sm80"))
    (called,) = [c for c in launches(fused, (x,)) if c.op == "pqk::int8_linear"]
    with noting() as noted, collecting():
        kernel = on_cuda(called.op)
        assert kernel is not None
        kernel(*called.arguments.values())
    (choice,) = noted
    first, *_, last = choice.candidates
    assert choice.config == first and len(choice.candidates) == 3
    tuning = measure_tuning(fused, (x,), Rigged(fastest=last, broken=first))  # type: ignore[arg-type]
    assert tuning.measured and tuning.choices == {"int8_linear": {choice.key: last}}
    really = Rigged(last, first)
    really.timer = lambda ballast: timed  # type: ignore[method-assign,assignment]
    assert measure_tuning(fused, (x,), really).choices["int8_linear"][choice.key] in choice.candidates  # type: ignore[arg-type]
    both = merge_tunings([tuning, Tuning(HERE, True, {"int8_linear": {KEY: first}})])
    assert set(both.choices["int8_linear"]) == {choice.key, KEY} and both.measured
    assert on_cuda("aten::add") is None and on_cuda("pqk::nothing") is None
