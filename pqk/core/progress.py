"""Progress, shown by an observer; the library itself never prints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Advance = Callable[[int, str], None]
"""(steps, text) -> None"""


class Observer(Protocol):
    """Shows progress. The library never prints; the command line passes an observer that does."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]: ...


class Silent:
    """The default observer: nothing is shown."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        return nullcontext(lambda steps, text="": None)
