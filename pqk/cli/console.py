"""What the command line shows: an answer as tables or as one JSON document, and progress with the time left."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pqk.core.distributed import is_first_launched
from pqk.core.progress import Advance, Observer, Silent

PLAIN_WIDTH = 120
"""columns where the output is not a terminal, which has none of its own"""


@dataclass(frozen=True)
class CommandAnswer:
    """What a command found: `document` for `--json`, `shown` for people."""

    document: Any
    shown: Sequence[RenderableType]
    exit_code: int = 0


def speaks() -> bool:
    """Whether this process talks to the user: rank 0 of a launch of several, or the only one."""
    return is_first_launched()


def write(answer: CommandAnswer, as_json: bool) -> None:
    """Put an answer on stdout."""
    if not speaks():
        return
    if as_json:
        write_json(answer.document)
        return
    console = terminal(stderr=False)
    for part in answer.shown:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def write_piece(text: str) -> None:
    """A piece of a line on stdout, shown at once."""
    if speaks():
        sys.stdout.write(text)
        sys.stdout.flush()


def write_json(document: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def terminal(stderr: bool) -> Console:
    """A console as wide as the terminal, or `PLAIN_WIDTH` where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    fixed = None if stream.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(stderr=stderr, width=fixed)


def table(title: str | None, header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> Table:
    """A table; `right` are the columns of numbers. None is shown as a dash."""
    made = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*("–" if cell is None else str(cell) for cell in row))
    return made


def observer(as_json: bool) -> Observer:
    """Bars where stderr is a terminal that a person looks at, silence elsewhere."""
    return Bars() if speaks() and not as_json and sys.stderr.isatty() else Silent()


class Bars:
    """An `Observer` on stderr: a bar with the time left for each task, and one line when it is done."""

    def __init__(self) -> None:
        self.progress: Progress | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        outermost = self.progress is None
        progress = self.progress = self.progress or self._started()
        row, last, began = progress.add_task(description, total=total, note=""), [""], time.monotonic()

        def advance(steps: int, text: str = "") -> None:
            last[0] = text or last[0]
            progress.update(row, advance=steps, note=last[0])

        try:
            yield advance
            line = f"{description}: {clock(time.monotonic() - began)}  {last[0]}".rstrip()
            progress.console.print(line, highlight=False, markup=False)
        finally:
            progress.remove_task(row)
            if outermost:
                progress.stop()
                self.progress = None

    @staticmethod
    def _started() -> Progress:
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=terminal(stderr=True),
        )
        progress.start()
        return progress


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def listed(values: Any, most: int = 120) -> str:
    """JSON values in one line; a list or table that takes more than `most` characters by its size."""
    if isinstance(values, dict | list):
        parts = [f"{k} {listed(v)}" for k, v in values.items()] if isinstance(values, dict) else map(listed, values)
        text = ", ".join(f"({p})" if ", " in p and isinstance(values, list) else p for p in parts)
        return text if len(text) <= most else f"{len(values)} entries"
    if isinstance(values, bool):
        return str(values).lower()
    return f"{values:.4g}" if isinstance(values, float) else str(values)
