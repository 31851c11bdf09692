"""A file that continues texts, run step by step: new tokens in, scores of the next one and what is kept out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqk.core.onnxruntime_session import IDS, MASK, PAST, PLACES, PRESENT, Continuing

KeyValues = dict[str, NDArray[Any]]
"""keys and values of all tokens so far, by the names of the file's inputs: float32 [1, G, S, D]"""


class Steps:
    """A file that continues texts, opened in ONNX Runtime, one text at a time.

    Args:
        run: its session.
    """

    def __init__(self, run: Continuing) -> None:
        self._run = run.inner
        pasts = [i for i in self._run.get_inputs() if i.name.startswith(PAST)]
        self.empty: KeyValues = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in pasts}
        self._outputs = [o.name for o in self._run.get_outputs()]
        self._placed = any(i.name == PLACES for i in self._run.get_inputs())

    @property
    def kept_bytes(self) -> int:
        """What is kept of one token."""
        return sum(t.itemsize * t.shape[1] * t.shape[3] for t in self.empty.values())

    def __call__(self, new: Sequence[int], kept: KeyValues, total: int) -> tuple[NDArray[np.float32], KeyValues]:
        """Scores [S, V] of what follows each of the S `new` tokens, the last of `total`, and what is kept of all."""
        feeds = {IDS: np.array([new]), MASK: np.ones((1, total), np.int64), **kept}
        if self._placed:
            feeds[PLACES] = np.arange(total - len(new), total)[None]
        found = dict(zip(self._outputs, self._run.run(None, feeds), strict=True))
        scores = next(value for name, value in found.items() if not name.startswith(PRESENT))
        return scores[0], {name: found[PRESENT + name.removeprefix(PAST)] for name in kept}
