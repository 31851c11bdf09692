"""Times what a compile reports as its progress: the steps of its trainings, and what each epoch ends in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pqk.core.progress import Advance, Observer


class Stopwatch:
    """An `Observer` that notes the seconds of every step of every task and passes everything on."""

    def __init__(self, inner: Observer) -> None:
        self.inner = inner
        self.steps: dict[str, list[float]] = {}
        """task -> seconds of each step"""
        self.ends: dict[str, list[float]] = {}
        """task -> seconds from its last step to its end, such as those of a checkpoint and of an epoch's evaluation"""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        seconds = self.steps.setdefault(description, [])
        last = time.perf_counter()
        with self.inner.task(description, total) as show:

            def advance(steps: int, text: str = "") -> None:
                nonlocal last
                now = time.perf_counter()
                if steps:
                    seconds.append((now - last) / steps)
                last = now
                show(steps, text)

            yield advance
        self.ends.setdefault(description, []).append(time.perf_counter() - last)

    def clear(self) -> None:
        """Forgets all tasks."""
        self.steps.clear()
        self.ends.clear()

    def of_trainings(self, scope: str) -> tuple[list[float], list[float]]:
        """Seconds of each step, and of each end, of the trainings of the pass `scope`: its own, and its `scope-…`."""
        trainings = [name for name in self.steps if name == scope or name.startswith(f"{scope}-")]
        steps = [s for name in trainings for s in self.steps[name]]
        return steps, [s for name in trainings for s in self.ends.get(name, [])]


def training_seconds(steps: int, fresh: int | None, step: float, answer: float) -> float:
    """Estimates the seconds of a training whose teacher's answers are kept.

    Args:
        steps: of the training.
        fresh: steps until the teacher has answered everything; None: its answers are not kept.
        step: seconds of a step with a teacher that answers.
        answer: of these, seconds that the teacher takes.

    Returns:
        Seconds of all steps, the first `fresh` of them with the teacher and the others without.
    """
    kept = 0 if fresh is None else max(0, steps - fresh)
    return steps * step - kept * min(answer, step)
