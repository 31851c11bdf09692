"""The budget of a pruning, and how much of it a network spends.

The latency of a model that continues texts is that of one token after those of the example, which are kept; that of a
prompt, until the first token, is one of the task's `timed` inputs.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from pqk.core.costs import count_macs, count_parameters, integer_bytes
from pqk.core.run_context import RunContext
from pqk.errors import InputError, Reason

UNITS = {"macs": "MACs", "parameters": "parameters", "size": "bytes", "latency": "ms"}

CUT_MORE = (
    "Lower the ratio below that, or lower floor or multiple, allow depth and width both, or shorten ignore and "
    "protect; or set best_effort."
)
"""what to do where pruning cannot meet a budget"""


class Missed(InputError):
    """A budget that cannot be met."""


@dataclass
class Unmeasured:
    """Networks that a rehearsal does not measure and a compile will, and the seconds that those took that it did."""

    architectures: set[str] = field(default_factory=set)
    estimates: dict[str, float] = field(default_factory=dict)
    """architecture -> what it is taken to spend"""
    seconds: list[float] = field(default_factory=list)

    def estimate(self) -> dict[str, float]:
        """How many there are, and how long measuring them will take; empty where there are none."""
        if not self.architectures:
            return {}
        count = len(self.architectures)
        return {"candidates": count, "seconds": count * statistics.median(self.seconds or [0.0])}


@dataclass(frozen=True)
class Budget:
    """A goal for `reference / value(student)`. Latencies are measured once for each architecture."""

    kind: str
    goal: float
    reference: float
    run: RunContext
    example: tuple[Tensor, ...]
    pass_name: str = "prune"
    timed: str = ""
    """name of the task's inputs that a latency is of; empty: the example"""
    unmeasured: Unmeasured = field(default_factory=Unmeasured)

    def value(self, model: nn.Module) -> float:
        """MACs a sample, parameters, INT8 bytes, or milliseconds of the INT8 form."""
        if self.kind == "macs":
            return count_macs(model, self.example)
        if self.kind == "parameters":
            return count_parameters(model)
        if self.kind == "size":
            return integer_bytes(model)
        known = self.unmeasured.estimates.get(architecture := digest(model))
        key = f"latency/{architecture}/{self.timed}" if self.timed else f"latency/{architecture}"
        return known or self.run.decide(key, lambda: self._latency(model))

    def _latency(self, model: nn.Module) -> float:
        began = time.perf_counter()
        milliseconds = self.run.latency(model, f"{self.pass_name}.latency_ratio", self.timed)
        self.unmeasured.seconds.append(time.perf_counter() - began)
        return milliseconds

    def compare(self, whole: nn.Module, value: float, part: nn.Module) -> tuple[float, float]:
        """What `whole` and `part` spend.

        In a rehearsal the latency of `whole` is `value`, and that of `part` less as its MACs are: each of many
        candidates would take seconds to export and time.
        """
        if self.kind != "latency" or not self.run.rough:
            return self.value(whole), self.value(part)
        self.unmeasured.architectures.add(digest(part))
        return value, value * count_macs(part, self.example) / max(1, count_macs(whole, self.example))

    def take(self, model: nn.Module, value: float) -> float:
        """Takes `value` for what `model` spends, without measuring it, from now on."""
        self.unmeasured.estimates[digest(model)] = value
        return value

    def ratio(self, value: float) -> float:
        """How many times less than the teacher `value` is."""
        return self.reference / max(value, 1e-12)

    def missed(
        self, reached: float, what: str, refused: Mapping[str, Reason], advice: str = CUT_MORE, done: str = "cut"
    ) -> Missed:
        """The error for a budget that cannot be met; `refused`: layer or block -> why it may not be cut."""
        unit = UNITS[self.kind]
        return Missed(
            f"{self.pass_name}: {self.kind}_ratio = {self.goal:.4g} cannot be met: {what} is {self.ratio(reached):.3g} "
            f"times less than the teacher ({reached:.4g} against {self.reference:.4g} {unit}). {advice}"
            f"{_why_each(refused, done)}"
        )


def _why_each(refused: Mapping[str, Reason], done: str) -> str:
    """Every layer or block that may not be cut, under the reason that it shares with others."""
    if not refused:
        return ""
    alike: dict[Reason, list[str]] = {}
    for name, reason in refused.items():
        alike.setdefault(reason, []).append(name)
    return f" Not {done} are " + "; ".join(f"{', '.join(names)}: {reason}" for reason, names in alike.items())


def digest(model: nn.Module) -> str:
    """Names an architecture by a hash of everything that a latency depends on: all but the weights."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    return hashlib.sha256(f"{model!r}{shapes}".encode()).hexdigest()[:16]
