"""The protocol: turns, pauses, intervals, and that what is measured in turn is what is measured alone."""

import time
from collections.abc import Callable
from itertools import pairwise
from math import comb

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pqk.bench import contenders
from pqk.bench import measure as benchmark
from pqk.bench.contenders import (
    Contender,
    Skipped,
    compiled_contender,
    onnxruntime_contender,
    openvino_contender,
    torch_contender,
    torch_threads,
)
from pqk.bench.measure import (
    PAUSE,
    TimingProtocol,
    fastest,
    interleave,
    measure,
    ratio_to,
    turn,
    undisturbed_ratio,
)
from pqk.bench.statistics import Ratio, bootstrap_ratio
from pqk.core.onnxruntime_session import session
from pqk.errors import InputError

pytestmark = pytest.mark.slow


def stack(layers: int, channels: int = 16, size: int = 16) -> bytes:
    """An FP32 ONNX file of `layers` 3x3 convolutions."""
    rng = np.random.default_rng(0)
    names = ["input", *(f"y{i}" for i in range(layers))]
    shape = ["batch", channels, size, size]
    weights = [rng.normal(size=(channels, channels, 3, 3)).astype(np.float32) for _ in range(layers)]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", [a, f"w{i}"], [b], f"conv{i}", pads=[1] * 4)
            for i, (a, b) in enumerate(pairwise(names))
        ],
        "stack",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


FEEDS = {"input": np.zeros((1, 16, 16, 16), np.float32)}


def contender(call: Callable[[], object], variant: str = "student") -> Contender:
    return Contender(variant, "test", 1, 1, call)  # type: ignore[arg-type]


def test_turns_are_interleaved_and_warmed() -> None:
    seen: list[str] = []
    names = "ABC"
    contenders = [contender(lambda n=n: seen.append(n)) for n in names]  # type: ignore[misc]
    times = interleave(contenders, TimingProtocol(rounds=5, burst=3, pause=0.0, warm=2))
    assert times.shape == (3, 5, 3)
    order = [a for a, b in zip(seen, [*seen[1:], ""], strict=True) if a != b]
    assert "".join(order) == "ABC" * 5
    assert all(seen.count(n) >= 5 * (2 + 3) for n in names)


def test_torch_gets_its_threads_in_its_own_turn_only() -> None:
    seen = []
    with torch_threads(1):
        timed = Contender("student", "torch", 1, 2, lambda: seen.append(torch.get_num_threads()), torch_threads=2)
        other = contender(lambda: seen.append(torch.get_num_threads()))
        interleave([timed, other], TimingProtocol(rounds=2, burst=1, pause=0.0, warm=0))
        assert seen == [2, 1, 2, 1] and torch.get_num_threads() == 1


class Clock:
    """Time that passes where it is slept, and nowhere else."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Spinner:
    """A runtime whose idle threads spin for 30 ms after its calls and slow every other contender down threefold."""

    last: tuple["Spinner | None", float] = (None, 0.0)

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __call__(self) -> None:
        owner, when = Spinner.last
        stolen = owner is not self and owner is not None and self.clock.now < when + 0.03
        self.clock.sleep(self.seconds * (3 if stolen else 1))
        if not stolen:
            Spinner.last = (self, self.clock.now)


def simulate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol sleeps and the contenders are timed on `clock`."""
    monkeypatch.setattr(benchmark, "time", clock)
    monkeypatch.setattr(contenders, "time", clock)


def test_a_pause_keeps_spinning_threads_out_of_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    simulate(clock, monkeypatch)
    a, b = Spinner(clock, 0.003), Spinner(clock, 0.001)
    for pause, ratio in ((PAUSE, 3.0), (0.0, 1.0)):
        Spinner.last = (None, 0.0)
        row = measure([contender(a), contender(b)], timing=TimingProtocol(rounds=5, burst=4, pause=pause, warm=1))[1]
        assert row.ratio == pytest.approx(ratio), pause


