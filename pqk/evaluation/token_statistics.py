"""Whether distillation worked, of networks that continue texts: by what is kept of each next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pqk.data.structures import Outputs
from pqk.evaluation.answer_statistics import beside_control, confidence_error, copied_mistakes, share
from pqk.report.diagnostics import ControlVariant, TokenAnswers, TokenDiagnostics
from pqk.task.kept_tokens import CHOICE, LOSS, TOP, counted


@dataclass(frozen=True)
class SaidTokens:
    """What a network says of the tokens that have a label, [N] each."""

    losses: Tensor
    """float64, in nats"""
    choices: Tensor
    """int64"""
    top: Tensor
    """float64, the probability of the choice"""
    labels: Tensor
    """int64"""

    @property
    def right(self) -> Tensor:
        """Which choices are the labels, bool [N]."""
        return self.choices == self.labels


def tokens_of(outputs: Outputs, targets: Any) -> SaidTokens | str | None:
    """What a task keeps of next tokens; why that is not there; None where the outputs are no such thing."""
    if not isinstance(outputs, dict) or not {LOSS, CHOICE, TOP} <= outputs.keys():
        return None
    if targets is None:
        return "the evaluation data has no labels"
    learned = counted(targets)
    if not bool(learned.any()):
        return "no token of the evaluation data has a label"
    losses, choices, top = (outputs[name][learned] for name in (LOSS, CHOICE, TOP))
    if not bool(losses.isfinite().all() and top.isfinite().all()):
        return "some logits are NaN or infinite"
    return SaidTokens(losses.double(), choices, top.double().clamp(0, 1), targets[learned])


def token_diagnostics(
    teacher: SaidTokens, student: SaidTokens, controls: Mapping[ControlVariant, SaidTokens], reason: str | None
) -> TokenDiagnostics | str:
    """The part of a report. `reason`: why there is no student that was trained without the teacher."""
    if not torch.equal(teacher.labels, student.labels):
        return "teacher and student were shown other tokens"
    alone = controls.get("student_no_kd")
    return TokenDiagnostics(
        tokens=len(teacher.labels),
        teacher=_said(teacher),
        student=_said(student),
        agreement=_mean(teacher.choices == student.choices),
        lost=_mean(teacher.right & ~student.right),
        won=_mean(student.right & ~teacher.right),
        negative_transfer=copied_mistakes(
            student.choices, teacher.choices, teacher.labels, None if alone is None else alone.choices, reason, "tokens"
        ),
        controls=tuple(beside_control(student.right, said.right, name, "tokens") for name, said in controls.items()),
    )


def _said(tokens: SaidTokens) -> TokenAnswers:
    return TokenAnswers(
        accuracy=_mean(tokens.right),
        nats=float(tokens.losses.mean().clamp_min(0)),
        top=share(tokens.top.mean()),
        ece=confidence_error(tokens.top, tokens.right),
    )


def _mean(flags: Tensor) -> float:
    return float(flags.to(torch.float64).mean())
