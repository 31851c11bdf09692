"""What a search has spent of its budget, what the rest pays for, and how long it may train with it.

Nothing is begun that is expected to take more than what is left. What a network takes beside its training is the most
that one before it took, and what a training step takes is timed before the first student is trained. Both are
journaled, so that a resumed search begins the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pqk.core.program import Pass
from pqk.errors import InputError, Reason
from pqk.passes import Quantize
from pqk.recipe.contract import Contract
from pqk.search.candidates import TrainingChoice
from pqk.search.runs import name_of

BRIEF, LENGTH = 0.06, 0.5
"""shares of what is left: for a brief training of a rung; for one at length"""
FEWEST_STEPS = 8
"""that are worth a training"""
MOST_EPOCHS = 40.0
QUANTIZED = 3.0
"""what an epoch under quantization takes, over one before it"""
UNDER_QUANTIZATION = 1.5
"""what an epoch at length takes, over one before quantization: a quarter of it is under quantization"""
TRIAL_STEPS = 30
"""that trying how to train takes at least: six for each of four options, and as many before, to time them"""
FORMS = 0.5
"""share of what is left that the least training may take, for forms without training to leave it that much"""
ROUNDING = 1e-5
"""epochs by which a sum of rounded ones may be above what is left"""


@dataclass(frozen=True)
class Overrun:
    """What was being made when a budget in seconds was spent."""

    name: str
    left: float
    """seconds that were left when it was begun"""
    expected: float
    """seconds that it was expected to take"""
    took: float


@dataclass
class Spending:
    """Seconds and epochs so far, those of an earlier part of a resumed run among them."""

    contract: Contract
    steps: int
    """of an epoch; 0 where there is no training data"""
    seconds: float = 0.0
    epochs: float = 0.0
    overhead: float = 0.0
    """seconds of a candidate that is not trained"""
    beside: float = 0.0
    """seconds of one that is, beside its training"""
    paces: dict[str | None, float] = field(default_factory=dict)
    """seconds of an epoch before quantization, by the shape of the student; None: cut out of the teacher"""
    overrun: Overrun | None = None
    counted: set[str] = field(default_factory=set)
    """passes whose epochs are counted: candidates share those that led to them"""

    def refuse_few_epochs(self) -> None:
        """Raises `InputError` for a budget in epochs in which no student could be trained."""
        if self.steps and self.contract.epochs * self.steps < FEWEST_STEPS - ROUNDING:
            least = math.ceil(100 * FEWEST_STEPS / self.steps) / 100
            raise InputError(
                f'contract: budget = "{self.contract.budget}" is too small for one candidate: an epoch is {self.steps} '
                f'steps here, and a student is trained for {FEWEST_STEPS} at least; give "{least:g} epochs" or more'
            )

    def refuse_few_seconds(self) -> None:
        """Raises `InputError` where a first candidate that was not trained took the whole budget."""
        if self.room > 0:
            return
        enough = f'"{_tens(self.seconds)}s" would do for it'
        if self.least_training:
            enough += f', and "{_tens(self.seconds + self.least_training)}s" for one that is trained'
        raise InputError(
            f'contract: budget = "{self.contract.budget}" is too small for one candidate: INT8 without training, '
            f"with what is measured of the teacher, took {self.seconds:.3g} s; {enough}"
        )

    def count(
        self, name: str, passes: Sequence[Pass], seconds: float, shape: str | None = None, size: float = 1.0
    ) -> None:
        """Adds what a candidate took; `size` is as in `expected`."""
        training, epochs = self._training(passes, shape, size)
        expected = self._beside(passes) + training
        self.counted.update(name_of(passes[: i + 1], shape) for i in range(len(passes)))
        self.epochs += epochs
        self.add(name, seconds, expected)
        if training:
            self.beside = max(self.beside, seconds - training)

    def add(self, name: str, seconds: float, expected: float) -> None:
        """Adds seconds of anything, and notes what it was where the budget ends in it."""
        if self.overrun is None and self.seconds + seconds > self.contract.seconds:
            self.overrun = Overrun(name, self.room, expected, seconds)
        self.seconds += seconds

    def expected(self, passes: Sequence[Pass], shape: str | None = None, size: float = 1.0) -> tuple[float, float]:
        """Seconds and epochs that a candidate is expected to take.

        Args:
            passes: that make it; epochs of those that were made before count no more.
            shape: of the student, where it is not cut out of the teacher.
            size: what an epoch takes of it, over one of the students that the time of an epoch was taken on.
        """
        training, epochs = self._training(passes, shape, size)
        return self._beside(passes) + training, epochs

    def _training(self, passes: Sequence[Pass], shape: str | None, size: float) -> tuple[float, float]:
        pace, costs, quantized = self.paces.get(shape, max(self.paces.values(), default=0.0)), [], False
        for i, p in enumerate(passes):
            quantized = quantized or p.name == Quantize.name
            if p.training_epochs and name_of(passes[: i + 1], shape) not in self.counted:
                costs.append((p.training_epochs * (QUANTIZED if quantized else 1.0), p.training_epochs))
        return size * pace * sum(cost for cost, _ in costs), sum(epochs for _, epochs in costs)

    def _beside(self, passes: Sequence[Pass]) -> float:
        return max(self.overhead, self.beside if any(p.training_epochs for p in passes) else 0.0)

    def why_not_begun(
        self, seconds: float, epochs: float, kept_seconds: float = 0.0, kept_epochs: float = 0.0
    ) -> Reason | None:
        """Why what is expected to take so long is not begun, where some of the budget is for something else."""
        room, left = max(0.0, self.room - kept_seconds), max(0.0, self.epochs_left - kept_epochs)
        if seconds > room:
            return f"not begun: it would take about {seconds:.3g} s, and {room:.3g} s of the budget are left for it"
        if epochs > left + ROUNDING:
            return f"not begun: it takes {epochs:.3g} epochs, and {left:.3g} of the budget are left for it"
        return None

    @property
    def least_training(self) -> float:
        """Seconds that the first student takes at least that is trained, with trying how; 0 where none can be."""
        step = self.paces.get(None, 0.0) / max(1, self.steps)
        return (TRIAL_STEPS + FEWEST_STEPS) * step + 2 * self.overhead if step else 0.0

    @property
    def kept_free(self) -> float:
        """Seconds that forms without training leave to a first one, unless that would take most of what is left."""
        return self.least_training if self.least_training <= FORMS * self.room else 0.0

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
        room = 2 * (self.overhead + max(self.overhead, self.beside))
        return self.room > room and self.epochs_left * self.steps > FEWEST_STEPS

    @property
    def too_little(self) -> str:
        """Says that what is left does not allow more."""
        left = f"{self.room:.0f} s" if math.isinf(self.contract.epochs) else f"{self.epochs_left:.2g} epochs"
        return f"the {left} that are left of the budget are too little for another rung and a training of it"

    def brief(self, training: TrainingChoice) -> float:
        """Epochs of a rung's training."""
        epochs = min(BRIEF * self.room / training.seconds, BRIEF * self.epochs_left, BRIEF * MOST_EPOCHS)
        return round(max(epochs, FEWEST_STEPS / self.steps), 6)

    def epochs_in(self, training: TrainingChoice, seconds: float, epochs: float) -> float:
        """Epochs of a training that may take so many seconds, and epochs."""
        return round(max(min(seconds / training.seconds, epochs, MOST_EPOCHS), FEWEST_STEPS / self.steps), 6)

    def at_length(self, training: TrainingChoice, share_of_macs: float) -> float:
        """Epochs of a training at length of a student with so many of the teacher's MACs; 0 where it is too few."""
        room = max(0.0, self.room - 2 * max(self.overhead, self.beside))
        seconds = UNDER_QUANTIZATION * training.seconds * size_of(share_of_macs)
        epochs = round(min(LENGTH * room / seconds, LENGTH * self.epochs_left, MOST_EPOCHS), 3)
        return epochs if epochs * self.steps >= FEWEST_STEPS else 0.0

    def why_not_in_budget(self) -> Reason | None:
        """By how much a budget in seconds was overrun, and by what; None where it was not, by a second or more."""
        over, made = self.seconds - self.contract.seconds, self.overrun
        if made is None or over < 1:
            return None
        return (
            f"the search took {self.seconds:.0f} s, {over:.0f} s more than its budget of {self.contract.budget}: "
            f"{made.name} was begun with {made.left:.0f} s left, was expected to take {made.expected:.0f} s, and took "
            f"{made.took:.0f} s"
        )


def size_of(share_of_macs: float) -> float:
    """What an epoch takes of a student with so many of the teacher's MACs: the teacher answers, and batches are made,
    whatever is cut."""
    return 0.5 + 0.5 * share_of_macs


def _tens(seconds: float) -> int:
    """Rounded up to whole tens."""
    return 10 * math.ceil(seconds / 10)
