"""What surrounds a pass: the seed, the journal of measured decisions, the checkpoint folder, progress, the oracle.

A measured decision (a latency, a ranking) differs from run to run. It is therefore made once, by rank 0, written to
the journal, and replayed by a resumed run, which then ends in the same student bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from pqk.core.decisions import Journal, Json
from pqk.core.distributed import from_main
from pqk.core.progress import Observer, Silent
from pqk.core.run_folder import RunFolder
from pqk.errors import InputError

_NO_BUDGET = (
    "{where}: a latency budget needs the target's runtime, and this machine is not the target; "
    "use a budget in macs, parameters or size, or compile on the target"
)
_NO_GAIN = (
    "{where}: how fast a layer is must be measured in the target's runtime, and this machine is not the target; "
    "set it to false, or compile on the target"
)


WidthPair = tuple[int, int]
"""channels in and out, of a layer"""
Channels = Mapping[str, Sequence[WidthPair]]
"""layer -> input and output channels that it might have"""


@dataclass(frozen=True)
class TimesByWidth:
    """What a network takes with layers of other channels, in milliseconds."""

    layers: dict[str, list[float]]
    """layer -> with each of the channels that were asked for, with the operators that follow it"""
    rest: float
    """everything else, and the call"""


class LatencyOracle(Protocol):
    """Times the deployed INT8 form of students, batch 1, in the target's runtime."""

    def latency(self, student: nn.Module, timed: str = "") -> float:
        """Milliseconds of the INT8 form of a MODULE student, on the example or the task's inputs of a name."""

    def baseline(self, timed: str = "") -> float:
        """Milliseconds of the teacher in FP32, likewise."""

    def float_gain(self, student: nn.Module, floats: tuple[str, ...], layer: str) -> tuple[float, float, float]:
        """How many times faster the INT8 form of a GRAPH student is with `layer` in float beside `floats`.

        Returns the ratio and the ends of its 95 % interval.
        """

    def layer_times(self, student: nn.Module, channels: Channels) -> TimesByWidth:
        """Milliseconds of the layers of the INT8 form of a MODULE student, with other channels, by a table."""


@dataclass(frozen=True)
class RunContext:
    """The surroundings of a compilation. `enter` gives those of one pass."""

    seed: int = 0
    folder: Path | None = None
    """run state (`OUT/.work`); None: nothing is saved"""
    journal: Journal = field(default_factory=Journal)
    observer: Observer = field(default_factory=Silent)
    oracle: LatencyOracle | None = None
    """what times students in the target's runtime; None where this machine is not the target"""
    rough: bool = False
    """a rehearsal: what candidates are only compared by may be estimated where measuring takes seconds for each, and
    passes note what they take where a whole compile takes more of it"""
    scope: str = ""
    """the pass that is running, such as `02-distill`"""
    identity: str = ""
    """a digest of what this is a run of; what is saved says it, and is of no other run"""

    def enter(self, scope: str) -> RunContext:
        return replace(self, scope=scope)

    @property
    def scratch(self) -> Path | None:
        """Where the running pass keeps its checkpoints; made on demand."""
        if self.folder is None:
            return None
        path = RunFolder(self.folder).checkpoints(self.scope)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def seed_for(self, *key: object) -> int:
        """A 63-bit seed for (seed, pass, key…), the same on every machine."""
        text = json.dumps([self.seed, self.scope, *map(str, key)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def decide(self, key: str, measure: Callable[[], Json]) -> Json:
        """A measured decision: journaled, replayed on resume, made by rank 0 for all processes."""
        return from_main(lambda: self.journal.decide(f"{self.scope}/{key}", measure))

    def is_decided(self, key: str) -> bool:
        """Whether this process has the decision in its journal."""
        return f"{self.scope}/{key}" in self.journal.decisions

    def latency(self, student: nn.Module, where: str, timed: str = "") -> float:
        """Milliseconds of `student`'s deployed INT8 form, on the example or the task's inputs of the name `timed`.

        Raises `InputError` where it cannot be measured here.
        """
        named = (timed,) if timed else ()
        return self._oracle(_NO_BUDGET, where).latency(student, *named)

    def baseline_latency(self, where: str, timed: str = "") -> float:
        """Milliseconds of the teacher in FP32, likewise. Raises `InputError` where it cannot be measured here."""
        named = (timed,) if timed else ()
        return self._oracle(_NO_BUDGET, where).baseline(*named)

    def float_gain(
        self, student: nn.Module, floats: tuple[str, ...], layer: str, where: str
    ) -> tuple[float, float, float]:
        """How many times faster `student`'s deployed form is with `layer` in float beside `floats`: ratio, low, high.

        Raises `InputError` where it cannot be measured here.
        """
        return self._oracle(_NO_GAIN, where).float_gain(student, floats, layer)

    def layer_times(self, student: nn.Module, channels: Channels, where: str) -> TimesByWidth:
        """What the layers of `student`'s deployed INT8 form take with these channels, by a table of this machine.

        Raises `InputError` where it cannot be measured here.
        """
        return self._oracle(_NO_BUDGET, where).layer_times(student, channels)

    def _oracle(self, refusal: str, where: str) -> LatencyOracle:
        if self.oracle is None:
            raise InputError(refusal.format(where=where))
        return self.oracle
