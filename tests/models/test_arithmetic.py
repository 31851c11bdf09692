"""Multi-step arithmetic: what problems, their steps and answers are, and that a model can learn the language."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pqk.errors import InputError
from pqk.models.arithmetic import (
    HARDEST,
    LETTERS,
    Problem,
    answer_in,
    letters,
    mixed,
    problems,
    reasoner,
    table,
    train,
)

WORKED = Problem(7, (("*", 8), ("+", 9), ("-", 3)))


def test_a_problem_has_steps_and_an_answer_of_one_digit() -> None:
    assert WORKED.difficulty == 3 and WORKED.question == "7*8+9-3="
    assert WORKED.steps == "7*8=6;6+9=5;5-3=2;" and WORKED.short_steps == "6;5;2;"
    assert WORKED.answer == "2"
    assert Problem(3, (("-", 9),)).answer == "4" and Problem(5, (("+", 5),)).answer == "0"


@pytest.mark.parametrize("problem", problems(40, range(1, HARDEST + 1), seed=5), ids=lambda p: p.question)
def test_steps_follow_from_each_other_and_end_in_the_answer(problem: Problem) -> None:
    lines = problem.steps.rstrip(";").split(";")
    assert len(lines) == problem.difficulty
    values = [str(problem.first)]
    for line, (symbol, n) in zip(lines, problem.operations, strict=True):
        left, right = line.split("=")
        assert left == f"{values[-1]}{symbol}{n}" and int(right) == eval(left) % 10
        values.append(right)
    assert values[-1] == problem.answer and problem.short_steps == "".join(f"{v};" for v in values[1:])


def test_difficulties_take_turns_and_no_problem_comes_twice() -> None:
    found = problems(400, (2, 3), seed=2)
    assert [p.difficulty for p in found] == [2, 3] * 200 and len(set(found)) == 400
    assert found == problems(400, (2, 3), seed=2) != problems(400, (2, 3), seed=3)
    few = problems(300, (1,), seed=0)  # there are 270, all of which it finds before it repeats some
    assert len(few) == 300 and len(set(few)) == 270


@pytest.mark.parametrize("difficulties", [(), (0,), (1, 6)])
def test_other_difficulties_are_refused(difficulties: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"must be from 1 to 5"):
        problems(1, difficulties, 0)


def test_tables_have_the_steps_or_the_answer_at_once() -> None:
    assert table([WORKED], worked=True) == {"prompt": ["!7*8+9-3="], "completion": ["7*8=6;6+9=5;5-3=2;:2"]}
    assert table([WORKED], worked=False) == {"prompt": ["?7*8+9-3="], "completion": [":2"]}


@pytest.mark.parametrize(
    ("text", "answer"),
    [("7*8=6;:12", "12"), (":7", "7"), (":7 ", "7"), (":1:2", "2"), ("82", ""), (":", ""), (":8+2", ""), ("", "")],
)
def test_the_answer_is_what_stands_behind_the_last_colon(text: str, answer: str) -> None:
    assert answer_in(text) == answer


def test_a_letter_is_a_token() -> None:
    tokenizer = letters()
    ids = tokenizer(f"!{WORKED.question}")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 2 + len(WORKED.question)
    assert tokenizer.decode(tokenizer(LETTERS)["input_ids"], skip_special_tokens=True) == LETTERS


def test_training_makes_the_language_likely() -> None:
    """From 3 nats a letter, which is chance, in a few steps; with the same seed to the same weights."""
    models = [reasoner(1, 32, seed=1) for _ in range(2)]
    before = train(models[0], steps=1, batch=16, rate=0.03)
    assert before["loss"] == train(models[1], steps=1, batch=16, rate=0.03)["loss"] > 2.95
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert train(models[0], steps=20, batch=16, rate=0.03)["loss"] < 2.85  # the mean of all steps
    assert not models[0].training
    with pytest.raises(InputError, match="width=40 must be a multiple of 32"):
        reasoner(1, 40)


def test_every_difficulty_is_learned_with_steps_and_without() -> None:
    """A teacher that never saw one step worked, or two at once, would answer the other way whatever it is asked."""
    of = problems(100, range(1, HARDEST + 1), seed=0)
    kinds = Counter((p.difficulty, prompt[0] == "!") for p, (prompt, _) in zip(of, mixed(of), strict=True))
    assert kinds == {(d, worked): 15 if worked else 5 for d in range(1, HARDEST + 1) for worked in (False, True)}
