"""What each command does: calls the library and makes its answer: a document for `--json` and tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from pqk.bench.artifact import benchmark as benchmark_artifact
from pqk.bench.measure import TimingProtocol
from pqk.cli import views as describe
from pqk.cli.console import CommandAnswer, clock, observer, table
from pqk.cli.doctor import examine
from pqk.comparison.config import Comparison, comparison_schema
from pqk.compiler import compress as compile_student
from pqk.core.progress import Observer
from pqk.data.augmentation import UNAUGMENTED
from pqk.deploy.artifact import MANIFEST, REPORT, REPORT_HTML, Artifact, write_html
from pqk.deploy.manifest import read_manifest
from pqk.errors import InputError
from pqk.evaluation.settings import Evaluation
from pqk.recipe.contract import Contract
from pqk.recipe.factories import load_student, load_task, load_teacher
from pqk.recipe.recipe import Recipe, with_clauses
from pqk.recipe.schema import json_schema
from pqk.recipe.specs import TargetSpec, TaskSpec, TeacherSpec
from pqk.recipe.strict import parse
from pqk.report.html.page import why_not_drawn
from pqk.report.markdown import to_markdown
from pqk.report.schema import LatencyRow, Report, schema_text
from pqk.report.text import (
    LATENCY_HEADER,
    attribution_table,
    cascade_text,
    is_share,
    latency_cells,
    promise_text,
)
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target

TableRows = list[list[Any]]


# Compiling


def _open(
    path: Path, settings: Sequence[str], target: str | None, seed: int | None
) -> tuple[Recipe, TeacherSpec, TaskSpec]:
    """A recipe with the command line's changes, and its [teacher] and [task]."""
    recipe = Recipe.load(path).override(settings)
    if target is not None:
        recipe = replace(recipe, target=TargetSpec(name=Target.named(target).name))
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if recipe.teacher is None or recipe.task is None:
        missing = "[teacher]" if recipe.teacher is None else "[task]"
        raise InputError(
            f'{path}: it has no {missing} table, which names what to compile: factory = "module:function". Without '
            "one, call pqk.compress(teacher, task, recipe) from Python"
        )
    return recipe, recipe.teacher, recipe.task


def load_sources(teacher: TeacherSpec, task: TaskSpec, data: Path | None, recipe: Path) -> tuple[Any, Any]:
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: there is no such folder")
    beside = recipe.resolve().parent
    model = load_teacher(teacher, data, beside)
    return model, load_task(task, data, beside, model)


def _student(recipe: Recipe, teacher: Any, data: Path | None, path: Path) -> Any:
    """The student of another shape that the recipe names; None: it is cut out of the teacher."""
    if recipe.student is None:
        return None
    return load_student(recipe.student, teacher, recipe.seed, data, path.resolve().parent)


def compress(
    path: Path,
    out: Path,
    *,
    data: Path | None,
    target: str | None,
    settings: Sequence[str],
    seed: int | None,
    resume: bool,
    evaluation: str,
    allow_parity_failure: bool,
    clauses: Mapping[str, Any],
    as_json: bool,
) -> CommandAnswer:
    recipe, teacher_spec, task_spec = _open(path, settings, target, seed)
    if clauses:
        recipe = with_clauses(recipe, clauses)
    teacher, task = load_sources(teacher_spec, task_spec, data, path)
    artifact = compile_student(
        teacher,
        task,
        recipe,
        out=out,
        student=_student(recipe, teacher, data, path),
        resume=resume,
        evaluation=Evaluation.named(evaluation),
        allow_parity_failure=allow_parity_failure,
        observer=observer(as_json),
    )
    report = artifact.report
    warnings = [m for m in [artifact.target.why_not_here()] if m is not None] + describe.diagnosed(report)
    warnings += [note for note in report.notes if note.startswith(UNAUGMENTED)]
    files = sorted([*artifact.manifest["files"], MANIFEST])
    document = {"out": str(out), "files": files, "warnings": warnings, "report": json.loads(report.dumps())}
    spent = f"{clock(sum(report.seconds.values()))} in passes; parity {describe.parity(report)}"
    promised = [] if report.promise is None else [promise_text(report.promise, share=is_share(report))]
    promised += [] if report.cascade is None else [cascade_text(report)]
    written = f"written to {out}: {', '.join(files)}"
    shown = [attribution_table(report), *promised, spent, *describe.warned(warnings), written]
    if REPORT_HTML not in files and (reason := why_not_drawn()) is not None:
        shown.append(f"no {REPORT_HTML}, a page with pictures: {reason}")
    return CommandAnswer(document, shown)


