"""The data that decides a contract: samples that the teacher has not seen, and that the report does not look at.

A teacher is better on what it was trained on than on new data, and a student that was trained without a part of it is
not: on that part it seems to lose what the teacher has only learned by heart. Where no validation data is given, half
of the evaluation data decides, and the report is about the other half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pqk.data.data import Data
from pqk.data.rows import JoinedData, halves
from pqk.recipe.contract import DEFAULT_DROP, Contract
from pqk.search.judge import NONE_OF
from pqk.task.task import Task

FEW = 100
"""samples that decide at least, where no rule says how many it takes"""
SEEN = (
    "evaluation data is few, so that samples that were split off the training data decide as well: where the teacher "
    "was trained on them, it is better there than on new data, and students seem to lose more than they do; "
    "Task(validation=…) of data that it has not seen decides better"
)


@dataclass(frozen=True)
class Deciding:
    """What a contract is decided on."""

    data: Data
    task: Task
    """whose evaluation data has none of it"""
    caution: str | None = None
    """what to know of the data"""


def deciding(task: Task, contract: Contract) -> Deciding:
    """Validation data that was given, or else half of the evaluation data.

    Where that half is too little to tell the drop that is allowed, what was split off the training data is joined to
    it. Raises `InputError` for evaluation data of a single sample.
    """
    if not task.validation_is_split:
        return Deciding(task.validation, task)
    held, rest = halves(task.evaluation)
    note = (
        f"no validation data was given: {held.samples} of the {task.evaluation.samples} evaluation samples, drawn "
        f"by a seed, decided which student ships; the metrics here are of the other {rest.samples}"
    )
    apart = task.with_evaluation(rest, note)
    if held.samples >= _least(contract, task.metric.unit if held.labelled else "share"):
        return Deciding(held, apart)
    if held.labelled != task.validation.labelled:
        return Deciding(held, apart)
    return Deciding(JoinedData(held, task.validation), apart, SEEN)


def _least(contract: Contract, unit: str) -> int:
    """Samples without which the drop that is allowed could not be told."""
    points = DEFAULT_DROP if contract.max_drop is None else contract.max_drop
    return max(FEW, math.ceil(NONE_OF * 100 / points)) if unit == "share" and points else FEW  # see Contract.max_drop
