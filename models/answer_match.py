"""Exact match of answers: a text that is written to the letter, or the answer that is parsed out of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pqk.data.data import Data
from pqk.data.sequences import padded
from pqk.data.structures import Inputs, Outputs, first_tensor
from pqk.errors import InputError
from pqk.models.rationales import Parse
from pqk.task.classes import IGNORED
from pqk.task.kept_tokens import CHOICE, LOSS, counted, kept
from pqk.task.metrics import Metric

MATCH = "match"
TokenMetric = Literal["log-likelihood", "agreement", "exact_match"]
"""how a task of texts is judged: by the likelihood of the tokens that have a label, in nats per token; the share of
them that are chosen where the ones before are given; or the share of texts whose answer is the data's"""
LONGER = 2
"""a text that is parsed has at most so many times the tokens of the longest one of its batch in the data"""


def log_likelihood(outputs: Outputs, targets: Any) -> float:
    """Mean log-likelihood of what is to be learned, in nats per token: minus the cross-entropy, so higher is better.

    Args:
        outputs: what is `kept`, or scores [B, S, V].
        targets: int64 [B, S], -100 where nothing is to be learned.
    """
    return -float(_kept(outputs, targets)[LOSS][counted(targets)].double().mean())


def agreement(outputs: Outputs, targets: Any) -> float:
    """The share of tokens with a label that are chosen where those before are given. As `log_likelihood`."""
    learned = counted(targets)
    return float((_kept(outputs, targets)[CHOICE] == targets)[learned].double().mean())


def exact_match(outputs: Outputs, targets: Any) -> float:
    """The share of texts whose answer is the data's.

    Of what `ParsedAnswers` kept it is that of answers which were parsed. Of other outputs, as `log_likelihood` takes
    them, it is that of texts of which every token with a label is chosen: what is written by the likeliest tokens then
    is the data's text to the letter.
    """
    if isinstance(outputs, dict) and MATCH in outputs:
        return float(outputs[MATCH].double().mean())
    same = (_kept(outputs, targets)[CHOICE] == targets) | ~counted(targets)
    return float(same.all(1).double().mean())


def _kept(outputs: Outputs, targets: Any) -> dict[str, Tensor]:
    found = outputs if isinstance(outputs, dict) else kept(outputs, targets)
    assert isinstance(found, dict)
    return found


LIKELIHOOD = Metric("log-likelihood", "nats per token", log_likelihood)
METRICS: dict[str, Metric] = {
    "log-likelihood": LIKELIHOOD,
    "agreement": Metric("agreement with the data", "share", agreement),
    "exact_match": Metric("exact match", "share", exact_match),
}


@dataclass(frozen=True)
class ParsedAnswers:
    """What is kept of a batch where answers are parsed: that of tokens, and whether the text that the model writes has
    the data's answer, bool [B] "match".

    The model writes from what stands before the first token with a label, by its likeliest tokens, up to a token that
    ends texts; it reads all of a text again for each token, whatever runs it.
    """

    tokenizer: Any
    parse: Parse
    ends: frozenset[int]
    """tokens that end a text"""

    def __call__(self, outputs: Outputs, targets: Any) -> Outputs:
        return kept(outputs, targets)

    def asked(self, model: Callable[..., Outputs], inputs: Inputs, targets: Any) -> Outputs:
        """The same with what the model writes itself."""
        *source, ids, mask = inputs
        found = kept(model(*inputs), targets)
        assert isinstance(found, dict)
        lengths = mask.sum(1).tolist()
        starts = (targets != IGNORED).int().argmax(1) + 1
        given = [row[:start] for row, start in zip(ids, starts.tolist(), strict=True)]
        most = LONGER * max(n - len(g) + 1 for n, g in zip(lengths, given, strict=True))
        texts = written(lambda *new: first_tensor(model(*source, *new)), given, self.ends, most)
        wanted = [self.parse(self._text(row[row != IGNORED])) for row in targets]
        same = [self.parse(self._text(text)) == answer for text, answer in zip(texts, wanted, strict=True)]
        return {**found, MATCH: torch.tensor(same)}

    def _text(self, tokens: Tensor) -> str:
        text: str = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        return text

    def check(self, parts: Iterable[tuple[str, Data]]) -> None:
        """Raises `InputError` for data in which a text has no answer."""
        for what, data in parts:
            for batch in data.batches():
                for targets in batch.targets:
                    text = self._text(targets[targets != IGNORED])
                    if self.parse(text) is None:
                        raise InputError(
                            f"{what} data: no answer is parsed out of the text {text!r:.80}: see the argument "
                            "`answer`, or raise max_length where the end of texts is cut off"
                        )


@torch.no_grad()
def written(
    scores: Callable[[Tensor, Tensor], Tensor], given: Sequence[Tensor], ends: frozenset[int], most: int
) -> list[Tensor]:
    """What a model writes behind tokens int64 [P] by its likeliest ones, `most` at most: int64 [N], the end included.

    `scores` takes ids and mask int64 [B, S], padded behind, always of all texts.
    """
    texts, going = list(given), [True] * len(given)
    for _ in range(most):
        ids, mask = padded(texts, 0)
        last = mask.sum(1) - 1
        chosen = scores(ids, mask)[torch.arange(len(texts)), last].argmax(-1)
        for i, token in enumerate(chosen):
            if going[i]:
                texts[i] = torch.cat([texts[i], token[None]])
                going[i] = int(token) not in ends
        if not any(going):
            break
    return [text[len(start) :] for text, start in zip(texts, given, strict=True)]


def parser(answer: str | Parse) -> Parse:
    """The function that parses answers: a function is one; of a regular expression it is the last match's first group,
    or all of that match.

    Raises `InputError` for what is no regular expression.
    """
    if not isinstance(answer, str):
        return answer
    try:
        pattern = re.compile(answer)
    except re.error as error:
        raise InputError(f"answer = {answer!r} is no regular expression: {error}") from error

    def parse(text: str) -> Any:
        found = [*pattern.finditer(text)]
        return found[-1].group(1 if pattern.groups else 0).strip() if found else None

    return parse


def judged_by(
    metric: Metric | TokenMetric, answer: str | Parse | None, tokenizer: Any, ends: Iterable[int]
) -> tuple[Metric, Any]:
    """The metric of a task of texts, and what is kept of its outputs. Raises `InputError` for what does not fit."""
    if not isinstance(metric, Metric) and metric not in METRICS:
        raise InputError(f"metric = {metric!r}: known are {', '.join(METRICS)}, and a Metric of what is kept of tokens")
    if answer is not None and metric != "exact_match":
        raise InputError(f'answer = {answer!r} says what metric = "exact_match" compares, and that is not set')
    found = metric if isinstance(metric, Metric) else METRICS[metric]
    return found, kept if answer is None else ParsedAnswers(tokenizer, parser(answer), frozenset(ends))
