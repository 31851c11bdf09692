"""Which student is trained at length, and what follows: by a made-up teacher whose students' worths are known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from pqk.recipe.contract import Contract
from pqk.search.candidates import STATIC, Candidate, TrainingChoice, forms
from pqk.search.finals import Finals
from pqk.search.judge import Worth
from pqk.search.verdict import Terms, Tried


def tried(name: str, drop: float, ratio: float) -> Tried:
    worth = Worth(0.9 - drop, drop, drop + 0.002, ratio, ratio, ratio, None, 1000, 500)
    return Tried(Candidate(name, "", forms(nn.Identity())[0].passes, cut="width"), worth, 1.0)


@dataclass
class Made:
    """Attempts whose trainings end as `outcomes` says: the drop by the name of what was made."""

    outcomes: dict[str, float]
    contract: Contract = field(default_factory=Contract)
    made: list[str] = field(default_factory=list)
    ended: str | None = None
    macs: int = 1000

    def __post_init__(self) -> None:
        self.terms = Terms(self.contract, 0.01, share=True)
        self.spending = SimpleNamespace(at_length=lambda training, share: 0.0 if len(self.made) >= 6 else 3.0)
        self.task = SimpleNamespace(validation=SimpleNamespace(labelled=True))
        self.fastest = tried(STATIC, 0.0, 1.5)

    def worth_training(self, start: Tried) -> bool:
        return start.known.speed > 1.05 * self.fastest.known.speed

    @property
    def best(self) -> Tried:
        return self.fastest

    def ends(self, last: Tried, why: str) -> None:
        self.ended = f"{last.candidate.name}: {why}"

    def judged(self, candidate: Candidate, size: float = 1.0) -> Tried:
        start = candidate.name.partition(",")[0]
        self.made.append(candidate.name)
        done = tried(candidate.name, self.outcomes[candidate.name], {"slow": 2.0, "mid": 3.0, "fast": 4.0}[start])
        done = replace(done, candidate=candidate)
        if self.terms.holds(done.worth) and done.known.speed > self.fastest.known.speed:
            self.fastest = done
        return done


def run(outcomes: dict[str, float], brief: dict[str, float], deeper: dict[str, Tried] | None = None) -> list[str]:
    """The names of what was trained at length, in order; `brief` are drops after brief trainings."""
    attempts: Any = Made(outcomes)
    speeds = {"slow": 2.0, "mid": 3.0, "fast": 4.0}
    starts = [tried(name, drop, speeds[name]) for name, drop in brief.items()]
    found = deeper or {}
    ladder: Any = SimpleNamespace(
        form=forms(nn.Identity())[0],
        training=TrainingChoice("sgd", 0.1, 1.0),
        deeper=lambda done: [found[done.candidate.name]] if done.candidate.name in found else [],
    )
    Finals(attempts, ladder, None).run(starts)
    return attempts.made


def test_the_fastest_that_is_expected_to_keep_the_contract_goes_first() -> None:
    brief = {"slow": 0.005, "mid": 0.02, "fast": 0.04}  # of 0.04 a third is left: too much
    outcomes = {"mid, trained": 0.005, "fast, trained": 0.039}
    assert run(outcomes, brief) == ["mid, trained", "fast, trained"]  # then a faster one may try


def test_where_none_is_expected_to_the_one_that_loses_least_does_and_goes_on_as_long_as_that_helps() -> None:
    brief = {"slow": 0.03, "mid": 0.05}
    outcomes = {"slow, trained": 0.02, "slow, trained (2)": 0.012, "slow, trained (3)": 0.0119, "mid, trained": 0.03}
    assert run(outcomes, brief) == ["slow, trained", "slow, trained (2)", "slow, trained (3)"]


def test_after_one_that_does_not_comes_the_next_slower_one() -> None:
    brief = {"slow": 0.01, "mid": 0.02}
    outcomes = {"mid, trained": 0.015, "slow, trained": 0.004}
    assert run(outcomes, brief) == ["mid, trained", "slow, trained"]


def test_one_that_keeps_it_is_cut_further_and_faster_ones_get_their_turn() -> None:
    brief = {"slow": 0.03, "mid": 0.06}
    outcomes = {"slow, trained": 0.001, "fast, trained": 0.003}
    made = run(outcomes, brief, {"slow, trained": tried("fast", 0.012, 4.0)})
    assert made == ["slow, trained", "fast, trained"]


def test_what_is_no_faster_than_what_holds_is_not_trained() -> None:
    assert run({}, {}) == []
    attempts: Any = Made({})
    Finals(attempts, None, None).run([tried("slow", 0.0, 1.55)])
    assert attempts.made == []
