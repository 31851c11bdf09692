"""How often a runtime decides as itself where it reads a text in another way: once as a whole, once token by token.

Both are the same file and the same arithmetic but for the order of sums of floats. What each layer then rounds falls,
rarely, on the other side of a half, later layers round what differs by a step, and tokens that are nearly as likely
change places. Other arithmetic of the same numbers, such as torch's, cannot be held to agree with it more often.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pqk.core.onnxruntime_session import Continuing, EncoderDecoderSession, of_every_token, session
from pqk.core.steps import KeyValues, Steps
from pqk.core.task_texts import texts_of
from pqk.task.task import Task

TOKENS = 4096
"""tokens that are run one by one, at most"""


def own_agreement(path: Path, task: Task, *, optimized: bool = True) -> float | None:
    """The share of tokens of evaluation data that the file decides alike read at once and one by one.

    None of a file that keeps nothing of tokens before.
    """
    run = session(path, optimized=optimized)
    if not isinstance(run, Continuing | EncoderDecoderSession):
        return None
    steps, reading, differ, count = Steps(run), Steps(of_every_token(run)), 0, 0
    for text in texts_of(task):
        begin, learned = steps.begin(text.source), text.learned.numpy()
        whole = reading(text.tokens, begin, len(text.tokens))[0].argmax(-1)
        differ += int((whole != _one_by_one(steps, begin, text.tokens))[learned].sum())
        count += int(learned.sum())
        if count >= TOKENS:
            break
    return 1 - differ / count if count else None


def _one_by_one(steps: Steps, begin: KeyValues, tokens: list[int]) -> NDArray[np.int64]:
    """What is decided after each token."""
    found, kept = [], begin
    for total, token in enumerate(tokens, 1):
        scores, kept = steps([token], kept, total)
        found.append(scores[-1].argmax())
    return np.array(found)