def compare(
    path: Path, out: Path, *, data: Path | None, seeds: list[int] | None, resume: bool, as_json: bool
) -> CommandAnswer:
    from pqk.comparison import markdown
    from pqk.comparison.runner import compare as run_cells

    comparison = Comparison.load(path)
    if seeds is not None:
        comparison = comparison.seeded(tuple(seeds))
    recipe = comparison.recipe
    if recipe.teacher is None or recipe.task is None:
        raise InputError(f"{path}: it needs a [teacher] and a [task] table, as recipes have them")
    teacher, task = load_sources(recipe.teacher, recipe.task, data, path)
    chosen = "" if seeds is None else f" --seeds {','.join(map(str, seeds))}"
    command = f"pqk compare {path}{'' if data is None else ' --data DATA'} --out {out}{chosen}"
    student, shows = _student(recipe, teacher, data, path), observer(as_json)
    document = run_cells(
        teacher, task, comparison, out, student=student, resume=resume, observer=shows, command=command
    )
    shown: list[RenderableType] = [
        table(title, markdown.HEADER, markdown.table_of(document, part), right=(2, 3, 4, 6))
        for part, title in (("screen", "Screened"), ("confirm", "Confirmed"))
        if part in document
    ]
    shown += [*markdown.notes_of(document), f"written to {out}: comparison.json, comparison.md"]
    return CommandAnswer(document, shown, 1 if document["failed"] else 0)


def strangers(
    out: Path, *, data: Path | None, budget: str, only: Sequence[str], peers: bool, as_json: bool
) -> CommandAnswer:
    from pqk.models.strangers import STRANGERS
    from pqk.models.strangers.stranger import named
    from pqk.strangers.bench import DOCUMENT, Bench, BenchConditions
    from pqk.strangers.peers import PEERS
    from pqk.strangers.table import beside_peers, markdown, rows_of

    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: there is no such folder")
    parse(Contract, {"budget": budget}, "contract")  # refuses what is none, before a teacher is trained
    chosen = [named(name, STRANGERS) for name in only] or STRANGERS
    bench = Bench(out, data, BenchConditions(budget=budget), observer(as_json), PEERS if peers else ())
    document = bench.run(chosen)
    tables = [markdown(document), *([beside_peers(document)] if peers else [])]
    broken = any(not row.held for row in rows_of(document))
    return CommandAnswer(document, [*tables, f"written: {out / DOCUMENT}"], 1 if broken else 0)


def check(
    path: Path, *, data: Path | None, target: str | None, settings: Sequence[str], seed: int | None, as_json: bool
) -> CommandAnswer:
    from pqk.check import check as rehearse

    recipe, teacher_spec, task_spec = _open(path, settings, target, seed)
    teacher, task = load_sources(teacher_spec, task_spec, data, path)
    shows: Observer = observer(as_json)
    found = rehearse(teacher, task, recipe, shows, student=_student(recipe, teacher, data, path))
    document = {"recipe": str(path), **asdict(found)}
    return CommandAnswer(document, describe.findings(document), 2 if found.problems else 0)


# Measuring and looking


def benchmark(folder: Path, batches: Sequence[int], threads: int, rounds: int, device: str) -> CommandAnswer:
    if device == "cuda":
        return _benchmark_cuda(folder, batches)
    artifact = Artifact.load(folder)
    warnings = [m for m in [artifact.target.why_not_here()] if m is not None]
    rows = benchmark_artifact(artifact, tuple(batches), threads, TimingProtocol(rounds=rounds))
    if all(row.variant == "student" for row in rows):
        warnings.append(
            "nothing to compare with: the teacher's ONNX file, which a finished compile keeps in .work, is gone"
        )
    machine = machine_fingerprint()
    document = {
        "artifact": str(folder),
        "target": artifact.target.name,
        "machine": machine,
        "warnings": warnings,
        "latency": [row.model_dump(mode="json") for row in rows],
    }
    title = f"{folder}, compiled for {artifact.target.name}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['target']}; measured in turn"
    return CommandAnswer(document, [_latency(title, rows), where, *describe.warned(warnings)])


def _benchmark_cuda(folder: Path, batches: Sequence[int]) -> CommandAnswer:
    from pqk.gpu.benchmark import benchmark as benchmark_on
    from pqk.gpu.device import Cuda, why_not_present

    if (reason := why_not_present()) is not None:
        raise InputError(f"--device cuda: {reason}")
    artifact = Artifact.load(folder)
    warnings = [] if (mismatch := artifact.target.why_not_here()) is None else [mismatch]
    head = {
        "artifact": str(folder),
        "target": artifact.target.name,
        "machine": machine_fingerprint(),
        "warnings": warnings,
    }
    document = head | benchmark_on(artifact, Cuda(), batches).document()
    stores = "kernel configurations were measured first; to store them, compile with the file of --json as fuse.tuning"
    return CommandAnswer(document, [*describe.gpu(document), stores, *describe.warned(warnings)])


