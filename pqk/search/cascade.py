"""A cascade: where no student alone keeps the contract, one answers what it is sure of and the teacher the rest.

The threshold is chosen on validation data, and what is lost there is no fair estimate for the best of many thresholds.
So they are tried in an order that is fixed before, the teacher answering ever fewer samples, and the first at which the
upper end of the drop's interval is not allowed ends it: then each that came before holds with the interval's certainty,
without correction (Angelopoulos et al. 2021, "Learn then Test", arXiv:2110.01052, section 3.2, fixed sequence testing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pqk.data.structures import tensors
from pqk.deploy.cascade import Routing
from pqk.errors import Reason
from pqk.search.attempts import Attempts
from pqk.search.candidates import Candidate
from pqk.search.judge import Judge, Worth
from pqk.search.verdict import Tried
from pqk.task.calibration import best_temperature
from pqk.task.task import Task

SHARES = tuple(n / 20 for n in range(19, -1, -1))
"""of samples that the teacher answers, in the order in which they are tried"""
Z = 1.6448536269514722
"""standard deviations of a one-sided 95 % interval"""


@dataclass(frozen=True)
class RoutingChoice:
    """A routing, and what it does on validation data."""

    routing: Routing
    routed: float
    """share of samples that the teacher answers"""
    routed_high: float
    """upper end of its one-sided 95 % interval (Wilson 1927)"""
    drop: float
    """of the metric below the teacher's"""
    drop_high: float
    """upper end of its one-sided interval"""


@dataclass(frozen=True)
class ChosenCascade:
    """A cascade that keeps the contract."""

    choice: RoutingChoice
    tried: Tried
    """as one of the networks that were tried"""
    judge: Judge
    student: Candidate
    """who answers what it is sure of"""

    @property
    def teacher(self) -> Path:
        """The teacher's file, written where it is not there."""
        return self.judge.teacher_files[-1]


def why_not_cascaded(task: Task, teacher: nn.Module) -> Reason | None:
    """Why nobody can tell, from this model's outputs, how sure it is of a decision."""
    with torch.no_grad():
        outputs = tensors(teacher(*task.example))
    if len(outputs) != 1 or outputs[0].dim() != 2 or outputs[0].shape[1] < 2 or not outputs[0].is_floating_point():
        shapes = ", ".join(str(["B", *t.shape[1:]]).replace("'", "") for t in outputs)
        return f"a cascade routes by the probability of one class: it needs one output of logits [B, C], not {shapes}"
    if not task.decides_by_argmax:
        return "a cascade routes by the probability of the class that is decided for, and the task has its own decision"
    if task.views is not None:
        return "a cascade gives student and teacher the same sample, and the task's views are different ones"
    if any(not axes or axes[0] is None for axes in task.axes):
        return "a cascade sends single samples to the teacher, and not every input has its batch on the first axis"
    return None


def choose_routing(
    student: Tensor, teacher: Tensor, targets: Tensor, allowed: float, drop: Callable[[Tensor], tuple[float, float]]
) -> RoutingChoice | Reason:
    """The threshold at which the teacher answers fewest samples while the drop's upper bound is allowed.

    Args:
        student: its logits on validation data, [N, C].
        teacher: likewise.
        targets: the classes that are right, int64 [N], or the teacher's decisions; the temperature is fitted to them.
        allowed: the most that the metric may fall.
        drop: the metric's drop below the teacher's for some logits [N, C], and the upper end of its interval by a
            paired bootstrap (`Judge.drop`).

    Returns:
        The choice; or why even the teacher's answers to all but the surest samples lose too much.
    """
    temperature = best_temperature(student, targets) or 1.0
    confidence = Routing(temperature, 0.0).confidence(student.numpy())
    order = np.sort(confidence)[::-1]
    count, found, worst = len(order), None, 0.0
    for share in SHARES:
        routing = Routing(temperature, min(1.0, float(order[max(1, round((1 - share) * count)) - 1])))
        sure = torch.from_numpy(routing.sure(student.numpy()))
        lost, worst = drop(torch.where(sure[:, None], student, teacher))
        if worst > allowed:
            break
        routed = float((~sure).double().mean())
        found = RoutingChoice(routing, routed, _upper(routed, count), lost, worst)
    if found is None:
        return (
            f"where it answers the {100 * (1 - SHARES[0]):.0f} % of samples that it is surest of, {worst:.3g} of the "
            f"metric may be lost, and {allowed:.3g} are allowed"
        )
    return found


