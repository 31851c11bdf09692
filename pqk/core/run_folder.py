"""Where a run keeps its state: the names below `OUT/.work`, and how a run is opened or continued.

run.json                 what this is a run of; a resume must match it
journal.jsonl            measured decisions
00-prune/                a finished pass: student.safetensors and program.json (stage, plan, records, declined)
01-distill.partial/      the checkpoint of the running one
cache/                   the teacher's answers
proof/                   the artifact and its report in the making
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqk.errors import InputError
from pqk.files import read_json, write_json

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

    def open(self, identity: dict[str, Any], resume: bool) -> None:
        """Make the folder for a run of `identity` (JSON), or find the one to continue.

        Raises:
            InputError: something else stands where the artifact goes, or the run to continue is of another identity.
        """
        out = self.path.parent
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; --out names a directory")
        present = sorted(p.name for p in out.iterdir()) if out.exists() else []
        if not resume and present:
            listing = ", ".join(present[:4])
            raise InputError(f"{out} is not empty ({listing}…); choose another, or continue with --resume")
        if resume and self.identity.exists():
            saved = read_json(self.identity)
            differing = [key for key in identity if saved.get(key, identity[key]) != identity[key]]
            if differing:
                names = " and ".join(differing)
                raise InputError(f"{out} holds a run with another {names}; it cannot be continued with these")
            return
        # A run that was killed before its first file has a folder with hidden files at most.
        begun = present == [WORK] and all(p.name.startswith(".") for p in self.path.iterdir())
        if resume and present and not begun:
            raise InputError(f"{out} is not empty and holds no run to continue")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {self.path}: {error.strerror}") from error
        write_json(self.identity, identity)
