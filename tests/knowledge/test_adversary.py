"""An adversary: what its discriminator sees and learns, what `group_policy` makes of that, and who trains on which."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_decoder import VOCABULARY, sequence_task, small_decoder
from torch import Tensor, nn

from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.sequences import UNLABELLED, prompts_of
from pqk.errors import InputError
from pqk.knowledge import (
    JSD,
    ByAdversary,
    ByCritic,
    ByStudent,
    CallableTeacher,
    CrossEntropy,
    Ends,
    FrozenTeacher,
    GroupPolicy,
    TokenSampling,
    View,
    generate,
)
from pqk.knowledge.answers.adversary import AdversaryAuthor, Discriminator
from pqk.knowledge.answers.authors import Desk
from pqk.knowledge.objective import Distillation
from pqk.models.language import NextTokens, Text, next_tokens
from pqk.passes import Distill
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target

HOW = ByAdversary(max_new_tokens=5, samples=3)
OWN = {"max_new_tokens": 5}


def low(count: int = 16, seed: int = 0, batch: int = 4) -> NextTokens:
    """Texts in the lower half of the vocabulary, of which three tokens are given."""
    g = torch.Generator().manual_seed(seed)
    rows = [[1, *torch.randint(3, VOCABULARY // 2, (7,), generator=g).tolist()] for _ in range(count)]
    return next_tokens([Text(row, 3) for row in rows], batch, 0)


TASK = sequence_task(low())


def author(student: nn.Module) -> AdversaryAuthor:
    made = HOW.make(Desk(student, FrozenTeacher(small_decoder(7)), TASK, 3))
    assert isinstance(made, AdversaryAuthor)
    return made


# ---- the discriminator


def test_it_sees_the_mean_state_of_the_answers_tokens() -> None:
    """The output layer is linear, so of the mean state it makes the mean of the scores."""
    model = small_decoder(7)
    discriminator = Discriminator(model)
    discriminator.norm = nn.Identity()  # type: ignore[assignment]
    batch = next(low().batches(0))
    with torch.no_grad():
        logits = model(*batch.inputs)
    for row, prompt in enumerate(prompts_of(batch)):
        length = int(batch.inputs[1][row].sum())
        found = discriminator.features(batch)[row] @ model.model.get_output_embeddings().weight.T
        torch.testing.assert_close(found, logits[row, len(prompt) : length].mean(0), atol=1e-4, rtol=1e-4)


def test_before_it_has_learned_it_says_the_same_of_all_and_loses_log_two() -> None:
    student = small_decoder(0)
    written = author(student)(next(low().batches(0)), 0.0)
    assert written is not None and written.scores is not None and written.loss is not None
    assert written.scores.tolist() == [[0.0] * 3] * 4 and not written.scores.requires_grad
    assert written.loss.tolist() == pytest.approx([math.log(2)] * 4)
    assert len(written.batch.targets) == 12 and not written.instead


def test_it_learns_to_tell_the_data_from_the_student() -> None:
    student = small_decoder(0)
    made = author(student)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3)
    losses = []
    for epoch in range(8):
        for batch in low().batches(epoch):
            written = made(batch, 0.0)
            assert written is not None and written.loss is not None
            optimizer.zero_grad()
            written.loss.mean().backward()
            optimizer.step()
            losses.append(float(written.loss.detach().mean()))
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4]) and all(p.grad is None for p in student.parameters())


# ---- the policy


def test_group_policy_by_hand() -> None:
    """Two answers of one token each: the better one has advantage 1, the other −1; equal ones have none."""
    z = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    logits = z[:, None].clone().requires_grad_()
    labels = torch.zeros(2, 1, dtype=torch.int64)
    p = z.log_softmax(-1)[:, 0].tolist()
    said = GroupPolicy()(View(logits, None, labels, {}, {}, TASK, scores=torch.tensor([[5.0, 1.0]])), None)
    assert said.tolist() == pytest.approx([-(p[0] - p[1]) / 2], abs=1e-5)
    said.sum().backward()
    assert logits.grad is not None and float(logits.grad[0, 0, 0]) < 0 < float(logits.grad[1, 0, 0])
    logits.grad = None
    GroupPolicy()(View(logits, None, labels, {}, {}, TASK, scores=torch.tensor([[2.0, 2.0]])), None).sum().backward()
    assert float(logits.grad.abs().sum()) == 0
    assert GroupPolicy()(View(logits, None, labels, {}, {}, TASK), None).tolist() == [0.0, 0.0]


def test_labels_are_learned_from_the_data_and_the_reward_from_answers() -> None:
    student = small_decoder(0).train()
    objective = Distillation(
        (GroupPolicy(), CrossEntropy()), TASK, student, FrozenTeacher(small_decoder(7)), author=author(student)
    )
    batch = next(low().batches(0))
    losses = objective(objective.wrap(student), batch)
    plain = Distillation((CrossEntropy(),), TASK, student, FrozenTeacher(small_decoder(7)))
    expected = plain(plain.wrap(student), batch) + math.log(2)  # the discriminator's, and no reward yet
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_the_student_comes_to_pass_for_the_data() -> None:
    """By the reward alone, without a label, its answers move into the half of the vocabulary that the data is of."""
    teacher, student = small_decoder(7).requires_grad_(False), small_decoder(0)
    start = Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1).enter("00-distill"))
    prompts = [p for b in low(16, 4).batches() for p in prompts_of(b)] * 4

    def share() -> float:
        found = generate(student, prompts, TokenSampling(max_new_tokens=5), range(64), Ends((2,), 48))
        return sum(float((a < VOCABULARY // 2).double().mean()) for a in found) / 64

    before = share()
    reward = GroupPolicy(ramp_up=0.25)
    how = ByAdversary(max_new_tokens=5, samples=6)
    trained = Distill(terms=(reward,), answers=how, epochs=20, learning_rate=2e-3, optimizer="adamw")
    trained.apply(start, sequence_task(low(64, batch=16)))
    assert share() > before + 0.2


# ---- recipes and refusals


def test_a_recipe_says_so() -> None:
    text = (
        '[[pass]]\nname = "distill"\nterms = [{ term = "cross_entropy" }, { term = "group_policy", weight = 0.5 }]\n'
        'answers = { by = "adversary", samples = 8 }\n'
    )
    recipe = Recipe.loads(text)
    expected = Distill(terms=(CrossEntropy(), GroupPolicy(weight=0.5)), answers=ByAdversary(samples=8))
    assert recipe.passes[0] == expected and Recipe.loads(recipe.dumps()) == recipe


def black_box(ids: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, VOCABULARY)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"terms": (GroupPolicy(),)}, "group_policy compares several answers to a prompt"),
        ({"terms": (GroupPolicy(), JSD()), "answers": ByStudent(**OWN)}, "group_policy compares several answers"),
        ({"terms": (GroupPolicy(),), "answers": ByCritic(**OWN)}, "the data's answer is among them; set data = false"),
        ({"terms": (GroupPolicy(),), "answers": ByAdversary(**OWN, top_k=5)}, "drawn at another temperature, or among"),
        ({"terms": (CrossEntropy(),), "answers": HOW}, "are scored, and no term looks at that; add group_policy"),
    ],
)
def test_what_cannot_be_learned_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distill(**fields)


def test_a_model_without_states_is_refused() -> None:
    with pytest.raises(InputError, match="all alike"):
        ByAdversary(temperature=0)
    with pytest.raises(InputError, match="is not known of a Linear; take a causal model"):
        HOW.make(Desk(nn.Linear(2, 2), CallableTeacher(black_box), TASK, 3))
    assert TASK.ignored == UNLABELLED
