"""Asking a black box: a function from text to text, or a file of its answers, several answers to a prompt.

Every answer is kept as soon as it is there (`pqk.data.answer_file`), so a run that was stopped, or a service that was
down, costs no question twice.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from pqk.data.answer_file import AnswerFile
from pqk.data.checks import why_not_text
from pqk.errors import InputError, Reason, first_line
from pqk.settings import settings

log = logging.getLogger(__name__)

TextFunction = Callable[[str], Any]
"""a prompt -> the answer, which must be a text"""


@settings
class Asking:
    """How a black box is asked."""

    samples: int = Field(default=1, ge=1)
    """answers to a prompt"""
    retries: int = Field(default=3, ge=0)
    """how often a question is asked again that was not answered"""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """after so long a call counts as stalled; it cannot be stopped, and what it still returns is thrown away"""
    pause_seconds: float = Field(default=1.0, ge=0)
    """pause before the first retry; twice as long before each further one"""
    give_up_after: int = Field(default=3, ge=1)
    """questions in a row that get no answer, after which nothing more is asked: the box is down"""
    missing: float = Field(default=0.0, ge=0, le=1)
    """share of the prompts that may stay without any answer; they are left out"""


@dataclass(frozen=True)
class Asked:
    """What came of asking."""

    answers: list[list[str]]
    """those to each prompt, in the order of the draws; none: it is left out"""
    queries: int
    """calls of the function this time, those without an answer included"""
    failures: list[Reason]
    """why calls gave no answer, in order"""

    @property
    def notes(self) -> list[str]:
        """What a report should say."""
        given = [a for a in self.answers if a]
        total = sum(map(len, given))
        said = [
            f"a black box answered {len(given)} prompts with {total} texts; {self.queries} calls were made this time"
        ]
        if any(len(a) > 1 for a in given):
            estimates = [estimate(a) for a in given]
            top, entropy = (sum(v) / len(given) for v in ([e.top for e in estimates], [e.entropy for e in estimates]))
            said.append(
                f"of its answers to a prompt the most frequent is {top:.0%} on average, entropy {entropy:.2f} nats"
            )
        if left := len(self.answers) - len(given):
            said.append(f"{left} prompts without an answer are left out, the last because {self.failures[-1]}")
        return said


def ask(function: TextFunction, prompts: Sequence[str], kept: AnswerFile, how: Asking | None = None) -> Asked:
    """Asks for what is not kept yet, and keeps it.

    A call that raises, stalls or returns no text is repeated; where that is in vain, what is kept is gone on with.

    Args:
        function: the black box.
        prompts: what it is asked; equal ones share their answers.
        kept: where answers are read and kept.
        how: how it is asked.

    Raises:
        InputError: a prompt is no text, or too many prompts have no answer in the end.
    """
    how = Asking() if how is None else how
    if not len(prompts):
        raise InputError("black box: there are no prompts to ask")
    for row, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"black box: prompt {row} is {prompt!r:.60}, and must be a text that is not empty")
        if (reason := why_not_text(prompt)) is not None:
            raise InputError(f"black box: prompt {row} has {reason}")
    queries, failures, silent = 0, list[Reason](), 0
    for prompt, draw in [(p, draw) for draw in range(how.samples) for p in dict.fromkeys(prompts)]:
        if kept.get(prompt, draw) is not None:
            continue
        if silent >= how.give_up_after:
            log.warning("black box: %d questions in a row were not answered; going on with what is kept", silent)
            break
        answer, reasons = _answer(function, prompt, how)
        queries += len(reasons) + (answer is not None)
        kept.add([*((prompt, draw, None) for _ in reasons), *([] if answer is None else [(prompt, draw, answer)])])
        failures += reasons
        silent = silent + 1 if answer is None else 0
    asked = Asked([_answers(kept, p, how.samples) for p in prompts], queries, failures)
    empty = sum(not a for a in asked.answers)
    if empty > how.missing * len(prompts) or empty == len(prompts):
        why = failures[-1] if failures else "nothing was asked"
        raise InputError(
            f"black box: {empty} of {len(prompts)} prompts have no answer, the last because {why}; {_rest(kept)}; or "
            "let `missing` allow it"
        )
    return asked


def _rest(kept: AnswerFile) -> str:
    """What another run would have to ask."""
    if kept.path is None:
        return "another run asks for everything again, unless answers are kept: give a `cache` and an `identity`"
    return f"what was answered is kept in {kept.path}, so another run asks for the rest only"


def _answers(kept: AnswerFile, prompt: str, samples: int) -> list[str]:
    found = (kept.get(prompt, draw) for draw in range(samples))
    return [answer for answer in found if answer is not None]


def _answer(function: TextFunction, prompt: str, how: Asking) -> tuple[str | None, list[Reason]]:
    """An answer, if there is one, and why each call before it gave none."""
    reasons: list[Reason] = []
    for attempt in range(how.retries + 1):
        if attempt:
            time.sleep(how.pause_seconds * 2 ** (attempt - 1))
        value = _called(function, prompt, how.timeout_seconds)
        reason = _why_not_answered(value, how)
        if reason is None:
            return value, reasons
        reasons.append(reason)
    return None, reasons


def _why_not_answered(value: Any, how: Asking) -> Reason | None:
    """Why what a call returned or raised is no answer, else None."""
    if isinstance(value, TimeoutError):
        return f"it did not answer within {how.timeout_seconds:g} seconds"
    if isinstance(value, BaseException):
        return f"it raised {first_line(value)}"
    if not isinstance(value, str):
        return f"it returned a {type(value).__name__} and no text"
    if not value.strip():
        return "it returned an empty text"
    reason = why_not_text(value)
    return None if reason is None else f"it returned {reason}"


def _called(function: TextFunction, prompt: str, seconds: float) -> Any:
    """What a call returns or raises, or a `TimeoutError` after so long."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(function(prompt))
        except BaseException as error:  # whatever a service raises, an exit included: it ends this thread alone
            found.append(RuntimeError(first_line(error)) if isinstance(error, TimeoutError) else error)

    worker = threading.Thread(target=call, daemon=True)  # a call that stalls for ever does not keep the process alive
    worker.start()
    worker.join(seconds)
    return found[0] if found else TimeoutError()


