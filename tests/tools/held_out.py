"""What files that continue texts say of held-out ones, teacher forced, and how they go on with their first words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pqk.core.onnxruntime_session import Continuing, session
from pqk.core.steps import Steps
from pqk.generation.greedy import Limits, likeliest
from pqk.task.classes import IGNORED
from pqk.task.task import Task


@dataclass(frozen=True)
class Greedy:
    """Which texts are continued, and how far."""

    texts: int = 0
    """how many, the first ones that are longer than the prompt"""
    prompt: int = 16
    """tokens"""
    new_tokens: int = 64


@dataclass(frozen=True)
class Answers:
    """What one file says of all held-out texts."""

    choices: Tensor
    """the most likely next token at every place where there is one"""
    nats: float
    """per token"""
    continuations: list[list[int]]


def answers(path: Path, task: Task, threads: int, greedy: Greedy = Greedy()) -> Answers:
    """Of the evaluation data of `task`, text by text."""
    run = session(path, threads=threads)
    assert isinstance(run, Continuing)
    steps = Steps(run)
    choices, nats, continuations = [], [], []
    for batch in task.evaluation.batches():
        (ids, mask), targets = batch.inputs[:2], batch.targets
        for row, length, wanted in zip(ids, mask.sum(1).tolist(), targets, strict=True):
            text = row[:length].tolist()
            scores = torch.from_numpy(steps(text, steps.empty, length)[0])
            wanted = wanted[:length]
            learned = wanted != IGNORED
            choices.append(scores.argmax(-1)[learned])
            nats.append(nn.functional.cross_entropy(scores[learned], wanted[learned], reduction="none"))
            if len(continuations) < greedy.texts and length > greedy.prompt:
                prompt = text[: greedy.prompt]
                continuations.append(likeliest(steps, steps.empty, prompt, greedy.new_tokens, Limits())[0])
    return Answers(torch.cat(choices), float(torch.cat(nats).double().mean()), continuations)


def compared(mine: Answers, floats: Answers) -> dict[str, Any]:
    """What is the same, as shares, and how long greedy texts are the same."""
    found: dict[str, Any] = {
        "agreement": round(float((mine.choices == floats.choices).double().mean()), 5),
        "nats_per_token": round(mine.nats, 4),
    }
    pairs = list(zip(mine.continuations, floats.continuations, strict=True))
    if not pairs:
        return found
    prefixes = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    return found | {
        "greedy_texts_alike": round(sum(a == b for a, b in pairs) / len(pairs), 4),
        "greedy_tokens_before_divergence": round(sum(prefixes) / len(prefixes), 2),
    }
