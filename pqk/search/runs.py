"""Makes candidates: every pass is saved by all that led to it, so that what candidates share is made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from pqk.bench.oracle import Oracle
from pqk.core.decisions import Journal
from pqk.core.distributed import is_main_process
from pqk.core.pipeline import run_passes
from pqk.core.program import Pass, Program
from pqk.core.run_context import RunContext
from pqk.core.run_folder import RunFolder
from pqk.documents import digest_of_values
from pqk.recipe.strict import plain
from pqk.target.target import Target
from pqk.task.task import Task


def name_of(passes: Sequence[Pass], shape: str | None = None) -> str:
    """The name of what some passes make of a teacher, or of the student of that shape."""
    made_of = [{"name": p.name, **plain(p)} for p in passes]
    return digest_of_values(made_of if shape is None else [shape, *made_of])[:16]


@dataclass(frozen=True)
class Runs:
    """The candidates of one search, in `place`."""

    teacher: nn.Module
    task: Task
    target: Target
    context: RunContext
    """of the whole compile"""
    place: Path
    shapes: Mapping[str, nn.Module]
    """students of another shape by name, frozen"""

    def program(self, passes: Sequence[Pass], shape: str | None = None) -> Program:
        """The program that `passes` make of the teacher, or of the student of that shape; what is saved is loaded."""
        given = None if shape is None else self.shapes[shape]
        program = Program.begin(self.teacher, self.target, self.context, given)
        timed = self.target.why_not_measured() is None
        oracle = Oracle(self.teacher, self.task, self.target, passes, self.context) if timed else None
        try:
            for i, p in enumerate(passes):
                run = replace(self._context(passes[: i + 1], shape), oracle=oracle)
                program = run_passes(replace(program, run=run), self.task, [p], start=i, earlier=passes[:i])
        finally:
            if oracle is not None:
                oracle.folder.cleanup()
        return program

    def _context(self, passes: Sequence[Pass], shape: str | None) -> RunContext:
        """The surroundings of the last of some passes; what is saved says which ones led to it."""
        name = name_of(passes, shape)
        folder, identity = self.place / name, f"{self.context.identity}/search/{name}"
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(RunFolder(folder).journal if is_main_process() else None, identity)
        return replace(self.context, folder=folder, journal=journal, identity=identity)
