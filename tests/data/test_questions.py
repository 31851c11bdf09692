"""A black box: every answer is asked for once, whatever it does, and what it does not say is told in words."""

from __future__ import annotations

import _thread
import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pqk.data.answer_file import AnswerFile
from pqk.data.questions import Asking, answers_of_table, ask, estimate
from pqk.errors import InputError

QUICK: dict[str, Any] = {"pause_seconds": 0, "timeout_seconds": 5}
PROMPTS = ["one", "two", "three"]


class Box:
    """A black box that does with each call what it is told, then answers."""

    def __init__(self, *does: Any) -> None:
        self.does, self.calls = list(does), Counter[str]()

    def __call__(self, prompt: str) -> Any:
        self.calls[prompt] += 1
        first = self.does.pop(0) if self.does else "answer"
        if isinstance(first, BaseException):
            raise first
        if isinstance(first, threading.Event):
            first.wait()
        return f"{prompt} {self.calls[prompt]}" if first == "answer" else first


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    path, box = tmp_path / "a.jsonl", Box()
    asked = ask(box, [*PROMPTS, "one"], AnswerFile(path, "box"), Asking(samples=2, **QUICK))
    assert asked.queries == 6 and asked.answers == [
        ["one 1", "one 2"],
        ["two 1", "two 2"],
        ["three 1", "three 2"],
        ["one 1", "one 2"],
    ]
    again = ask(box, PROMPTS, AnswerFile(path, "box"), Asking(samples=2, **QUICK))
    assert again.queries == 0 and again.answers == asked.answers[:3]
    more = ask(box, [*PROMPTS, "four"], AnswerFile(path, "box"), Asking(samples=3, **QUICK))
    assert more.queries == 6 and AnswerFile(path, "box").queries == 12 and sum(box.calls.values()) == 12


def test_a_call_that_raises_stalls_or_says_nothing_is_repeated(tmp_path: Path) -> None:
    stalled = threading.Event()
    box = Box(ValueError("no\nway"), "  ", {"text": "x"}, None, "a\ud83d", SystemExit(3), KeyboardInterrupt(), stalled)
    how = Asking(retries=8, pause_seconds=0, timeout_seconds=0.05)
    path = tmp_path / "a.jsonl"
    asked = ask(box, ["one"], AnswerFile(path, "box"), how)
    stalled.set()
    assert asked.answers == [["one 9"]] and asked.queries == 9
    for said, reason in zip(
        [
            "no", "an empty text", "a dict and no text", "a NoneType and no text", r"half a character (\ud83d at 1)",
            "it raised SystemExit: 3", "it raised KeyboardInterrupt", "within 0.05 seconds",
        ],
        asked.failures, strict=True,
    ):  # fmt: skip
        assert said in reason
    assert AnswerFile(path, "box").queries == 9


def test_the_users_interrupt_stops_the_run() -> None:
    """It comes in the main thread, whatever the box is doing."""
    stalled = threading.Event()

    def interrupted(prompt: str) -> str:
        _thread.interrupt_main()
        stalled.wait(5)
        return prompt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupted, PROMPTS, AnswerFile(None, ""), Asking(**QUICK))
    stalled.set()


def test_without_a_file_another_run_asks_for_everything() -> None:
    with pytest.raises(InputError, match="another run asks for everything again, unless .* give a `cache`") as found:
        ask(Box("answer", *[OSError("down")] * 9), PROMPTS, AnswerFile(None, ""), Asking(retries=0, **QUICK))
    assert "kept in" not in str(found.value)


def test_a_box_that_is_down_is_left_alone_and_asked_for_the_rest_later(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    prompts = [f"p{i}" for i in range(20)]
    box = Box("answer", "answer", *[OSError("refused")] * 100)
    how = Asking(retries=1, give_up_after=2, **QUICK)
    with pytest.raises(
        InputError, match=r"18 of 20 prompts have no answer.*refused.*another run asks for the rest only"
    ):
        ask(box, prompts, AnswerFile(path, "box"), how)
    assert sum(box.calls.values()) == 2 + 4
    rest = Box()
    asked = ask(rest, prompts, AnswerFile(path, "box"), how)
    assert asked.queries == 18 and not {"p0", "p1"} & set(rest.calls)


def test_it_goes_on_with_what_is_kept(tmp_path: Path) -> None:
    """A second sample that fails leaves the first; a prompt without any is left out where that is allowed."""
    box = Box("answer", *[OSError("down")] * 100)
    how = Asking(samples=2, retries=0, missing=0.7, **QUICK)
    asked = ask(box, PROMPTS, AnswerFile(tmp_path / "a.jsonl", "box"), how)
    assert asked.answers == [["one 1"], [], []]
    assert any("2 prompts without an answer are left out" in note for note in asked.notes)
    with pytest.raises(InputError, match="3 of 3 prompts"):
        ask(Box(*[OSError("down")] * 100), PROMPTS, AnswerFile(None, ""), Asking(missing=1, retries=0, **QUICK))


@pytest.mark.parametrize("prompt", ["", " \n", None, 3, "a\ud83d"])
def test_prompts_are_texts(prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt 2 (is|has half a character)"):
        ask(Box(), ["one", prompt], AnswerFile(None, ""))


def test_without_prompts_nothing_can_be_asked() -> None:
    with pytest.raises(InputError, match="there are no prompts to ask"):
        ask(Box(), [], AnswerFile(None, ""))


def test_answers_of_a_file() -> None:
    table = {"q": ["a", "b", "a"], "r": ["x", ["y", "z"], "w"]}
    assert answers_of_table(table, "q", "r") == {"a": ["x", "w"], "b": ["y", "z"]}
    for wrong, said in (
        ({"q": ["a", "b"], "r": ["x", " "]}, "row 2 of the answers has an empty completion"),
        ({"q": ["a"], "r": [["x", ""]]}, "row 1 of the answers has an empty completion"),
        ({"q": ["a", "b"], "r": ["x", ["y", "a\ud83d"]]}, "row 2 of the answers has half a character"),
        ({"q": ["a"], "r": [[]]}, "row 1"), ({"q": ["a"], "r": [7]}, "row 1"), ({"q": ["a"]}, 'no column "r"'),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            answers_of_table(wrong, "q", "r")


def test_a_distribution_is_estimated_from_samples() -> None:
    found = estimate(["a", "b", "a", "a"])
    assert list(found.shares.items()) == [("a", 0.75), ("b", 0.25)] and found.top == 0.75
    plain = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.entropy == pytest.approx(plain + 1 / 8)
    assert estimate(["a"] * 5).entropy == 0
    with pytest.raises(InputError, match="no answer"):
        estimate([])
