"""Runs strangers one after the other; what is finished is kept, and what was stopped goes on."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pqk.bench.measure import THREADS
from pqk.compiler import compress
from pqk.core.progress import Observer, Silent
from pqk.core.run_folder import RunFolder
from pqk.deploy.artifact import MANIFEST, MODEL, Artifact
from pqk.errors import ContractError, InputError, ParityError, first_line
from pqk.evaluation.settings import Evaluation
from pqk.files import read_json, read_tensors, write_json, write_tensors
from pqk.models.strangers.stranger import Samples, Stranger
from pqk.recipe.contract import Contract
from pqk.search.candidates import MIXED
from pqk.strangers.contest import Contest, Standing
from pqk.strangers.peers import Case, Peer
from pqk.strangers.rows import End, Row, summary
from pqk.target.machine import installed, machine_fingerprint
from pqk.target.target import Target
from pqk.task.state import frozen_copy
from pqk.task.task import Task

log = logging.getLogger(__name__)

DOCUMENT = "strangers.json"


@dataclass(frozen=True, kw_only=True)
class BenchConditions:
    """Under which strangers are compiled. The defaults are those of the committed result."""

    budget: str = "10m"
    """of each search, as a contract says it"""
    seed: int = 0
    evaluation: str = "standard"
    """of each compile's report: see `pqk.Evaluation.named`"""
    rounds: int = 15
    """turns that each file gets beside the teacher"""
    samples: int | None = None
    """use only the first ones of each part of the data"""
    epochs: int | None = None
    """that teachers are trained for, instead of their own"""


