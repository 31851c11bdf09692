"""Folders for the time of a process, which the next one of their kind removes where that process was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: what is left there stays
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""held as long as the process runs; the system lets go of it when it ends, however it does"""


class ScratchFolder(tempfile.TemporaryDirectory[str]):
    """A temporary folder `pqk-KIND-…`; those of this kind whose processes were killed are removed first."""

    def __init__(self, kind: str) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"pqk-{kind}-*"):
            _remove_where_dead(left)
        super().__init__(prefix=f"pqk-{kind}-")
        lock = _locked(Path(self.name))
        if lock is not None:
            weakref.finalize(self, os.close, lock)


def _locked(folder: Path) -> int | None:
    """The file whose lock says that this process is alive; None: there are no locks here."""
    if fcntl is None:
        return None
    first = folder / f"{LOCK}.new"
    lock = os.open(first, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        first.rename(folder / LOCK)  # nobody finds it without its lock
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove_where_dead(folder: Path) -> None:
    """Remove a folder of this user whose lock is there and nobody has."""
    if fcntl is None:
        return
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or not made by this
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # its process is alive
        return
    finally:
        os.close(lock)
