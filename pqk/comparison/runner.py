"""Runs a comparison: one cell for each variant and seed, all cells saved as they end, and the table they make.

A cell is a recipe compiled with one seed, up to the INT8 student, and judged as it would be deployed. What variants
begin with alike (the same passes and settings, on the same seed) is compiled once. Choices are made on validation data;
evaluation data is looked at when a cell has ended, and nothing is chosen by it.

    OUT/cells/NAME-SEED.json     a finished cell
    OUT/students/NAME-SEED.onnx  its student, as it is deployed
    OUT/comparison.json, .md     the result
    OUT/.work/SEED/              the passes of unfinished cells, those that are shared, and the teacher's answers
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from pqk.bench.measure import ratio_to
from pqk.bench.oracle import Oracle
from pqk.comparison.config import Comparison, RecipeVariant, epochs
from pqk.comparison.markdown import to_markdown
from pqk.comparison.results import ComparedRow, Result, best, rows_of, significance
from pqk.core.decisions import Journal
from pqk.core.onnxruntime_session import OnnxModel, session
from pqk.core.pipeline import load, run_passes
from pqk.core.program import Pass, Program
from pqk.core.progress import Observer, Silent
from pqk.core.run_context import RunContext
from pqk.core.run_folder import WORK, RunFolder
from pqk.data.data import digest_of
from pqk.deploy.onnx_emitter import emit_onnx_for
from pqk.errors import InputError, PqkError
from pqk.files import read_sealed, write_json, write_sealed, write_whole
from pqk.knowledge.teachers.base import network_fingerprint, weights_fingerprint
from pqk.passes import REWRITES
from pqk.recipe.factories import students_of
from pqk.recipe.recipe import why_not_for_target
from pqk.recipe.strict import plain
from pqk.target.machine import machine_fingerprint, usable_cores
from pqk.target.target import Target
from pqk.task.state import frozen_copy
from pqk.task.task import Task
from pqk.training.trainer import accelerator


def compare(
    teacher: nn.Module,
    task: Task,
    comparison: Comparison,
    out: str | Path,
    *,
    student: nn.Module | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs all cells of a comparison, a variant with a seed each, and writes what they say.

    A variant that fails is a reason in the document, and its cells are tried again on resume.

    Args:
        teacher: a trained module; it is copied, put into eval mode and never changed.
        task: data and metric of all variants.
        comparison: the variants, and the seeds that they are run on.
        out: a new or empty directory, or with `resume` one that holds cells.
        student: a network of another shape that all variants begin with; None: what the recipe's `[student]` names, or
            else a copy of the teacher.
        resume: go on with the cells in `out`; those that are finished are not run again.
        observer: shows progress.
        command: how to repeat it, for the document.

    Returns:
        The document of `comparison.json`, JSON.

    Raises:
        InputError: nothing can be run, or `out` holds cells of other recipes, data or teachers.
        PqkError: every cell failed.
    """
    target = Target.named(comparison.recipe.target.name) if comparison.recipe.target else Target.detect()
    for variant in comparison.trained:
        if (reason := why_not_for_target(variant.recipe.passes, target)) is not None:
            raise InputError(f'variant "{variant.name}": {reason}')
        if epochs(variant.recipe):
            task.need_train(f'variant "{variant.name}"')
    if accelerator().num_processes > 1:
        raise InputError("compare: its cells run one after the other in one process; start it without torchrun")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --out names a directory")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; choose another, or continue with --resume")
    teacher = frozen_copy(teacher, task.example)
    task.check(teacher)
    students = students_of(student, comparison.recipe, teacher, task)
    with RunFolder.of(folder).held():
        bench = _Bench(
            teacher, students[0].module if students else None, task, comparison, target, folder, observer or Silent()
        )
        try:
            return bench.run(command)
        finally:
            bench.oracle.folder.cleanup()


def _identity_of(folder: Path) -> str:
    """The seed and the digest of the passes, teacher and data that a cell's folder is of."""
    return f"{folder.parent.name}/{folder.name}"


