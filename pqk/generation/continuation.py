"""Texts continued by an artifact: a prompt in, pieces of text out, each token from what is kept of those before.

from pqk.generation.continuation import Continuation, Sampling

model = Continuation("out/stories")
for piece in model.stream("Once upon a time", Sampling(max_tokens=100)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pqk.core.onnxruntime_session import Continuing, EncoderDecoderSession, session
from pqk.core.steps import Steps
from pqk.data.tokenizing import open_tokens
from pqk.deploy.artifact import Artifact, deployed_file
from pqk.errors import InputError
from pqk.generation.greedy import Limits
from pqk.models.hub import quietly, read_tokenizer
from pqk.settings import settings

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""what bytes that are no whole character yet are shown as"""


@settings
class Sampling:
    """How the next token is chosen, and how many are."""

    max_tokens: int = Field(default=128, ge=1)
    """tokens at most, beside the prompt's"""
    temperature: float = Field(default=0.0, ge=0)
    """0: always the likeliest token; else one is drawn, with the logits divided by this"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """tokens are drawn from the likeliest that have this probability together (Holtzman et al. 2020, "The Curious Case
    of Neural Text Degeneration", section 3.1)"""
    seed: int = 0
    """of the draws"""


@dataclass
class Pace:
    """What a text took."""

    prompt: int = 0
    """tokens of the prompt"""
    tokens: int = 0
    """tokens that were added"""
    first_ms: float = 0.0
    """from the prompt to the first token"""
    per_second: float = 0.0
    """tokens a second after the first"""
    stopped: Literal["end", "max_tokens", "positions"] | None = None
    """what it stopped at: the token that ends texts, as many tokens as asked for, or the model's last position"""


class Continuation:
    """An artifact that continues texts, opened: its model.onnx in ONNX Runtime, and its tokenizer.

    Args:
        folder: an artifact whose task generates; every file is checked against its manifest.
        threads: of ONNX Runtime.

    Raises:
        InputError: the folder is no such artifact, has been changed, or transformers is not installed.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        self.folder = Artifact.load(folder).folder
        path = deployed_file(self.folder)
        run = session(path, threads=threads) if path.is_file() else None
        if not isinstance(run, Continuing | EncoderDecoderSession):
            raise InputError(
                f"{self.folder} continues no texts: its {path.name} takes nothing that is kept of tokens before"
            )
        self._steps, self.pace = Steps(run), Pace()
        if not self._steps.reads_text:
            raise InputError(f"{self.folder} reads sounds, which are not given as text; run its two files")
        self.limits = Limits.of(self.folder)
        self.tokenizer: Any = read_tokenizer(self.folder, "generate")

    @property
    def seq2seq(self) -> bool:
        """Whether what is generated is the target of a source, and does not go on with a prompt."""
        return self._steps.encodes

    def tokens_of(self, prompt: str, chat: bool = False) -> list[int]:
        """The tokens of a prompt; `chat`: of a user's message in the tokenizer's template, ready for the answer.

        A text that is gone on with has none of the special tokens that the tokenizer puts behind texts; a source has.
        Raises `InputError` for a prompt without tokens, and for a tokenizer without a template.
        """
        with quietly():
            if chat and not getattr(self.tokenizer, "chat_template", None):
                raise InputError(f"{self.folder}: its tokenizer has no chat template; give the prompt as plain text")
            if chat:
                message = [{"role": "user", "content": prompt}]
                found = self.tokenizer.apply_chat_template(message, add_generation_prompt=True)
            elif self.seq2seq:
                found = self.tokenizer(prompt, verbose=False)["input_ids"]
            else:
                (found,) = open_tokens(self.tokenizer, [prompt])
        if not found:
            raise InputError("generate: the prompt has no tokens; give at least one word")
        return list(found)

    def tokens(self, prompt: Sequence[int], sampling: Sampling | None = None) -> Iterator[int]:
        """The tokens that follow those of `prompt`, or of its target, up to the end of the text, one by one.

        `pace` says what they took. Raises `InputError` for a prompt that fills all positions.
        """
        chosen, start = sampling or Sampling(), time.perf_counter()
        longest = self.limits.longest
        if len(prompt) >= longest:
            raise InputError(f"generate: the prompt has {len(prompt)} tokens and the model {longest} positions")
        self.pace = Pace(prompt=len(prompt))
        draws, new, total, first = np.random.default_rng(chosen.seed), list(prompt), 0, start
        kept, room, forced = self._steps.empty, longest - len(prompt), None
        if self.seq2seq:
            new = [] if self.limits.begin is None else [self.limits.begin]
            kept, room, forced = self._steps.encoded(prompt), longest - 1, self.limits.forced
        for count in range(1, min(chosen.max_tokens, room) + 1):
            total += len(new)
            scores, kept = self._steps(new, kept, total)
            new = [choose(self.limits.allowed(scores[-1]), chosen, draws) if forced is None else forced]
            forced = None
            now = time.perf_counter()
            first = now if count == 1 else first
            self.pace.tokens, self.pace.first_ms = count, (first - start) * 1e3
            self.pace.per_second = (count - 1) / (now - first) if count > 1 else 0.0
            if new[0] in self.limits.ends:
                self.pace.stopped = "end"
                return
            yield new[0]
        self.pace.stopped = "max_tokens" if self.pace.tokens == chosen.max_tokens else "positions"

    def stream(self, prompt: str, sampling: Sampling | None = None, *, chat: bool = False) -> Iterator[str]:
        """The text that follows `prompt`, or its target, in pieces of whole characters. Raises as `tokens` does."""
        found: list[int] = []
        asked = self.tokens_of(prompt, chat)
        before = [] if self.seq2seq else asked
        given = len(self._text(before))
        for token in self.tokens(asked, sampling):
            found.append(token)
            text = self._text([*before, *found])
            if not text.endswith(UNFINISHED) and len(text) > given:
                yield text[given:]
                given = len(text)
        rest = self._text([*before, *found])[given:]
        if rest:
            yield rest

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def choose(scores: NDArray[np.float32], sampling: Sampling, draws: np.random.Generator) -> int:
    """The next token of scores [V]: the likeliest, or one drawn from the likeliest."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    shares = np.exp((scores - scores.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-shares, kind="stable")
    ordered = shares[order] / shares.sum()
    most = int(np.searchsorted(ordered.cumsum(), sampling.top_p * (1 - 1e-12))) + 1
    return int(draws.choice(order[:most], p=ordered[:most] / ordered[:most].sum()))