def _latency(title: str, rows: Sequence[LatencyRow]) -> RenderableType:
    return table(title, LATENCY_HEADER, [latency_cells(r) for r in rows], right=(2, 3, 4, 5, 6, 7))


def kernels(folder: Path | None, arches: Sequence[str], batch: int, *, as_json: bool) -> CommandAnswer:

    from pqk.gpu.static_checks import check_launches_statically

    document = check_launches_statically(folder, arches, batch=batch, observer=observer(as_json))
    what = "the kernels' cases" if folder is None else f"{folder} at batch {batch}"
    shown: list[RenderableType] = []
    for arch in document["predictions_assume"]:
        rows = [row for layer in document["layers"] for row in _launches(layer, arch["name"])]
        untraced = {why for layer in document["layers"] if (why := layer["on"][arch["name"]]["traffic_reason"])}
        shown += [
            table(f"{what}, compiled for {arch['name']}", LAUNCHES, rows, right=range(3, len(LAUNCHES))),
            f"≥ µs: predicted, not measured, by the peaks of one {arch['gpu']}: "
            f"{arch['int8_ops'] / 1e12:.0f} TOPS INT8, {arch['bandwidth'] / 1e9:.0f} GB/s ({arch['source']})",
            *(f"bytes not counted: {why}" for why in sorted(untraced)),
        ]
    missed = document["problems"]
    verdict = [f"missed: {text}" for text in missed] or ["every bar is met: no spills, no more than 1.1x the bytes"]
    return CommandAnswer(document, [*shown, READ, *verdict], 1 if missed else 0)


LAUNCHES = (
    "layer", "operator", "int8 units", "regs", "spills", "shared", "fills ≤", "moved", "to once", "issued", "≥ µs"
)  # fmt: skip
READ = (
    "int8 units: integer matrix instructions in the code; fills: share of a core's warps that such programs can fill; "
    "moved: distinct 32-byte sectors; to once: beside inputs, weights and outputs once; issued: all loads and stores"
)


def _launches(layer: dict[str, Any], arch: str) -> TableRows:
    """A row for each launch of a layer; its bytes and time stand in the first."""
    there = layer["on"][arch]
    traffic, predicted, alike = there["traffic"], there["predicted"], len(layer["layers"]) - 1
    name, op = layer["layers"][0] + (f" +{alike}" if alike else ""), layer["op"].removeprefix("pqk::")
    counted: list[str | None] = [None] * 4
    if traffic:
        moved, issued = (f"{traffic[k] / 1e3:.1f} kB" for k in ("moved", "issued"))
        counted = [moved, f"{traffic['ratio']:.2f}x", issued, f"{predicted['microseconds']:.3f}"]
    rows: TableRows = []
    for code in there["launches"]:
        made: list[Any] = [None] * 5
        if code["reason"] is None:
            units = {name.partition(".")[0].removeprefix("v_").partition("_")[0].upper() for name in code["integer"]}
            shared = f"{code['shared'] / 1024:.1f}/{code['shared_limit'] / 1024:.0f} K"
            filled = f"{100 * code['occupancy']:.0f} %"
            made = [", ".join(sorted(units)) or None, code["registers"], code["spills"], shared, filled]
        rows.append([name, op, *made, *counted])
        name, op, counted = "", "", [None] * 4
    return rows or [[name, op, "not our kernel", *[None] * 8]]


def report(where: Path, *, as_html: bool, out: Path | None) -> CommandAnswer:
    source = where / REPORT if where.is_dir() else where
    found = Report.load(source)
    if not as_html:
        return CommandAnswer(json.loads(found.dumps()), [to_markdown(found)])
    if (reason := why_not_drawn()) is not None:
        raise InputError(f"pqk report: {reason}")
    page = out or source.with_name(REPORT_HTML)
    manifest = page.parent / MANIFEST
    if manifest.is_file() and page.name in read_manifest(manifest)["files"]:
        raise InputError(
            f"{page} is a file of the artifact there, which {MANIFEST} seals; open it, or write another with --out FILE"
        )
    write_html(found, page)
    return CommandAnswer({"report": str(source), "written": str(page)}, [f"written: {page}"])


# Reference


def passes() -> CommandAnswer:
    document = describe.reference()
    return CommandAnswer(document, describe.reference_tables(document))


def schema(report: bool, comparison: bool) -> CommandAnswer:
    document = comparison_schema() if comparison else json.loads(schema_text()) if report else json_schema()
    return CommandAnswer(document, [json.dumps(document, indent=2, ensure_ascii=False)])


def doctor() -> CommandAnswer:
    document = examine()
    return CommandAnswer(document, describe.machine(document))
