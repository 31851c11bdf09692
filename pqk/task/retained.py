"""What a model must not forget: data to train on, and the part of it that tells whether it was forgotten."""

from __future__ import annotations

from typing import Any

from pqk.data.data import Data, as_data, split
from pqk.errors import InputError


def retained_data(retained: Any, evaluation: Any, share: float) -> tuple[Data | None, Data | None]:
    """What must not be forgotten, as (data to train on, data that this is measured on).

    Args:
        retained: a `DataLoader`, a list of batches or a `Data`; None: there is none.
        evaluation: likewise; None: a `share` of `retained` is split off.
        share: between 0 and 1.

    Raises:
        InputError: it is no data, or cannot be split.
    """
    whole = None if retained is None else as_data(retained, "task retained")
    if evaluation is not None:
        return whole, as_data(evaluation, "task retained_evaluation")
    if whole is None:
        return None, None
    try:
        return split(whole, share)
    except InputError as error:
        raise InputError(
            f"task: {share:.0%} of the retained data, {whole.samples} samples, cannot be split off to tell what was "
            "forgotten; pass retained_evaluation=…, other samples of the same kind"
        ) from error
