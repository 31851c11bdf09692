"""Continuing texts, in torch, whatever stage the model is in: sampled or greedy, a function of each text and its seed.

A text's draws come from a generator of its own, so its answer does not depend on which texts it is in a batch with (but
for the rounding of sums in batches of another size, where two tokens are next to alike). Models that can read on with
what attention keeps of the tokens before (`extend` of `pqk.models.decoder.Decoder`) do; others read all tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from pqk.core.modes import evaluating
from pqk.data.sequences import padded
from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError
from pqk.settings import settings

NextScores = Callable[[Tensor, Tensor], Any]
"""`input_ids` and `attention_mask` int64 [B, S], padded behind -> scores [B, S, V]"""


@settings
class TokenSampling:
    """How the next token is drawn."""

    max_new_tokens: int = Field(default=128, ge=1)
    """tokens of an answer at most"""
    temperature: float = Field(default=1.0, ge=0)
    """the scores are divided by it before the softmax; 0: always the most probable token"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """draw among the fewest tokens that have this much of the probability (Holtzman et al., ICLR 2020,
    arXiv:1904.09751)"""
    top_k: int = Field(default=0, ge=0)
    """draw among so many of the most probable tokens; 0: among all"""

    @property
    def draws_as_said(self) -> bool:
        """Whether tokens are drawn with the model's own probabilities."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class Ends:
    """What ends an answer beside its own length."""

    stop: tuple[int, ...] = ()
    """tokens that end a text, and belong to it"""
    longest: int | None = None
    """tokens of a text at most, its prompt included"""


@dataclass(frozen=True)
class Mixing:
    """Each next token is drawn from a mean of two models' probabilities."""

    share: float
    """of the other model's"""

    def pick(self, own: Tensor, other: Tensor, noise: Tensor) -> Tensor:
        """Tokens int64 [B] by probabilities [B, V] of both and numbers [2, B] in [0, 1)."""
        return drawn((1 - self.share) * own + self.share * other, noise[0])


@dataclass(frozen=True)
class Correcting:
    """Each next token is drawn by the model, and where the other one finds it unlikely, that one draws in its place."""

    among: int
    """a token is kept where it is one of so many of the other model's most probable"""

    def pick(self, own: Tensor, other: Tensor, noise: Tensor) -> Tensor:
        """Tokens int64 [B] by probabilities [B, V] of both and numbers [2, B] in [0, 1)."""
        proposed = drawn(own, noise[0])
        least = other.topk(min(self.among, other.shape[1])).values[:, -1]
        kept = other.gather(1, proposed[:, None])[:, 0] >= least
        # Whether a token is kept depends on the number that drew it: another draws in its place.
        return proposed.where(kept, drawn(other, noise[1]))


class Reader(Protocol):
    """A model in the middle of texts, of which it says what comes next."""

    def scores(self) -> Tensor:
        """Scores [B, V] of the next token."""

    def append(self, tokens: Tensor, going: Tensor) -> None:
        """Puts tokens int64 [B] behind the texts, where these go on: bool [B]."""


class CachingReader:
    """Reads with what attention keeps of the tokens before, padding before the texts."""

    def __init__(self, model: Any, prompts: Sequence[Tensor]) -> None:
        self.model, self.past = model, None
        ids, mask = padded([p.flip(0) for p in prompts], 0)
        self.ids, self.mask = (t.flip(1).to(prompts[0].device) for t in (ids, mask))

    def scores(self) -> Tensor:
        scores, self.past = self.model.extend(self.ids, self.mask, self.past)
        return widened(scores)

    def append(self, tokens: Tensor, going: Tensor) -> None:
        # What follows a text that has ended counts as padding, which has no place of its own: positions end somewhere.
        self.ids, self.mask = tokens[:, None], torch.cat([self.mask, going.long()[:, None]], 1)


class WholeReader:
    """Reads all tokens again for each new one: any model, such as a captured graph under fake-quantization."""

    def __init__(self, model: NextScores, prompts: Sequence[Tensor]) -> None:
        self.model, self.texts = model, list(prompts)
        self.known: Tensor | None = None
        self.going = list(range(len(prompts)))

    def scores(self) -> Tensor:
        texts = [self.texts[i] for i in self.going]
        ids, mask = (t.to(texts[0].device) for t in padded(texts, 0))
        scores = widened(first_tensor(self.model(ids, mask)))
        last = scores[torch.arange(len(texts)), mask.sum(1) - 1]
        if self.known is None:
            self.known = last
        else:
            self.known = self.known.index_copy(0, torch.tensor(self.going, device=last.device), last)
        return self.known

    def append(self, tokens: Tensor, going: Tensor) -> None:
        self.going = going.nonzero()[:, 0].tolist()
        for i in self.going:
            self.texts[i] = torch.cat([self.texts[i], tokens[i : i + 1]])


