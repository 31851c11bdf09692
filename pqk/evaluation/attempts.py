"""A number for the report, or why there is none: no statistic ends a compile whose student is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pqk.errors import PqkError, Reason, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why something could not be computed."""

    reason: Reason


def attempt(what: Callable[[], T]) -> T | Failure:
    """`what()`, or why it failed. A file that cannot be written, as on a full disk, is an error all the same."""
    try:
        return what()
    except OSError:
        raise
    except PqkError as error:
        return Failure(str(error))
    except Exception as error:  # whatever a model, a runtime or another tool raises
        return Failure(first_line(error, 300))
