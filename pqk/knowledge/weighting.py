"""How much each term counts: balancers over the terms, ramps over the training, gates over the samples, temperatures.

All work on factors of the weights that the recipe gives, so that a recipe's weights keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from pqk.core.distributed import is_distributed, world_size
from pqk.data.structures import first_tensor, widened
from pqk.errors import InputError, nearest
from pqk.knowledge.terms.base import Term, View
from pqk.knowledge.terms.response import labelled_tokens, per_sample

LEAST, MOST = 0.01, 100.0
"""a balancer's factors stay within these"""


def ramp(term: Term, progress: float, start: float) -> float:
    """The factor of a term's weight at `progress` (0 to 1) of the training, if it joined at `start`."""
    up = 1.0 if term.ramp_up == 0 else (progress - start) / term.ramp_up
    down = 1.0 if term.ramp_down == 0 else (1 - progress) / term.ramp_down
    return max(0.0, min(1.0, up, down))


# ---- balancers


class Balancer(nn.Module):
    """Adds up weighted losses. Owns the factors, which are saved with the training."""

    def __init__(self, count: int) -> None:
        super().__init__()

    def forward(self, losses: Mapping[int, Tensor], ramps: Mapping[int, float], student: nn.Module) -> Tensor:
        """Per-sample losses [B] by number of the term, times its ramp: [B]."""
        return _total(ramps[i] * loss for i, loss in losses.items())


class Static(Balancer):
    """The recipe's weights as they are."""

    name = "static"


class GradientNorm(Balancer):
    """Every term pulls at the student's parameters equally hard: f_i ← f_i · ḡ / ‖∇ f_i L_i‖, a moving average.

    L_i is the weighted loss and ḡ the mean of the norms. It costs a backward pass a term, so it looks every tenth step.
    """

    name = "gradient_norm"
    every, momentum = 10, 0.5

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.factors: Tensor
        self.step: Tensor
        self.register_buffer("factors", torch.ones(count))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, losses: Mapping[int, Tensor], ramps: Mapping[int, float], student: nn.Module) -> Tensor:
        if torch.is_grad_enabled() and student.training:
            if len(losses) > 1 and int(self.step) % self.every == 0:
                self._update(losses, [p for p in student.parameters() if p.requires_grad])
            self.step += 1
        return _total(ramps[i] * (float(self.factors[i]) * loss) for i, loss in losses.items())

    def _update(self, losses: Mapping[int, Tensor], parameters: list[nn.Parameter]) -> None:
        norms = {i: float(self.factors[i]) * _norm(loss, parameters) for i, loss in losses.items()}
        if is_distributed():  # one student, so one balance
            shared = torch.tensor([*norms.values()], device=self.factors.device)
            torch.distributed.all_reduce(shared)
            norms = dict(zip(norms, (shared / world_size()).tolist(), strict=True))
        norms = {i: n for i, n in norms.items() if math.isfinite(n) and n > 0}
        mean = sum(norms.values()) / max(1, len(norms))
        for i, norm in norms.items():
            balanced = float(self.factors[i]) * mean / norm
            factor = self.momentum * float(self.factors[i]) + (1 - self.momentum) * balanced
            self.factors[i] = min(MOST, max(LEAST, factor))


class Learned(Balancer):
    """Σ exp(−s_i) L_i + s_i / 2, with the s_i learned (Kendall, Gal, Cipolla, CVPR 2018, equation 10)."""

    name = "learned"

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.log_variance = nn.Parameter(torch.zeros(count))

    def forward(self, losses: Mapping[int, Tensor], ramps: Mapping[int, float], student: nn.Module) -> Tensor:
        s = self.log_variance.clamp(-math.log(MOST), -math.log(LEAST))
        return _total(ramps[i] * ((-s[i]).exp() * loss + s[i] / 2) for i, loss in losses.items())


BALANCERS = (Static, GradientNorm, Learned)