def answers_of_table(table: Mapping[str, Sequence[Any]], prompt: str, completion: str) -> dict[str, list[str]]:
    """The answers that a table has for each prompt: a text, or a list of texts, a row; rows of one prompt are added up.

    Raises:
        InputError: a column is missing, a prompt is no text, or an answer is none or empty; it names the row.
    """
    found: dict[str, list[str]] = {}
    for name in (prompt, completion):
        if name not in table:
            raise InputError(f'black box: the answers have no column "{name}", but {", ".join(map(str, table))}')
    for row, (asked, said) in enumerate(zip(table[prompt], table[completion], strict=True), 1):
        texts = [said] if isinstance(said, str) else said
        if not isinstance(asked, str) or not isinstance(texts, list | tuple) or not texts:
            raise InputError(f"black box: row {row} of the answers is no prompt with a text or a list of texts")
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"black box: row {row} of the answers has an empty completion ({text!r:.40}); take it out"
                )
            if (reason := why_not_text(text)) is not None:
                raise InputError(f"black box: row {row} of the answers has {reason}")
        found.setdefault(asked, []).extend(texts)
    return found


@dataclass(frozen=True)
class Estimate:
    """A black box's answers to one prompt as a distribution, estimated from samples."""

    shares: dict[str, float]
    """of each answer the share of the samples, the most frequent first"""
    entropy: float
    """nats, with the correction for few samples of Miller 1955: plus (answers − 1) / (2 · samples)"""

    @property
    def top(self) -> float:
        """The share of the most frequent answer: how far the box agrees with itself."""
        return next(iter(self.shares.values()))


def estimate(answers: Sequence[str]) -> Estimate:
    """Estimates the distribution that answers to one prompt are drawn from. Raises `InputError` for none.

    Training on all samples with equal weight is training on this distribution (Kim & Rush 2016, section 3.2).
    """
    if not answers:
        raise InputError("black box: there is no answer to estimate a distribution from")
    shares = {text: count / len(answers) for text, count in Counter(answers).most_common()}
    entropy = -sum(p * math.log(p) for p in shares.values()) + (len(shares) - 1) / (2 * len(answers))
    return Estimate(shares, entropy)
