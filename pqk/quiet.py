"""Other libraries' warnings, logs and prints, kept from the user."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*loggers: str, level: int | None = None, printing: bool = False) -> Iterator[None]:
    """Drops what a library says while it works; Python's warnings always.

    Args:
        loggers: names of the loggers that `level` is for; without names it is for all, whatever their own level is,
            since some libraries raise it when they are imported.
        level: the least level of a log record that passes; None: logs are as they were.
        printing: also drop what is written to `sys.stdout` and `sys.stderr`.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    disabled = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if printing:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            if level is not None:
                if not loggers:
                    logging.disable(level - 1)
                for name in loggers:
                    logging.getLogger(name).setLevel(level)
            yield
        finally:
            logging.disable(disabled)
            for name, before in levels.items():
                logging.getLogger(name).setLevel(before)
