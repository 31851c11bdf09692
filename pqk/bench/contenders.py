"""Who is timed: ONNX Runtime, torch, torch.compile and OpenVINO, each behind one callable with its threads pinned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pqk.core.onnxruntime_session import OnnxSource, of_every_token, session
from pqk.data.structures import Inputs, tensors
from pqk.errors import first_line
from pqk.quiet import quiet
from pqk.report.schema import VariantName

if TYPE_CHECKING:
    import onnxruntime as ort


Feeds = Mapping[str, NDArray[Any]]


Timer = Callable[[Callable[[], object]], float]
"""the milliseconds of one call"""


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call, by the wall clock."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True, eq=False)
class Contender:
    """Something to time: one `call` is one inference of `batch` samples."""

    variant: VariantName
    runtime: str
    batch: int
    threads: int
    call: Callable[[], object]
    spinning: bool = True
    torch_threads: int = 1
    """torch's own pool during its turn: 1 for everything that is not torch, whose threads would do harm"""
    inputs: str = ""
    """what the inputs are, where they are not the task's example"""
    answers: Callable[[Inputs], list[Tensor]] | None = None
    """what it answers to inputs of the shapes that it is timed on; None where it cannot be asked"""
    timer: Timer = timed
    """what takes the time of one call; a device has its own clock"""


@dataclass(frozen=True)
class Skipped:
    """A contender that cannot run here, and why."""

    variant: VariantName
    runtime: str
    reason: str


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads and restore the number that was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def onnxruntime_contender(
    variant: VariantName, model: OnnxSource, feeds: Feeds, *, threads: int = 2, spinning: bool = True, inputs: str = ""
) -> Contender:
    """ONNX Runtime with its default optimizations. Raises `InputError` for a model it refuses."""
    run, names = session(model, threads=threads, spinning=spinning), list(feeds)

    def answers(given: Inputs) -> list[Tensor]:
        return as_tensors(of_every_token(run).run(None, as_feeds(names, given)))

    call = session_call(run, feeds)
    return Contender(variant, "onnxruntime", batch_of(feeds), threads, call, spinning, inputs=inputs, answers=answers)


def torch_contender(
    variant: VariantName, module: torch.nn.Module, inputs: Sequence[torch.Tensor], *, threads: int = 2
) -> Contender:
    """torch eager, in inference mode; `module` as it is, so put it in eval mode first."""

    def call() -> None:
        with torch.inference_mode():
            module(*inputs)

    def answers(given: Inputs) -> list[Tensor]:
        with torch.inference_mode():
            return tensors(module(*given))

    return Contender(variant, "torch", len(inputs[0]), threads, call, torch_threads=threads, answers=answers)


def compiled_contender(
    variant: VariantName,
    module: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    threads: int = 2,
    runtime: str = "torch.compile",
) -> Contender | Skipped:
    """`torch.compile` with inductor, which needs a C++ compiler; compiled here, so the first call is not timed.

    Weights are frozen into the code, which is what lets inductor choose its own layouts and fuse integer kernels.
    """
    try:
        with torch_threads(threads), quiet(), torch.no_grad():  # inductor's modules deprecate themselves as they work
            from torch._inductor import config as inductor

            with inductor.patch(freezing=True):
                compiled = torch.compile(module, dynamic=False)
                compiled(*inputs)
    except Exception as error:  # whatever inductor, dynamo or the C++ compiler raise: the row is left out, with this
        return Skipped(variant, runtime, first_line(error))

    def call() -> None:
        with torch.no_grad():
            compiled(*inputs)

    def answers(given: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [t.clone() for t in tensors(compiled(*given))]

    return Contender(variant, runtime, len(inputs[0]), threads, call, torch_threads=threads, answers=answers)


def openvino_contender(
    variant: VariantName, model: OnnxSource, feeds: Feeds, *, threads: int = 2
) -> Contender | Skipped:
    """OpenVINO on the CPU in latency mode (`pip install pqk[bench]`), reading the same ONNX file."""
    try:
        import openvino
    except ImportError:
        return Skipped(variant, "openvino", "openvino is not installed: pip install 'pqk[bench]'")
    try:
        core = openvino.Core()
        network = core.read_model(model if isinstance(model, bytes) else str(model))
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        request = core.compile_model(network, "CPU", properties).create_infer_request()
        request.infer(dict(feeds))
    except Exception as error:  # openvino's exceptions share no public base class
        return Skipped(variant, "openvino", first_line(error))

    def answers(given: Inputs) -> list[Tensor]:
        return as_tensors(request.infer(as_feeds(list(feeds), given)).to_tuple())

    return Contender(variant, "openvino", batch_of(feeds), threads, lambda: request.infer(dict(feeds)), answers=answers)


def session_call(run: ort.InferenceSession, feeds: Feeds) -> Callable[[], object]:
    feeds = dict(feeds)
    return lambda: run.run(None, feeds)


def as_feeds(names: Sequence[str], inputs: Inputs) -> dict[str, NDArray[Any]]:
    return {name: t.contiguous().numpy() for name, t in zip(names, inputs, strict=True)}


def as_tensors(values: Iterable[Any]) -> list[Tensor]:
    """Copies, since a runtime may write its next answers where these are."""
    return [torch.from_numpy(np.array(value)) for value in values]


def batch_of(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))
