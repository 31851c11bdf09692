"""A teacher that has read a text first: it answers as if the student's prompts began with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_decoder import sequence_task, sequences, small_decoder
from torch import nn

from pqk.errors import InputError
from pqk.knowledge import ByStudent, ByTeacher, FromContext, FromModule, FrozenTeacher, ReverseKL
from pqk.knowledge.answers.authors import Desk
from pqk.knowledge.answers.generation import Ends, TokenSampling, generate
from pqk.knowledge.objective import Distillation
from pqk.knowledge.sources import TeacherContext
from pqk.knowledge.teachers.context import ContextTeacher

BATCH = next(sequences().batches(0))
TOKENS = torch.tensor([9, 8, 7, 6])


class Letters:
    """A tokenizer whose tokens are the numbers of a text's letters, behind one that begins it."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) - ord("a") + 3 for c in text]}


class EndedLetters(Letters):
    """The same, with a token behind that ends the text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": super().__call__(text, add_special_tokens)["input_ids"] + [2] * add_special_tokens}


def test_it_reads_its_text_behind_what_begins_one_whatever_ends_it() -> None:
    model = small_decoder(7)
    answers = []
    for letters in (Letters(), EndedLetters()):
        read: Any = lambda name, tokenizer=letters: (nn.Identity(), tokenizer)  # noqa: E731
        context = TeacherContext(model, model, (), "fp32", BATCH.inputs, language_model=read)
        answers.append(FromContext(text="dogs", tokenizer="letters").make(context)(BATCH)[0])
    torch.testing.assert_close(*answers)


def test_it_answers_as_with_the_text_before_each_prompt() -> None:
    model, points = small_decoder(7), ["model.model.norm"]
    answer, features = ContextTeacher(FrozenTeacher(model, points), TOKENS)(BATCH)
    ids, mask = BATCH.inputs
    for row, n in enumerate(mask.sum(1).tolist()):
        whole = torch.cat([ids[row, :1], TOKENS, ids[row, 1:n]])[None]
        with torch.no_grad():
            want = model(whole, torch.ones_like(whole))[0, 4:]
        torch.testing.assert_close(answer[row, :n], want, atol=1e-5, rtol=1e-5)
    assert answer.shape[:2] == ids.shape and features[points[0]].shape[:2] == ids.shape


def test_what_it_writes_is_written_under_the_text() -> None:
    model = small_decoder(7)
    desk = Desk(small_decoder(0), ContextTeacher(FrozenTeacher(model), TOKENS), sequence_task(), 3)
    written = ByTeacher(max_new_tokens=6).make(desk)(BATCH, 0.0)
    assert written is not None
    prompts = [torch.cat([row[:1], TOKENS, row[1:3]]) for row in BATCH.inputs[0]]
    want = generate(model, prompts, TokenSampling(max_new_tokens=6, temperature=0), [0] * 4, Ends((2,)))
    for row, answer in enumerate(want):
        assert torch.equal(written.batch.targets[row, 2 : 2 + len(answer)], answer)


def test_a_student_learns_to_do_without() -> None:
    """By itself as it was, over its own answers: the divergence from what it says under the text falls."""
    student = small_decoder(0)
    read: Any = lambda name: (nn.Identity(), Letters())  # noqa: E731
    context = TeacherContext(student, student, (), "fp32", BATCH.inputs, language_model=read)
    teacher = FromContext(text="dogs", tokenizer="letters").make(context)
    task = sequence_task()
    author = ByStudent(fraction=1.0, max_new_tokens=5).make(Desk(student, teacher, task, 3))
    objective = Distillation([ReverseKL()], task, student, teacher, author=author)
    fixed = Distillation([ReverseKL()], task, student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)

    def apart() -> float:
        with torch.no_grad():
            return float(fixed(fixed.wrap(student), BATCH).mean())

    before = apart()
    for _ in range(12):
        optimizer.zero_grad()
        objective(objective.wrap(student), BATCH).mean().backward()
        optimizer.step()
    assert apart() < 0.8 * before


def test_what_it_cannot_read_is_refused() -> None:
    teacher = FrozenTeacher(small_decoder(7))
    with pytest.raises(InputError, match="has no tokens"):
        ContextTeacher(teacher, torch.tensor([], dtype=torch.int64))
    with pytest.raises(InputError, match="reads texts, and these are none"):
        ContextTeacher(teacher, TOKENS).check((torch.zeros(2, 3, 4, 4),))
    assert "reads a context" in str(ContextTeacher(teacher, TOKENS).why_not_cached())
    source = FromContext(text="dogs", tokenizer="letters", teacher=FromModule())
    assert source.why_not_cached() is not None
    with pytest.raises(InputError, match="read from a directory"):
        source.make(TeacherContext(small_decoder(7), small_decoder(0), (), "fp32", BATCH.inputs))