def reader_of(model: nn.Module | NextScores, prompts: Sequence[Tensor]) -> Reader:
    """The quickest reader that the model allows."""
    return CachingReader(model, prompts) if callable(getattr(model, "extend", None)) else WholeReader(model, prompts)


@torch.no_grad()
def generate(
    model: nn.Module | NextScores,
    prompts: Sequence[Tensor],
    sampling: TokenSampling,
    seeds: Sequence[int],
    ends: Ends,
    other: nn.Module | NextScores | None = None,
    together: Mixing | Correcting | None = None,
) -> list[Tensor]:
    """Continues texts; the model, in eval mode meanwhile, is left as it was.

    Args:
        model: `input_ids` and `attention_mask` int64 [B, S], padded behind, to scores [B, S, V]; or one that extends.
        prompts: the tokens of each text, int64 [P] with P at least 1.
        sampling: how tokens are drawn.
        seeds: of each text's draws.
        ends: what ends a text.
        other: another such model over the same tokens.
        together: how the two draw a token.

    Returns:
        Of each text the new tokens, int64 [N] with N at least 1, the one that ends it included.

    Raises:
        InputError: a prompt is empty, or leaves no room for an answer.
    """
    room = [sampling.max_new_tokens if ends.longest is None else ends.longest - len(p) for p in prompts]
    room = [min(sampling.max_new_tokens, r) for r in room]
    for row, (prompt, most) in enumerate(zip(prompts, room, strict=True)):
        if not len(prompt) or most < 1:
            raise InputError(
                f"generation: prompt {row} has {len(prompt)} tokens, and a text may have 1 to {ends.longest}: there is "
                "nothing to continue, or no room to do so"
            )
    models = [model] if other is None else [model, other]
    with ExitStack() as modes:
        for m in models:
            if isinstance(m, nn.Module):
                modes.enter_context(evaluating(m))
        readers = [reader_of(m, prompts) for m in models]
        noise = torch.stack([_draws(seed, max(room)) for seed in seeds], 1).to(prompts[0].device)
        return _written(readers, room, noise, sampling, ends, together)


def _written(
    readers: Sequence[Reader],
    room: Sequence[int],
    noise: Tensor,
    sampling: TokenSampling,
    ends: Ends,
    together: Mixing | Correcting | None,
) -> list[Tensor]:
    device = noise.device
    most, going = torch.tensor(room, device=device), torch.ones(len(room), dtype=torch.bool, device=device)
    stop = torch.tensor(ends.stop, dtype=torch.int64, device=device)
    counts, columns = torch.zeros_like(most), []
    for step in range(int(most.max())):
        probabilities = [next_probabilities(r.scores(), sampling) for r in readers]
        own, now = probabilities[0], noise[..., step]
        if len(sizes := {p.shape[1] for p in probabilities}) > 1:
            raise InputError(
                f"generation: those that write together know {min(sizes)} and {max(sizes)} tokens, and must know the "
                'same; let the student write, answers = { by = "student" }, or take a teacher over its tokens'
            )
        tokens = drawn(own, now[0]) if together is None else together.pick(own, probabilities[1], now)
        columns.append(tokens)
        counts += going
        going = going & ~torch.isin(tokens, stop) & (counts < most)
        if not bool(going.any()):
            break
        for reader in readers:
            reader.append(tokens, going)
    written = torch.stack(columns, 1)
    return [row[:count] for row, count in zip(written, counts.tolist(), strict=True)]


def next_probabilities(scores: Tensor, sampling: TokenSampling) -> Tensor:
    """The probabilities [B, V], in float64, with which tokens are drawn by scores [B, V]."""
    if sampling.temperature == 0:
        return torch.zeros_like(scores, dtype=torch.float64).scatter(1, scores.argmax(1, keepdim=True), 1.0)
    p = (scores.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        least = p.topk(min(sampling.top_k, p.shape[1])).values[:, -1:]
        p = p.where(p >= least, 0.0)
    if sampling.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # what the more probable ones have
        p = torch.zeros_like(p).scatter(1, order, ordered.where(before < sampling.top_p * p.sum(-1, keepdim=True), 0.0))
    return p / p.sum(-1, keepdim=True)


def drawn(probabilities: Tensor, noise: Tensor) -> Tensor:
    """A token int64 [B] of each row of probabilities [B, V]: where their running sum passes `noise` [B], in [0, 1)."""
    sums = probabilities.cumsum(-1)
    found = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True)[:, 0]
    last = probabilities.shape[1] - 1 - (probabilities.flip(1) > 0).int().argmax(1)
    return torch.minimum(found, last)


def _draws(seed: int, count: int) -> Tensor:
    """Numbers in [0, 1), float64 [2, count], of which the first row draws and the second corrects."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for _ in range(2)])