@dataclass
class Bench:
    """Strangers under the default contract, in `out`, a folder for each."""

    out: Path
    data: Path | None = None
    conditions: BenchConditions = BenchConditions()
    observer: Observer = Silent()  # noqa: RUF009 (it has no state)
    peers: Sequence[Peer] = ()
    """tools that get the same strangers, and the same time"""

    def run(self, strangers: Sequence[Stranger]) -> dict[str, Any]:
        """Compiles every stranger that has no row yet, and writes what became of all: `strangers.json` in `out`.

        Raises:
            InputError: the data of a stranger is missing, `out` cannot be written, or peers would have no time, as the
                budget is in epochs.
        """
        if self.peers and math.isinf(self._contract.seconds):
            raise InputError(f'strangers: peers need a budget in time, and "{self.conditions.budget}" is in epochs')
        rows = []
        with self.observer.task("strangers", len(strangers)) as advance:
            for stranger in strangers:
                rows.append(self.row(stranger))
                advance(1, stranger.name)
        document: dict[str, Any] = json.loads(json.dumps(self.document(rows)))  # lists for tuples, as it will be read
        write_json(self.out / DOCUMENT, document)
        return document

    def document(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows as JSON, with the conditions that they hold under."""
        machine = machine_fingerprint()
        conditions = {
            **asdict(self.conditions), "threads": THREADS, "training_threads": torch.get_num_threads(),
            "machine": machine, "peers": {p.package: v for p in self.peers if (v := installed(p.package))},
        }  # fmt: skip
        return {"conditions": conditions, "summary": summary(rows), "strangers": [row.document() for row in rows]}

    @property
    def _contract(self) -> Contract:
        """The default one, with the budget of each search, which is what a peer's training may take, too."""
        return Contract(budget=self.conditions.budget)

    def row(self, stranger: Stranger) -> Row:
        """What became of one stranger: read, or found out now."""
        folder = self.out / stranger.name
        saved = self._saved(folder, "row.json")
        row = None if saved is None else Row.read(saved["row"])
        if row is not None and not self._waiting(row):
            return self._with_absent(row)
        folder.mkdir(parents=True, exist_ok=True)
        samples = stranger.samples(self.data).first(self.conditions.samples)
        trained, seconds = self._teacher(stranger, samples, folder)
        task = stranger.task(samples)
        teacher = frozen_copy(trained, task.example)
        contest = Contest(teacher, task, self._contract, folder, rounds=self.conditions.rounds)
        if row is None:
            row = replace(self._compiled(stranger, trained, task, contest), teacher_seconds=seconds)
            self._keep(row)
        case = Case(stranger, samples, teacher, contest, self._contract.seconds)
        for peer in self._waiting(row):
            row = replace(row, peers=(*row.peers, peer.standing(case)))
            self._keep(row)
        return self._with_absent(row)

    def _waiting(self, row: Row) -> list[Peer]:
        """The peers that have not had this stranger, and are installed."""
        done = {standing.name for standing in row.peers}
        return [p for p in self.peers if p.name not in done and p.why_not_here() is None]

    def _with_absent(self, row: Row) -> Row:
        """A row that says why peers are missing; it is not kept, as they may be there the next time."""
        absent = [Standing(p.name, reason=reason) for p in self.peers if (reason := p.why_not_here()) is not None]
        return replace(row, peers=(*row.peers, *absent))

    def _keep(self, row: Row) -> None:
        """Writes a row where the next run looks for it."""
        write_json(self.out / row.name / "row.json", {"conditions": asdict(self.conditions), "row": row.document()})

    def _saved(self, folder: Path, name: str) -> dict[str, Any] | None:
        """What an earlier run under the same conditions left; None: there is nothing of the kind."""
        if not (folder / name).exists():
            return None
        found: dict[str, Any] = read_json(folder / name)
        return found if found["conditions"] == asdict(self.conditions) else None

    def _teacher(self, stranger: Stranger, samples: Samples, folder: Path) -> tuple[nn.Module, float]:
        """The trained teacher and the seconds that it took; its weights are kept."""
        stranger = replace(stranger, epochs=self.conditions.epochs or stranger.epochs)
        path = folder / "teacher.safetensors"
        made = {
            "epochs": str(stranger.epochs),
            "samples": str(len(samples.train[1])),
            "seed": str(self.conditions.seed),
        }
        if path.exists():
            tensors, metadata = read_tensors(path)
            if {name: metadata.get(name) for name in made} == made:
                model = stranger.network()
                model.load_state_dict(tensors)
                return model.eval(), float(metadata["seconds"])
        began = time.perf_counter()
        model = stranger.teacher(samples, self.conditions.seed)
        took = time.perf_counter() - began
        write_tensors(path, dict(model.state_dict()), {**made, "seconds": f"{took:.1f}"})
        return model, took

    def _compiled(self, stranger: Stranger, teacher: nn.Module, task: Task, contest: Contest) -> Row:
        """Compiles one stranger, and judges what came of it beside the teacher without training."""
        began = time.perf_counter()
        end, words, out = self._compress(teacher, task, contest.folder)
        seconds = time.perf_counter() - began
        chosen, trained, student, timed = None, None, None, False
        if (out / MANIFEST).exists():
            report = Artifact.load(out).report
            trained = report.conditions.training_epochs > 0
            student = contest.standing("pqk", out / MODEL)
            if report.promise is not None:
                chosen = report.promise.chosen
                timed = any(t.name == MIXED and t.metric is not None for t in report.promise.tried)
        return Row(
            name=stranger.name, what=stranger.what, teacher=contest.teacher_metric, end=end, words=words,
            chosen=chosen, trained=trained, student=student, teacher_seconds=0.0, seconds=seconds,
            post_training=tuple(contest.post_training(Target.detect(), timing_layers=timed)),
        )  # fmt: skip

    def _compress(self, teacher: nn.Module, task: Task, folder: Path) -> tuple[End, str | None, Path]:
        """How the compile of one stranger ends, in which words, and its folder."""
        out, begun = folder / "compile", folder / "begun.json"
        if self._saved(folder, "begun.json") is None:
            shutil.rmtree(out, ignore_errors=True)
            write_json(begun, {"conditions": asdict(self.conditions)})
        options = self.conditions
        try:
            compress(
                teacher,
                task,
                out=out,
                seed=options.seed,
                resume=RunFolder.of(out).identity.exists(),
                evaluation=Evaluation.named(options.evaluation),
                observer=self.observer,
                contract=self._contract,
            )
        except (InputError, ContractError) as error:
            return "refused", str(error), out
        except ParityError as error:
            return "failed", str(error), out
        except Exception as error:  # a benchmark goes on with the next stranger, and the table says what this one met
            log.exception("%s", folder.name)
            return "failed", first_line(error), out
        return "kept", None, out
