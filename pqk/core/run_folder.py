"""Where a run keeps its state: the names below `OUT/.work`, and how a run is opened or continued.

run.json                 what this is a run of; a resume must match it
.lock                    held by the process that runs
journal.jsonl            measured decisions
00-prune/                a finished pass: student.safetensors and program.json (stage, plan, records, declined)
01-distill.partial/      the checkpoint of the running one
cache/                   the teacher's answers
proof/                   the artifact and its report in the making
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.errors import InputError
from pqk.files import read_sealed, write_sealed

WORK = ".work"
"""the folder of a run's state, in the directory that its artifact goes to"""


def scope_of(index: int, pass_name: str) -> str:
    """The name of a pass in its run, such as `02-distill`: of its folder, its seeds and its decisions."""
    return f"{index:02d}-{pass_name}"


@dataclass(frozen=True)
class RunFolder:
    """The state of one run on disk. Nothing is made before it is asked for."""

    path: Path

    @staticmethod
    def of(out: Path) -> RunFolder:
        """The state of the run whose artifact goes to `out`."""
        return RunFolder(out / WORK)

    @property
    def identity(self) -> Path:
        """What this is a run of, as JSON."""
        return self.path / "run.json"

    @property
    def journal(self) -> Path:
        """Measured decisions, a JSON line each."""
        return self.path / "journal.jsonl"

    @property
    def cache(self) -> Path:
        """The teacher's answers."""
        return self.path / "cache"

    @property
    def unfinished_artifact(self) -> Path:
        """The artifact in the making, and the files that its student was compared with."""
        return self.path / "proof"

    @property
    def teacher_files(self) -> tuple[Path, ...]:
        """The teacher's FP32 ONNX files, the faster one first; they exist after a compile."""
        return tuple(self.unfinished_artifact / name for name in ("teacher_optimized.onnx", "teacher.onnx"))

    def of_pass(self, index: int, pass_name: str) -> Path:
        """The folder of a pass. It is there when the pass is finished."""
        return self.path / scope_of(index, pass_name)

    def is_finished(self, index: int, pass_name: str) -> bool:
        """Whether the result of a pass is saved."""
        return (self.of_pass(index, pass_name) / "program.json").exists()

    def checkpoints(self, scope: str) -> Path:
        """Where a running pass keeps its checkpoints."""
        return self.path / f"{scope}.partial"

    def drop_checkpoints(self, scope: str) -> None:
        """Remove the checkpoints of a finished pass, which may have trained more than once."""
        for path in self.path.glob(f"{scope}*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """This process alone has the folder, which is made where it is not there.

        The system lets go of it when the process ends, however it does. A file system without locks is taken as it is.

        Raises:
            InputError: another process has it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise InputError(f"cannot make {self.path}: {error.strerror}") from error
        try:
            if not _locked(lock):
                raise InputError(f"another process runs in {self.path.parent}; wait for it, or choose another --out")
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def opened(self, identity: dict[str, Any], resume: bool) -> Iterator[None]:
        """The folder for a run of `identity` (JSON), new or the one to continue, held by this process alone.

        Raises:
            InputError: something else stands where the artifact goes, the run to continue is of another identity, or
                another process runs in it.
        """
        out = self.path.parent
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; --out names a directory")
        present = sorted(p.name for p in out.iterdir()) if out.exists() else []
        if not resume and present:
            listing = ", ".join(present[:4])
            raise InputError(f"{out} is not empty ({listing}…); choose another, or continue with --resume")
        if resume and present and not self.identity.exists() and not self._is_begun(present):
            raise InputError(f"{out} is not empty and holds no run to continue")
        with self.held():
            # Asked again: another process may have begun, or ended, between the look and the lock.
            if self.identity.exists() and not resume:
                raise InputError(f"{out} is not empty ({WORK}…); choose another, or continue with --resume")
            if self.identity.exists():
                self._check(identity)
            else:
                write_sealed(self.identity, identity)
            yield

    def _is_begun(self, present: list[str]) -> bool:
        """Whether all that is there is what a run that was killed before its first file has made."""
        return present == [WORK] and all(p.name.startswith(".") for p in self.path.iterdir())

    def _check(self, identity: dict[str, Any]) -> None:
        saved = read_sealed(self.identity, (), unsealed=True)
        differing = [key for key in identity if saved.get(key, identity[key]) != identity[key]]
        if differing:
            names = " and ".join(differing)
            out = self.path.parent
            raise InputError(f"{out} holds a run with another {names}; it cannot be continued with these")


def _locked(file: int) -> bool:
    """Whether this process has the lock of an open file now, as far as there are locks here."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
