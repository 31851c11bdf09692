"""A critic: in which order it puts the student's answers, what learns from which of them, and what `ranking` says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_decoder import VOCABULARY, sequence_task, sequences, small_decoder
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.sequences import answers_of, prompts_of
from pqk.errors import InputError
from pqk.knowledge import (
    JSD,
    ByCritic,
    ByStudent,
    CrossEntropy,
    Ends,
    FrozenTeacher,
    Ranking,
    Term,
    TokenSampling,
    View,
    generate,
)
from pqk.knowledge.answers.authors import Desk
from pqk.knowledge.objective import Distillation
from pqk.passes import Distill
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task

TASK = sequence_task()
HOW = ByCritic(max_new_tokens=5, samples=3)
TEACHER = small_decoder(7)


def desk(student: nn.Module, task: Task = TASK) -> Desk:
    return Desk(student, FrozenTeacher(TEACHER), task, 3)


def low(prompt: Tensor, answers: Sequence[Tensor]) -> list[float]:
    """A taste: the share of tokens in the lower half of the vocabulary."""
    return [float((a < VOCABULARY // 2).double().mean()) for a in answers]


def likelihood(ids: Tensor, start: int, stop: int) -> float:
    """Mean log-likelihood of tokens `start` to `stop` of one text, by the teacher."""
    with torch.no_grad():
        logs = TEACHER(ids[None, :stop], torch.ones(1, stop, dtype=torch.int64))[0].log_softmax(-1)
    return float(logs[torch.arange(start - 1, stop - 1), ids[start:stop]].mean())


# ---- the order


@pytest.mark.parametrize("data", [True, False])
def test_the_best_stands_first_by_what_the_teacher_finds_likely(data: bool) -> None:
    batch = next(sequences().batches(0))
    written = replace(HOW, data=data).make(desk(small_decoder(0)))(batch, 0.0)
    assert written is not None and written.scores is not None and written.instead
    count = 4 if data else 3
    assert written.scores.shape == (4, count)
    assert torch.equal(written.scores, written.scores.sort(1, descending=True).values)
    (ids, mask), prompts = written.batch.inputs, prompts_of(batch)
    for row, length in enumerate(mask.sum(1).tolist()):
        prompt = prompts[row // count]
        assert torch.equal(ids[row, : len(prompt)], prompt)
        expected = likelihood(ids[row], len(prompt), length)
        assert float(written.scores.flatten()[row]) == pytest.approx(expected, abs=1e-4)
    texts = [row[:n].tolist() for row, n in zip(ids, mask.sum(1).tolist(), strict=True)]
    given = [[*p.tolist(), *a.tolist()] for p, a in zip(prompts, answers_of(batch, prompts), strict=True)]
    assert all((text in texts[4 * i : 4 * i + 4]) for i, text in enumerate(given)) == data


def test_a_function_of_the_task_ranks_as_well() -> None:
    task = sequence_task(critic=low)
    batch = next(sequences().batches(0))
    written = replace(HOW, critic="task").make(desk(small_decoder(0), task))(batch, 0.0)
    assert written is not None and written.scores is not None
    (ids, mask), prompts = written.batch.inputs, prompts_of(batch)
    for row, length in enumerate(mask.sum(1).tolist()):
        prompt = prompts[row // 4]
        assert low(prompt, [ids[row, len(prompt) : length]]) == pytest.approx([float(written.scores.flatten()[row])])


# ---- what terms see


def view_of(answers: Any, *terms: Term) -> list[View]:
    views: list[View] = []

    class Watching:
        def __init__(self, term: Term) -> None:
            self.term = term

        def __getattr__(self, name: str) -> Any:
            return getattr(self.term, name)

        def __call__(self, view: View, projector: nn.Module | None) -> Tensor:
            views.append(view)
            return self.term(view, projector)

    student = small_decoder(0).train()
    objective = Distillation(terms, TASK, student, FrozenTeacher(TEACHER), author=answers.make(desk(student)))
    objective.terms = [Watching(t) for t in objective.terms]  # type: ignore[misc]
    losses = objective(objective.wrap(student), next(sequences().batches(0)))
    losses.sum().backward()
    assert losses.shape == (4,) and all(p.grad is not None for p in student.parameters())
    return views


def test_ranking_sees_all_answers_and_the_others_the_best() -> None:
    ranked, best, judged = view_of(HOW, Ranking(), CrossEntropy(), JSD())
    assert ranked.scores is not None and ranked.scores.shape == (4, 4)
    for view in (best, judged):
        assert view.scores is None and len(view.targets) == 4
        assert torch.equal(view.inputs[0], ranked.inputs[0][::4]) and torch.equal(view.student, ranked.student[::4])
    assert judged.teacher.shape == judged.student.shape


def test_ranking_by_hand() -> None:
    """Two prompts with three answers of one or two tokens; ties count for nothing."""
    logits = torch.zeros(6, 2, 3, dtype=torch.float64)
    logits[:, :, 0] = torch.tensor([[1.0, 1], [3, 0], [2, 2], [0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    labels = torch.tensor([[0, 0], [0, -100], [0, 0], [0, 0], [0, -100], [1, 0]])
    scores = torch.tensor([[0.9, 0.5, 0.5], [3.0, 2.0, 1.0]])
    view = View(logits, None, labels, {}, {}, TASK, scores=scores)

    def p(z: float, label: int = 0) -> float:
        logs = torch.tensor([z, 0.0, 0.0], dtype=torch.float64).log_softmax(0)
        return float(logs[label])

    first = max(0, p(3) - p(1)) + max(0, p(2) - p(1))
    second = max(0, p(1) - p(0)) + max(0, (p(0, 1) + p(1)) / 2 - p(0)) + max(0, (p(0, 1) + p(1)) / 2 - p(1))
    assert Ranking()(view, None).tolist() == pytest.approx([first, second], abs=1e-12)
    ahead = Ranking(margin=10.0)(view, None)
    pairs = [(p(1), p(3)), (p(1), p(2))]
    assert float(ahead[0]) == pytest.approx(sum(10 - a + b for a, b in pairs), abs=1e-9)
    plain = View(logits.requires_grad_(), None, labels, {}, {}, TASK)
    assert Ranking()(plain, None).tolist() == [0.0] * 6  # the data's answers, which nobody ranked


# ---- training


def test_the_student_learns_what_the_critic_likes() -> None:
    task = sequence_task(critic=low)
    teacher, student = small_decoder(7).requires_grad_(False), small_decoder(0)
    start = Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1).enter("00-distill"))
    prompts = [p for b in sequences(16, 4).batches() for p in prompts_of(b)]

    def liked() -> float:
        found = generate(student, prompts, TokenSampling(max_new_tokens=5), range(16), Ends((2,), 48))
        return sum(low(p, [a])[0] for p, a in zip(prompts, found, strict=True)) / 16

    before = liked()
    answers = replace(HOW, critic="task", data=False)
    pass_ = Distill(
        terms=(Ranking(), CrossEntropy(weight=0.3)), answers=answers, epochs=10, learning_rate=1e-2, optimizer="adamw"
    )
    pass_.apply(start, task)
    assert liked() > before + 0.15


# ---- recipes and refusals


def test_a_recipe_says_who_ranks() -> None:
    text = (
        '[[pass]]\nname = "distill"\nterms = [{ term = "cross_entropy" }, { term = "ranking", margin = 0.1 }]\n'
        'answers = { by = "critic", samples = 8, critic = "task" }\n'
    )
    recipe = Recipe.loads(text)
    expected = Distill(terms=(CrossEntropy(), Ranking(margin=0.1)), answers=ByCritic(samples=8, critic="task"))
    assert recipe.passes[0] == expected and Recipe.loads(recipe.dumps()) == recipe


def test_what_cannot_be_ranked_is_refused_before_training() -> None:
    with pytest.raises(InputError, match="ranking compares several answers to a prompt"):
        Distill(terms=(CrossEntropy(), Ranking()))
    with pytest.raises(InputError, match="ranking compares several answers to a prompt"):
        Distill(terms=(JSD(), Ranking()), answers=ByStudent())
    with pytest.raises(InputError, match="Ranking must not be the only term"):
        Distill(terms=(Ranking(),), answers=HOW)
    with pytest.raises(InputError, match="all alike"):
        ByCritic(temperature=0)
    by_task = Distill(terms=(CrossEntropy(),), answers=replace(HOW, critic="task"))
    reason = by_task.why_not_applied(TASK, torch.zeros(2, 5, VOCABULARY))
    assert reason is not None and "Task(critic=…)" in reason
    with pytest.raises(InputError, match="critic is a int and must be a function"):
        sequence_task(critic=3)
    wrong = (
        (lambda p, a: [0.0] * 9, "for 1 answers"),
        (lambda p, a: [float("nan")], "finite"),
        (lambda p, a: None, "gave None for 1 answers"),
        (lambda p, a: ["good"] * len(a), r"gave \['good'\] for 1 answers"),
        (lambda p, a: {}["the service"], "the task's critic raised KeyError: 'the service'"),
    )
    for critic, said in wrong:
        with pytest.raises(InputError, match=said):
            replace(HOW, critic="task").make(desk(small_decoder(0), sequence_task(critic=critic)))
