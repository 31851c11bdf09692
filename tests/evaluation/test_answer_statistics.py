"""Diagnostics of a distillation: known answers on small cases, laws on drawn ones, warnings where they are due."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pqk.errors import InputError
from pqk.evaluation import answer_statistics as d
from pqk.task.calibration import best_temperature


def answers(*decisions: int, classes: int = 3, top: float = 0.8) -> Tensor:
    """Logits whose top probability is `top`."""
    p = torch.full((len(decisions), classes), (1 - top) / (classes - 1))
    return p.scatter(1, torch.tensor(decisions)[:, None], top).log()


LABELS = torch.tensor([0, 1, 2, 0, 1])
logits = st.tuples(st.integers(1, 40), st.integers(2, 9), st.integers(0, 2**31)).map(
    lambda n: (2 * torch.randn(n[0], n[1], generator=torch.Generator().manual_seed(n[2])), n[2])
)


def test_accuracy_is_counted_by_class() -> None:
    """Classes 0 and 1 have two samples each, class 2 one; classes that do not occur have no row."""
    teacher, student = answers(0, 1, 2, 1, 1, classes=4), answers(0, 0, 2, 0, 0, classes=4)
    rows = d.accuracy_by_class(student, teacher, LABELS)
    assert [(r.label, r.samples, r.teacher, r.student) for r in rows] == [(0, 2, 0.5, 1), (1, 2, 1, 0), (2, 1, 1, 1)]
    assert [r.difference.mean for r in rows] == [0.5, -1, 0]
    assert all(r.difference.low <= r.difference.mean <= r.difference.high for r in rows)


def test_the_calibration_error_of_a_simple_case() -> None:
    """Four of five right at 0.8 is calibrated; five of five is off by 0.2; two bins are averaged by their samples."""
    assert d.calibration_error(answers(0, 1, 2, 0, 0), LABELS) == pytest.approx(0, abs=1e-6)
    assert d.calibration_error(answers(0, 1, 2, 0, 1), LABELS) == pytest.approx(0.2, abs=1e-6)
    mixed = torch.cat([answers(0, 1, top=0.8), answers(2, 0, 0, top=0.5)])
    assert d.calibration_error(mixed, LABELS) == pytest.approx((2 * 0.2 + (2 - 3 * 0.5)) / 5, abs=1e-6)
    assert d.calibration_error(answers(0, 1, 2, 0, 1, top=1 - 1e-9), LABELS) == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(logits)
def test_no_temperature_is_better_than_the_best(drawn: tuple[Tensor, int]) -> None:
    z, seed = drawn
    labels = torch.randint(z.shape[1], (len(z),), generator=torch.Generator().manual_seed(seed))
    best = best_temperature(z, labels)
    right = float((z.argmax(1) == labels).double().mean())
    if best is None:
        assert right == 1
        return
    least = float(F.cross_entropy(z.double() / best, labels))
    for other in (0.01, best * 0.9, best * 1.1, 1.0, 100.0):
        if 0.01 <= other <= 100:
            assert least <= float(F.cross_entropy(z.double() / other, labels)) + 1e-9
    found = d.calibration(z, labels, best)
    assert found.nll_after is not None and found.nll_after <= found.nll + 1e-12 and found.accuracy == right


def test_where_all_is_right_no_temperature_is_best() -> None:
    assert best_temperature(answers(0, 1, 2, 0, 1), LABELS) is None
    found = d.calibration(answers(0, 1, 2, 0, 1), LABELS, None, "all are right")
    assert found.temperature is found.ece_after is found.nll_after is None and found.reason == "all are right"


def test_a_known_temperature_is_found_again() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    assert best_temperature(3 * z, labels) == pytest.approx(3, rel=0.05)
    found = d.calibration(3 * z, labels, 3.0)
    assert found.ece > 0.1 and found.ece_after is not None and found.ece_after < 0.02


def test_health_says_where_there_is_nothing_to_learn() -> None:
    good = d.teacher_health(answers(0, 1, 2, 0, 0), d.calibration(answers(0, 1, 2, 0, 0), LABELS))
    assert good.warning is None and good.top == pytest.approx(0.8) and good.calibration is not None
    assert good.entropy == pytest.approx(-(0.8 * math.log(0.8) + 0.2 * math.log(0.1)) / math.log(3))
    sure = d.teacher_health(answers(0, 1, 2, 0, 1, top=0.999))
    assert sure.calibration is None and "hardly more than its decisions" in str(sure.warning)
    assert "nearly uniform" in str(d.teacher_health(torch.zeros(4, 10)).warning)


def test_fidelity_of_a_simple_case() -> None:
    student, teacher = answers(0, 1, 2, 1, 2), answers(0, 1, 1, 0, 2)
    found = d.fidelity(student, teacher, LABELS)
    assert found.agreement == pytest.approx(3 / 5)
    assert (found.lost, found.won) == (pytest.approx(1 / 5), pytest.approx(1 / 5))  # samples 3, 2
    assert found.agreement_per_class == (pytest.approx(1 / 2), 1, 0)
    by_decision = d.fidelity(student, teacher)
    assert by_decision.lost is None and by_decision.agreement_per_class == (1 / 2, 1 / 2, 1)
    assert d.fidelity(answers(0, 0), answers(0, 0)).agreement_per_class == (1, None, None)


@settings(max_examples=25, deadline=None)
@given(logits, logits)
def test_fidelity_keeps_its_laws(a: tuple[Tensor, int], b: tuple[Tensor, int]) -> None:
    student, n = a[0], min(len(a[0]), len(b[0]))
    itself = d.fidelity(student, student + 3, student.argmax(1))
    assert itself.agreement == 1 and itself.kl == pytest.approx(0, abs=1e-9) and itself.lost == itself.won == 0
    width = min(student.shape[1], b[0].shape[1])
    s, t = student[:n, :width], b[0][:n, :width]
    labels = torch.arange(n) % width
    found = d.fidelity(s, t, labels)
    right = [float((z.argmax(1) == labels).double().mean()) for z in (s, t)]
    assert found.won is not None and found.lost is not None and found.kl >= -1e-12
    assert right[0] - right[1] == pytest.approx(found.won - found.lost)  # churn is what accuracy hides


def test_copied_mistakes_are_counted() -> None:
    teacher, student = answers(1, 2, 2, 0, 0), answers(1, 0, 2, 0, 0)  # wrong on 0, 1 and 4; copied on 0 and 4
    found = d.negative_transfer(student, teacher, LABELS)
    assert (found.samples, found.copied, found.control, found.warning) == (3, pytest.approx(2 / 3), None, None)
    fine = d.negative_transfer(student, answers(0, 1, 2, 0, 1), LABELS)
    assert (fine.samples, fine.copied) == (0, None)


def test_copied_mistakes_are_held_against_a_control() -> None:
    labels = torch.zeros(100, dtype=torch.long)
    teacher = answers(*[1] * 50, *[0] * 50)
    parrot, control = answers(*[1] * 40, *[0] * 60), answers(*[1] * 10, *[2] * 40, *[0] * 50)
    found = d.negative_transfer(parrot, teacher, labels, control)
    assert (found.samples, found.copied, found.control) == (50, pytest.approx(0.8), pytest.approx(0.2))
    assert "repeats its label on 80.0%" in str(found.warning) and "on 20.0%" in str(found.warning)
    assert d.negative_transfer(control, teacher, labels, parrot).warning is None
    assert d.negative_transfer(parrot, teacher, labels, parrot).warning is None


def test_two_mistakes_are_no_proof() -> None:
    labels = torch.zeros(50, dtype=torch.long)
    teacher, control = answers(1, 1, *[0] * 48), answers(*[0] * 50)
    found = d.negative_transfer(teacher, teacher, labels, control)
    assert (found.samples, found.copied, found.control, found.warning) == (2, 1, 0, None)


def test_a_student_worse_than_its_control_is_said_so() -> None:
    labels = torch.zeros(200, dtype=torch.long)
    worse, better = answers(*[0] * 100, *[1] * 100), answers(*[0] * 190, *[1] * 10)
    said = d.control_row(worse, better, labels, "student_label_smoothing")
    assert said.warning is not None and '"+ QAT with smoothed labels, INT8" by 45.00%' in said.warning
    assert said.accuracy == 0.95 and said.difference.mean == pytest.approx(-0.45)
    assert d.control_row(better, worse, labels, "student_no_kd").warning is None
    one_off = better.clone()
    one_off[0] = answers(1)[0]
    assert d.control_row(one_off, better, labels, "student_no_kd").warning is None  # one sample is chance


def test_a_paired_difference_is_within_its_interval() -> None:
    """Agresti and Min: half a sample more of each outcome; here 1.5, 0.5 of 6 samples."""
    found = d.paired_difference(torch.tensor([True, True, False, True]), torch.tensor([False, True, False, True]))
    half = 1.96 * math.sqrt((2 / 6 - (1 / 6) ** 2) / 6)
    assert found.mean == 0.25 and (found.low, found.high) == (pytest.approx(1 / 6 - half), pytest.approx(1 / 6 + half))
    one = d.paired_difference(torch.ones(1).bool(), torch.zeros(1).bool())
    assert one.low < 0 < one.mean == one.high == 1
    with pytest.raises(InputError, match="no pairs"):
        d.paired_difference(torch.ones(2), torch.ones(3))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_difference_turns_its_sign_with_its_sides(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(side) for side in zip(*pairs, strict=True))
    one, other = d.paired_difference(a, b), d.paired_difference(b, a)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert -1 <= one.low <= one.mean <= one.high <= 1


def flags(*counts: int) -> Tensor:
    """So many true, so many false, …"""
    return torch.cat([torch.full((n,), i % 2 == 0) for i, n in enumerate(counts)])


def test_what_a_corruption_costs_is_relative_and_has_an_interval() -> None:
    clean, all_right = flags(80, 20), flags(100)
    row = d.corruption_row("fog", "grey", (all_right, flags(90, 10)), (clean, flags(40, 60)))
    assert (row.teacher, row.student) == (0.9, 0.4)
    assert row.teacher_drop is not None and row.teacher_drop.mean == pytest.approx(0.1)
    assert row.student_drop is not None and row.student_drop.mean == pytest.approx(0.5)
    assert row.excess is not None and row.excess.mean == pytest.approx(0.4)
    binomial = 1.96 * math.sqrt(0.1 * 0.9 / 100)  # of the teacher, whose clean answers are all right
    assert row.teacher_drop.low == pytest.approx(0.1 - binomial, abs=0.02)
    assert row.teacher_drop.high == pytest.approx(0.1 + binomial, abs=0.02)
    assert "fog costs the student 50.0%" in str(d.corruption_warning(row))
    same = d.corruption_row("fog", "grey", (clean, flags(40, 60)), (clean, flags(40, 60)))
    assert same.excess is not None and same.excess.low == same.excess.high == 0 and d.corruption_warning(same) is None
    lost = d.corruption_row("fog", "grey", (flags(0, 9), flags(0, 9)), (flags(9), flags(9)))
    assert lost.teacher_drop is lost.excess is None and lost.student_drop is not None and lost.student_drop.mean == 0


def test_the_compile_has_paid_after_so_many_queries() -> None:
    paid = d.break_even(3600, 2.0, 0.5)
    assert paid is not None and (paid.queries, paid.saved_ms) == (2_400_000, 1.5)
    up = d.break_even(1, 3.0, 0.0)
    assert up is not None and up.queries == 334
    assert d.break_even(10, 1.0, 1.0) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.teacher_health(torch.zeros(3)), r"logits \(3,\) must be \[N, C\]"),
        (lambda: d.teacher_health(torch.zeros(0, 3)), "not empty"),
        (lambda: d.teacher_health(torch.tensor([[0.0, float("nan")]])), "finite"),
        (lambda: d.calibration(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), r"labels \(3,\).*\(2, 3\)"),
        (lambda: d.calibration(torch.zeros(2, 3), torch.zeros(2)), "float32"),
        (lambda: d.calibration(torch.zeros(2, 3), torch.tensor([0, 3])), "from 0 to 3, with 3 classes"),
        (lambda: d.fidelity(torch.zeros(2, 3), torch.zeros(2, 4)), r"student's logits are \(2, 3\).*\(2, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_half_precision_and_extremes_are_computed_in_float64() -> None:
    z = (1e4 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))).bfloat16()
    labels = torch.arange(8) % 5
    found = d.calibration(z, labels, best_temperature(z, labels))
    assert all(math.isfinite(v) for v in found.model_dump(exclude={"reason"}).values())
    assert math.isfinite(d.fidelity(z, -z, labels).kl)
