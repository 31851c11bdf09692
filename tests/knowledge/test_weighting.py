"""Balancers, ramps, gates and chosen temperatures: their laws, and what a training does with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.errors import InputError
from pqk.files import read_tensors
from pqk.knowledge import CrossEntropy, Hint, KLDivergence, LogitMSE, SortedULD, StandardizedKD, Term, View
from pqk.knowledge.objective import Distillation
from pqk.knowledge.teachers.base import FrozenTeacher
from pqk.knowledge.weighting import (
    BALANCERS,
    GATES,
    LEAST,
    MOST,
    GradientNorm,
    Learned,
    Static,
    balancer,
    ramp,
    student_doubt,
    teacher_confidence,
    teacher_right,
    temperature_for,
)
from pqk.task.task import Task
from pqk.training.trainer import Training, fit

DATA = ArrayData(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4, 8)
TASK = Task(DATA, DATA, validation=DATA, class_axis=-1)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def objective(student: nn.Module, *terms: Term, teacher: nn.Module | None = None, **options: Any) -> Distillation:
    points = sorted({p[1] for t in terms if (p := t.points())})
    return Distillation(terms, TASK, student, FrozenTeacher(teacher or net(1), points), **options)


def batch() -> Batch:
    return next(DATA.batches())


# ---- balancers


def norms(student: nn.Module, losses: dict[int, Tensor]) -> list[float]:
    parameters = [*student.parameters()]
    found = [torch.autograd.grad(loss.mean(), parameters, retain_graph=True) for loss in losses.values()]
    return [float(torch.cat([g.flatten() for g in grads]).norm()) for grads in found]


@pytest.mark.parametrize("scale", [1e-1, 1.0, 30.0])
def test_balanced_terms_pull_equally_hard(scale: float) -> None:
    student = net().train()
    outputs = student(*batch().inputs)
    losses = {0: outputs.square().sum(1), 2: scale * (outputs - 1).abs().sum(1)}
    balance = GradientNorm(3)
    for _ in range(40 * balance.every):
        total = balance(losses, {0: 1.0, 2: 1.0}, student)
    a, b = norms(student, {i: float(balance.factors[i]) * loss for i, loss in losses.items()})
    assert a == pytest.approx(b, rel=1e-3)
    torch.testing.assert_close(total, sum(float(balance.factors[i]) * loss for i, loss in losses.items()))
    assert float(balance.factors[1]) == 1  # it was not there


def test_factors_stay_within_their_bounds_and_dead_terms_as_they_are() -> None:
    student = net().train()
    outputs = student(*batch().inputs)
    losses = {0: outputs.square().sum(1), 1: 1e6 * outputs.square().sum(1), 2: 0 * outputs.sum(1)}
    balance = GradientNorm(3)
    for _ in range(60 * balance.every):
        balance(losses, dict.fromkeys(losses, 1.0), student)
    low, high = balance.factors.aminmax()
    assert float(low) == pytest.approx(LEAST) and float(high) <= MOST and float(balance.factors[2]) == 1


def test_one_term_alone_needs_no_balance_and_evaluation_changes_none() -> None:
    student = net()
    outputs = student(*batch().inputs)
    balance = GradientNorm(2)
    two = {0: outputs.square().sum(1), 1: 50 * outputs.abs().sum(1)}
    balance({0: two[0]}, {0: 1.0}, student.train())
    assert balance.factors.tolist() == [1, 1]
    with torch.no_grad():
        balance(two, {0: 1.0, 1: 1.0}, student)
    balance(two, {0: 1.0, 1: 1.0}, student.eval())
    assert balance.factors.tolist() == [1, 1] and int(balance.step) == 1


def test_learned_weights_end_where_their_losses_are_equal() -> None:
    """At the minimum over s of exp(−s) L + s / 2 the weighted losses are 1/2 each (Kendall et al., section 3)."""
    student, balance = net(), Learned(2)
    losses = {0: torch.full((4,), 3.0), 1: torch.full((4,), 0.2)}
    start = balance(losses, {0: 1.0, 1: 1.0}, student)
    torch.testing.assert_close(start, losses[0] + losses[1])
    optimizer = torch.optim.SGD(balance.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        balance(losses, {0: 1.0, 1: 1.0}, student).mean().backward()
        optimizer.step()
    weighted = (-balance.log_variance.detach()).exp() * torch.tensor([3.0, 0.2])
    torch.testing.assert_close(weighted, torch.full((2,), 0.5), rtol=1e-3, atol=0)


def test_static_is_the_plain_sum_and_unknown_names_are_refused() -> None:
    losses = {0: torch.rand(4), 1: torch.rand(4)}
    assert torch.equal(Static(2)(losses, {0: 1.0, 1: 0.5}, net()), losses[0] + 0.5 * losses[1])
    assert [type(balancer(kind.name, 2)) for kind in BALANCERS] == [*BALANCERS]
    with pytest.raises(InputError, match='unknown balance "gradient_nrom".*"gradient_norm"'):
        objective(net(), CrossEntropy(), balance="gradient_nrom")


def agreement(student: nn.Module) -> float:
    """With the teacher, on all samples."""
    with torch.no_grad():
        return float((student(*DATA.inputs).argmax(1) == net(1)(*DATA.inputs).argmax(1)).double().mean())


@pytest.mark.parametrize("name", [kind.name for kind in BALANCERS])
def test_a_balanced_training_learns_and_its_checkpoint_holds_the_factors(name: str, tmp_path: Path) -> None:
    student, run = net(), RunContext(folder=tmp_path).enter("x")
    distillation = objective(student, CrossEntropy(), KLDivergence(weight=30), balance=name)
    before = agreement(student)
    fit(run, student, DATA, distillation, Training(epochs=12, learning_rate=0.05))
    assert agreement(student) > max(0.7, before)
    assert run.scratch is not None
    tensors, _ = read_tensors(run.scratch / "checkpoint.safetensors")
    saved = {k for k in tensors if k.startswith("objective/balance")}
    assert bool(saved) == (name != "static")
    assert "objective/balance.factors" in saved or name != "gradient_norm"
    if name != "static":
        assert any(
            not torch.equal(v, type(distillation.balance)(2).state_dict()[k])
            for k, v in distillation.balance.state_dict().items()
            if k != "step"
        )


def test_a_static_balance_is_a_training_without_one_bit_for_bit() -> None:
    def train(**options: Any) -> dict[str, Tensor]:
        student = net()
        terms = CrossEntropy(weight=0.3), KLDivergence(weight=0.7), Hint(point="0", projector_kind="linear")
        fit(RunContext().enter("x"), student, DATA, objective(student, *terms, **options), Training(epochs=2))
        return student.state_dict()

    plain, static = train(), train(balance="static")
    assert all(torch.equal(plain[k], static[k]) for k in plain)
    other = train(balance="gradient_norm")
    assert not all(torch.equal(plain[k], other[k]) for k in plain)


# ---- ramps


@settings(max_examples=50, deadline=None)
@given(*[st.integers(0, 100).map(lambda percent: percent / 100)] * 4)
def test_a_ramp_is_a_factor_that_rises_and_falls(rise: float, fall: float, progress: float, start: float) -> None:
    term = KLDivergence(ramp_up=rise, ramp_down=fall)
    factor = ramp(term, progress, start)
    assert 0 <= factor <= 1
    if start + rise <= progress <= 1 - fall:
        assert factor == pytest.approx(1, abs=1e-6)
    assert rise == 0 or ramp(term, start, start) == 0
    assert fall == 0 or ramp(term, 1.0, start) == 0
    assert ramp(KLDivergence(), progress, start) == 1


def test_terms_rise_after_they_have_joined() -> None:
    student = net().eval()
    terms = CrossEntropy(), LogitMSE(ramp_up=0.2, ramp_down=0.1)
    ramped, plain = objective(student, *terms, start=0.5), objective(student, LogitMSE())
    wrapped = ramped.wrap(student)
    labels, full = objective(student, CrossEntropy())(wrapped, batch()), plain(wrapped, batch())
    for progress, factor in ((0.0, 0), (0.5, 0), (0.6, 0.5), (0.7, 1), (0.85, 1), (0.95, 0.5)):
        ramped.begin(progress)
        torch.testing.assert_close(ramped(wrapped, batch()), labels + factor * full)


# ---- gates


def shown(student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> View:
    return View(student, teacher, targets, {}, {}, TASK)


def test_gates_say_what_their_names_say() -> None:
    sure, guess = torch.tensor([9.0, 0, 0, 0]), torch.zeros(4)
    seen = shown(torch.stack([sure, guess]), torch.stack([sure, sure]), torch.tensor([0, 1]))
    assert teacher_right(seen).tolist() == [1, 0]
    assert float(student_doubt(seen)[0]) < 0.01 and float(student_doubt(seen)[1]) == pytest.approx(1)
    doubtful = shown(torch.stack([sure, sure]), torch.stack([sure, guess]))
    torch.testing.assert_close(teacher_confidence(doubtful), torch.tensor([1, 0.25]), atol=1e-2, rtol=0)
    with pytest.raises(InputError, match="needs one class label"):
        teacher_right(doubtful)
    tokens = torch.stack([torch.stack([sure, guess])] * 3)
    seen = shown(tokens, tokens, torch.tensor([[0, 0], [1, 0], [1, 1]]))
    assert teacher_right(seen).tolist() == [1, 0.5, 0]
    shown_all = View(seen.student, seen.teacher, seen.targets, {}, {"disagreement": torch.zeros(3)}, TASK)
    assert all(gate(shown_all).shape == (3,) for gate in GATES)


def test_a_gate_scales_its_term_sample_by_sample() -> None:
    student, teacher = net().eval(), net(1).eval()
    wrapped = objective(student, LogitMSE()).wrap(student)
    full = objective(student, LogitMSE())(wrapped, batch())
    gated = objective(student, LogitMSE(gate="teacher_right"), CrossEntropy(weight=1e-9))(wrapped, batch())
    with torch.no_grad():
        right = teacher(*batch().inputs).argmax(1) == batch().targets
    assert 0 < int(right.sum()) < len(right)
    torch.testing.assert_close(gated, full * right, atol=1e-7, rtol=1e-6)
    own = objective(student, LogitMSE(gate="mine"), gates={"mine": lambda view: torch.arange(8.0)})
    torch.testing.assert_close(own(wrapped, batch()), full * torch.arange(8.0))


def test_a_gate_gives_no_gradient() -> None:
    student = net()
    term, gated = objective(student, LogitMSE()), objective(student, LogitMSE(gate="student_doubt"))
    wrapped = gated.wrap(student.eval())
    outputs = student(*batch().inputs)
    with torch.no_grad():
        doubt = student_doubt(shown(outputs, outputs))
    want = torch.autograd.grad((term(wrapped, batch()) * doubt).mean(), [*student.parameters()])
    found = torch.autograd.grad(gated(wrapped, batch()).mean(), [*student.parameters()])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gate_on_a_term_without_a_teacher_asks_the_teacher() -> None:
    student = net().eval()
    gated = objective(student, CrossEntropy(gate="teacher_confidence"), start=0.5)
    assert bool(gated(gated.wrap(student), batch()).isfinite().all())


def test_unknown_gates_are_refused_before_training() -> None:
    with pytest.raises(InputError, match='unknown gate "teacher_rihgt".*"teacher_right"'):
        objective(net(), KLDivergence(gate="teacher_rihgt"))


def test_what_is_blind_never_trains_alone() -> None:
    for terms in ([SortedULD()], [SortedULD(), CrossEntropy(weight=0)]):
        with pytest.raises(InputError, match="SortedULD must not be the only term: it does not see which class"):
            objective(net(), *terms)
    assert len(objective(net(), SortedULD(), CrossEntropy()).terms) == 2


# ---- temperature


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_the_temperature_meets_the_wish(classes: int, share: float, seed: int) -> None:
    logits = 3 * torch.randn(50, classes, generator=torch.Generator().manual_seed(seed))
    top = 1 / classes + share * (1 - 1 / classes)
    temperature = temperature_for(logits, top)
    assert float((logits.double() / temperature).softmax(1).amax(1).mean()) == pytest.approx(top, abs=1e-9)
    warmer = temperature_for(logits, top * 0.99 + 0.01 / classes)
    assert warmer > temperature
    assert temperature_for(logits * 7, top) == pytest.approx(7 * temperature, rel=1e-6)


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(InputError, match=r"probability of 0.2; with 4 classes it can be 0.25 to 1"):
        temperature_for(torch.randn(9, 4), 0.2)
    with pytest.raises(InputError, match=r"probability of 0.9; with 4 classes it can be 0.25 to 0.25"):
        objective(net(), KLDivergence(teacher_top=0.9), teacher=nn.Sequential(net(), nn.Threshold(1e9, 0)))


@pytest.mark.parametrize("kind", [KLDivergence, StandardizedKD])
def test_a_term_takes_the_temperature_that_its_teacher_needs(kind: Any) -> None:
    teacher = net(1).eval()
    (term,) = objective(net(), kind(teacher_top=0.4), teacher=teacher).terms
    assert isinstance(term, kind) and term.temperature != kind().temperature and term.weight == kind().weight
    with torch.no_grad():
        logits = term.scaled(teacher(*DATA.inputs))
    assert float((logits / term.temperature).softmax(1).amax(1).mean()) == pytest.approx(0.4, abs=1e-5)
    assert not math.isclose(float((logits / kind().temperature).softmax(1).amax(1).mean()), 0.4, abs_tol=1e-3)
