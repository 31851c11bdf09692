"""What pqk raises. Every message says what, where, which numbers, and what to do.

The command line maps these to exit codes: `InputError` to 2, `ParityError` to 3, `ContractError` to 4.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

Reason = str
"""why something does not apply, in words that reach the report; `why_not_…() -> Reason | None` is None where it does"""


class PqkError(Exception):
    """Base of every error that pqk raises on purpose."""


class InputError(PqkError, ValueError):
    """Something the user gave cannot be used: a file, a recipe, data, a model."""


class ParityError(PqkError):
    """The deployed numbers differ from the trained ones (exit code 3)."""


class ContractError(PqkError):
    """No student keeps the contract; the nearest one is kept (exit code 4)."""


def nearest(word: object, known: Iterable[str]) -> str:
    """`' (did you mean "kernel"?)'` for the closest known word, or the list of the known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else f" (known: {', '.join(known)})"


def first_line(error: BaseException, limit: int = 200) -> str:
    """An unexpected error in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:limit]}"
