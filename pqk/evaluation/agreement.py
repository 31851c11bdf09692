"""Whether a contender answers as the network that its row is of: asked before it is timed, on inputs of that shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pqk.bench.contenders import Contender
from pqk.core.modes import fused_layers
from pqk.core.onnxruntime_session import restructured
from pqk.data.data import Data
from pqk.data.structures import Inputs, Outputs, concatenate
from pqk.evaluation.attempts import Failure, attempt
from pqk.task.task import Task
from pqk.verify.verdict import ModelFunction

SAMPLES = 256
"""evaluation samples that contenders are compared on, beside those that they are timed on"""
AT_ONCE = 64
"""samples that the network itself is asked at once"""

Agreement = tuple[float, int]
"""the share of decisions that agree, and on how many samples"""


@torch.no_grad()
def agreement(contender: Contender, network: ModelFunction, task: Task, batches: Sequence[Inputs]) -> Agreement | None:
    """Decisions of a contender beside those of its network; None where it cannot be asked, or decisions are numbers.

    `batches` are inputs of the shapes that the contender is timed on. Raises what the contender raises.
    """
    if contender.answers is None:
        return None
    size = max(1, AT_ONCE // len(batches[0][0]))
    groups = [batches[i : i + size] for i in range(0, len(batches), size)]
    with fused_layers(False):  # as it was evaluated
        expected = concatenate([network(*joined(group)) for group in groups])
    got = concatenate([like(expected, contender.answers(inputs)) for inputs in batches])
    wanted = attempt(lambda: task.decision(expected))
    if isinstance(wanted, Failure) or wanted.is_floating_point():
        return None  # which is no contender's fault
    return float((wanted == task.decision(got)).double().mean()), sum(len(inputs[0]) for inputs in batches)


def joined(batches: Sequence[Inputs]) -> Inputs:
    """Batches of inputs as one; what has no batch axis is that of the first."""
    return tuple(torch.cat(parts) if parts[0].ndim else parts[0] for parts in zip(*batches, strict=True))


def like(outputs: Outputs, values: Sequence[Tensor]) -> Outputs:
    return restructured(outputs, iter(values))


def batches_like(inputs: Inputs, data: Data, most: int = SAMPLES) -> list[Inputs]:
    """`inputs`, and batches of up to `most` samples of `data` that have their shapes."""
    return [inputs, *_batches(inputs, data, most)]


def _batches(inputs: Inputs, data: Data, most: int) -> Iterator[Inputs]:
    size = len(inputs[0])
    for batch in data.batches():
        same = all(t.shape[1:] == i.shape[1:] and t.dtype == i.dtype for t, i in zip(batch.inputs, inputs, strict=True))
        for start in range(0, len(batch.inputs[0]) - size + 1, size) if same else ():
            if most < size:
                return
            most -= size
            yield tuple(t[start : start + size] if t.ndim else t for t in batch.inputs)
