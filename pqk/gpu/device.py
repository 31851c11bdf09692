"""A CUDA device as the benchmark sees it: captured graphs, a clock, and the rates that the device reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pqk.bench.contenders import Timer
from pqk.errors import InputError, Reason
from pqk.kernels.common.gpu import why_not_run
from pqk.kernels.common.triton import TRITON_MISSING

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this device reached: bytes a second of a large copy, int8 operations a second of a large product."""

    bandwidth: float
    integer: float


class Device(Protocol):
    """What the benchmark needs of a GPU. `Cuda` is the only part of it that touches one."""

    name: str
    """where torch puts tensors: `cuda`"""
    l2_bytes: int

    def describe(self) -> dict[str, Any]: ...

    def captured(self, call: Call) -> Call:
        """The device's work in `call`, recorded once and replayed by the result."""

    def timer(self, ballast: int) -> Timer:
        """A clock for one call in milliseconds, which writes `ballast` other bytes before it."""

    def ceilings(self) -> Ceilings: ...


def why_not_present() -> Reason | None:
    """Why the kernels cannot be measured on this machine, or None."""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none on this machine"
    return TRITON_MISSING or why_not_run(torch.cuda.current_device())


@dataclass(frozen=True)
class Replay:
    """A captured graph. `call` is kept because the graph reads its weights and inputs where they are."""

    graph: Any
    call: Call

    def __call__(self) -> None:
        self.graph.replay()


class Cuda:
    """The current CUDA device."""

    name = "cuda"
    WARM_CALLS = 3
    SPIN = 400_000
    """clock cycles, about 0.2 ms, that the device spins while the host enqueues one timed call"""
    COPY, SIDE, TRIALS = 1 << 30, 8192, 20

    def __init__(self) -> None:
        if (reason := why_not_present()) is not None:
            raise InputError(reason)
        self.properties = torch.cuda.get_device_properties(self.name)
        self.l2_bytes = int(self.properties.L2_cache_size)

    def describe(self) -> dict[str, Any]:
        p = self.properties
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda,
        }

    def captured(self, call: Call) -> Call:
        """CUDA semantics, "CUDA Graphs" (PyTorch documentation): warm up on a side stream, then capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.WARM_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return Replay(graph, call)

    def timer(self, ballast: int) -> Timer:
        scratch = torch.empty(max(1, ballast), dtype=torch.uint8, device=self.name)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def milliseconds(call: Call) -> float:
            scratch.zero_()
            torch.cuda._sleep(self.SPIN)
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return milliseconds

    def ceilings(self) -> Ceilings:
        free, _ = torch.cuda.mem_get_info()
        source = torch.empty(min(self.COPY, free // 4), dtype=torch.uint8, device=self.name)
        target = torch.empty_like(source)
        square = (self.SIDE, self.SIDE)
        a, b = (torch.randint(-128, 128, square, dtype=torch.int8, device=self.name) for _ in range(2))
        clock = self.timer(1)
        copied = min(clock(lambda: target.copy_(source)) for _ in range(self.TRIALS)) / 1e3
        multiplied = min(clock(lambda: torch._int_mm(a, b.t())) for _ in range(self.TRIALS)) / 1e3
        return Ceilings(2 * source.numel() / copied, 2 * self.SIDE**3 / multiplied)
