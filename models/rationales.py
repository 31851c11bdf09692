"""Tables of questions with worked answers, made into what a small student can learn from.

Each function takes and gives columns: `prompt` and `completion` of `pqk.models.language.language_task`, or those that a
teacher wrote. All that is chosen is a function of the rows and the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pqk.errors import InputError

Columns = dict[str, list[Any]]
LABEL, RATIONALE = "[label] ", "[rationale] "
"""what stands before a question of each of the two tasks"""
Parse = Callable[[str], Any]
"""a text -> the answer in it, which must be hashable; None: there is none"""


def step_by_step(
    questions: Sequence[str],
    rationales: Sequence[str],
    answers: Sequence[str],
    weight: float = 1.0,
    marks: tuple[str, str] = (LABEL, RATIONALE),
) -> Columns:
    """Two tasks, told apart by what stands before the question: to answer, and to reason.

    Hsieh et al., Distilling Step-by-Step, ACL Findings 2023, arXiv:2305.02301, section 3.2: the loss of the answers
    plus `weight` times that of the rationales. The weight is a share of the rows: of 0.5 every second rationale is
    there, of 2 each is there twice. In use a question is asked with the first mark, and no rationale is written.

    Args:
        questions: what is asked.
        rationales: the worked steps.
        answers: what comes out.
        weight: of the rationales' loss beside that of the answers.
        marks: what stands before a question that is to be answered, and before one that is to be worked.

    Raises:
        InputError: the columns differ in length, the weight is negative, or the marks are the same.
    """
    _same_length(questions=questions, rationales=rationales, answers=answers)
    if weight < 0:
        raise InputError(f"rationales: weight = {weight:g} must not be negative")
    if marks[0] == marks[1]:
        raise InputError(f"rationales: both tasks have the mark {marks[0]!r}, so none can be asked for")
    rows = [(marks[0] + q, a) for q, a in zip(questions, answers, strict=True)]
    for i, (q, r) in enumerate(zip(questions, rationales, strict=True)):
        rows += [(marks[1] + q, r)] * (int((i + 1) * weight) - int(i * weight))
    return _columns(rows)


def mixed(
    questions: Sequence[str], one: Sequence[str], other: Sequence[str], share: float = 0.2, seed: int = 0
) -> Columns:
    """Each question with one of two answers, in the first way for a `share` of the questions, drawn by the seed.

    Li et al., "Small Models Struggle to Learn from Strong Reasoners", arXiv:2502.12143, "Mix Distillation": long
    reasoning beside short, or a strong teacher's beside a weak one's, as a small student cannot follow all of it.

    Raises:
        InputError: the columns differ in length, or the share is not from 0 to 1.
    """
    _same_length(questions=questions, one=one, other=other)
    if not 0 <= share <= 1:
        raise InputError(f"rationales: share = {share:g} must be from 0 to 1")
    chosen = set(random.Random(seed).sample(range(len(questions)), round(share * len(questions))))
    return _columns([(q, one[i] if i in chosen else other[i]) for i, q in enumerate(questions)])


def adaptive(
    questions: Sequence[str],
    rationales: Sequence[str],
    answers: Sequence[str],
    difficulty: Sequence[float],
    least: float,
) -> Columns:
    """The worked answer where a question is difficult, the answer alone where it is not.

    Rationales cost tokens, in training and in use, and pay where a question takes steps. The difficulty may be the
    student's own loss on the answer, or one minus how far it agrees with itself (`agreement`).

    Args:
        questions: what is asked.
        rationales: the worked steps, which the answer follows.
        answers: what comes out.
        difficulty: of each question, a number.
        least: from which on a question counts as difficult.

    Raises:
        InputError: the columns differ in length, or a difficulty is no number.
    """
    _same_length(questions=questions, rationales=rationales, answers=answers, difficulty=difficulty)
    if wrong := [i for i, d in enumerate(difficulty, 1) if d != d]:
        raise InputError(f"rationales: the difficulty of row {wrong[0]} is no number")
    worked = [r + a if d >= least else a for r, a, d in zip(rationales, answers, difficulty, strict=True)]
    return _columns(list(zip(questions, worked, strict=True)))


def verified(
    samples: Mapping[str, Sequence[str]], right: Callable[[str, str], bool], most: int | None = None
) -> Columns:
    """The sampled answers that are right, at most so many different ones a question, the shortest first.

    Rejection sampling, or filtered best-of-n (Yuan et al., "RFT", arXiv:2308.01825): several different ways to one
    answer teach more than one way several times.

    Args:
        samples: question -> answers that a teacher, or the model itself, wrote.
        right: question, answer -> whether it counts.
        most: answers that are kept of a question; None: all different ones.

    Raises:
        InputError: none is right.
    """
    rows = []
    for question, texts in samples.items():
        good = sorted({t for t in texts if right(question, t)}, key=_by_length)
        rows += [(question, t) for t in good[:most]]
    if not rows:
        raise InputError(f"rationales: of the answers to {len(samples)} questions none is right")
    return _columns(rows)


def agreement(texts: Sequence[str], parse: Parse) -> tuple[Any, float]:
    """The answer that most of the texts come to, and the share of all texts that do (Wang et al., arXiv:2203.11171).

    Raises:
        InputError: no text has an answer.
    """
    found = Counter(a for t in texts if (a := parse(t)) is not None)
    if not found:
        raise InputError(f"rationales: of {len(texts)} texts none has an answer that can be parsed")
    answer, count = found.most_common(1)[0]
    return answer, count / len(texts)


def _by_length(text: str) -> tuple[int, str]:
    return len(text), text


def _columns(rows: Sequence[tuple[str, str]]) -> Columns:
    return {"prompt": [p for p, _ in rows], "completion": [c for _, c in rows]}


def _same_length(**columns: Sequence[Any]) -> None:
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise InputError(f"rationales: the columns have different lengths: {said}")
