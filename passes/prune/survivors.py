"""The teacher's channels that the output of a module still has, also where the module is a block or a whole stage.

The plan names the layers that were cut. The output of a block is that of some layers in it behind element-wise
operators and pooling, which autograd remembers: the walk back from it ends at those layers, and where all of them kept
the same channels, so did the block. Between queries and values it is heads that survive, one for a whole attention.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pqk.copies import copy_of
from pqk.core.aten import SAME_CHANNELS
from pqk.core.program import Example, Program, Rewrite, replay
from pqk.passes.prune.cuts import channels_of, cut_channels, drop_block, kept_channels
from pqk.passes.prune.low_rank import split_layers


def surviving_channels(program: Program, example: Example, point: str) -> Sequence[int] | None:
    """The teacher's channels, or heads, in order, that the student's output at module `point` has.

    None where none was cut, where it cannot be told, and for a student of another shape, whose channels were never the
    teacher's. Raises `InputError` where pruning removed the module.
    """
    if program.given is not None:
        return None
    kept = kept_channels(program.plan, point)
    table = {f.__name__: f for f in (cut_channels, drop_block, split_layers)}
    steps = [*itertools.takewhile(lambda step: step.function in table, program.plan)]
    if kept is not None or not any(step.function == cut_channels.__name__ for step in steps):
        return kept
    student = replay(copy_of(program.teacher).requires_grad_(True), example, steps, table).eval()
    layers = _layers(student, example, point)
    if not layers:  # channels mix there, as they do in a product of queries and keys
        return _heads(steps, point)
    channels = {None if k is None else tuple(k) for k in (kept_channels(steps, p) for p in layers)}
    return channels.pop() if len(channels) == 1 else None


def _heads(steps: Sequence[Rewrite], point: str) -> Sequence[int] | None:
    """The heads of the innermost attention around `point` that lost some; None where there is none."""
    parts = point.split(".")
    around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((kept for path in around if (kept := kept_channels(steps, path, "heads")) is not None), None)


def _layers(student: nn.Module, example: Example, point: str) -> list[str]:
    """The layers with channels whose outputs reach that of `point` channel by channel; [] where channels mix."""
    outputs: dict[str, Any] = {}

    def keeper(path: str) -> Any:
        # The node is read at once: an in-place activation gives the tensor another one.
        return lambda module, inputs, output: outputs.update(
            {path: getattr(output[0] if isinstance(output, tuple) else output, "grad_fn", None)}
        )

    handles = [module.register_forward_hook(keeper(path)) for path, module in student.named_modules()]
    result: Tensor = student(*example)  # keeps the graph alive
    for handle in handles:
        handle.remove()
    layers = {
        node: p for p, node in outputs.items() if node and channels_of(student.get_submodule(p), "out") is not None
    }
    reached, queue, visited = [], [outputs.get(point)], set()
    while queue:
        node = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in layers:
            reached.append(layers[node])
        elif re.sub(r"(\dD)?(WithIndices)?Backward\d+$", "", node.name()) in SAME_CHANNELS:
            queue += [following for following, _ in node.next_functions]
        else:
            return []
    del result
    return reached
