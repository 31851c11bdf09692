"""The student on a GPU beside its teacher, measured so that the number survives being checked.

Correctness comes first: `student.pt2` runs on the device and, through the same operators' reference bodies, on the
CPU; where the two disagree there is no speed to speak of. Then everything is timed by the protocol of
`pqk.bench.measure`, in turn, with three things that a GPU asks for:

- every contender is captured into a CUDA graph and replayed, so that Python and launch overhead are in nobody's time;
- inputs rotate through several copies, and other bytes are written between the calls, so that more than twice the L2
  cache passes before a copy is used again: inputs are read from memory, as they are in service (`rotation`);
- the device is kept busy while the host enqueues a timed call, and events on the device take its time.

The teacher gets `torch.compile` in four precisions, and the fastest of them is the baseline. A student's share of the
device's bandwidth and integer rate is taken against what this device reached a moment ago, not against a data sheet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pqk.bench.contenders import Contender, Skipped
from pqk.bench.measure import TimingProtocol, interleave, measure
from pqk.copies import copy_of
from pqk.core.launches import traffic
from pqk.data.structures import Inputs, tensors
from pqk.deploy.artifact import Artifact
from pqk.deploy.tuning import Tuning
from pqk.errors import InputError, ParityError, first_line
from pqk.gpu.autotune import measure_tuning, merge_tunings
from pqk.gpu.device import Ceilings, Device
from pqk.quant.noise import sqnr
from pqk.quiet import quiet
from pqk.recipe.factories import load_teacher
from pqk.report.schema import LatencyRow, VariantName

STUDENT = "student.pt2"
GATE_SAMPLES = 64
SQNR_DB = 30.0
"""the device's outputs carry at most this little noise beside the CPU's"""
COPIES = 8
"""most copies of the inputs that rotate; each is a CUDA graph of its own"""
PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
}
"""the teacher's: its dtype, and what float32 matrix products may be computed in"""

REPLAYS = TimingProtocol(pause=0.0)
"""without pauses, as no threads spin"""
PROTOCOL = (
    "Measured in turn: every round gives each contender at least "
    "{warm} warm calls and a burst of {burst} timed calls, for {rounds} rounds; medians over calls, ratios within "
    "rounds, "
    "bootstrap 95 % intervals. Calls are CUDA graph replays timed by events; inputs rotate so that twice the L2 cache "
    "passes before one is used again, and weights are as warm as that leaves them. Ratios are against the teacher's "
    "fastest precision in torch.compile."
)


# Correctness


@dataclass(frozen=True)
class DeviceAgreement:
    """How alike the same inputs are decided on two devices."""

    samples: int
    sqnr_db: float | None
    """signal over the difference of the outputs, 10 log10(Σ a² / Σ (a - b)²); None where they are equal"""
    alike: int
    """samples whose largest output is the same"""

    @property
    def reason(self) -> str | None:
        """Why the two are not the same network, or None: noise, or more than 0.5 % (and one sample) decided apart."""
        if self.sqnr_db is not None and not self.sqnr_db >= SQNR_DB:
            return f"outputs differ: SQNR {self.sqnr_db:.1f} dB, at least {SQNR_DB:g} is needed"
        apart, allowed = self.samples - self.alike, max(1, int(0.005 * self.samples))
        if apart > allowed:
            return f"{apart} of {self.samples} samples are decided differently, at most {allowed} may be"
        return None


def compare(reference: Sequence[Tensor], found: Sequence[Tensor]) -> DeviceAgreement:
    """The outputs of one batch, as the CPU and the device computed them.

    Decisions are those of the first output. Raises `ParityError` for shapes, dtypes or values that no tolerance
    covers.
    """
    kinds = [[(tuple(t.shape), t.dtype) for t in side] for side in (reference, found)]
    if kinds[0] != kinds[1]:
        raise ParityError(f"{STUDENT}: the outputs on the device are {kinds[1]}, on the CPU {kinds[0]}")
    if not all(bool(t.isfinite().all()) for t in found):
        raise ParityError(f"{STUDENT}: an output is not finite on the device")
    a, b = (torch.cat([t.double().flatten() for t in side]) for side in (reference, found))
    decibels = sqnr(a, b)
    first = [side[0].reshape(len(side[0]), -1).argmax(1) for side in (reference, found)]
    return DeviceAgreement(
        len(reference[0]), None if decibels == math.inf else decibels, int((first[0] == first[1]).sum())
    )


