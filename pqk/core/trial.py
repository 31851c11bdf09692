"""Whether two forms of a model answer alike, at the example's sizes of their free axes and at others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pqk.core.modes import evaluating, fused_layers
from pqk.data.structures import Inputs, tensors
from pqk.errors import first_line
from pqk.quiet import quiet
from pqk.task.axes import BATCH, Axes, resized

LARGEST = 1 << 22
"""elements of the inputs up to which a model is tried"""
DIFFERENCE = 1e-3
"""of the outputs' RMS: what folding and reordering of float sums stay under, and a wrong size does not"""
CONDITIONED = 0.1
"""of the outputs' RMS: what badly conditioned sums are excused up to"""
ANOTHER = 0.25
"""the RMS of the difference, over that of the outputs, from which on two forms are two models"""
Outcome = Literal["same", "model", "graph", "shape", "value"]
"""alike; the model cannot run there; the graph alone cannot; other shapes; other values"""


@dataclass(frozen=True)
class TrialResult:
    """How two forms of a model agree at some sizes."""

    outcome: Outcome
    words: str = ""
    largest: float = 0.0
    """difference of a value, over the outputs' RMS"""
    rms: float = 0.0
    """of the difference, over the outputs' RMS"""
    shapes: tuple[tuple[int, ...], ...] = ()
    """of the outputs, where they are of the same"""


class Trial:
    """Two forms of a model, run at several sizes of their free axes.

    They answer alike where they differ by less than `difference`, of the outputs' RMS, or by at most `slack` times what
    they differ by at the example's sizes: sums may be badly conditioned.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Callable[..., Any],
        example: Sequence[Tensor],
        axes: Axes,
        difference: float = DIFFERENCE,
        slack: float = 20.0,
    ) -> None:
        self.model, self.graph, self.example, self.axes = model, graph, example, axes
        self.results: dict[tuple[tuple[str, int], ...], TrialResult] = {}
        self.scaled, self.tolerance = True, math.inf
        self.at_example = self._compare({})
        if self.at_example.outcome == "model":  # floats may have a meaning that allows no others, as coordinates have
            self.scaled = False
            self.at_example = self._compare({})
        self.tolerance = max(difference, min(slack * self.at_example.largest, CONDITIONED))

    @torch.no_grad()
    def two_models(self) -> bool:
        """Whether the forms are far apart at the example's own sizes, though the model is the same twice."""
        if self.at_example.rms <= ANOTHER:
            return False
        once, twice = (tensors(self._model(resized(self.example, self.axes, {}))) for _ in range(2))
        return all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))

    def affordable(self, sizes: Mapping[str, int]) -> bool:
        """Whether inputs of these sizes are small enough to be tried."""
        counts = [
            math.prod(sizes.get(n or "", s) for n, s in zip(names, t.shape, strict=True))
            for t, names in zip(self.example, self.axes, strict=True)
        ]
        return sum(counts) <= max(LARGEST, 4 * sum(t.numel() for t in self.example))

    def run(self, sizes: Mapping[str, int]) -> TrialResult:
        """How graph and model agree there; each sizes are run once."""
        key = tuple(sorted(sizes.items()))
        if key not in self.results:
            self.results[key] = self._compare(sizes)
        return self.results[key]

    @torch.no_grad()
    def answers_none(self) -> bool:
        """Whether the graph answers a batch of none by none, which not every model does that its file does."""
        try:
            with quiet(printing=True):
                return all(len(t) == 0 for t in tensors(self.graph(*resized(self.example, self.axes, {BATCH: 0}))))
        except Exception:  # whatever an operator raises
            return False

    def _model(self, inputs: Inputs) -> Any:
        with evaluating(self.model), fused_layers(False), quiet(printing=True):
            return self.model(*(t.clone() for t in inputs))

    @torch.no_grad()
    def _compare(self, sizes: Mapping[str, int]) -> TrialResult:
        inputs = resized(self.example, self.axes, sizes, scaled=self.scaled)
        try:
            want = tensors(self._model(inputs))
        except Exception:  # whatever the model's code raises on sizes that it was not made for
            return TrialResult("model")
        if any(bool(t.isnan().any()) for t in want):
            return TrialResult("model")
        try:
            with quiet(printing=True):  # a graph that fails prints its code
                got = tensors(self.graph(*(t.clone() for t in inputs)))
        except Exception as error:
            return TrialResult("graph", f"it fails there ({first_line(error, 120)})")
        ours, theirs = ([tuple(t.shape) for t in side] for side in (got, want))
        if ours != theirs:
            return TrialResult("shape", f"its outputs are {ours} and the model's {theirs}")
        apart = [_differences(a, b) for a, b in zip(want, got, strict=True)]
        largest, rms = (max((each[i] for each in apart), default=0.0) for i in (0, 1))
        words = f"its outputs differ from the model's by up to {largest:.2g} of their RMS"
        return TrialResult("value" if largest > self.tolerance else "same", words, largest, rms, tuple(ours))


def _differences(want: Tensor, got: Tensor) -> tuple[float, float]:
    """The largest difference and that as an RMS, over the RMS of what is finite; of integers the share that differs."""
    if not want.numel():
        return 0.0, 0.0
    if not want.is_floating_point():
        share = float((want != got).double().mean())
        return share, share
    finite = want.isfinite()
    if not torch.equal(want[~finite], got[~finite]):
        return math.inf, math.inf
    if not finite.any():
        return 0.0, 0.0
    apart = (want[finite].double() - got[finite].double()).abs()
    scale = max(float(want[finite].double().square().mean().sqrt()), torch.finfo(torch.float32).tiny)
    largest, rms = (float(x) / scale for x in (apart.max(), apart.square().mean().sqrt()))
    return (largest, rms) if math.isfinite(largest) else (math.inf, math.inf)
