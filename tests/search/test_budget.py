"""What a budget pays for and why the ladder of prunings ends, by a made-up teacher whose students' worths are known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pqk import ArrayData, Contract, InputError, Task
from pqk.search.attempts import Attempts
from pqk.search.candidates import GOALS, Candidate, TrainingChoice, forms
from pqk.search.finals import Finals
from pqk.search.judge import Worth
from pqk.search.ladder import Ladder
from pqk.search.shapes import best_shape
from pqk.search.spending import FEWEST_STEPS, Spending
from pqk.search.verdict import Terms, Tried

STEPS = 8
"""of an epoch: as many as a student is trained for at least"""


def worth(drop: float, ratio: float, macs: int) -> Worth:
    return Worth(0.9 - drop, drop, drop + 0.002, ratio, ratio, ratio, 1 / ratio, macs, macs)


@dataclass
class Made(Attempts):
    """Attempts whose candidates lose what `drop` says at a rung of that level and take `took` seconds beside training,
    of which an epoch takes `pace`."""

    drop: Callable[[Candidate], float] = lambda candidate: 0.0
    reached: Callable[[Candidate], float] = lambda candidate: GOALS[candidate.level - 1] if candidate.level else 1.0
    took: float = 5.0
    pace: float = 10.0

    def judged(self, candidate: Candidate, size: float = 1.0) -> Tried:
        _, epochs = self.spending.expected(candidate.passes, candidate.shape)
        fewer = self.reached(candidate)
        known = worth(self.drop(candidate), 1.5 * fewer, round(100_000 / fewer))
        tried = self._add(Tried(candidate, known, self.took + self.pace * epochs))
        self.spending.count(candidate.name, candidate.passes, tried.seconds, candidate.shape, size)
        return tried

    def training(self, program: Any, what: str = "", share: float = 1.0) -> TrainingChoice:
        return TrainingChoice("sgd", 0.1, self.pace)


def attempts(contract: Contract, **made: Any) -> Made:
    data = ArrayData(torch.zeros(64, 3), torch.arange(64) % 3, 8)
    task = Task(data, data, validation=data)
    terms = Terms(contract, contract.allowed_drop("share", 0.9), share=True)
    unknown: Any = None
    found = Made(
        task, torch.zeros(8, 3), unknown, unknown, unknown, terms,
        Spending(contract, STEPS), lambda steps, text="": None, **made,
    )  # fmt: skip
    found.judged(forms(nn.Identity())[0])
    found.spending.overhead = found.took
    return found


def searched(made: Made) -> Made:
    """After a ladder and trainings at length."""
    ladder = Ladder.of(made, forms(nn.Identity())[0])
    assert ladder is not None
    Finals(made, ladder, None).run(ladder.starts())
    return made


@pytest.mark.parametrize("epochs", [1, 1.5, 2, 3, 5, 20])
def test_a_budget_in_epochs_is_never_overrun(epochs: float) -> None:
    made = searched(attempts(Contract(budget=f"{epochs} epochs")))
    assert 0 < made.spending.epochs <= epochs + 1e-6
    rungs = [t.candidate.name for t in made.tried if t.worth is not None and t.candidate.level]
    assert rungs and (epochs < 3 or {"width 1.4x", "depth 1.4x", "both 1.4x"} <= set(rungs))
    fates = [t.fate for t in made.tried if t.worth is None]
    assert epochs >= 3 or re.fullmatch(r"not begun: it takes 1 epochs, and 0?\.?\d? of the budget are .*", fates[0])


@pytest.mark.parametrize("seconds", [19, 20, 45, 90, 200, 900])
def test_a_budget_in_seconds_is_not_overrun_where_candidates_take_what_they_took_before(seconds: int) -> None:
    """An epoch of the least training takes ten seconds, and each network five beside it."""
    made = attempts(Contract(budget=f"{seconds}s"))
    made.spending.paces[None] = made.pace
    searched(made)
    assert made.spending.seconds <= seconds and made.spending.why_not_in_budget() is None
    assert (made.spending.epochs > 0) == (seconds >= 20)


def test_of_forms_without_training_only_those_that_fit_are_made_and_a_first_training_is_kept_free() -> None:
    made = attempts(Contract(budget="100s"))  # five are spent
    made.spending.paces[None] = made.pace  # a training takes 38 steps of 1.25 s, and twice five
    assert made.spending.least_training == pytest.approx(57.5) and made.spending.kept_free == 0
    assert len(made.within(forms(nn.Identity()) * 9)) == 19  # more than half of what is left: forms have it all
    made.spending.paces[None] = 0.5 * made.pace
    assert made.spending.kept_free == pytest.approx(33.75)
    assert len(made.within(forms(nn.Identity()) * 9, made.spending.kept_free)) == 12
    made.spending.seconds = 97.0
    assert made.within(forms(nn.Identity())[:1]) == []
    assert made.tried[-1].fate == "not begun: it would take about 5 s, and 3 s of the budget are left for it"


def test_a_budget_too_small_for_one_candidate_is_refused_with_one_that_would_do() -> None:
    few = Spending(Contract(budget="0.01 epochs"), 391)
    with pytest.raises(InputError, match=r"too small for one candidate.*391 steps.*8 at least; give") as refused:
        few.refuse_few_epochs()
    number = re.search(r'give "([\d.]+) epochs"', str(refused.value))
    assert number is not None
    enough = Spending(Contract(budget=f"{number[1]} epochs"), 391)
    enough.refuse_few_epochs()
    assert enough.epochs_left * 391 >= FEWEST_STEPS
    Spending(Contract(budget="0.01 epochs"), 0).refuse_few_epochs()  # nothing is trained
    little = Spending(Contract(budget="30s"), 10, overhead=31.0, paces={None: 20.0})
    little.refuse_few_seconds()
    little.seconds = 35.0
    with pytest.raises(InputError, match=r'took 35 s; "40s" would do for it, and "180s" for one that is trained'):
        little.refuse_few_seconds()


def test_an_overrun_says_by_how_much_and_what_was_being_made() -> None:
    spending = Spending(Contract(budget="90s"), 8, overhead=5.0)
    spending.count("static", forms(nn.Identity())[0].passes, 60.0)
    assert spending.why_not_in_budget() is None
    spending.count("dynamic", forms(nn.Identity())[1].passes, 50.0)
    spending.count("float", forms(nn.Identity())[2].passes, 3.0)
    assert spending.why_not_in_budget() == (
        "the search took 113 s, 23 s more than its budget of 90s: dynamic was begun with 30 s left, was expected to "
        "take 5 s, and took 50 s"
    )


def test_what_a_trained_student_takes_beside_its_training_is_learned() -> None:
    made = attempts(Contract(budget="900s"))
    made.spending.paces[None] = made.pace
    ladder = Ladder.of(made, forms(nn.Identity())[0])
    assert ladder is not None
    made.took = 40.0
    ladder.starts()
    assert made.spending.beside == pytest.approx(40.0)


def test_shapes_that_the_budget_does_not_pay_for_are_not_begun() -> None:
    made = attempts(Contract(budget="2 epochs"), drop=lambda c: 0.5 if not c.epochs else 0.0, reached=lambda c: 3.0)
    runs: Any = SimpleNamespace(teacher=nn.Identity(), program=lambda passes, shape=None: None)
    made.runs = runs
    found = best_shape(made, ["a", "b", "c"])
    assert made.spending.epochs <= 2 and found is not None and found.tried.candidate.name == "a, round 1"
    untried = {t.candidate.name: t.fate for t in made.tried if t.worth is None}
    assert untried["c, round 1"] == "not begun: it takes 1 epochs, and 0 of the budget are left for it"


# ---- why pruning ended

DEEPER = {
    "width 1.4x": 0.02,
    "width 1.4x, trained": 0.0,
    "width 2x": 0.06,
    "width 2x, of what was trained": 0.02,
    "width 2x, of what was trained, trained": 0.02,
}
"""what is lost where a student that keeps the contract is cut further, and that one does not"""


@pytest.mark.parametrize(
    ("contract", "made", "ended"),
    [
        (Contract(budget="1 epochs"), {}, r"0 epochs that are left of the budget are too little for another rung"),
        (Contract(budget="400 epochs"), {}, r"there is no deeper rung than 11 times fewer MACs"),
        (
            Contract(budget="40 epochs"),
            {"drop": lambda c: 0.03 * c.level},
            r"^pruning ended at \w+ 2x: it loses 6 points after a brief training, and 5 points at most may be won back",
        ),
        (Contract(budget="40 epochs"), {"reached": lambda c: 1.0}, "^nothing was cut out of the teacher: width leaves"),
        (
            Contract(budget="40 epochs"),
            {"reached": lambda c: min(2.0, GOALS[c.level - 1]) if c.level else 1.0},
            r"^pruning ended at \w+ 2x: the next rung was width leaves 100% of the MACs: no more can be cut so",
        ),
        (
            Contract(budget="40 epochs", min_speedup=2.5, max_drop=1),
            {},
            r"^pruning ended at \w+ 2x: it is as fast and as small as the contract asks for",
        ),
        (
            Contract(budget="400 epochs"),
            {"drop": lambda c: DEEPER.get(c.name, 0.04 if c.level else 0.0)},
            r"^pruning ended at width 2x, of what was trained, trained: after a training at length it may lose up to "
            r"2.2 points, and 1 point are allowed",
        ),
    ],
)
def test_why_pruning_ended_is_said(contract: Contract, made: dict[str, Any], ended: str) -> None:
    found = searched(attempts(contract, **made))
    assert found.ended is not None and re.search(ended, found.ended), found.ended


def test_where_the_metric_is_free_what_is_fast_enough_is_trained_as_long_as_that_helps() -> None:
    lost = {"width 2x": 0.08, "width 2x, trained": 0.03, "width 2x, trained (2)": 0.02, "width 2x, trained (3)": 0.0199}
    made = searched(
        attempts(Contract(budget="100 epochs", min_speedup=2.5), drop=lambda c: lost.get(c.name, 0.05 * bool(c.level)))
    )
    names = [t.candidate.name for t in made.tried if "trained" in t.candidate.name]
    assert names == ["width 2x, trained", "width 2x, trained (2)", "width 2x, trained (3)"]
    assert made.best.candidate.name == "width 2x, trained (3)"


def test_rungs_that_are_no_faster_than_what_holds_are_said_to_gain_nothing() -> None:
    made = attempts(Contract(budget="40 epochs"), drop=lambda c: 0.02 if c.level else 0.0)
    made.tried[0] = replace(made.tried[0], worth=worth(0.0, 90.0, 100_000))
    searched(made)
    assert made.ended is not None and made.ended.endswith("gains nothing over static, which keeps the contract")