def _upper(share: float, count: int) -> float:
    """The upper end of Wilson's one-sided 95 % interval for a share of so many samples."""
    centre = share + Z * Z / (2 * count)
    spread = Z * (share * (1 - share) / count + (Z / (2 * count)) ** 2) ** 0.5
    return min(1.0, (centre + spread) / (1 + Z * Z / count))


def best_cascade(attempts: Attempts) -> ChosenCascade | None:
    """Finds the cascade of the tried students that keeps every clause with the best mean latency."""
    judge = attempts.judge
    teacher = attempts.context.decide(
        "cascade", lambda: {"bytes": judge.teacher_files[-1].stat().st_size, "macs": judge.teacher_macs}
    )
    kept: list[ChosenCascade] = []
    for tried in [t for t in attempts.tried if t.worth is not None and t.candidate.tool is None]:
        choice = _choice(attempts, tried)
        if isinstance(choice, RoutingChoice):
            worth = worth_of(tried.known, choice, teacher["bytes"], teacher["macs"])
            if attempts.terms.holds(worth) and (worth.ratio is None or worth.ratio > 1):
                what = f"{tried.candidate.what}; the teacher answers the {100 * choice.routed:.0f} % it is not sure of"
                candidate = replace(tried.candidate, name=f"{tried.candidate.name}, cascade", what=what)
                kept.append(ChosenCascade(choice, Tried(candidate, worth, 0.0), judge, tried.candidate))
    if not kept:
        return None
    best = max(kept, key=lambda c: (c.tried.known.ratio or 0.0, -c.choice.routed))
    attempts.tried.append(best.tried)
    return best


def _choice(attempts: Attempts, tried: Tried) -> RoutingChoice | Reason:
    """The routing of a student, journaled."""
    judge = attempts.judge

    def measure() -> dict[str, object] | str:
        program = attempts.runs.program(tried.candidate.passes, tried.candidate.shape)
        with judge.deployed(program) as (_, outputs):
            (student,) = tensors(outputs)
        (teacher,), targets = tensors(judge.answers[0]), judge.answers[1]
        decided = targets if _classes(targets, student) else teacher.argmax(1)
        found = choose_routing(student, teacher, decided, attempts.terms.allowed, judge.drop)
        return found if isinstance(found, str) else asdict(found)

    entry = attempts.context.decide(f"cascade/{tried.candidate.name}", measure)
    return entry if isinstance(entry, str) else RoutingChoice(**{**entry, "routing": Routing(**entry["routing"])})


def _classes(targets: object, logits: Tensor) -> bool:
    """Whether targets are one class for each sample."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != logits.shape[:1]:
        return False
    return bool(((targets >= 0) & (targets < logits.shape[1])).all())


def worth_of(student: Worth, choice: RoutingChoice, teacher_bytes: int, teacher_macs: int) -> Worth:
    """What a cascade is worth: the mean latency is the student's and, for those routed, the teacher's beside it."""

    def mixed(ratio: float | None, routed: float) -> float | None:
        return None if ratio is None else 1 / (1 / ratio + routed)

    low, slowest = mixed(student.ratio_low, choice.routed_high), student.milliseconds_high
    if slowest is not None and student.ratio_low is not None:  # the teacher's time is the student's times its ratio
        slowest += choice.routed_high * slowest * student.ratio_low
    return Worth(
        metric=student.metric + student.drop - choice.drop,
        drop=choice.drop,
        drop_high=choice.drop_high,
        ratio=mixed(student.ratio, choice.routed),
        ratio_low=low,
        ratio_high=mixed(student.ratio_high, choice.routed),
        milliseconds_high=slowest,
        size_bytes=student.size_bytes + teacher_bytes,
        macs=round(student.macs + choice.routed * teacher_macs),
    )
