"""Whether distillation worked: what there was to learn, what was learned, and what should not have been.

Pure functions of outputs that were computed already: logits [N, C] of any float dtype and labels int64 [N], computed in
float64. Shares are 0 to 1, divergences in nats. All raise `InputError`, naming the shapes, where these do not fit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pqk.errors import InputError
from pqk.report.diagnostics import (
    BreakEven,
    Calibration,
    ClassAccuracy,
    ControlRow,
    ControlVariant,
    CorruptionRow,
    Fidelity,
    Interval,
    NegativeTransfer,
    TeacherHealth,
)
from pqk.report.schema import TITLES

SOFT = 0.02
"""a teacher that leaves less than this to all classes but its first teaches no more than its decisions do"""
BINS = 15
SERIOUS = 0.05
"""a warning is due where a student surely loses this much more to a corruption than its teacher, relative to itself"""
RESAMPLES = 2000

Flags = tuple[Tensor, Tensor]
"""bool [N] each: which samples are right without and with a corruption"""


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over equal bins of the top probability (Guo et al. 2017, equation 3)."""
    logits, labels = _checked(logits, labels)
    top, decided = logits.softmax(1).max(1)
    return confidence_error(top, decided == labels, bins)


def confidence_error(top: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The same of probabilities of decisions, float64 [N], and whether these are right, bool [N]."""
    index = (top * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - top)
    return share(gaps.abs().sum() / len(top))


def calibration(logits: Tensor, labels: Tensor, temperature: float | None = None, reason: str = "") -> Calibration:
    """ECE and NLL, before and after a temperature; `reason`: why there is none."""
    logits, labels = _checked(logits, labels)
    after = None if temperature is None else logits / temperature
    return Calibration(
        accuracy=_accuracy(logits, labels),
        ece=calibration_error(logits, labels),
        nll=float(F.cross_entropy(logits, labels)),
        temperature=temperature,
        ece_after=None if after is None else calibration_error(after, labels),
        nll_after=None if after is None else float(F.cross_entropy(after, labels)),
        reason=reason or "none was looked for" if after is None else None,
    )


def teacher_health(logits: Tensor, calibrated: Calibration | None = None) -> TeacherHealth:
    """Confidence, entropy and calibration of a teacher, with a warning where soft targets hold nothing to learn."""
    logits, _ = _checked(logits, None)
    log_p = logits.log_softmax(1)
    top = share(log_p.exp().amax(1).mean())
    entropy = share(-(log_p.exp() * log_p).sum(1).mean() / math.log(max(2, logits.shape[1])))
    warning = None
    if 1 - top < SOFT:
        warning = (
            f"the teacher's mean top probability is {top:.4f}: at temperature 1 its soft targets say hardly more than "
            "its decisions; use a higher temperature, or a term on features"
        )
    elif entropy > 0.98:
        warning = f"the teacher's answers are nearly uniform (mean top probability {top:.4f}); is it trained?"
    return TeacherHealth(top=top, entropy=entropy, calibration=calibrated, warning=warning)


def fidelity(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Fidelity:
    """Agreement, divergence and churn of a student against its teacher."""
    (student, labels), (teacher, _) = _checked(student, labels), _checked(teacher, labels)
    _same(student, teacher)
    s, t = student.argmax(1), teacher.argmax(1)
    agree, groups = (s == t).double(), t if labels is None else labels
    counts = torch.bincount(groups, minlength=student.shape[1])
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, groups, agree)
    per_class = tuple(float(a / n) if n else None for a, n in zip(sums, counts, strict=True))
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    kl = max(0.0, float(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean()))
    lost = won = None
    if labels is not None:
        lost = float(((t == labels) & (s != labels)).double().mean())
        won = float(((s == labels) & (t != labels)).double().mean())
    return Fidelity(agreement=float(agree.mean()), kl=kl, lost=lost, won=won, agreement_per_class=per_class)


def accuracy_by_class(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[ClassAccuracy, ...]:
    """Accuracy of teacher and student on the samples of each class that occurs, and the difference."""
    (student, checked), (teacher, _) = _checked(student, labels), _checked(teacher, labels)
    assert checked is not None
    _same(student, teacher)
    rows = []
    for label in checked.unique().tolist():
        own = checked == label
        s, t = student[own].argmax(1) == label, teacher[own].argmax(1) == label
        rows.append(
            ClassAccuracy(
                label=label,
                samples=len(s),
                teacher=float(t.double().mean()),
                student=float(s.double().mean()),
                difference=paired_difference(s, t),
            )
        )
    return tuple(rows)


def negative_transfer(
    student: Tensor, teacher: Tensor, labels: Tensor, control: Tensor | None = None, reason: str | None = None
) -> NegativeTransfer:
    """How often wrong labels were learned from the teacher, against a control that never saw it.

    The warning needs the control, and a difference on the same samples whose 95 % interval excludes zero. `reason`:
    why there is no control.
    """
    (student, labels), (teacher, _) = _checked(student, labels), _checked(teacher, labels)
    _same(student, teacher)
    if control is not None:
        control, _ = _checked(control, labels)
        _same(control, teacher)
        control = control.argmax(1)
    assert labels is not None
    return copied_mistakes(student.argmax(1), teacher.argmax(1), labels, control, reason)


def copied_mistakes(
    student: Tensor, teacher: Tensor, labels: Tensor, control: Tensor | None = None, reason: str | None = None,
    of: str = "samples",
) -> NegativeTransfer:  # fmt: skip
    """The same of decisions, int64 [N], which are `of` samples or tokens."""
    wrong = teacher != labels
    copied = (student == teacher)[wrong]
    if not len(copied):
        return NegativeTransfer(samples=0, copied=None, control=None, control_reason="the teacher is never wrong")
    found = float(copied.double().mean())
    if control is None:
        return NegativeTransfer(samples=len(copied), copied=found, control=None, control_reason=reason)
    by_itself = (control == teacher)[wrong]
    alone, difference, warning = float(by_itself.double().mean()), paired_difference(copied, by_itself), None
    if difference.low > 0:
        warning = (
            f"where the teacher is wrong ({len(copied)} {of}) the student repeats its label on {found:.1%}, a "
            f"student without it on {alone:.1%} (difference {difference.low:.1%} to {difference.high:.1%}): it learned "
            "the teacher's mistakes; gate the term with teacher_right"
        )
    return NegativeTransfer(samples=len(copied), copied=found, control=alone, warning=warning)


def paired_difference(a: Tensor, b: Tensor) -> Interval:
    """The share of a less that of b, bool over the same samples [N], with its 95 % interval.

    The interval adds half a sample to each of the four outcomes (Agresti and Min 2005, "Wald + 2"), so that few
    samples that all say the same are no proof.
    """
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise InputError(f"diagnostics: {tuple(a.shape)} and {tuple(b.shape)} are no pairs of samples [N]")
    a, b = a.bool(), b.bool()
    more, less, count = int((a & ~b).sum()) + 0.5, int((b & ~a).sum()) + 0.5, len(a) + 2
    middle = (more - less) / count
    half = 1.96 * math.sqrt((more + less) / count - middle**2) / math.sqrt(count)
    mean = (more - less) / len(a)
    return Interval(mean=mean, low=max(-1.0, middle - half), high=min(1.0, middle + half))


def control_row(student: Tensor, control: Tensor, labels: Tensor, variant: ControlVariant) -> ControlRow:
    """The student beside a control, with a warning in words where it is less accurate for sure."""
    (student, labels), (control, _) = _checked(student, labels), _checked(control, labels)
    return beside_control(student.argmax(1) == labels, control.argmax(1) == labels, variant)


def beside_control(student: Tensor, control: Tensor, variant: ControlVariant, of: str = "samples") -> ControlRow:
    """The same of what each has right, bool [N], of samples or tokens."""
    difference = paired_difference(student, control)
    warning = None
    if difference.high < 0:
        warning = (
            f'the student is worse than its control "{TITLES[variant]}" by {-difference.mean:.2%} of {of} (95 % '
            f"interval {-difference.high:.2%} to {-difference.low:.2%}): what the teacher says does not help here"
        )
    accuracy = float(control.double().mean())
    return ControlRow(variant=variant, accuracy=accuracy, difference=difference, warning=warning)


def corruption_row(name: str, what: str, teacher: Flags, student: Flags) -> CorruptionRow:
    """What a corruption costs teacher and student: relative drops with bootstrap 95 % intervals over the samples.

    A resample of the samples is a draw of how often each of the 16 outcomes (right or wrong, clean or corrupted,
    teacher and student) occurs, so the two networks' drops are compared on the same resamples.
    """
    outcome = sum(flags.long() << bit for bit, flags in enumerate((*teacher, *student)))
    assert isinstance(outcome, Tensor)
    counts = torch.bincount(outcome, minlength=16).numpy()
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    bits = (np.arange(16)[:, None] >> np.arange(4)) & 1
    found, resampled = _drops(counts[None] @ bits), _drops(draws @ bits)
    return CorruptionRow(
        corruption=name,
        what=what,
        teacher=float(teacher[1].double().mean()),
        student=float(student[1].double().mean()),
        teacher_drop=_interval(found[:, 0], resampled[:, 0]),
        student_drop=_interval(found[:, 1], resampled[:, 1]),
        excess=_interval(found[:, 1] - found[:, 0], resampled[:, 1] - resampled[:, 0]),
    )


def corruption_warning(row: CorruptionRow) -> str | None:
    """In words, where the student is much more fragile than its teacher."""
    if row.excess is None or row.excess.low < SERIOUS or row.student_drop is None or row.teacher_drop is None:
        return None
    return (
        f"{row.corruption} costs the student {row.student_drop.mean:.1%} of its accuracy and the teacher "
        f"{row.teacher_drop.mean:.1%} ({row.excess.low:.1%} to {row.excess.high:.1%} more): train it on such inputs"
    )


def _drops(right: NDArray[np.int64]) -> NDArray[np.float64]:
    """[R, 4] counts that are right (teacher clean, corrupted, student clean, corrupted) -> relative drops [R, 2]."""
    clean, corrupted = right[:, ::2].astype(np.float64), right[:, 1::2]
    return np.where(clean > 0, 1 - corrupted / np.maximum(clean, 1), np.nan)


def _interval(value: NDArray[np.float64], resampled: NDArray[np.float64]) -> Interval | None:
    if not np.isfinite(value).all():
        return None
    low, high = np.quantile(resampled[np.isfinite(resampled)], [0.025, 0.975])
    return Interval(mean=float(value[0]), low=float(low), high=float(high))


def break_even(compile_seconds: float, teacher_ms: float, student_ms: float) -> BreakEven | None:
    """After how many queries the compile time has paid; None: never, as the student is not faster."""
    saved = teacher_ms - student_ms
    if saved <= 0:
        return None
    queries = math.ceil(compile_seconds * 1000 / saved)
    return BreakEven(queries=queries, compile_seconds=compile_seconds, saved_ms=saved)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def share(value: Tensor) -> float:
    """A mean of shares may leave 0 to 1 by its own rounding."""
    return min(1.0, max(0.0, float(value)))


def _checked(logits: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, on the CPU. The labels stay None where they are."""
    if logits.dim() != 2 or not logits.numel() or not bool(logits.isfinite().all()):
        raise InputError(f"diagnostics: logits {tuple(logits.shape)} must be [N, C], not empty, and finite")
    if labels is not None:
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise InputError(
                f"diagnostics: labels {tuple(labels.shape)} {labels.dtype} do not fit logits {tuple(logits.shape)}"
            )
        low, high = int(labels.min()), int(labels.max())
        if not 0 <= low <= high < logits.shape[1]:
            raise InputError(f"diagnostics: labels run from {low} to {high}, with {logits.shape[1]} classes")
        labels = labels.detach().cpu().long()
    return logits.detach().cpu().double(), labels  # type: ignore[return-value]


def _same(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise InputError(
            f"diagnostics: the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
        )
