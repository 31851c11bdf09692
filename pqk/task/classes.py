"""Which axis of a model's outputs the classes are on: given, or as the labels show; never guessed.

Networks for images put classes on axis 1, [B, C, H, W], those for tokens on the last, [B, T, C], and with two axes
there is no question. A wrong axis trains on something and teaches nothing, so where it cannot be told, that is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from pqk.data.structures import Outputs, tensors
from pqk.errors import InputError, Reason

IGNORED = -100
"""the label of what has none, such as padding, as torch has it"""
TORCH_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
"""they take classes on axis 1"""


def shown(shape: Sequence[int]) -> str:
    """A shape, in words, whatever the size of the batch: `[B, 19, 64, 64]`."""
    return f"[{', '.join(['B', *map(str, shape[1:])])}]"


def fitting_axes(output: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The axes without which an output of that shape has the shape of the labels, the size of the batch aside."""
    rest, wanted = list(output[1:]), list(labels[1:])
    return [i + 1 for i in range(len(rest)) if rest[:i] + rest[i + 1 :] == wanted]


def axis_by_labels(output: Sequence[int], labels: Sequence[int]) -> int | Reason:
    """The one axis of an output of that shape without which it has the shape of the labels, or why there is none."""
    fitting = fitting_axes(output, labels)
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        return f"labels {shown(labels)} are those of classes on no axis of outputs {shown(output)}"
    axes = " or ".join(map(str, fitting))
    return f"labels {shown(labels)} leave open whether classes are on axis {axes} of outputs {shown(output)}"


def ignored_by(loss: Callable[..., Any]) -> int:
    """The label that a loss leaves out: its own `ignore_index` where it has one, as torch's losses do."""
    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    return int(bound.get("ignore_index", getattr(loss, "ignore_index", IGNORED)))


class ClassAxis:
    """The axis of the classes in outputs with so many axes, as far as it is known.

    Args:
        given: the axis, not 0, the batch; negative ones count from the last. None: it is to be found.
        loss: the task's; torch's own losses say that it is axis 1.

    Raises:
        InputError: `given` is the batch, or no whole number.
    """

    def __init__(self, given: int | None, loss: Callable[..., Any]) -> None:
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given == 0):
            raise InputError(f"task: class_axis={given!r} must be the number of an axis, and not 0, which is the batch")
        function = loss.func if isinstance(loss, functools.partial) else loss
        torchs = isinstance(function, TORCH_LOSSES) or function in (F.cross_entropy, F.nll_loss)
        self.given = 1 if given is None and torchs else given
        self.found: dict[int, tuple[int, str]] = {}
        """number of an output's axes -> the axis of its classes, and how that is known"""
        self.doubts: dict[int, Reason] = {}
        """likewise, why it is not known"""
        self.open: set[int] = set()
        """the numbers of axes of outputs that have classes, on one of several axes"""

    def learn(self, outputs: Outputs, targets: Any) -> None:
        """Looks at the labels of some outputs: one for each output, or those of the first."""
        parts, labels = tensors(outputs), tensors(targets)
        if len(parts) != len(labels):
            parts, labels = parts[:1], labels[:1]
        for output, own in zip(parts, labels, strict=False):
            if output.dim() > 2 and not own.is_floating_point():
                self.learn_shapes(output.shape, own.shape)

    def learn_shapes(self, output: Sequence[int], labels: Sequence[int]) -> None:
        """Looks at the shapes of labels and of what they label."""
        axis = axis_by_labels(output, labels)
        if isinstance(axis, str):
            self.doubts[len(output)] = axis
            if fitting_axes(output, labels):
                self.open.add(len(output))
        else:
            how = f"classes are on axis {axis} of outputs {shown(output)}, as labels {shown(labels)} show"
            self.found.setdefault(len(output), (axis, how))

    def of(self, shape: Sequence[int]) -> int | Reason:
        """The axis of the classes of an output of that shape, or why it has none that is known."""
        count = len(shape)
        if count <= 2:
            return 1 if count == 2 else f"an output {shown(shape)} has no axis of classes"
        if self.given is not None:
            axis = self.given % count if -count < self.given < count else 0
            return axis or f"class_axis={self.given} is no axis of outputs {shown(shape)} that classes can be on"
        if count in self.found:
            return self.found[count][0]
        return self.doubts.get(count, f"no labels show which axis of outputs {shown(shape)} classes are on")

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out rather than given."""
        return () if self.given is not None else tuple(how for _, how in self.found.values())