def balancer(name: str, count: int) -> Balancer:
    """The balancer of that name for so many terms. Raises `InputError` naming the nearest known one."""
    for kind in BALANCERS:
        if kind.name == name:
            return kind(count)
    raise InputError(f'distill: unknown balance "{name}"{nearest(name, (kind.name for kind in BALANCERS))}')


def _total(losses: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for loss in losses:
        total = loss if total is None else total + loss
    assert total is not None
    return total


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """The Euclidean norm of the gradient of the mean loss."""
    gradients = torch.autograd.grad(loss.mean(), parameters, retain_graph=True, allow_unused=True)
    squares = [g.detach().float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


# ---- gates

Gate = Callable[[View], Tensor]
"""what a term's loss is scaled by, sample by sample: [B], without a gradient"""


def teacher_right(view: View) -> Tensor:
    """1 where the teacher's decision is the label, 0 where it is not. Raises `InputError` where there are no labels."""
    decisions = view.task.classes_last(first_tensor(view.teacher)).argmax(-1)
    if not isinstance(view.targets, Tensor) or view.targets.shape != decisions.shape:
        raise InputError('distill: the gate "teacher_right" needs one class label for each of the teacher\'s rows')
    return per_sample([(decisions == view.targets).float()], [view.targets != view.task.ignored])


def teacher_confidence(view: View) -> Tensor:
    """The teacher's top probability; of sequences [B, S, C] its mean over the tokens that have a label."""
    top = view.task.classes_last(widened(first_tensor(view.teacher))).softmax(-1).amax(-1)
    return _token_mean(view, top)


def student_doubt(view: View) -> Tensor:
    """The entropy of the student's answer over that of a guess: what it does not know yet, 0 to 1.

    Of sequences [B, S, C] its mean over the tokens that have a label.
    """
    log_p = view.task.classes_last(widened(first_tensor(view.student).detach())).log_softmax(-1)
    doubt = -(log_p.exp() * log_p).sum(-1) / math.log(max(2, log_p.shape[-1]))
    return _token_mean(view, doubt)


def _token_mean(view: View, values: Tensor) -> Tensor:
    """The mean [B] of values [B, …] over the positions that count."""
    counted = labelled_tokens(view, values.shape)
    return per_sample([values], None if counted is None else [counted])


def teacher_agreement(view: View) -> Tensor:
    """1 − how far the teacher's members disagree. Raises `InputError` where it is no ensemble that says so."""
    if "disagreement" not in view.teacher_features:
        raise InputError('distill: the gate "teacher_agreement" needs an ensemble that shows its uncertainty')
    return 1 - view.teacher_features["disagreement"]


GATES: tuple[Callable[[View], Tensor], ...] = (teacher_right, teacher_confidence, student_doubt, teacher_agreement)


def gate_named(name: str, own: Mapping[str, Gate]) -> Gate:
    """A gate given in Python, or one of `GATES`. Raises `InputError` naming the nearest known one."""
    known: dict[str, Gate] = {**{g.__name__: g for g in GATES}, **own}
    if name not in known:
        raise InputError(f'distill: unknown gate "{name}"{nearest(name, known)}')
    return known[name]


# ---- temperature


def temperature_for(logits: Tensor, top: float) -> float:
    """The T at which the mean top probability of softmax(logits / T), logits [N, …, C], is `top`.

    It falls with T from 1 (no ties) to 1 / C. Raises `InputError` where no T from 1e-3 to 1e3 reaches `top`.
    """
    logits = logits.detach().double()
    low, high = math.log(1e-3), math.log(1e3)

    def mean_top(log_t: float) -> float:
        return float((logits / math.exp(log_t)).softmax(-1).amax(-1).mean())

    most, least = mean_top(low), mean_top(high)
    if not least <= top <= most:
        raise InputError(
            f"distill: no temperature from 0.001 to 1000 gives the teacher a mean top probability of {top:g}; with "
            f"{logits.shape[-1]} classes it can be {least:.3g} to {most:.3g}"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_top(middle) > top else (low, middle)
    return math.exp((low + high) / 2)