def test_slow_calls_have_short_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    simulate(clock, monkeypatch)
    counts = dict.fromkeys("ab", 0)

    def call(name: str, seconds: float) -> None:
        counts[name] += 1
        clock.sleep(seconds)

    rows = measure(
        [contender(lambda: call("a", 0.125)), contender(lambda: call("b", 0.01))], timing=TimingProtocol(rounds=5)
    )
    assert rows[1].ratio == pytest.approx(12.5) and counts["a"] == counts["b"] == 2 + 5 * (8 + 8)
    counts = dict.fromkeys("ab", 0)
    measure([contender(lambda: call("a", 9.0)), contender(lambda: call("b", 0.01))], timing=TimingProtocol(rounds=5))
    assert counts["a"] == 2 + 5 * (4 + 4)


def test_in_turn_and_alone_agree() -> None:
    """Sessions with spinning pools, in one process: each in turn is as fast as by itself. Best of three, as the
    machine may be busy with something else; without the pause the small one is measured two to three times slower."""
    contenders = [onnxruntime_contender("student", stack(n), FEEDS) for n in (12, 3)]
    differences = []
    for _ in range(3):
        alone = [np.median(interleave([c], TimingProtocol(rounds=5))) for c in contenders]
        in_turn = [row.median_ms for row in measure(contenders, timing=TimingProtocol(rounds=5))]
        differences.append(max(abs(np.log(np.array(in_turn) / alone))))
        if differences[-1] < np.log(1.3):
            return
    pytest.fail(f"in turn and alone differ by factors of {np.exp(differences)}")


def test_fewer_layers_are_faster_and_the_baseline_is_one() -> None:
    teacher, student = (onnxruntime_contender("student", stack(n), FEEDS, threads=1) for n in (12, 2))
    rows = measure([teacher, student], timing=TimingProtocol(rounds=7))
    assert (rows[0].ratio, rows[0].ratio_low, rows[0].ratio_high, rows[0].significant) == (1, 1, 1, False)
    assert rows[0].verdict == "1x (baseline)"
    assert rows[1].significant and rows[1].ratio is not None and rows[1].ratio > 2
    for row in rows:
        assert row.p05_ms <= row.median_ms <= row.p95_ms
        assert (row.runtime, row.batch, row.threads, row.spinning) == ("onnxruntime", 1, 1, True)


def test_an_interval_that_contains_one_is_no_speed_up() -> None:
    call = onnxruntime_contender("student", stack(2), FEEDS, threads=1).call
    jitter = np.random.default_rng(0)

    def noisy() -> None:
        time.sleep(0.0005 * jitter.uniform(0.5, 1.5))

    row = measure([contender(noisy), contender(noisy)], timing=TimingProtocol(rounds=9, burst=5, pause=0.0, warm=0))[1]
    assert not row.significant and row.verdict.startswith("no significant speed-up")
    assert call is not None


@pytest.mark.parametrize(
    ("ratio", "significant"),
    [((1.1, 0.9, 1.3), False), ((1.1, 1.0, 1.3), False), ((1.2, 1.01, 1.3), True), ((0.8, 0.7, 0.9), True)],
)
def test_significance(ratio: tuple[float, float, float], significant: bool) -> None:
    assert Ratio(*ratio).significant is significant


def test_bootstrap_known_answers() -> None:
    """Of 11 distinct values the resampled median is at most the k-th smallest with probability
    P(Binomial(11, k/11) >= 6); the interval ends where that passes 2.5 % and 97.5 %."""
    assert bootstrap_ratio(np.full(15, 2.5)) == Ratio(2.5, 2.5, 2.5)
    n = 11
    chances = [k / n for k in range(1, n + 1)]
    cumulative = [sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(6, n + 1)) for p in chances]
    low = next(k + 1 for k, p in enumerate(cumulative) if p >= 0.025)
    high = next(k + 1 for k, p in enumerate(cumulative) if p >= 0.975)
    assert bootstrap_ratio(np.arange(1.0, 12.0)) == Ratio(6.0, low, high)
    assert bootstrap_ratio(np.arange(1.0, 12.0), seed=3) == bootstrap_ratio(np.arange(1.0, 12.0), seed=3)


