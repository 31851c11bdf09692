"""Latency beside the baseline, measured so that the number survives being checked.

Idle thread pools spin and steal the cores from whoever is being timed, and machines drift. So contenders are measured
*in turn* (A B C A B C …), each turn after a pause in which the others' threads fall asleep, with warm calls before a
burst of timed ones. A ratio is taken within a round, where both sides saw the same machine, and its interval is a
bootstrap over rounds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3): an interval that
contains 1 is no speed-up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pqk.bench.contenders import Contender, Feeds, Timer, batch_of, session_call, timed, torch_threads
from pqk.bench.statistics import Ratio, bootstrap_ratio
from pqk.core.onnxruntime_session import session
from pqk.errors import InputError
from pqk.report.schema import LatencyRow
from pqk.settings import settings

if TYPE_CHECKING:
    import onnxruntime as ort


FEWEST_ROUNDS = 5
"""turns below which an interval would mean nothing"""
THREADS = 2
"""intra-op threads that runtimes are timed with, where nothing else is said"""
ROUNDS, WARM, BURST, PAUSE = 15, 20, 20, 0.05
LONG_MS, FEWEST = 1000.0, 4
"""calls of a burst are so few that it takes about so long, but at least so many"""
PROTOCOL = (
    "Measured in turn: every round gives each contender a pause of {pause:g} ms, at least {warm} warm calls and a "
    "burst of {burst} timed calls (fewer, at least {fewest}, where a burst would take over {long:g} s), for {rounds} "
    "rounds; medians over calls, ratios within rounds, bootstrap 95 % intervals. Threads are pinned and, unless said "
    "otherwise, spin while idle, as they do by default."
)


@settings
class TimingProtocol:
    """How long contenders are measured in turn. The default is that of every committed result."""

    rounds: int = Field(default=ROUNDS, ge=1)
    """turns of each contender; at least 5 where intervals are wanted"""
    burst: int = Field(default=BURST, ge=1)
    """timed calls of a turn"""
    warm: int = Field(default=WARM, ge=0)
    """calls before them that are not timed"""
    pause: float = Field(default=PAUSE, ge=0)
    """seconds before a turn in which the other contenders' threads fall asleep"""

    def __str__(self) -> str:
        """The protocol in a sentence, for the report's conditions."""
        return PROTOCOL.format(
            rounds=self.rounds,
            burst=self.burst,
            pause=1e3 * self.pause,
            warm=self.warm,
            fewest=FEWEST,
            long=LONG_MS / 1e3,
        )

    def shortened(self, slowest_ms: float) -> TimingProtocol:
        """With bursts of about a second, where a call takes `slowest_ms`."""
        if slowest_ms * self.burst <= LONG_MS:
            return self
        burst, warm = (min(n, max(FEWEST, round(LONG_MS / slowest_ms))) for n in (self.burst, self.warm))
        return replace(self, burst=burst, warm=warm)


QUICK = TimingProtocol(rounds=5, burst=1, warm=1, pause=0.0)
"""times that mean little, in no time: for tests and trials"""


def measure(
    contenders: Sequence[Contender],
    baseline: Contender | None = None,
    timing: TimingProtocol | None = None,
    *,
    seed: int = 0,
) -> list[LatencyRow]:
    """Times contenders in turn.

    Where the slowest contender would take over a second for a burst, all have shorter ones.

    Args:
        contenders: who is timed, in the order of the rows.
        baseline: the contender that ratios are against; the first one by default.
        timing: how long; the default protocol where None.
        seed: of the bootstrap.

    Returns:
        One row a contender, in milliseconds.

    Raises:
        InputError: fewer than 5 rounds, no contender, or a baseline that is not measured.
    """
    timing = timing or TimingProtocol()
    if timing.rounds < FEWEST_ROUNDS or not contenders:
        raise InputError(
            f"latency: {timing.rounds} rounds of {len(contenders)} contenders; at least {FEWEST_ROUNDS} rounds of 1 "
            "are needed"
        )
    baseline = contenders[0] if baseline is None else baseline
    if baseline not in contenders:
        raise InputError(f"latency: the baseline {baseline.variant} in {baseline.runtime} is not among the contenders")
    if timing.burst > FEWEST:
        timing = timing.shortened(max(min(c.timer(c.call) for _ in range(2)) for c in contenders))
    times = interleave(contenders, timing)
    reference = np.median(times[contenders.index(baseline)], axis=1)
    rows = []
    for contender, calls in zip(contenders, times, strict=True):
        ratio = Ratio(1.0, 1.0, 1.0)
        if contender is not baseline:
            ratio = bootstrap_ratio(reference / np.median(calls, axis=1), seed=seed)
        rows.append(_row(contender, calls, ratio))
    return rows


