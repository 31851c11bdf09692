"""Documents as they are read: bounded in size and depth, from plain files, with digests that tell what was changed.

A sealed document states the digest of its own values, as its first key, so that one which was changed by anything but
pqk is not believed (`pqk.files` writes and reads them).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from pqk.errors import InputError

LARGEST = 1 << 28
"""bytes that a text may have: far more than any that pqk writes, and little enough to be held in memory"""
DEEPEST = 100
"""how many lists and tables of a document may be in one another"""
SEAL = "sha256"
"""the key of a sealed document's own digest"""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """A plain file, and its size. Raises `InputError` for one that is missing, unreadable, or none; also while read."""
    try:
        # Without waiting: a named pipe would keep whoever opens it until somebody writes.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"cannot read {path}: it is not a plain file")
            yield f, status.st_size
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """What a plain file holds. Raises `InputError` where it cannot be read, or is larger than `most`."""
    with opened(path) as (file, size):
        if size > most:
            raise InputError(f"cannot read {path}: it has {size} bytes, and {most} at most are expected")
        return file.read(size)


def parse_json(content: bytes, where: object, *, finite: bool = False) -> Any:
    """The values of a JSON document in UTF-8; `finite` is for one in which no number is NaN or infinite.

    Raises `InputError` where it is none, or is nested too deeply.
    """
    try:
        hook = _finite if finite else None
        value = json.loads(content.decode(), parse_constant=hook, parse_float=hook)
    except RecursionError:
        raise InputError(f"cannot read {where}: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"cannot read {where}: {error}") from error
    check_depth(value, where)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number that it can have")
    return value


def check_depth(value: Any, where: object) -> None:
    """Raises `InputError` where lists and tables are in one another more than `DEEPEST` times."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part for v in level for part in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return
    raise InputError(f"cannot read {where}: it is nested too deeply; {DEEPEST} lists and tables in one another at most")


def digest_of_values(value: Any) -> str:
    """The sha256 of JSON values, however they are laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """The sha256 of a plain file's bytes. Raises `InputError` where it cannot be read."""
    with opened(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()
