"""Tables of worked answers: shares are as said, and what is left out is said."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pqk.errors import InputError
from pqk.models.rationales import LABEL, RATIONALE, adaptive, agreement, mixed, step_by_step, verified

Q, R, A = ([f"{kind}{i}" for i in range(10)] for kind in "qra")


@pytest.mark.parametrize(("weight", "count"), [(0, 0), (0.5, 5), (1, 10), (2, 20), (0.3, 3)])
def test_two_tasks_with_their_weights(weight: float, count: int) -> None:
    rows = list(zip(*step_by_step(Q, R, A, weight).values(), strict=True))
    assert rows[:10] == [(LABEL + q, a) for q, a in zip(Q, A, strict=True)]
    others = rows[10:]
    assert len(others) == count and set(others) <= {(RATIONALE + q, r) for q, r in zip(Q, R, strict=True)}
    assert weight < 1 or len(set(others)) == 10


def test_the_two_tasks_may_have_other_marks() -> None:
    """Those of a tokenizer that knows few letters; equal ones could not be told apart."""
    found = step_by_step(Q[:1], R[:1], A[:1], marks=("?", "!"))
    assert found == {"prompt": ["?q0", "!q0"], "completion": ["a0", "r0"]}
    with pytest.raises(InputError, match="both tasks have the mark '!'"):
        step_by_step(Q, R, A, marks=("!", "!"))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_share_is_long(share: float) -> None:
    found = mixed(Q, R, A, share, seed=3)
    assert found["prompt"] == Q and sum(c in R for c in found["completion"]) == round(10 * share)
    assert all(c[1:] == q[1:] for q, c in zip(Q, found["completion"], strict=True))
    assert found == mixed(Q, R, A, share, seed=3)
    assert share in (0, 1) or found != mixed(Q, R, A, share, seed=4)


def test_what_is_difficult_is_worked() -> None:
    found = adaptive(Q[:3], R[:3], A[:3], [0.1, 0.5, 0.9], 0.5)
    assert found == {"prompt": Q[:3], "completion": ["a0", "r1a1", "r2a2"]}


def test_right_answers_are_kept_each_once() -> None:
    samples = {"1+1": ["2", "it is 2", "3", "2"], "2+2": ["5"]}

    def right(question: str, text: str) -> bool:
        return text.endswith("2")

    assert verified(samples, right) == {"prompt": ["1+1"] * 2, "completion": ["2", "it is 2"]}
    assert verified(samples, right, most=1)["completion"] == ["2"]
    with pytest.raises(InputError, match="of the answers to 2 questions none is right"):
        verified(samples, lambda question, text: False)


def test_agreement_is_the_share_of_all_texts() -> None:
    def parse(text: str) -> int | None:
        return int(text) if text.isdigit() else None

    assert agreement(["4", "4", "5", "no"], parse) == (4, 0.5)
    with pytest.raises(InputError, match="none has an answer"):
        agreement(["no"], parse)


@pytest.mark.parametrize("made", [
    lambda: step_by_step(Q, R[:3], A), lambda: mixed(Q, R, A[:2]), lambda: adaptive(Q, R, A, [1.0], 0),
    lambda: step_by_step(Q, R, A, -1), lambda: mixed(Q, R, A, 1.5), lambda: adaptive(Q, R, A, [math.nan] * 10, 0),
])  # fmt: skip
def test_columns_and_numbers_that_do_not_fit_are_refused(made: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="rationales: "):
        made()
