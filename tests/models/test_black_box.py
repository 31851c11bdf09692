"""A black box as a task: its texts become rows of tokens, whoever gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from causal_models import directory, letters

from pqk.data.questions import Asking
from pqk.errors import InputError
from pqk.models.black_box import black_box_task
from pqk.models.language import NextTokens
from pqk.task.task import Task

PROMPTS = ["2 + 3 =", "1 + 1 =", "4 + 0 ="]
HELD = {"prompt": ["3 + 3 =", "5 + 1 ="], "completion": [" 6", " 6"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("model"))


def made(model: Path, teacher: Any, **options: Any) -> Task:
    return black_box_task(
        teacher, train={"prompt": PROMPTS}, directory=model, evaluation=HELD, validation=HELD, batch_size=2, **options
    )


def rows_of(task: Task) -> list[str]:
    assert isinstance(task.train, NextTokens)
    return [letters().decode(t, skip_special_tokens=True) for t in task.train.tokens]


def add(prompt: str) -> str:
    first, _, second, _ = prompt.split()
    return f" {int(first) + int(second)}"


def test_a_function_answers_once_and_its_texts_are_the_data(model: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(prompt: str) -> str:
        calls.append(prompt)
        return add(prompt)

    options: dict[str, Any] = {"cache": tmp_path, "identity": "adds", "asking": Asking(samples=2)}
    for _ in range(2):
        task = made(model, counted, **options)
        assert sorted(rows_of(task)) == sorted(f"{p}{add(p)}" for p in PROMPTS for _ in range(2))
        assert any("answered 3 prompts with 6 texts" in note for note in task.notes)
    assert sorted(calls) == sorted(PROMPTS * 2)
    batch = next(task.train.batches(0))  # type: ignore[union-attr]
    assert [int(n) for n in (batch.targets != -100).sum(1)] == [3, 3]  # " 5" and its end: the prompt is not learned
    with pytest.raises(InputError, match="need an `identity`"):
        made(model, counted, cache=tmp_path)


def test_a_file_answers_in_one_or_several_texts(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"prompt": "2 + 3 =", "completion": [" 5", " five"]}\n{"prompt": "1 + 1 =", "completion": " 2"}\n'
        '{"prompt": "4 + 0 =", "completion": " 4"}\n{"prompt": "1 + 1 =", "completion": " 2"}\n'
    )
    task = made(model, path)
    assert rows_of(task) == ["2 + 3 = 5", "2 + 3 = five", "1 + 1 = 2", "1 + 1 = 2", "4 + 0 = 4"]
    path.write_text('{"prompt": "2 + 3 =", "completion": " 5"}\n')
    with pytest.raises(InputError, match=r"2 of 3 prompts have no answer in the file, such as '1 \+ 1 ='"):
        made(model, path)
    path.write_text('{"prompt": "2 + 3 =", "completion": ""}\n')
    with pytest.raises(InputError, match="row 1 of the answers has an empty completion"):
        made(model, path)


def test_all_else_is_checked_before_anything_is_asked(model: Path) -> None:
    """An answer may cost something."""
    calls: list[str] = []

    def counted(prompt: str) -> str:
        calls.append(prompt)
        return add(prompt)

    for wrong, said in (
        ({"max_length": 2.5}, "max_length=2.5 must be a whole number"),
        ({"critic": 5}, "critic must be a function"),
        ({"cache": 5, "identity": "box"}, r"cache is a folder's name, and not int \(5"),
        ({"cache": "kept"}, "need an `identity`: the name of what gives them$"),
        ({"cache": "kept", "identity": 5}, "need an `identity`: .* a text, and not 5"),
        ({"cache": "kept", "identity": ""}, "need an `identity`: .* a text, and not ''"),
        ({"retained": {"text": ["a dog"]}}, "retained data .* has the columns text"),
    ):
        with pytest.raises(InputError, match=said):
            made(model, counted, **wrong)
    assert not calls


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (
            5,
            r"the teacher is a function from text to text, or a .jsonl file or table with its answers, and not int \(5",
        ),
        ({"prompt": PROMPTS, "completion": [" 5"]}, "different lengths: prompt 3, completion 1"),
        (lambda prompt: "a\ud83d", "it returned half a character"),
    ],
)
def test_a_teacher_without_texts_is_refused(model: Path, tmp_path: Path, teacher: Any, said: str) -> None:
    how = Asking(retries=0, pause_seconds=0)
    with pytest.raises(InputError, match=said):
        made(model, teacher, cache=tmp_path, identity="none", asking=how)


def test_rows_of_answers_are_a_table(model: Path) -> None:
    answers = [{"prompt": p, "completion": add(p)} for p in PROMPTS]
    assert rows_of(made(model, answers)) == [f"{p}{add(p)}" for p in PROMPTS]