def _row(contender: Contender, calls: NDArray[np.float64], ratio: Ratio) -> LatencyRow:
    p05, p95 = np.percentile(calls, [5, 95])
    return LatencyRow(
        variant=contender.variant,
        runtime=contender.runtime,
        batch=contender.batch,
        threads=contender.threads,
        median_ms=float(np.median(calls)),
        p05_ms=float(p05),
        p95_ms=float(p95),
        ratio=ratio.ratio,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        inputs=contender.inputs,
        spinning=contender.spinning,
        significant=ratio.significant,
    )


def interleave(contenders: Sequence[Contender], timing: TimingProtocol) -> NDArray[np.float64]:
    """Milliseconds of every timed call, `[contender, round, call]`, taken A B C A B C."""
    times = np.empty((len(contenders), timing.rounds, timing.burst))
    for round_index in range(timing.rounds):
        for index, contender in enumerate(contenders):
            with torch_threads(contender.torch_threads):
                times[index, round_index] = turn(contender.call, timing, contender.timer)
    return times


def turn(call: Callable[[], object], timing: TimingProtocol, timer: Timer = timed) -> list[float]:
    """One turn: pause until the other pools sleep, warm up, then a burst of timed calls, in milliseconds.

    Two warm calls cost a small network 15 % (20 are the default), and a burst is not started while the calls still get
    faster: it warms up again, at most three times, until its second half is as fast as its first.
    """
    time.sleep(timing.pause)
    for _ in range(4):
        calls = np.array([timer(call) for _ in range(timing.warm)])
        half = timing.warm // 2
        if half == 0 or np.median(calls[half:]) > 0.9 * np.median(calls[:half]):
            break
    return [timer(call) for _ in range(timing.burst)]


# Quick forms, for passes that choose by measured latency


def fastest(runs: Sequence[ort.InferenceSession], feeds: Feeds, *, rounds: int = 9) -> list[float]:
    """Milliseconds of the fastest call of each session, in turn over `rounds`.

    Whatever else the machine does only adds time, so the fastest call is the one to decide by on a machine that is
    shared; a median there can be ten times the truth. Reports quote medians.
    """
    return [float(t) for t in sessions_in_turn(runs, feeds, rounds).min(axis=(1, 2))]


def ratio_to(
    baseline: ort.InferenceSession, candidate: ort.InferenceSession, feeds: Feeds, *, rounds: int = 7, seed: int = 0
) -> Ratio:
    """How many times faster `candidate` is than `baseline` on the same feeds, in turn."""
    reference, times = np.median(sessions_in_turn([baseline, candidate], feeds, rounds), axis=2)
    return bootstrap_ratio(reference / times, seed=seed)


Twins = tuple["ort.InferenceSession", "ort.InferenceSession"]
"""two sessions of one file"""
TOLERATED = 1.05
"""times that two sessions of one file may differ by before a measurement is repeated"""
REPEATS = 3


def undisturbed_ratio(baseline: Twins, candidate: Twins, feeds: Feeds, *, rounds: int = 7, seed: int = 0) -> Ratio:
    """How many times faster one file is than another, each in two sessions, by the fastest call of every round.

    What else a machine does disturbs sessions unequally, for as long as their threads stay where they are, which no
    bootstrap over rounds sees: two files of one network differed by 1.7 times beside eight other processes. So each is
    timed in two sessions. Where those of one file differ, all is measured again, up to three times, and what is left of
    the differences widens the interval.
    """
    found: list[tuple[float, Ratio]] = []
    for _ in range(REPEATS):
        a, b, c, d = np.min(sessions_in_turn([*baseline, *candidate], feeds, rounds), axis=2)
        apart = [float(np.median(first / second)) for first, second in ((a, b), (c, d))]
        ratio = bootstrap_ratio(np.sqrt(a * b) / np.sqrt(c * d), seed=seed)
        found.append((math.prod(max(share, 1 / share) for share in apart), ratio))
        if found[-1][0] <= TOLERATED:
            break
    apart_in_all, ratio = min(found, key=lambda pair: pair[0])
    return Ratio(ratio.ratio, ratio.low / apart_in_all, ratio.high * apart_in_all)


def twins_of(path: Path) -> Twins:
    """Two sessions of the ONNX file at `path`, with the threads that everything is timed with."""
    return session(path, threads=THREADS), session(path, threads=THREADS)


def sessions_in_turn(runs: Sequence[ort.InferenceSession], feeds: Feeds, rounds: int) -> NDArray[np.float64]:
    """Milliseconds of every timed call of some candidates, `[session, round, call]`, by the protocol."""
    contenders = [Contender("student", "onnxruntime", batch_of(feeds), 1, session_call(run, feeds)) for run in runs]
    return interleave(contenders, TimingProtocol(rounds=rounds))
