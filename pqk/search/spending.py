"""What a search has spent of its budget, and how long it may train with the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pqk.core.program import Pass
from pqk.recipe.contract import Contract
from pqk.search.candidates import TrainingChoice
from pqk.search.runs import name_of

BRIEF, LENGTH = 0.06, 0.5
"""shares of what is left: for a brief training of a rung; for one at length"""
FEWEST_STEPS = 8
"""that are worth a training"""
MOST_EPOCHS = 40.0
UNDER_QUANTIZATION = 1.5
"""what an epoch at length takes, over one before quantization: a quarter of it is under quantization"""


@dataclass
class Spending:
    """Seconds and epochs so far, those of an earlier part of a resumed run among them."""

    contract: Contract
    steps: int
    """of an epoch"""
    seconds: float = 0.0
    epochs: float = 0.0
    overhead: float = 0.0
    """seconds of a candidate beside its training"""
    counted: set[str] = field(default_factory=set)
    """passes whose epochs are counted: candidates share those that led to them"""

    def count(self, passes: Sequence[Pass], seconds: float, shape: str | None = None) -> None:
        """Adds what a candidate took."""
        self.seconds += seconds
        for i, p in enumerate(passes):
            if (name := name_of(passes[: i + 1], shape)) not in self.counted:
                self.counted.add(name)
                self.epochs += p.training_epochs

    @property
    def room(self) -> float:
        """Seconds that are left; infinite where the budget is in epochs."""
        return max(0.0, self.contract.seconds - self.seconds)

    @property
    def epochs_left(self) -> float:
        """Infinite where the budget is a time."""
        return max(0.0, self.contract.epochs - self.epochs)

    @property
    def part(self) -> float:
        """The share of the budget that is spent."""
        return min(1.0, max(self.seconds / self.contract.seconds, self.epochs / self.contract.epochs))

    @property
    def allows_more(self) -> bool:
        """Whether another rung and a training of it may be begun."""
        return self.room > 4 * self.overhead and self.epochs_left * self.steps > FEWEST_STEPS

    def brief(self, training: TrainingChoice) -> float:
        """Epochs of a rung's training."""
        epochs = min(BRIEF * self.room / training.seconds, BRIEF * self.epochs_left, BRIEF * MOST_EPOCHS)
        return round(max(epochs, FEWEST_STEPS / self.steps), 6)

    def epochs_in(self, training: TrainingChoice, seconds: float, epochs: float) -> float:
        """Epochs of a training that may take so many seconds, and epochs."""
        return round(max(min(seconds / training.seconds, epochs, MOST_EPOCHS), FEWEST_STEPS / self.steps), 6)

    def at_length(self, training: TrainingChoice, share_of_macs: float) -> float:
        """Epochs of a training at length of a student with so many of the teacher's MACs; 0 where it is too few."""
        size = 0.5 + 0.5 * share_of_macs  # the teacher answers, and batches are made, whatever is cut
        room = max(0.0, self.room - 2 * self.overhead)
        seconds = UNDER_QUANTIZATION * training.seconds * size
        epochs = round(min(LENGTH * room / seconds, LENGTH * self.epochs_left, MOST_EPOCHS), 3)
        return epochs if epochs * self.steps >= FEWEST_STEPS else 0.0