def gate(reference: nn.Module, found: nn.Module, inputs: Inputs, device: str) -> DeviceAgreement:
    """Run both modules, `found` on `device`. Raises `ParityError` where they disagree, so that nothing is timed."""
    with torch.no_grad():
        want = tensors(reference(*inputs))
        have = [t.cpu() for t in tensors(found(*(x.to(device) for x in inputs)))]
    agreement = compare(want, have)
    if agreement.reason is not None:
        raise ParityError(
            f"{STUDENT} is not the same network on the device as on the CPU: {agreement.reason}. No speed is measured"
        )
    return agreement


# What is timed


@dataclass(frozen=True)
class Rotation:
    """`copies` of the inputs in turn, with `ballast` bytes written before each call."""

    copies: int
    ballast: int


def rotation(input_bytes: int, l2_bytes: int, most: int = COPIES) -> Rotation:
    """The fewest copies (2 to `most`) and the least ballast with which `2 * l2_bytes` pass before a copy comes again.

    Between two uses of a copy lie the `copies - 1` others and `copies` times the ballast.
    """
    traffic = 2 * l2_bytes
    copies = min(most, max(2, 1 + -(-traffic // max(1, input_bytes))))
    missing = max(0, traffic - (copies - 1) * input_bytes)
    return Rotation(copies, -(-missing // copies))


def rotated(inputs: Inputs, copies: int) -> list[Inputs]:
    """The same values in `copies` places."""
    return [tuple(x.clone() for x in inputs) for _ in range(copies)]


def input_bytes(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for x in inputs)


def contender(
    device: Device, variant: VariantName, runtime: str, module: nn.Module, inputs: Inputs
) -> Contender | Skipped:
    """`module`, on the device and in eval mode, as captured graphs: one for each copy of `inputs`."""
    plan = rotation(input_bytes(inputs), device.l2_bytes)
    try:
        with torch.no_grad():
            replays = [device.captured(partial(module, *each)) for each in rotated(inputs, plan.copies)]
    except Exception as error:  # whatever torch, inductor or Triton raise: the row is left out, with this
        return Skipped(variant, runtime, first_line(error))
    turns = itertools.cycle(replays)
    return Contender(variant, runtime, len(inputs[0]), 1, lambda: next(turns)(), timer=device.timer(plan.ballast))


@contextmanager
def float32_products(kind: str) -> Iterator[None]:
    """Compute float32 matrix products and convolutions in `ieee` or `tf32`; restores what was set."""
    cudnn: Any = torch.backends.cudnn
    matmul, convolution = torch.backends.cuda.matmul, cudnn.conv
    with _setting(matmul, "fp32_precision", kind), _setting(convolution, "fp32_precision", kind):
        yield


@contextmanager
def at_its_best() -> Iterator[None]:
    """Settings for torch's fastest code: weights are constants of the compiled code, and cuDNN tries its algorithms.

    Dynamo's limit of compiles is raised, and reaching it is an error: each precision and batch is a compile, and by
    default those past the limit would run eagerly, unnoticed.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    with (
        quiet(),  # inductor's own modules deprecate themselves
        _setting(torch.backends.cudnn, "benchmark", True),
        inductor.patch(freezing=True),
        dynamo.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True),
    ):
        yield


@contextmanager
def _setting(place: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def teachers(device: Device, teacher: nn.Module, inputs: Inputs) -> list[Contender | Skipped]:
    """The teacher through `torch.compile` in each of `PRECISIONS`; its floating-point inputs come in that dtype."""
    contenders: list[Contender | Skipped] = []
    for name, (dtype, products) in PRECISIONS.items():
        module = copy_of(teacher).eval().to(device.name, dtype)
        cast = tuple(x.to(device.name, dtype if x.is_floating_point() else x.dtype) for x in inputs)
        with at_its_best(), float32_products(products):
            compiled: Any = torch.compile(module, dynamic=False)
            contenders.append(contender(device, "teacher_fp32", f"torch.compile, {name}", compiled, cast))
    return contenders


@dataclass(frozen=True)
class CeilingShare:
    """One student row against the ceilings. An operation is a multiplication or an addition: two for each MAC."""

    batch: int
    bytes: int
    """inputs and outputs of all operators, each tensor of an operator once: what the launches cannot do without"""
    operations: int
    bandwidth: float
    integer: float


def share(batch: int, moved: int, macs: int, milliseconds: float, ceilings: Ceilings) -> CeilingShare:
    """`moved` bytes and `macs` a call."""
    seconds = milliseconds / 1e3
    return CeilingShare(
        batch, moved, 2 * macs, moved / seconds / ceilings.bandwidth, 2 * macs / seconds / ceilings.integer
    )


# The benchmark


@dataclass(frozen=True)
class Found:
    """What `pqk benchmark --device cuda` found; `document()` is its JSON."""

    device: dict[str, Any]
    gate: DeviceAgreement
    ceilings: Ceilings
    latency: list[LatencyRow]
    shares: list[CeilingShare]
    skipped: list[Skipped]
    protocol: str
    tuning: Tuning | None
    """the fastest configurations of the student's kernels, which it was then timed with; None where not measured"""

    def document(self) -> dict[str, Any]:
        rows = [row.model_dump(mode="json") for row in self.latency]
        tuning = self.tuning and self.tuning.document()
        plain = {k: v for k, v in asdict(self).items() if k not in ("latency", "tuning")}
        return {**plain, "latency": rows, "tuning": tuning}


def benchmark(
    artifact: Artifact,
    device: Device,
    batches: Sequence[int] = (1,),
    timing: TimingProtocol = REPLAYS,
    tune: bool = True,
) -> Found:
    """The artifact's `student.pt2` on `device` beside its teacher and beside its INT8 graph in plain torch.

    With `tune` the kernels' configurations are measured first, for the shapes of `batches`, and the student then runs
    with the fastest. The student by Triton is the last row of a batch size. Raises `InputError` where there is no such
    file, and `ParityError` where the device computes something else than the CPU.
    """
    cpu, student = artifact.student(), artifact.student(device.name)
    tuning = _tuned(artifact, cpu, device, batches) if tune else None
    agreement = gate(cpu, student, example_on(artifact, GATE_SAMPLES), device.name)
    ceilings, macs = device.ceilings(), artifact.report.macs
    teacher, absent = _teacher(artifact)
    graph = _graph(artifact, teacher)
    latency, shares, skipped = [], [], [absent] if absent is not None else []
    for batch in batches:
        inputs = example_on(artifact, batch)
        placed = tuple(x.to(device.name) for x in inputs)
        tried = [] if teacher is None else teachers(device, teacher, inputs)
        if graph is not None:
            tried.append(contender(device, "student", "torch, dequantized", graph.to(device.name), placed))
        tried.append(contender(device, "student", "triton", student, placed))
        if isinstance(tried[-1], Skipped):
            raise InputError(f"{STUDENT} cannot be captured for batch {batch}: {tried[-1].reason}")
        skipped += [each for each in tried if isinstance(each, Skipped)]
        rows = in_turn([each for each in tried if isinstance(each, Contender)], timing)
        latency += rows
        shares.append(share(batch, traffic(cpu, inputs).bytes, macs * batch, rows[-1].median_ms, ceilings))
    return Found(
        device.describe(), agreement, ceilings, latency, shares, skipped, PROTOCOL.format(**asdict(timing)), tuning
    )


def _tuned(artifact: Artifact, cpu: Any, device: Device, batches: Sequence[int]) -> Tuning:
    """What is fastest on the device, by measurement; from now on the process runs so."""
    tuning = merge_tunings([measure_tuning(cpu, example_on(artifact, batch), device) for batch in batches])
    tuning.install()
    return tuning


def in_turn(contenders: Sequence[Contender], timing: TimingProtocol) -> list[LatencyRow]:
    """Rows by the protocol, without its pauses, as no threads spin. The baseline is the fastest teacher in a short
    run before; without a teacher ratios are null."""
    rivals = [c for c in contenders if c.variant == "teacher_fp32"]
    baseline = None
    if rivals:
        baseline = rivals[int(np.median(interleave(rivals, replace(timing, rounds=3)), axis=(1, 2)).argmin())]
    rows = measure(contenders, baseline, timing)
    if baseline is None:
        rows = [row.without_ratio() for row in rows]
    return rows


def example_on(artifact: Artifact, batch: int) -> Inputs:
    """The artifact's random inputs of that batch size, on the CPU."""
    return tuple(torch.from_numpy(x) for x in artifact.example(batch).values())


def _graph(artifact: Artifact, teacher: nn.Module | None) -> nn.Module | None:
    """The INT8 graph as a torch module; None where nothing says how to make what it began as."""
    known = teacher is not None if not artifact.given else artifact.recipe.student is not None
    return artifact.rebuild(teacher).eval() if known else None


def _teacher(artifact: Artifact) -> tuple[nn.Module | None, Skipped | None]:
    """The teacher with whatever weights its factory gives it: they do not change its time."""
    spec = artifact.recipe.teacher
    if spec is None:
        why = "the artifact was compiled from a module in Python, so there is no factory to make the teacher with"
        return None, Skipped("teacher_fp32", "torch.compile", why)
    return load_teacher(type(spec)(factory=spec.factory, arguments=spec.arguments), beside=artifact.folder), None
