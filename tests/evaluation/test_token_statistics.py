"""Diagnostics of next tokens: the same numbers as those of the logits behind what is kept of them."""

from __future__ import annotations

import pytest
import torch

from pqk.evaluation.answer_statistics import calibration, control_row, fidelity, negative_transfer, teacher_health
from pqk.evaluation.token_statistics import SaidTokens, token_diagnostics, tokens_of
from pqk.report.diagnostics import TokenDiagnostics
from pqk.task.classes import IGNORED
from pqk.task.kept_tokens import kept

TEXTS, LENGTH, WORDS = 40, 9, 7


def labels() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, WORDS, (TEXTS, LENGTH), generator=g)
    return drawn.where(torch.rand(TEXTS, LENGTH, generator=g) < 0.7, IGNORED)


def scores(seed: int) -> torch.Tensor:
    noise = torch.randn(TEXTS, LENGTH, WORDS, generator=torch.Generator().manual_seed(seed))
    return noise + 1.5 * torch.nn.functional.one_hot(labels().clamp_min(0), WORDS)


def tokens(seed: int) -> SaidTokens:
    found = tokens_of(kept(scores(seed), labels()), labels())
    assert isinstance(found, SaidTokens)
    return found


def test_they_are_those_of_the_logits() -> None:
    learned = labels() != IGNORED
    (teacher, student, control), truth = (scores(seed)[learned] for seed in (1, 2, 3)), labels()[learned]
    found = token_diagnostics(tokens(1), tokens(2), {"student_no_kd": tokens(3)}, None)
    assert isinstance(found, TokenDiagnostics) and found.tokens == int(learned.sum())
    for said, logits in ((found.teacher, teacher), (found.student, student)):
        expected = calibration(logits, truth)
        assert said.accuracy == pytest.approx(expected.accuracy) and said.nats == pytest.approx(expected.nll, abs=1e-6)
        assert said.ece == pytest.approx(expected.ece, abs=1e-6)
        assert said.top == pytest.approx(teacher_health(logits).top, abs=1e-6)
    alike = fidelity(student, teacher, truth)
    assert (found.agreement, found.lost, found.won) == pytest.approx((alike.agreement, alike.lost, alike.won))
    assert found.negative_transfer == negative_transfer(student, teacher, truth, control)
    assert found.controls == (control_row(student, control, truth, "student_no_kd"),)


def test_a_copied_mistake_is_a_warning_in_tokens() -> None:
    """The teacher is wrong on a half; one student repeats that, the other knows better."""
    truth, wrong = torch.zeros(200, dtype=torch.int64), torch.arange(200) % 2

    def said(choices: torch.Tensor) -> SaidTokens:
        return SaidTokens(torch.ones(200).double(), choices, torch.ones(200).double(), truth)

    found = token_diagnostics(said(wrong), said(wrong), {"student_no_kd": said(truth)}, None)
    assert isinstance(found, TokenDiagnostics) and found.negative_transfer.copied == 1.0
    assert "(100 tokens) the student repeats" in str(found.negative_transfer.warning)
    assert "by 50.00% of tokens" in str(found.controls[0].warning)
    alone = token_diagnostics(said(truth), said(truth), {}, "it was not trained")
    assert (
        isinstance(alone, TokenDiagnostics) and alone.negative_transfer.control_reason == "the teacher is never wrong"
    )
    assert alone.student.accuracy == alone.student.top == 1.0 and alone.student.ece == 0.0


def test_what_is_no_such_thing_is_told_apart() -> None:
    outputs = kept(scores(1), labels())
    assert tokens_of(scores(1), labels()) is None
    assert tokens_of(outputs, None) == "the evaluation data has no labels"
    assert tokens_of(outputs, torch.full_like(labels(), IGNORED)) == "no token of the evaluation data has a label"
    broken = {**outputs, "loss": outputs["loss"] / 0}
    assert tokens_of(broken, labels()) == "some logits are NaN or infinite"
    other = SaidTokens(*(getattr(tokens(1), name)[:-1] for name in ("losses", "choices", "top", "labels")))
    assert token_diagnostics(tokens(1), other, {}, None) == "teacher and student were shown other tokens"
