"""Whether distillation worked: what there was to learn, what was learned, and what should not have been.

Pure functions of outputs that were computed already: logits [N, C] of any float dtype and labels int64 [N], computed in
float64. Shares are 0 to 1, divergences in nats. All raise `InputError`, naming the shapes, where these do not fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pqk.errors import InputError

SOFT = 0.02
"""a teacher that leaves less than this to all classes but its first teaches no more than its decisions do"""
BINS = 15


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (normal approximation over samples)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed."""

    accuracy: float
    ece: float
    """expected calibration error"""
    nll: float
    temperature: float
    """dividing the logits by this makes `nll` least; it can be folded into the last layer"""
    ece_after: float
    nll_after: float


@dataclass(frozen=True)
class TeacherHealth:
    """What there is to learn from a teacher's soft targets, at temperature 1."""

    top: float
    """mean probability of its decision"""
    entropy: float
    """mean entropy, over that of a guess: 0 to 1"""
    calibration: Calibration | None
    """None: there are no labels"""
    warning: str | None


@dataclass(frozen=True)
class Fidelity:
    """How much the student answers as the teacher does."""

    agreement: float
    kl: float
    """mean KL(teacher ‖ student) at temperature 1"""
    lost: float | None
    """share of all samples that only the teacher has right; None: there are no labels"""
    won: float | None
    """share of all samples that only the student has right"""
    agreement_per_class: tuple[float | None, ...]
    """by the label (without labels by the teacher's decision); None: the class does not occur"""


@dataclass(frozen=True)
class NegativeTransfer:
    """How often the student gives the teacher's wrong label where the teacher is wrong."""

    samples: int
    """on which the teacher is wrong"""
    copied: float | None
    """share of them on which the student says the same; None: there are none"""
    control: float | None
    """the same share of a student that was trained without the teacher"""
    warning: str | None


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error over equal bins of the top probability (Guo et al. 2017, equation 3)."""
    logits, labels = _checked(logits, labels)
    top, decided = logits.softmax(1).max(1)
    index = (top * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (decided == labels).double() - top)
    return float(gaps.abs().sum() / len(logits))


def calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """ECE and NLL, before and after the best temperature."""
    logits, labels = _checked(logits, labels)
    temperature = best_temperature(logits, labels)
    after = logits / temperature
    return Calibration(
        float((logits.argmax(1) == labels).double().mean()),
        calibration_error(logits, labels),
        float(F.cross_entropy(logits, labels)),
        temperature,
        calibration_error(after, labels),
        float(F.cross_entropy(after, labels)),
    )


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T from 0.01 to 100 at which the NLL of logits / T is least (Guo et al. 2017, section 4.2).

    The NLL is convex in 1 / T, so its derivative there, mean_p(z) − z_label, has one sign on each side.
    """
    logits, labels = _checked(logits, labels)
    given = logits.gather(1, labels[:, None])[:, 0].mean()
    low, high = -math.log(100.0), math.log(100.0)  # of log 1 / T
    for _ in range(60):
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(1) * logits).sum(1).mean()
        low, high = (low, middle) if float(expected) > float(given) else (middle, high)
    return math.exp(-(low + high) / 2)


def teacher_health(logits: Tensor, labels: Tensor | None = None) -> TeacherHealth:
    """Confidence, entropy and calibration of a teacher, with a warning where soft targets hold nothing to learn."""
    logits, labels = _checked(logits, labels)
    log_p = logits.log_softmax(1)
    top = float(log_p.exp().amax(1).mean())
    entropy = float(-(log_p.exp() * log_p).sum(1).mean()) / math.log(max(2, logits.shape[1]))
    warning = None
    if 1 - top < SOFT:
        warning = (
            f"the teacher's mean top probability is {top:.4f}: at temperature 1 its soft targets say hardly more than "
            "its decisions; use a higher temperature, or a term on features"
        )
    elif entropy > 0.98:
        warning = f"the teacher's answers are nearly uniform (mean top probability {top:.4f}); is it trained?"
    return TeacherHealth(top, entropy, None if labels is None else calibration(logits, labels), warning)


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
    kl = float(F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1).mean())
    lost = won = None
    if labels is not None:
        lost = float(((t == labels) & (s != labels)).double().mean())
        won = float(((s == labels) & (t != labels)).double().mean())
    return Fidelity(float(agree.mean()), kl, lost, won, per_class)


def negative_transfer(
    student: Tensor, teacher: Tensor, labels: Tensor, control: Tensor | None = None
) -> NegativeTransfer:
    """How often wrong labels were learned from the teacher, against a control that never saw it.

    The warning needs the control, and a difference on the same samples whose 95 % interval excludes zero.
    """
    (student, labels), (teacher, _) = _checked(student, labels), _checked(teacher, labels)
    _same(student, teacher)
    decided = teacher.argmax(1)
    wrong = decided != labels
    copied = (student.argmax(1) == decided)[wrong]
    if control is not None:
        control, _ = _checked(control, labels)
        _same(control, teacher)
    if not len(copied):
        return NegativeTransfer(0, None, None, None)
    share = float(copied.double().mean())
    if control is None:
        return NegativeTransfer(len(copied), share, None, None)
    by_itself = (control.argmax(1) == decided)[wrong]
    difference = paired_difference(copied, by_itself)
    warning = None
    if difference.low > 0:
        warning = (
            f"where the teacher is wrong ({len(copied)} samples) the student repeats its label on {share:.1%}, a "
            f"student without it on {float(by_itself.double().mean()):.1%} (difference {difference.low:.1%} to "
            f"{difference.high:.1%}): it learned the teacher's mistakes; gate the term with teacher_right"
        )
    return NegativeTransfer(len(copied), share, float(by_itself.double().mean()), warning)


def paired_difference(a: Tensor, b: Tensor) -> Interval:
    """The mean of a − b over the same samples [N], with its interval; of one sample the interval is everything."""
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise InputError(f"diagnostics: {tuple(a.shape)} and {tuple(b.shape)} are no pairs of samples [N]")
    difference = a.double() - b.double()
    mean, half = float(difference.mean()), math.inf
    if len(difference) > 1:
        half = 1.96 * float(difference.std()) / math.sqrt(len(difference))
    return Interval(mean, mean - half, mean + half)


def control_warning(student: Tensor, control: Tensor, labels: Tensor, name: str) -> str | None:
    """In words, where a student is less accurate than its control (such as "label smoothing"); None where it is not."""
    (student, labels), (control, _) = _checked(student, labels), _checked(control, labels)
    difference = paired_difference(student.argmax(1) == labels, control.argmax(1) == labels)
    if difference.high >= 0:
        return None
    return (
        f"the student is worse than its control ({name}) by {-difference.mean:.2%} of samples (95 % interval "
        f"{-difference.high:.2%} to {-difference.low:.2%}): what the teacher says does harm here"
    )


def break_even(compile_seconds: float, teacher_ms: float, student_ms: float) -> int | None:
    """After how many queries the compile time has paid; None: never, as the student is not faster."""
    if student_ms >= teacher_ms:
        return None
    return math.ceil(compile_seconds * 1000 / (teacher_ms - student_ms))


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
