"""What surrounds a pass: the seed, the journal of measured decisions, the checkpoint folder, progress, the oracle.

A measured decision (a latency, a ranking) differs from run to run. It is therefore made once, by rank 0, written to
the journal, and replayed by a resumed run, which then ends in the same student bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from pqk.core.distributed import from_main
from pqk.core.journal import Journal, Json
from pqk.core.progress import Observer, Silent
from pqk.errors import InputError

_NO_BUDGET = (
    "{where}: a latency budget needs the target's runtime, and this machine is not the target; "
    "use a budget in macs, parameters or size, or compile on the target"
)
_NO_GAIN = (
    "{where}: how fast a layer is must be measured in the target's runtime, and this machine is not the target; "
    "set it to false, or compile on the target"
)


@dataclass(frozen=True)
class RunContext:
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

    def enter(self, scope: str) -> RunContext:
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
