"""The configurations that a student's kernels run with: chosen or measured once, and stored with the artifact.

`tuning.json` beside `student.pt2`:

    {"format": 1, "gpu": {"capability": [8, 0], "processors": 108, "shared": 166912}, "measured": false,
     "choices": {"int8_linear": {"m=1 n=10 k=64 u8": {"block_m": 16, "block_n": 32, …}}}}

A compile stores what its target's kernels choose by rule; `pqk benchmark DIR --device cuda` measures, and what it found
is given to a compile as the `tuning` of its `fuse`. `Artifact.student` reads the file: on a GPU like the one it names
the kernels run as it says, on any other, and for shapes that it does not have, as they choose there. No configuration
changes a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from pqk.bench.protocol import Timer
from pqk.core.program import Pass
from pqk.errors import InputError
from pqk.files import read_json
from pqk.gpu.roofline import ARCHES, arch_named
from pqk.kernels import KERNELS, on_cuda
from pqk.kernels.common.configs import Choice, Config, noting, remember, trying
from pqk.kernels.common.launch import TRITON_MISSING, Gpu, collecting, gpu_of, planning_for
from pqk.passes import Fuse
from pqk.passes.fuse.fuse import LaunchedOp, launches

NAME = "tuning.json"
FORMAT = 1
TRIALS = 9
"""timed calls a configuration; their median counts"""
CHOICES = {m.__name__.rpartition(".")[2]: m.CONFIGS for m in KERNELS if hasattr(m, "CONFIGS")}
"""the kernels that have a choice, and the block sizes that each may have"""


@dataclass(frozen=True)
class Tuning:
    """Configurations by kernel and shape, for one kind of GPU; `measured` there, or chosen by rule."""

    gpu: Gpu
    measured: bool
    choices: dict[str, dict[str, Config]]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        chosen = {op: {key: asdict(c) for key, c in table.items()} for op, table in self.choices.items()}
        return {"format": FORMAT, "gpu": asdict(self.gpu), "measured": self.measured, "choices": chosen}

    @staticmethod
    def load(path: Path | str) -> Tuning:
        """The tuning in a file, which may be the whole answer of `pqk benchmark --device cuda --json`.

        Raises `InputError` for a file that is missing or malformed, or whose configurations are not their kernel's.
        """
        found = read_json(Path(path))
        if isinstance(found, dict) and "tuning" in found:
            found = found["tuning"]
        try:
            return _parsed(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no tuning of format {FORMAT} ({error}); measure it again") from error

    def install(self) -> None:
        """Let the kernels of this process run as it says, on GPUs like its own."""
        for op, table in self.choices.items():
            for key, config in table.items():
                remember(self.gpu, op, key, config)


def _parsed(found: Any) -> Tuning:
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']}")
    first, second = found["gpu"]["capability"]
    gpu = Gpu((int(first), int(second)), int(found["gpu"]["processors"]), int(found["gpu"]["shared"]))
    choices = {op: {k: _config(op, c) for k, c in table.items()} for op, table in found["choices"].items()}
    return Tuning(gpu, bool(found["measured"]), choices)


def _config(op: str, values: dict[str, Any]) -> Config:
    kinds = {f.name: type(getattr(CHOICES["int8_linear"][0], f.name)) for f in fields(Config)}
    wrong = sorted(k for k in kinds.keys() | values.keys() if type(values.get(k)) is not kinds.get(k))
    if wrong:
        raise ValueError(f"a configuration of {op} with {', '.join(wrong)} missing, unknown or of another type")
    config = Config(**values)
    if not any(_blocks(config) == _blocks(c) for c in CHOICES.get(op, ())):
        raise ValueError(f"{config.block_m} x {config.block_n} x {config.block_k} is no configuration of {op}")
    if config.num_warps not in (1, 2, 4, 8, 16) or not 1 <= config.split_k <= 64 or config.group_m < 1:
        raise ValueError(f"{op}: {config} cannot be launched")
    return config


def _blocks(config: Config) -> tuple[int, ...]:
    return config.block_m, config.block_n, config.block_k, config.num_stages


def for_target(name: str) -> Gpu:
    """The GPU that a target's students are planned for: this machine's, else the one that stands for the target."""
    if torch.cuda.is_available():
        return gpu_of("cuda")
    return arch_named(name.replace("cuda-sm", "sm_")).planned if name.startswith("cuda-") else ARCHES[0].planned


def given(passes: Sequence[Pass]) -> Tuning | None:
    """What a recipe's `fuse` says. Raises `InputError` for a file that is no tuning."""
    path = next((p.tuning for p in passes if isinstance(p, Fuse)), "")
    return Tuning.load(path) if path else None


def by_rule(student: fx.GraphModule, inputs: tuple[Tensor, ...], gpu: Gpu) -> Tuning:
    """What the kernels of a student choose on `gpu` for `inputs` (on the CPU), nothing being measured."""
    return Tuning(gpu, False, _table([choice for choice, _ in _choices(student, inputs, gpu)]))


class Clock(Protocol):
    """What measuring needs of a device; see `pqk.cuda.Device`."""

    name: str
    l2_bytes: int

    def timer(self, ballast: int) -> Timer: ...


def measured(student: fx.GraphModule, inputs: tuple[Tensor, ...], device: Clock) -> Tuning:
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


def merged(found: Sequence[Tuning]) -> Tuning:
    """All of them, of one GPU, as one; there is at least one."""
    choices: dict[str, dict[str, Config]] = {}
    for op, table in (pair for each in found for pair in each.choices.items()):
        choices[op] = choices.get(op, {}) | table
    return Tuning(found[0].gpu, all(each.measured for each in found), choices)


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
    seen: set[tuple[str, str]] = set()
    if TRITON_MISSING is not None:
        return
    for called in launches(student, inputs):
        kernel = on_cuda(called.op)
        if kernel is None:
            continue
        with planning_for(gpu), noting() as noted, collecting(), torch.no_grad():
            kernel(*called.arguments.values())
        for choice in noted:
            if (choice.op, choice.key) not in seen:
                seen.add((choice.op, choice.key))
                yield choice, called


def _table(choices: Sequence[Choice]) -> dict[str, dict[str, Config]]:
    table: dict[str, dict[str, Config]] = {}
    for choice in choices:
        table.setdefault(choice.op, {})[choice.key] = choice.config
    return table
