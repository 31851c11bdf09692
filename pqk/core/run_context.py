"""What surrounds a pass: the seed, the journal of measured decisions, the checkpoint folder, progress, the oracle.

A measured decision (a latency, a ranking) differs from run to run. It is therefore made once, by rank 0, written to
the journal, and replayed by a resumed run, which then ends in the same student bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pqk.errors import InputError

Json = Any
Advance = Callable[[int, str], None]
"""(steps, text) -> None"""


class Observer(Protocol):
    """Shows progress. The library never prints; the command line passes an observer that does."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]: ...


class Silent:
    """The default observer: nothing is shown."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        return nullcontext(lambda steps, text="": None)


class Journal:
    """Measured decisions by key, one JSON line each, flushed to disk before they are used."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.decisions: dict[str, Json] = {}
        if path is not None and path.exists():
            whole = path.read_bytes()
            lines = whole.split(b"\n")
            for line in lines[:-1]:
                try:
                    entry = json.loads(line)
                    self.decisions[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path} was changed: a line is not a decision ({error}); start anew") from error
            if lines[-1]:  # a killed run can leave half a line; the decision was not used yet
                os.truncate(path, len(whole) - len(lines[-1]))

    def decide(self, key: str, measure: Callable[[], Json]) -> Json:
        """The journaled value of `key`, or `measure()` (JSON), noted first."""
        if key not in self.decisions:
            value = json.loads(json.dumps(measure()))
            if self.path is not None:
                self._append(self.path, json.dumps({"key": key, "value": value}) + "\n")
            self.decisions[key] = value
        return self.decisions[key]

    @staticmethod
    def _append(path: Path, line: str) -> None:
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as f:
                f.write(line.encode())
                os.fsync(f.fileno())
        except OSError as error:
            if path.exists():
                os.truncate(path, before)
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def is_main_process() -> bool:
    """Whether this process decides and writes the files: rank 0, or the only one."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or (
        torch.distributed.get_rank() == 0
    )


def from_main(value: Callable[[], Json]) -> Json:
    """`value()` of rank 0 in all processes; the others do not call theirs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value()
    box = [value() if is_main_process() else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


_NO_BUDGET = (
    "{where}: a latency budget needs the target's runtime, and this machine is not the target; "
    "use a budget in macs, parameters or size, or compile on the target"
)
_NO_GAIN = (
    "{where}: how fast a layer is must be measured in the target's runtime, and this machine is not the target; "
    "set it to false, or compile on the target"
)


@dataclass(frozen=True)
class Run:
    """The surroundings of a compilation. `enter` gives those of one pass."""

    seed: int = 0
    folder: Path | None = None
    """run state (`OUT/.work`); None: nothing is saved"""
    journal: Journal = field(default_factory=Journal)
    observer: Observer = field(default_factory=Silent)
    deployed_latency: Callable[[nn.Module], float] | None = None
    """the oracle: milliseconds of a MODULE student's INT8 form, batch 1, in the target's runtime; None: not here"""
    deployed_baseline: Callable[[], float] | None = None
    """milliseconds of the teacher in FP32 in the same runtime"""
    deployed_float_gain: Callable[[nn.Module, tuple[str, ...], str], tuple[float, float, float]] | None = None
    """(GRAPH student, layers left in float, one more) -> how many times faster one more makes the INT8 form, with the
    ends of its 95 % interval"""
    scope: str = ""
    """the pass that is running, such as `02-distill`"""

    def enter(self, scope: str) -> Run:
        return replace(self, scope=scope)

    @property
    def scratch(self) -> Path | None:
        """Where the running pass keeps its checkpoints; made on demand."""
        if self.folder is None:
            return None
        path = self.folder / f"{self.scope}.partial"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def seed_for(self, *key: object) -> int:
        """A 63-bit seed for (seed, pass, key…), the same on every machine."""
        text = json.dumps([self.seed, self.scope, *map(str, key)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def decide(self, key: str, measure: Callable[[], Json]) -> Json:
        """A measured decision: journaled, replayed on resume, made by rank 0 for all processes."""
        return from_main(lambda: self.journal.decide(f"{self.scope}/{key}", measure))

    def latency(self, student: nn.Module, where: str) -> float:
        """Milliseconds of `student`'s deployed INT8 form. Raises `InputError` where it cannot be measured here."""
        if self.deployed_latency is None:
            raise InputError(_NO_BUDGET.format(where=where))
        return self.deployed_latency(student)

    def baseline_latency(self, where: str) -> float:
        """Milliseconds of the teacher in FP32. Raises `InputError` where it cannot be measured here."""
        if self.deployed_baseline is None:
            raise InputError(_NO_BUDGET.format(where=where))
        return self.deployed_baseline()

    def float_gain(self, student: nn.Module, floats: tuple[str, ...], layer: str, where: str) -> tuple[float, ...]:
        """How many times faster `student`'s deployed form is with `layer` in float beside `floats`: ratio, low, high.

        Raises `InputError` where it cannot be measured here.
        """
        if self.deployed_float_gain is None:
            raise InputError(_NO_GAIN.format(where=where))
        return self.deployed_float_gain(student, floats, layer)
