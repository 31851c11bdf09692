"""What a stopwatch notes of the tasks that a compile reports, and what an estimate makes of it."""

from __future__ import annotations

import time

import pytest

from pqk.bench.stopwatch import Stopwatch, training_seconds
from pqk.core.progress import Silent


def test_the_steps_and_the_end_of_a_task_are_timed_apart() -> None:
    watch = Stopwatch(Silent())
    with watch.task("01-distill", 6) as advance:
        advance(0, "")
        for _ in range(5):
            advance(1, "loss")
        time.sleep(0.02)
        advance(1, "loss")
        time.sleep(0.03)
    steps, ends = watch.of_trainings("01-distill")
    assert len(steps) == 6 and min(steps) >= 0 and steps[-1] >= 0.02 > max(steps[:-1])
    assert len(ends) == 1 and ends[0] >= 0.03


def test_a_ranking_is_no_training_and_a_recovery_is_one() -> None:
    watch = Stopwatch(Silent())
    for name in ("00-prune: ranking", "00-prune-recovery1", "00-prune-recovery2", "01-distill"):
        with watch.task(name, 3) as advance:
            advance(3, "")
    assert [len(part) for part in watch.of_trainings("00-prune")] == [2, 2]
    watch.clear()
    assert watch.of_trainings("00-prune") == ([], [])


@pytest.mark.parametrize(("fresh", "seconds"), [(None, 50.0), (0, 20.0), (4, 32.0), (10, 50.0), (99, 50.0)])
def test_answers_that_are_kept_cost_nothing_once_all_are_there(fresh: int | None, seconds: float) -> None:
    assert training_seconds(10, fresh, step=5.0, answer=3.0) == pytest.approx(seconds)


def test_a_training_never_takes_less_than_nothing() -> None:
    assert training_seconds(10, 0, step=5.0, answer=7.0) == 0.0
