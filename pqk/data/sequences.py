"""Token sequences of several lengths as one batch: prompts taken out of it, answers put behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pqk.data.data import Batch
from pqk.data.structures import Inputs
from pqk.errors import InputError, Reason

UNLABELLED = -100
"""the target of a token from which nothing is learned, as `pqk.task.classes.IGNORED`"""


def padded(tokens: Sequence[Tensor], pad: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` int64 [B, S] of sequences, S the longest of them or `length`."""
    length = max(length, *map(len, tokens))
    ids = torch.full((len(tokens), length), pad)
    for row, t in zip(ids, tokens, strict=True):
        row[: len(t)] = t
    lengths = torch.tensor([len(t) for t in tokens])
    return ids, (torch.arange(length) < lengths[:, None]).long()


def why_not_texts(inputs: Inputs) -> Reason | None:
    """Why inputs are not one text of tokens a row, else None."""
    if len(inputs) != 2 or any(t.dim() != 2 or t.is_floating_point() for t in inputs):
        shapes = [tuple(t.shape) for t in inputs]
        return f"the inputs are {shapes}, and not two of whole numbers [B, S]: token numbers and their mask"
    if inputs[1].numel() and int(inputs[1].max()) > 1:
        return "several texts stand in a row (packed); let each have a row of its own"
    return None


def need_texts(inputs: Inputs, who: str) -> None:
    """Raises `InputError` where inputs are not one text of tokens a row, for `who` reads them."""
    if (reason := why_not_texts(inputs)) is not None:
        raise InputError(f"distill: {who} reads texts, and these are none: {reason}")


def why_not_sequences(batch: Batch) -> Reason | None:
    """Why a batch has no prompts that can be answered, else None."""
    if (reason := why_not_texts(batch.inputs)) is not None:
        return reason
    if not isinstance(batch.targets, Tensor) or batch.targets.shape != batch.inputs[0].shape:
        return "the targets are not the next tokens, int64 [B, S]"
    return None


def prompts_of(batch: Batch, least: int = 1) -> list[Tensor]:
    """The prompt of each sample: its tokens, int64 [P], up to the one that predicts the first that is learned.

    Args:
        batch: `input_ids` and `attention_mask` [B, S], padded behind; targets are the next tokens, -100 where nothing
            is learned.
        least: tokens that a prompt has at least, where its text has more.

    Raises:
        InputError: the batch is of something else, or a sample has no token to learn.
    """
    if (reason := why_not_sequences(batch)) is not None:
        raise InputError(f"distill: answers are written to prompts of tokens, and this batch has none: {reason}")
    ids, mask = batch.inputs
    learned = batch.targets != UNLABELLED
    if not bool(learned.any(1).all()):
        row = int((~learned.any(1)).nonzero()[0])
        raise InputError(
            f"distill: sample {row} of a batch has no token to learn: its completion is all mask; take it out"
        )
    lengths, first = mask.sum(1), learned.int().argmax(1)
    counts = torch.maximum(first + 1, torch.minimum(lengths - 1, torch.full_like(lengths, least)))
    return [row[:count] for row, count in zip(ids, counts.tolist(), strict=True)]


def answers_of(batch: Batch, prompts: Sequence[Tensor]) -> list[Tensor]:
    """What follows the prompts (`prompts_of`) in a batch: the data's answers, int64 [N]."""
    ids, mask = batch.inputs
    return [row[len(p) : n] for row, p, n in zip(ids, prompts, mask.sum(1).tolist(), strict=True)]


def answered(prompts: Sequence[Tensor], answers: Sequence[Tensor], pad: int = 0) -> Batch:
    """Prompts int64 [P] with their answers int64 [N] behind them, as a batch that learns the answers alone.

    It has no keys, as no answer is one of the data's.
    """
    texts = [torch.cat([prompt, answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = (t.to(texts[0].device) for t in padded(texts, pad))
    targets = torch.full_like(ids, UNLABELLED)
    for row, prompt, answer in zip(targets, prompts, answers, strict=True):
        row[len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return Batch((ids, mask), targets, None)