def test_a_turn_keeps_warming_up_while_calls_get_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 6 calls are ten times slower; with 8 warm ones timing must not start inside them."""
    clock, count = Clock(), 0
    simulate(clock, monkeypatch)

    def call() -> None:
        nonlocal count
        count += 1
        clock.sleep(0.01 if count <= 6 else 0.001)

    assert turn(call, TimingProtocol(burst=3, pause=0.0, warm=8)) == pytest.approx([1.0] * 3)
    assert count == 2 * 8 + 3


def test_quick_forms() -> None:
    big, small = stack(12), stack(2)
    ratio = ratio_to(session(big), session(small), FEEDS, rounds=5)
    assert ratio.low > 1.5
    slow, fast = fastest([session(big), session(small)], FEEDS, rounds=3)
    assert 0 < fast < slow


class Simulated:
    """A session whose calls take so long, each in its turn; the last one stays."""

    def __init__(self, clock: Clock, *milliseconds: float) -> None:
        self.clock, self.left = clock, list(milliseconds)

    def run(self, names: None, feeds: object) -> None:
        self.clock.sleep((self.left.pop(0) if len(self.left) > 1 else self.left[0]) / 1e3)


def test_where_two_sessions_of_one_file_differ_the_interval_is_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them is disturbed in every call, which a bootstrap over rounds does not see."""
    clock = Clock()
    simulate(clock, monkeypatch)
    feeds = {"x": np.zeros((1, 4), np.float32)}

    def ratio(*milliseconds: float) -> Ratio:
        a, b, c, d = (Simulated(clock, ms) for ms in milliseconds)
        return undisturbed_ratio((a, b), (c, d), feeds, rounds=5)  # type: ignore[arg-type]

    assert ratio(4.0, 4.0, 2.0, 2.0) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio(4.0, 6.0, 2.0, 2.0) == pytest.approx((6**0.5, 6**0.5 / 1.5, 6**0.5 * 1.5))
    assert ratio(4.0, 4.0, 3.0, 2.0) == pytest.approx((4 / 6**0.5, 4 / 6**0.5 / 1.5, 4 / 6**0.5 * 1.5))


def test_the_fastest_call_of_a_round_counts_and_a_disturbed_measurement_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    simulate(clock, monkeypatch)
    feeds = {"x": np.zeros((1, 4), np.float32)}
    calls = 5 * (20 + 20)  # rounds of warm and timed calls
    first = Simulated(clock, *[8.0] * calls, 4.0)  # disturbed for one measurement
    second = Simulated(clock, *[4.0, 9.0] * calls, 4.0)  # every other call takes longer
    third = Simulated(clock, *[3.0] * calls, 1.0)
    candidate = third, Simulated(clock, 1.0)
    ratio = undisturbed_ratio((first, second), candidate, feeds, rounds=5)  # type: ignore[arg-type]
    assert ratio == pytest.approx((4.0, 4.0, 4.0))


def test_torch_rows_and_a_module_that_cannot_be_compiled() -> None:
    x = torch.zeros(2, 4)
    eager = torch_contender("teacher_fp32", nn.Linear(4, 4), (x,), threads=1)
    eager.call()
    assert (eager.runtime, eager.batch, eager.torch_threads) == ("torch", 2, 1)

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such path")

    skipped = compiled_contender("teacher_fp32", Broken(), (x,))
    assert isinstance(skipped, Skipped) and "no such path" in skipped.reason


def test_openvino_stands_beside_or_says_why_not() -> None:
    found = openvino_contender("teacher_fp32", stack(2), FEEDS, threads=1)
    if isinstance(found, Skipped):
        assert "openvino" in found.reason
    else:
        found.call()
        assert found.batch == 1
    broken = openvino_contender("teacher_fp32", b"no model", FEEDS)
    assert isinstance(broken, Skipped) and broken.reason


def test_refusals() -> None:
    good = contender(lambda: None)
    with pytest.raises(InputError, match="3 rounds"):
        measure([good], timing=TimingProtocol(rounds=3))
    with pytest.raises(InputError, match="not among"):
        measure([good], contender(lambda: None), timing=TimingProtocol(rounds=5))
    with pytest.raises(InputError, match="refuses the model's bytes"):
        session(b"no model")
