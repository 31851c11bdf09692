"""The report's part on where a network's time goes. `pqk.bench.layer_times` measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pqk.report.base import Part, Positive

if TYPE_CHECKING:
    from collections.abc import Iterator

Milliseconds = Annotated[float, Field(ge=0)]


class LayerTime(Part):
    """The operators of one layer: those that read its weights, and those without weights that follow them."""

    layer: str
    operators: tuple[str, ...]
    """kinds of operators, as the runtime executes them, in order"""
    milliseconds: Milliseconds
    """of one call: the median over calls of each operator's time, summed"""
    integer: bool | None
    """whether all its products are in integer kernels; null where it has none"""


class NetworkTimes(Part):
    """The layers of one network in the order of execution."""

    variant: str
    """of the attribution table"""
    layers: tuple[LayerTime, ...]
    call_ms: Positive
    """a whole call under the profiler, median"""

    @property
    def total_ms(self) -> float:
        """All layers together."""
        return sum(layer.milliseconds for layer in self.layers)


class LayerTimes(Part):
    """Where the time goes, by ONNX Runtime's own profiler, which makes every operator some microseconds longer."""

    batch: Annotated[int, Field(gt=0)]
    threads: Annotated[int, Field(gt=0)]
    networks: tuple[NetworkTimes, ...]
    reasons: dict[str, str] = Field(default_factory=dict)
    """why a network is missing, by variant"""
    conditions: str
    """how it was measured"""

    def layer_names(self) -> list[str]:
        """Every layer of any of the networks: the longest network's order, then what others have besides."""
        by_length = sorted(self.networks, key=lambda n: -len(n.layers))
        return list(dict.fromkeys(layer.layer for network in by_length for layer in network.layers))

    def of(self, variant: str) -> dict[str, LayerTime]:
        """The layers of a network by name; empty where it is not there."""
        return {la.layer: la for network in self._named(variant) for la in network.layers}

    def _named(self, variant: str) -> Iterator[NetworkTimes]:
        return (network for network in self.networks if network.variant == variant)