class _Bench:
    """The cells of one comparison, and where they are kept."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None,
        task: Task,
        comparison: Comparison,
        target: Target,
        folder: Path,
        observer: Observer,
    ) -> None:
        self.teacher, self.student, self.task = teacher, student, task
        self.comparison, self.target = comparison, target
        self.folder, self.observer = folder, observer
        for name in ("cells", "students", WORK):
            (folder / name).mkdir(parents=True, exist_ok=True)
        data = [None if d is None else d.fingerprint() for d in (task.train, task.validation, task.evaluation)]
        data += [d.fingerprint() for d in (task.retained, task.retained_evaluation) if d is not None]
        made_of = [weights_fingerprint(teacher), target.name, data, digest_of("example", task.example)]
        made_of += [] if student is None else [network_fingerprint(student)]
        self.source = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        # Only asked where a budget is a latency; the recipes share its measurement of the teacher.
        work = RunFolder.of(folder)
        run = RunContext(folder=work.path, journal=Journal(work.journal))
        self.oracle = Oracle(teacher, task, target, comparison.recipe.passes, run)
        self.saved: dict[tuple[str, int], Result] = {}
        self.failed: dict[tuple[str, int], str] = {}

    def run(self, command: str) -> dict[str, Any]:
        """Screen, choose, confirm; write the result."""
        comparison, self.saved = self.comparison, self._saved()
        cells = self._cells(comparison.trained, comparison.screen.seeds)
        if not cells:
            raise PqkError(f"compare: every cell failed; the first: {next(iter(self.failed.values()))}")
        screened = rows_of(comparison, cells, comparison.screen.seeds)
        document: dict[str, Any] = {"screen": self._round(comparison.screen.seeds, screened)}
        if comparison.confirm is not None:
            chosen = [comparison.baseline, *best(screened, comparison.baseline, comparison.confirm)]
            cells += self._cells([comparison.named(n) for n in chosen], comparison.confirm.seeds)
            confirmed = rows_of(comparison, cells, comparison.confirm.seeds)
            document["confirm"] = self._round(comparison.confirm.seeds, confirmed)
        document = {**self._about(command, cells), **document, "cells": [asdict(c) for c in cells]}
        write_json(self.folder / "comparison.json", document)
        write_whole(self.folder / "comparison.md", lambda p: p.write_text(to_markdown(document)))
        return document

    def _about(self, command: str, cells: Sequence[Result]) -> dict[str, Any]:
        comparison = self.comparison
        return {
            "pqk": importlib.metadata.version("pqk"),
            "command": command,
            "baseline": comparison.baseline,
            "metric": {"name": self.task.metric.name, "unit": self.task.metric.unit},
            "teacher": self.task.score(self.teacher, self.task.teachers(self.task.evaluation)),
            "budget": {
                "epochs": {v.name: epochs(v.recipe) for v in comparison.trained},
                "samples": 0 if self.task.train is None else self.task.train.samples,
                "validation_samples": self.task.validation.samples,
                "evaluation_samples": self.task.evaluation.samples,
                "note": comparison.budget,
            },
            "intervals": "95 %, Student's t over seeds; differences are paired by seed. Not corrected for the number "
            "of variants: of twenty that do nothing, one is expected outside",
            "chosen_by": "the metric of the INT8 graph on validation data",
            "recipe": comparison.recipe.dumps(),
            "variants": {v.name: dict(v.changes) for v in comparison.variants},
            "declined": {v.name: v.declined for v in comparison.variants if v.declined is not None},
            "failed": [{"variant": v, "seed": s, "reason": reason} for (v, s), reason in self.failed.items()],
            "speed": self._speed(cells),
            "target": self.target.name,
            "machine": machine_fingerprint(),
        }

    def _round(self, seeds: Sequence[int], rows: Sequence[ComparedRow]) -> dict[str, Any]:
        names = {self.comparison.baseline: "baseline"}
        said = [{**asdict(r), "verdict": names.get(r.variant, significance(r.difference))} for r in rows]
        return {"seeds": list(seeds), "rows": said}

    # cells

    def _cells(self, variants: Sequence[RecipeVariant], seeds: Sequence[int]) -> list[Result]:
        """All cells, those that are saved included, seed by seed. A failure is noted and the others go on."""
        cells = []
        with self.observer.task("cells", len(variants) * len(seeds)) as advance:
            for seed in seeds:
                for variant in variants:
                    try:
                        cells.append(self.saved.get((variant.name, seed)) or self._cell(variant, seed))
                    except PqkError as error:
                        self.failed[variant.name, seed] = str(error)
                    advance(1, f"{variant.name}, seed {seed}")
        return cells

    def _saved(self) -> dict[tuple[str, int], Result]:
        """The finished cells. Raises `InputError` for those that are of something else."""
        confirm, found = self.comparison.confirm, {}
        for variant in self.comparison.trained:
            for seed in (*self.comparison.screen.seeds, *(() if confirm is None else confirm.seeds)):
                path = self._path(variant, seed)
                if not path.exists():
                    continue
                identity = self._identity(variant, seed)
                saved = read_sealed(path, (*identity, "cell"), unsealed=True)
                other = [k for k in identity if saved[k] != identity[k]]
                if other:
                    what = "another recipe" if other == ["recipe"] else "other data, another teacher, student or target"
                    raise InputError(f"{path} is of {what}; name the variant anew, or choose another --out")
                try:
                    found[variant.name, seed] = Result(**saved["cell"])
                except TypeError as error:
                    raise InputError(f"{path} was changed or is of another version of pqk; delete it") from error
        return found

    def _path(self, variant: RecipeVariant, seed: int) -> Path:
        return self.folder / "cells" / f"{variant.stem}-{seed}.json"

    def _identity(self, variant: RecipeVariant, seed: int) -> dict[str, Any]:
        return {"source": self.source, "recipe": replace(variant.recipe, seed=seed).dumps()}

    def _cell(self, variant: RecipeVariant, seed: int) -> Result:
        """A new cell, saved. Raises `PqkError` where the variant fails."""
        passes, work = variant.recipe.passes, RunFolder.of(self.folder).path / str(seed)
        folders = [work / self._digest(passes[: i + 1]) for i in range(len(passes))]
        program = self._compile(passes, folders, seed)
        evaluation, size = self._judge(program, variant, seed)
        cell = _cell_of(variant, seed, program, evaluation, size)
        write_sealed(self._path(variant, seed), {**self._identity(variant, seed), "cell": asdict(cell)})
        for folder in self._unshared(passes, folders):
            shutil.rmtree(folder, ignore_errors=True)
        return cell

    def _compile(self, passes: Sequence[Pass], folders: Sequence[Path], seed: int) -> Program:
        """The INT8 student, from the last pass on whose result is saved. `folders[i]`: where passes 0 … i leave it."""
        program = Program.begin(self.teacher, self.target, RunContext(), self.student)
        runs = [RunFolder(folder) for folder in folders]
        saved = [i for i, p in enumerate(passes) if runs[i].is_finished(i, p.name)]
        if saved:
            last = passes[saved[-1]]
            program = replace(program, run=RunContext(identity=_identity_of(folders[saved[-1]])))
            program = last.derive(load(program, self.task, runs[saved[-1]].of_pass(saved[-1], last.name), REWRITES))
        for i in range(saved[-1] + 1 if saved else 0, len(passes)):
            run = RunContext(seed, folders[i], self._journal(folders[i]), self.observer)
            run = replace(run, identity=_identity_of(folders[i]))
            if self.target.why_not_measured() is None:
                run = replace(run, oracle=self.oracle)
            program = run_passes(replace(program, run=run), self.task, [passes[i]], start=i)
        return program

    def _journal(self, folder: Path) -> Journal:
        """The measured decisions of one pass, in a folder that shares the teacher's answers with the seed's others."""
        run, answers = RunFolder(folder), RunFolder(folder.parent).cache
        answers.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        if not run.cache.exists():  # where passes look for it
            run.cache.symlink_to(answers.resolve(), target_is_directory=True)
        return Journal(run.journal, _identity_of(folder))

    def _digest(self, passes: Sequence[Pass]) -> str:
        """Names what these passes make of the teacher, or of the student that was given."""
        text = json.dumps([self.source, [[p.name, plain(p)] for p in passes]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _unshared(self, passes: Sequence[Pass], folders: Sequence[Path]) -> list[Path]:
        """Those of `folders` whose passes no other variant begins with."""
        counts = Counter(
            self._digest(v.recipe.passes[: i + 1]) for v in self.comparison.trained for i in range(len(v.recipe.passes))
        )
        return [folder for folder in folders if counts[folder.name] < 2]

    def _judge(self, program: Program, variant: RecipeVariant, seed: int) -> tuple[float, int]:
        """(the metric on evaluation data, bytes) of the student as it is deployed."""
        if self.target.runtime != "onnxruntime":
            size = sum(t.numel() * t.element_size() for t in program.student.state_dict().values())
            return self.task.score(program.student, self.task.evaluation), size
        path = self._student(variant, seed)
        self._emit(program.student, path)
        like = program.student(*self.task.example)
        model = OnnxModel(path, like, optimized=self.target.why_not_measured() is None)
        return self.task.score(model, self.task.evaluation), path.stat().st_size

    def _emit(self, module: nn.Module, path: Path) -> None:
        emit_onnx_for(module, self.task, path)

    def _student(self, variant: RecipeVariant, seed: int) -> Path:
        return self.folder / "students" / f"{variant.stem}-{seed}.onnx"

    def _speed(self, cells: Sequence[Result]) -> list[dict[str, Any]]:
        """Each architecture's first student beside the teacher, once; empty where this machine is not the target."""
        if self.target.why_not_measured() is not None:
            return []
        alike: dict[tuple[int, int], list[Result]] = {}
        for cell in cells:
            alike.setdefault((cell.parameters, cell.macs), []).append(cell)
        threads, feeds = min(2, usable_cores()), self.task.feeds(1)
        path = self.folder / "students" / "teacher.onnx"
        self._emit(self.teacher, path)
        teacher, found = session(path, threads=threads), []
        for (parameters, macs), group in alike.items():
            student = self._student(self.comparison.named(group[0].variant), group[0].seed)
            ratio, low, high = ratio_to(teacher, session(student, threads=threads), feeds)
            measured = {"ratio": ratio, "low": low, "high": high, "batch": 1, "threads": threads}
            names = list(dict.fromkeys(c.variant for c in group))
            found.append({"parameters": parameters, "macs": macs, "variants": names, **measured})
        return found


def _cell_of(variant: RecipeVariant, seed: int, program: Program, evaluation: float, size: int) -> Result:
    records = program.records
    return Result(
        variant=variant.name,
        seed=seed,
        validation=records[-1].metric,
        evaluation=evaluation,
        epochs=epochs(variant.recipe),
        steps=sum(r.details.get("steps", 0) for r in records if isinstance(r.details.get("steps", 0), int)),
        seconds=round(sum(r.seconds for r in records), 3),
        parameters=next(r.parameters for r in reversed(records) if r.parameters),  # an INT8 graph has buffers
        macs=records[-1].macs,
        size_bytes=size,
        losses=[r.details["losses"] for r in records if "losses" in r.details],
    )
