"""The contract's tolerances, and the verdict on layers and on the ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from pqk.data.structures import Outputs, tensors
from pqk.errors import InputError, Reason
from pqk.report.schema import LEAST_AGREEMENT, LayerParity, Parity
from pqk.task.task import Task

ModelFunction = Callable[..., Outputs]


MAX_LSB = 1


EXACT_SHARE = 0.999


AGREEMENT = LEAST_AGREEMENT


METRIC_TOLERANCE = 0.001
"""0.1 points of a share; of a metric in another unit, a thousandth of its value"""


RELATIVE = 1e-5


def verdict(
    layers: Sequence[LayerParity], ends: Mapping[str, Any], mode: Literal["optimized", "unoptimized", "reference"]
) -> Parity:
    """The contract: every layer, then the ends."""
    broken = next((layer for layer in layers if not layer.passed), None)
    divergence = divergence_of(broken) if broken else ends["divergence"]
    return Parity(
        passed=divergence is None,
        layers=tuple(layers),
        agreement=ends["agreement"],
        own_agreement=ends.get("own_agreement"),
        metric_delta=ends["metric_delta"],
        first_divergence=divergence,
        samples=ends["samples"],
        mode=mode,
    )


def divergence_of(layer: LayerParity) -> str:
    """One line on how a layer breaks the contract."""
    if layer.max_relative is not None:
        return f"{layer.name} ({layer.op}): float output differs by {layer.max_relative:.2g} (allowed {RELATIVE:g})"
    text = f"{layer.name} ({layer.op}): differs by up to {layer.max_lsb:g} LSB, {100 * layer.exact:.2f} % exact"
    return text + (", int32 accumulators differ" if layer.accumulators is False else "")


def compare_ends(
    fake_quant: ModelFunction,
    deployed: ModelFunction,
    task: Task,
    *,
    samples: int | None,
    itself: Callable[[], float | None] = lambda: None,
) -> dict[str, Any]:
    """Decisions and metric of the fake-quant graph against what is deployed: agreement, delta, divergence.

    Of data with a label for each decision, those without one are not counted. `itself` is asked where too few agree:
    how often what is deployed agrees with itself.
    """
    expected, targets = task.predict(fake_quant, task.evaluation, samples)
    outputs, _ = task.predict(deployed, task.evaluation, samples)
    expected_decisions, decisions = task.decision(expected), task.decision(outputs)
    if expected_decisions.is_floating_point():
        raise InputError(
            f"parity: the task's decision is {expected_decisions.dtype}, which cannot agree exactly; pass "
            "Task(decision=…) that returns integers or booleans, such as the class, the token or whether a threshold "
            "is passed"
        )
    same = _labelled(expected_decisions == decisions, targets, task.ignored)
    agreement = float(same.double().mean())
    delta = None
    if targets is not None:
        delta = task.metric.function(outputs, targets) - task.metric.function(expected, targets)
    value = 1.0 if targets is None or task.metric.unit == "share" else task.metric.function(expected, targets)
    count = len(tensors(expected)[0])
    own = itself() if agreement < AGREEMENT else None
    divergence = why_not_at_the_ends(agreement, delta, value, same.numel(), count, own)
    ends = {"agreement": agreement, "metric_delta": delta, "samples": count, "divergence": divergence}
    return ends if own is None else {**ends, "own_agreement": own}


def _labelled(same: Tensor, targets: Any, ignored: int) -> Tensor:
    """The decisions that have a label, where targets are labels of decisions; else all."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != same.shape:
        return same
    labelled = targets != ignored
    return same[labelled] if bool(labelled.any()) else same


def why_not_at_the_ends(
    agreement: float,
    delta: float | None,
    value: float,
    decisions: int,
    samples: int,
    own: float | None = None,
) -> Reason | None:
    """How decisions or metric break the contract; None where they keep it. One sample is always allowed.

    `own` is how often what is deployed agrees with itself; others may disagree with it twice as often.
    """
    slack = 1e-12  # of summing shares in floating point
    least = min(AGREEMENT, 1 - 1 / decisions, 1.0 if own is None else 1 - 2 * (1 - own))
    most = max(METRIC_TOLERANCE * max(abs(value), 1e-3), 1 / samples)
    explanation = (
        "every layer by itself agrees with the INT8 graph: single steps grow from layer to layer, or the INT8 graph "
        "differs from the fake-quantized one"
    )
    if agreement < least - slack:
        itself = "" if own is None else f"; the runtime agrees with itself on {100 * own:.2f} %, read one by one"
        return (
            f"end to end: {100 * agreement:.2f} % of decisions agree (at least {100 * least:.2f} % must{itself}); "
            f"{explanation}"
        )
    if delta is not None and not abs(delta) <= most + slack:
        return f"end to end: the metric differs by {delta:+.5f} (allowed {most:.5f}); {explanation}"
    return None
