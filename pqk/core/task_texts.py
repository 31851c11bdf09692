"""The texts of a task's evaluation data one by one, as files that generate read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from pqk.core.onnxruntime_session import MASK
from pqk.core.steps import EncoderFeeds
from pqk.task.task import Task


@dataclass(frozen=True)
class TaskText:
    """A text, or a target with its source, without padding."""

    tokens: list[int]
    learned: Tensor
    """bool [S]: behind which of the tokens the next one has a label"""
    source: EncoderFeeds = field(default_factory=dict)
    """of an encoder-decoder: the encoder's inputs, [1, …] each; of others nothing"""


def texts_of(task: Task) -> Iterator[TaskText]:
    """Texts of the evaluation data of a task that generates; their inputs end with the ids and mask of the tokens."""
    names = task.input_names[:-2] if task.seq2seq else ()
    for batch in task.evaluation.batches():
        *sources, ids, mask = batch.inputs if task.seq2seq else batch.inputs[:2]
        for row, (tokens, seen, targets) in enumerate(zip(ids, mask, batch.targets, strict=True)):
            source = {name: given[row : row + 1].numpy() for name, given in zip(names, sources, strict=True)}
            if MASK in source:
                length = int(source[MASK].sum())
                source = {name: given[:, :length] for name, given in source.items()}
            yield TaskText(tokens[seen > 0].tolist(), targets[seen > 0] != task.ignored, source)
