"""Multi-step arithmetic: its steps and answers, and what a model of it is trained on."""

from __future__ import annotations

from collections import Counter

import pytest

from pqk.errors import InputError
from pqk.models.arithmetic import HARDEST, WORKED, Problem, answer_in, mixed, problems, table

PROBLEM = Problem(47, (("*", 8), ("+", 9), ("-", 3)))


def test_steps_go_from_left_to_right_and_stay_below_a_hundred() -> None:
    assert PROBLEM.question == "47*8+9-3="
    assert PROBLEM.steps == "47*8=76;76+9=85;85-3=82;"
    assert PROBLEM.answer == "82"
    assert Problem(1, (("-", 3),)).answer == "98"


def test_the_answer_stands_behind_the_last_colon() -> None:
    assert [answer_in(text) for text in table([PROBLEM], worked=True)["completion"]] == ["82"]
    assert [answer_in(text) for text in ("1+1=2;", ":", ":4x", ":5:6")] == ["", "", "", "6"]


def test_every_difficulty_is_learned_with_steps_and_without() -> None:
    """Both go round in fours, so that one of them, tied to the other, would leave out a kind of problem."""
    of = problems(64, range(1, HARDEST + 1), seed=0)
    kinds = Counter((p.difficulty, prompt[0] == WORKED) for p, (prompt, _) in zip(of, mixed(of), strict=True))
    assert kinds == {(d, worked): 12 if worked else 4 for d in range(1, HARDEST + 1) for worked in (False, True)}


@pytest.mark.parametrize("difficulties", [[], [0], [1, HARDEST + 1]])
def test_difficulties_that_are_none_are_refused(difficulties: list[int]) -> None:
    with pytest.raises(InputError, match="difficulties"):
        problems(1, difficulties, seed=0)
