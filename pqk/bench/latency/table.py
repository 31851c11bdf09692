"""The latency table: milliseconds of layers by shape and channels, measured once on a machine and kept in its cache."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pqk.bench.contenders import session_call, timed
from pqk.bench.latency.executed import LayerShape, LightKind
from pqk.bench.latency.samples import input_shape, layer_sample, light_sample, light_shape
from pqk.core.onnxruntime_session import session
from pqk.core.run_context import WidthPair
from pqk.documents import digest_of_values
from pqk.errors import InputError
from pqk.files import read_sealed, write_sealed
from pqk.target.machine import machine_fingerprint

log = logging.getLogger(__name__)

FEW, MANY = 2, 8
"""copies in the two files whose difference is measured, so that what a call costs anyway cancels out"""
BURST_MS, MOST_CALLS = 5.0, 40
"""a burst takes so long, or so many calls; files are timed in turn, and the fastest call counts, as in `fastest`"""
PATIENCE, MOST_BURSTS, BETTER = 3, 16, 0.98
"""bursts in which no file's fastest call became this much faster, after which its time is taken; and the most"""
SMALL, LARGE = 64, 16384
"""elements of the two chains that a line is drawn through"""
UNRULY = 1.1
"""by which a narrower layer may seem slower before both are measured again"""
FORMAT = 1

Timing = Callable[[Sequence[bytes], Mapping[str, Any]], list[float]]
"""files that read the same feeds -> milliseconds of a call of each"""


