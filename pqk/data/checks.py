"""What a user gives to a task, checked: whole numbers, and texts that a tokenizer can read."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from pqk.errors import InputError, Reason


def check_sizes(who: str, least: int = 1, **sizes: Any) -> None:
    """Raises `InputError`, beginning with `who`, for a size that is no whole number or less than `least`."""
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
            raise InputError(f"{who}: {name}={value!r} must be a whole number, at least {least}")


def why_not_text(value: Any) -> Reason | None:
    """Why a value is no text that can be tokenized and written to a file, else None."""
    if not isinstance(value, str):
        return f"no text but {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])[1:-1]
        return f"half a character ({half} at {error.start}), as of a text that was cut within one; mend or take it out"
    return None
