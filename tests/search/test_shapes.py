"""Successive halving among students of another shape, by made-up ones whose worth is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from pqk.search.candidates import Candidate, TrainingChoice
from pqk.search.judge import Worth
from pqk.search.shapes import best_shape
from pqk.search.verdict import Tried


def halving(
    drops: dict[str, float], speeds: dict[str, float]
) -> tuple[str | None, list[tuple[str, float]], list[Tried]]:
    """The shape that wins, the trainings in order with their epochs, and all rows."""
    trained: list[tuple[str, float]] = []
    rows: list[Tried] = []

    def judged(candidate: Candidate) -> Tried:
        name = str(candidate.shape)
        if candidate.epochs:
            trained.append((candidate.name, candidate.epochs))
        drop = drops[name] / (1 + candidate.epochs) if candidate.epochs else 0.9
        worth = Worth(0.9 - drop, drop, drop, speeds[name], speeds[name], speeds[name], None, 1000, 500)
        rows.append(Tried(candidate, worth, 1.0))
        return rows[-1]

    attempts: Any = SimpleNamespace(
        runs=SimpleNamespace(teacher=nn.Identity(), program=lambda passes, shape: None),
        judged=judged,
        within=list,
        all_judged=lambda candidates: [judged(c) for c in candidates],
        worth_training=lambda tried: tried.known.speed > 2.0,
        training=lambda program, what, share: TrainingChoice("adamw", 1e-3, 1.0),
        best=SimpleNamespace(candidate=SimpleNamespace(name="static")),
        terms=SimpleNamespace(lacks_speed=lambda worth: False),
        spending=SimpleNamespace(
            room=float("inf"), epochs_left=48.0, epochs_in=lambda training, seconds, epochs: min(seconds, epochs)
        ),
    )
    found = best_shape(attempts, list(drops))
    return None if found is None else found.tried.candidate.shape, trained, rows


def test_each_round_keeps_the_better_half_and_takes_as_long_in_all() -> None:
    drops = {"a": 0.4, "b": 0.2, "c": 0.3, "slow": 0.0}
    winner, trained, rows = halving(drops, {"a": 3.0, "b": 3.0, "c": 3.0, "slow": 1.5})
    assert winner == "b"
    # 24 of 48 epochs in three rounds of 8: of three shapes, of two, of one, each on top of the rounds before
    assert [name for name, _ in trained] == [
        "a, round 1", "b, round 1", "c, round 1", "b, round 2", "c, round 2", "b, round 3",
    ]  # fmt: skip
    assert [round(epochs, 2) for _, epochs in trained] == [2.67, 2.67, 2.67, 6.67, 6.67, 14.67]
    fates = {t.candidate.name: t.fate for t in rows}
    assert fates["a, round 1"] == fates["c, round 2"] == "learned less than b in as long"
    assert "is not 1.05 times faster than static" in fates["slow, static"]


def test_where_none_is_fast_enough_none_is_trained() -> None:
    winner, trained, _ = halving({"a": 0.0}, {"a": 1.0})
    assert winner is None and not trained