class LatencyTable:
    """Milliseconds of layers and operators in ONNX Runtime with some threads, here, at batch 1.

    What it does not know it measures. Layers are measured at a ladder of channels (`steps`) and interpolated between
    its rungs; a layer of fewer channels never takes longer than one of more. What was measured is kept in a file of the
    user's cache, for this machine, this version of ONNX Runtime and these threads; a file that cannot be read is
    measured anew, with a warning.
    """

    def __init__(self, threads: int = 2, folder: Path | None = None, timing: Timing | None = None) -> None:
        """`folder` is that of the cache, by default `cache_folder()`; `timing` replaces the clock."""
        self.threads = threads
        self.key = machine_key(threads)
        self.path = (folder or cache_folder()) / f"latency-{digest_of_values(self.key)[:16]}.json"
        self.timing = timing or self._timed
        self.lines, self.layers = self._read()
        self.settled: dict[str, set[WidthPair]] = {}
        """layers that were measured twice already"""
        self.measured = 0
        """how many samples were timed, and not found in the cache"""

    # ---- what networks ask

    def prepare(self, layers: Iterable[tuple[LayerShape, WidthPair]]) -> None:
        """Measures everything that `layer` needs for these, and `light` for anything, and keeps it."""
        before = self.measured
        self._lines()
        for shape, channels in layers:
            for corner in corners(shape, channels):
                self._sample(shape, corner)
            self._settle(shape)
        if self.measured > before:
            self._write()

    def layer(self, shape: LayerShape, channels: WidthPair) -> float:
        """Milliseconds of a layer of `channels`, which does not fall with them; measured where `prepare` did not."""
        read, made = (_bracket(c, shape) for c in channels)
        for corner in corners(shape, channels):
            self._sample(shape, corner)
        if shape.groups == 0:
            return _between(channels[1], made, [self._envelope(shape, (c, c)) for c in made])
        at_read = [_between(channels[1], made, [self._envelope(shape, (r, m)) for m in made]) for r in read]
        return _between(channels[0], read, at_read)

    def light(self, kind: LightKind, elements: int) -> float:
        """Milliseconds of an operator that is no layer: a constant, and a part for each element."""
        constant, each = self._lines()[kind]
        return constant + each * elements

    @property
    def call(self) -> float:
        """Milliseconds of a call without any operators."""
        self._lines()
        return self.lines["call"]

    # ---- measuring

    def _envelope(self, shape: LayerShape, at: WidthPair) -> float:
        """The most that any layer of the shape takes of those measured that have no more channels."""
        known = self.layers[str(shape)]
        return max(ms for (read, made), ms in known.items() if read <= at[0] and made <= at[1])

    def _sample(self, shape: LayerShape, at: WidthPair) -> None:
        known = self.layers.setdefault(str(shape), {})
        if at not in known:
            known[at] = self._measured(shape, at)

    def _measured(self, shape: LayerShape, at: WidthPair) -> float:
        self.measured += 1
        draw, size = np.random.default_rng(0), input_shape(shape, at[0])
        x = draw.integers(0, 256, size).astype(np.uint8) if shape.integer else draw.normal(size=size).astype(np.float32)
        few, many = self.timing([layer_sample(shape, at, n) for n in (FEW, MANY)], {"x": x})
        return max((many - few) / (MANY - FEW) - self._ends(shape, at), 1e-4)

    def _ends(self, shape: LayerShape, at: WidthPair) -> float:
        """What a copy of a layer takes in a sample besides the layer: see `layer_sample`."""
        if shape.kernel and not shape.integer:
            made = [-(-size // stride) for size, stride in zip(shape.sizes, shape.strides, strict=True)]
            return self.light("float", at[1] * int(np.prod(made)))
        return (2 if shape.kernel else 1) * self.light("movement", 1)

    def _settle(self, shape: LayerShape) -> None:
        """Measures again, once, what cannot be: a layer that seems slower than one of more channels."""
        known = self.layers[str(shape)]
        odd = {
            each
            for slower, faster in itertools.permutations(known, 2)
            if all(a <= b for a, b in zip(slower, faster, strict=True)) and known[slower] > UNRULY * known[faster]
            for each in (slower, faster)
        }
        for at in sorted(odd - self.settled.get(str(shape), set())):
            self.settled.setdefault(str(shape), set()).add(at)
            known[at] = min(known[at], self._measured(shape, at))

    def _lines(self) -> dict[LightKind, tuple[float, float]]:
        """By kind of operator the milliseconds that each takes, and for every element."""
        if "call" not in self.lines:
            self._measure_lines()
        return {k: (self.lines[f"{k}: each"], self.lines[f"{k}: element"]) for k in get_args(LightKind)}

    def _measure_lines(self) -> None:
        for kind in get_args(LightKind):
            dtype = np.uint8 if kind in ("integer", "movement") else np.float32
            steps, few = {}, 0.0
            for elements in (SMALL, LARGE):
                feeds = {"x": np.ones(light_shape(elements), dtype)}
                few, many = self.timing([light_sample(kind, elements, n) for n in (FEW, MANY)], feeds)
                steps[elements] = (many - few) / (MANY - FEW)
                if elements == SMALL and kind == "float":
                    self.lines["call"] = max(few - FEW * steps[elements], 1e-4)
            each = (steps[LARGE] - steps[SMALL]) / (LARGE - SMALL)
            self._line(kind, steps[SMALL] - SMALL * each, each)
        # a step that moves has two operators; one that rounds has two, and a function
        function = [self.lines[f"function: {part}"] for part in ("each", "element")]
        rounding = [self.lines[f"rounding: {part}"] for part in ("each", "element")]
        self._line("rounding", *((r - f) / 2 for r, f in zip(rounding, function, strict=True)))
        self._line("movement", self.lines["movement: each"] / 2, self.lines["movement: element"] / 2)
        self.measured += len(get_args(LightKind))

    def _line(self, kind: LightKind, each: float, element: float) -> None:
        self.lines[f"{kind}: each"], self.lines[f"{kind}: element"] = max(each, 1e-5), max(element, 0.0)

    def _timed(self, files: Sequence[bytes], feeds: Mapping[str, Any]) -> list[float]:
        runs = [session(file, threads=self.threads) for file in files]
        calls = [session_call(run, feeds) for run in runs]
        best = [min(timed(call) for _ in range(4)) for call in calls]
        waited = 0
        for _ in range(MOST_BURSTS):
            before = list(best)
            for i, call in enumerate(calls):
                count = max(3, min(MOST_CALLS, int(BURST_MS / best[i])))
                best[i] = min(best[i], *(timed(call) for _ in range(count)))
            waited = 0 if any(now < BETTER * then for now, then in zip(best, before, strict=True)) else waited + 1
            if waited == PATIENCE:
                break
        return best

    # ---- the cache

    def _read(self) -> tuple[dict[str, float], dict[str, dict[WidthPair, float]]]:
        """The lines and the layers of the cache's file; none where there is no such file, or it is not whole."""
        if not self.path.exists():
            return {}, {}
        try:
            stored = read_sealed(self.path, ("format", "key", "lines", "layers"))
            if stored["format"] != FORMAT or stored["key"] != self.key:
                raise InputError(f"{self.path} is of another machine or version")
            lines = {str(k): float(v) for k, v in stored["lines"].items()}
            layers = {
                str(shape): {_parsed(at): float(ms) for at, ms in known.items()}
                for shape, known in stored["layers"].items()
            }
            return lines, layers
        except (InputError, TypeError, ValueError, AttributeError) as error:
            log.warning("latency table: %s; layers are measured anew", error)
            return {}, {}

    def _write(self) -> None:
        """Keeps what was measured, beside what another process did meanwhile; if it cannot, this run alone has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines, layers = self._read()
            for shape, known in self.layers.items():
                layers[shape] = {**layers.get(shape, {}), **known}
            named = {
                shape: {f"{read} to {made}": ms for (read, made), ms in sorted(known.items())}
                for shape, known in sorted(layers.items())
            }
            stored = {"format": FORMAT, "key": self.key, "lines": {**lines, **self.lines}, "layers": named}
            write_sealed(self.path, stored)
        except (InputError, OSError) as error:
            log.warning("latency table: it is not kept for other runs: %s", error)


def cache_folder() -> Path:
    """Where this user's tables are: `$XDG_CACHE_HOME/pqk`, by default `~/.cache/pqk`."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "pqk"


def machine_key(threads: int) -> dict[str, Any]:
    """What a table is of: the CPU, its instruction sets and cores, ONNX Runtime, and threads."""
    machine = machine_fingerprint()
    known = {name: machine[name] for name in ("cpu", "isa", "cores", "os")}
    return {**known, "onnxruntime": machine["versions"].get("onnxruntime"), "threads": threads}


def steps(channels: int, unit: int = 1) -> tuple[int, int]:
    """The rungs of the ladder around a number of channels, both that number where it is one.

    Its rungs are 1, 2, 3, 4, 8, 12, 16, 24, 32, 48, …: of a power of two, the half and three quarters of it, times
    `unit`.
    """
    rungs, power = [1, 2, 3, 4, 8], 8
    while unit * rungs[-1] < channels:
        rungs += [3 * power // 2, 2 * power]
        power *= 2
    above = next(r for r in rungs if unit * r >= channels)
    exact = unit * above == channels or above == 1
    return unit * (above if exact else rungs[rungs.index(above) - 1]), unit * above


def _bracket(channels: int, shape: LayerShape) -> tuple[int, int]:
    return steps(channels, max(1, shape.groups))


def corners(shape: LayerShape, channels: WidthPair) -> list[WidthPair]:
    """The channels at which a layer of `channels` is measured: up to four rungs around it."""
    read, made = (sorted(set(_bracket(c, shape))) for c in channels)
    return [(c, c) for c in made] if shape.groups == 0 else list(itertools.product(read, made))


def _between(at: int, ends: tuple[int, int], values: Sequence[float]) -> float:
    """What lies on the line through two points, at `at`."""
    (low, high), (first, last) = ends, values
    return first if low == high else first + (last - first) * (at - low) / (high - low)


def _parsed(key: str) -> WidthPair:
    read, _, made = key.partition(" to ")
    return int(read), int(made)
