"""A file that generates, run step by step: new tokens in, scores of the next one and what is kept out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqk.core.onnxruntime_session import (
    ENCODED,
    HIDDEN,
    IDS,
    MASK,
    PAST,
    PLACES,
    PRESENT,
    SOURCE_MASK,
    Continuing,
    EncoderDecoderSession,
    kind_of,
)

KeyValues = dict[str, NDArray[Any]]
"""keys and values of all tokens so far, by the names of the file's inputs: float32, or what the file takes,
[1, G, S, D]; of an encoder-decoder the source's hidden states [1, S, C] and mask [1, S], too"""
EncoderFeeds = dict[str, NDArray[Any]]
"""an encoder's inputs by name, [1, …] each"""


class Steps:
    """A file that continues texts, or the decoder's of an encoder-decoder, opened in ONNX Runtime, one text at a time.

    Args:
        run: its session.
    """

    def __init__(self, run: Continuing | EncoderDecoderSession) -> None:
        self._encoder = run.encoder if isinstance(run, EncoderDecoderSession) else None
        self._run = run.decoder if isinstance(run, EncoderDecoderSession) else run.inner
        pasts = [i for i in self._run.get_inputs() if i.name.startswith(PAST)]
        self.empty: KeyValues = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), kind_of(i)) for i in pasts}
        self._outputs = [o.name for o in self._run.get_outputs()]
        self._inputs = {i.name for i in self._run.get_inputs()}

    @property
    def kept_bytes(self) -> int:
        """What is kept of one token that is read or written; of an encoder-decoder, not what is kept of its source."""
        own = [t for name, t in self.empty.items() if ".encoder." not in name]
        return sum(t.itemsize * t.shape[1] * t.shape[3] for t in own)

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads a source first."""
        return self._encoder is not None

    @property
    def reads_text(self) -> bool:
        """Whether what is read is tokens."""
        return self._encoder is None or any(i.name == IDS for i in self._encoder.get_inputs())

    def encoded(self, source: Sequence[int]) -> KeyValues:
        """What the decoder begins with after its encoder has read the tokens of a source."""
        ids = np.array([source])
        return self.begin({IDS: ids, MASK: np.ones_like(ids)})

    def begin(self, source: EncoderFeeds) -> KeyValues:
        """What a text begins with: nothing, or what the encoder, where there is one, makes of its source."""
        if self._encoder is None:
            return self.empty
        hidden = self._encoder.run([HIDDEN], source)[0]
        masked = {SOURCE_MASK: source[MASK]} if SOURCE_MASK in self._inputs else {}
        return {**self.empty, ENCODED: hidden, **masked}

    def __call__(self, new: Sequence[int], kept: KeyValues, total: int) -> tuple[NDArray[np.float32], KeyValues]:
        """Scores [S, V] of what follows each of the S `new` tokens, the last of `total`, and what is kept of all.

        Scores are [1, V], of the last token, where the file gives no others.
        """
        feeds = {IDS: np.array([new]), **kept}
        if MASK in self._inputs:
            feeds[MASK] = np.ones((1, total), np.int64)
        if PLACES in self._inputs:
            feeds[PLACES] = np.arange(total - len(new), total)[None]
        found = dict(zip(self._outputs, self._run.run(None, feeds), strict=True))
        scores = next(value for name, value in found.items() if not name.startswith(PRESENT))
        return scores[0], {name: found.get(PRESENT + name.removeprefix(PAST), old) for name, old in kept.items()}
