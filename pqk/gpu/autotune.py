"""Chooses block sizes of kernels for a GPU: by rule, or measured there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from pqk.bench.contenders import Timer
from pqk.core.program import Pass
from pqk.deploy.tuning import Tuning
from pqk.gpu.roofline import ARCHES, arch_named
from pqk.kernels import on_cuda
from pqk.kernels.common.configs import Choice, Config, noting, remember, trying
from pqk.kernels.common.gpu import Gpu, gpu_of, planning_for
from pqk.kernels.common.launch import collecting
from pqk.kernels.common.triton import TRITON_MISSING
from pqk.passes.fuse.fuse import LaunchedOp, launches

TRIALS = 9
"""timed calls a configuration; their median counts"""


def gpu_for(name: str) -> Gpu:
    """The GPU that a target's students are planned for: this machine's, else the one that stands for the target."""
    if torch.cuda.is_available():
        return gpu_of("cuda")
    return arch_named(name.replace("cuda-sm", "sm_")).planned if name.startswith("cuda-") else ARCHES[0].planned


def read_tuning(passes: Sequence[Pass]) -> Tuning | None:
    """What a recipe's `fuse` says. Raises `InputError` for a file that is no tuning."""
    path = next((p.tuning for p in passes if p.tuning), "")
    return Tuning.load(path) if path else None


def choose_tuning(student: fx.GraphModule, inputs: tuple[Tensor, ...], gpu: Gpu) -> Tuning:
    """What the kernels of a student choose on `gpu` for `inputs` (on the CPU), nothing being measured."""
    return Tuning(gpu, False, _table([choice for choice, _ in _choices(student, inputs, gpu)]))


class Clock(Protocol):
    """What measuring needs of a device; see `pqk.gpu.device.Device`."""

    name: str
    l2_bytes: int

    def timer(self, ballast: int) -> Timer: ...


def measure_tuning(student: fx.GraphModule, inputs: tuple[Tensor, ...], device: Clock) -> Tuning:
    """The fastest of each kernel's candidates for the shapes that `inputs` (on the CPU) give, timed on `device`.

    `student` is on the CPU. Each call finds twice the L2 cache written over. One that cannot run loses.
    """
    gpu = gpu_of(device.name)
    time = device.timer(2 * device.l2_bytes)
    best = []
    for choice, called in _choices(student, inputs, gpu):
        arguments = tree_map_only(Tensor, lambda t: t.to(device.name), tuple(called.arguments.values()))
        kernel = on_cuda(called.op)
        assert kernel is not None
        timed = {c: _milliseconds(choice, c, partial(kernel, *arguments), time) for c in choice.candidates}
        fastest = min(timed, key=timed.__getitem__)
        best.append(Choice(choice.op, choice.key, gpu, fastest, choice.candidates))
    return Tuning(gpu, True, _table(best))


def merge_tunings(tunings: Sequence[Tuning]) -> Tuning:
    """All of them, of one GPU, as one; there is at least one."""
    choices: dict[str, dict[str, Config]] = {}
    for op, table in (pair for each in tunings for pair in each.choices.items()):
        choices[op] = choices.get(op, {}) | table
    return Tuning(tunings[0].gpu, all(each.measured for each in tunings), choices)


def _milliseconds(choice: Choice, config: Config, call: Any, time: Timer) -> float:
    with trying(), torch.no_grad():
        remember(choice.gpu, choice.op, choice.key, config)
        try:
            call()  # compiles
            return median(time(call) for _ in range(TRIALS))
        except Exception:  # too large for the GPU, in words that differ from one version of Triton to the next
            return float("inf")


def _choices(student: fx.GraphModule, inputs: tuple[Tensor, ...], gpu: Gpu) -> Iterator[tuple[Choice, LaunchedOp]]:
    """Each choice that comes up once, with an operator that it came up in."""
    keys: set[tuple[str, str]] = set()
    if TRITON_MISSING is not None:
        return
    for called in launches(student, inputs):
        kernel = on_cuda(called.op)
        if kernel is None:
            continue
        with planning_for(gpu), noting() as noted, collecting(), torch.no_grad():
            kernel(*called.arguments.values())
        for choice in noted:
            if (choice.op, choice.key) not in keys:
                keys.add((choice.op, choice.key))
                yield choice, called


def _table(choices: Sequence[Choice]) -> dict[str, dict[str, Config]]:
    table: dict[str, dict[str, Config]] = {}
    for choice in choices:
        table.setdefault(choice.op, {})[choice.key] = choice.config
    return table
