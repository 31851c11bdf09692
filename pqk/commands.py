"""What each command does: calls the library and makes an `Answer`, a document for `--json` and tables for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from pqk import describe
from pqk.artifact import MANIFEST, Artifact
from pqk.compiler import compress as compile_student
from pqk.console import Answer, clock, listed, observer, table
from pqk.doctor import examine
from pqk.errors import InputError
from pqk.factories import load_task, load_teacher
from pqk.files import read_json
from pqk.machine import fingerprint
from pqk.recipe import Recipe, TargetSpec, TaskSpec, TeacherSpec, json_schema, plain
from pqk.report import TITLES, LatencyRow, Report, attribution_table, metric_text, percent, schema_text
from pqk.run import Observer
from pqk.target import Target

Rows = list[list[Any]]


def _warnings(texts: Sequence[str]) -> list[RenderableType]:
    return [f"warning: {text}" for text in texts]


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


def _loaded(teacher: TeacherSpec, task: TaskSpec, data: Path | None, recipe: Path) -> tuple[Any, Any]:
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data}: there is no such folder")
    beside = recipe.resolve().parent
    return load_teacher(teacher, data, beside), load_task(task, data, beside)


def compress(
    path: Path,
    out: Path,
    *,
    data: Path | None,
    target: str | None,
    settings: Sequence[str],
    seed: int | None,
    resume: bool,
    attribution: Literal["standard", "full"],
    allow_parity_failure: bool,
    as_json: bool,
) -> Answer:
    recipe, teacher_spec, task_spec = _open(path, settings, target, seed)
    teacher, task = _loaded(teacher_spec, task_spec, data, path)
    artifact = compile_student(
        teacher,
        task,
        recipe,
        out=out,
        resume=resume,
        attribution=attribution,
        allow_parity_failure=allow_parity_failure,
        observer=observer(as_json),
    )
    report = artifact.report
    warnings = [m for m in [artifact.target.mismatch()] if m is not None]
    files = sorted([*artifact.manifest["files"], MANIFEST])
    document = {"out": str(out), "files": files, "warnings": warnings, "report": json.loads(report.dumps())}
    spent = f"{clock(sum(report.seconds.values()))} in passes; parity {_parity(report)}"
    shown = [attribution_table(report), spent, *_warnings(warnings), f"written to {out}: {', '.join(files)}"]
    return Answer(document, shown)


def _parity(report: Report) -> str:
    if report.parity is None:
        return f"not checked: {report.parity_reason or 'no reason given'}"
    if report.parity.passed:
        return f"met, {percent(report.parity.agreement)} of {report.parity.samples} samples decided alike"
    return f"BROKEN: {report.parity.first_divergence}"


def check(
    path: Path, *, data: Path | None, target: str | None, settings: Sequence[str], seed: int | None, as_json: bool
) -> Answer:
    from pqk.check import check as rehearse

    recipe, teacher_spec, task_spec = _open(path, settings, target, seed)
    teacher, task = _loaded(teacher_spec, task_spec, data, path)
    shows: Observer = observer(as_json)
    found = rehearse(teacher, task, recipe, shows)
    document = {"recipe": str(path), **asdict(found)}
    return Answer(document, describe.findings(document), 2 if found.problems else 0)


# Measuring and looking


def benchmark(folder: Path, batches: Sequence[int], threads: int, device: str) -> Answer:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"--device cuda: no CUDA device: torch {torch.__version__} sees none on this machine")
        raise InputError("--device cuda: this version has no CUDA kernels yet; --device cpu runs model.onnx")
    artifact = Artifact.load(folder)
    warnings = [m for m in [artifact.target.mismatch()] if m is not None]
    rows = artifact.benchmark(tuple(batches), threads)
    if all(row.variant == "student" for row in rows):
        warnings.append(
            "nothing to compare with: the teacher's ONNX file, which a finished compile keeps in .work, is gone"
        )
    machine = fingerprint()
    document = {
        "artifact": str(folder),
        "target": artifact.target.name,
        "machine": machine,
        "warnings": warnings,
        "latency": [row.model_dump(mode="json") for row in rows],
    }
    title = f"{folder}, compiled for {artifact.target.name}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['target']}; measured in turn"
    return Answer(document, [_latency(title, rows), where, *_warnings(warnings)])


def _latency(title: str, rows: Sequence[LatencyRow]) -> RenderableType:
    header = ("network", "runtime", "batch", "threads", "median", "5 % to 95 %", "against the teacher")
    cells = [
        [
            TITLES[r.variant],
            r.runtime if r.spinning else f"{r.runtime}, no spinning",
            r.batch,
            r.threads,
            f"{r.median_ms:.3f} ms",
            f"{r.p05_ms:.3f} to {r.p95_ms:.3f} ms",
            r.verdict,
        ]
        for r in rows
    ]
    return table(title, header, cells, right=(2, 3, 4, 5, 6))


def inspect(where: Path) -> Answer:
    if not where.exists():
        raise InputError(f"{where}: there is no such file or folder")
    if not where.is_dir():
        return _inspect_recipe(where)
    if (where / ".work").is_dir() and not (where / MANIFEST).exists():
        return _inspect_unfinished(where)
    return _inspect_artifact(Artifact.load(where))


def _passes_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [
        {"pass": p.name, "stage": str(stage), "produces": str(p.result_stage(stage)), "settings": plain(p)}
        for p, stage in zip(recipe.passes, recipe.stages(), strict=True)
    ]


def _inspect_recipe(path: Path) -> Answer:
    recipe = Recipe.load(path)
    specs = {k: None if (s := getattr(recipe, k)) is None else plain(s) for k in ("teacher", "task", "target")}
    rows = _passes_of(recipe)
    document = {"kind": "recipe", "path": str(path), "seed": recipe.seed, **specs, "passes": rows}
    head = [f"{k}: {listed(v, 400) if v else 'none given'}" for k, v in {**specs, "seed": str(recipe.seed)}.items()]
    cells = [
        [i + 1, r["pass"], f"{r['stage']} → {r['produces']}", listed(r["settings"], 400)] for i, r in enumerate(rows)
    ]
    shown = table(str(path), ("", "pass", "stage", "settings (the rest are defaults)"), cells)
    return Answer(document, ["\n".join(head), shown])


def _inspect_unfinished(folder: Path) -> Answer:
    recipe = Recipe.loads(read_json(folder / ".work" / "run.json")["recipe"])
    names = [f"{i:02d}-{p.name}" for i, p in enumerate(recipe.passes)]
    done = [n for n in names if (folder / ".work" / n / "program.json").exists()]
    document = {"kind": "unfinished", "folder": str(folder), "finished": done, "passes": _passes_of(recipe)}
    left = [n for n in names if n not in done]
    shown = [
        f"{folder} is an unfinished compile: {len(done)} of {len(names)} passes are done",
        f"done: {', '.join(done) or 'none'}",
        f"left: {', '.join(left) or 'the proof'}",
        f"continue with: pqk compress RECIPE.toml --out {folder} --resume",
    ]
    return Answer(document, ["\n".join(shown)])


def _inspect_artifact(artifact: Artifact) -> Answer:
    report, manifest = artifact.report, artifact.manifest
    recipe = _passes_of(artifact.recipe)
    rows = []
    for record, planned in zip(report.passes, recipe, strict=False):
        declined = [{"layer": d.layer, "reason": d.reason} for d in report.declined if d.pass_name == record.pass_name]
        rows.append({**record.model_dump(mode="json"), "settings": planned["settings"], "declined": declined})
    document = {
        "kind": "artifact",
        "folder": str(artifact.folder),
        **{k: v for k, v in manifest.items() if k not in ("files", "format")},
        "files": manifest["files"],
        "rewrites": [r.function for r in artifact.plan],
        "passes": rows,
        "report": json.loads(report.dumps()),
    }
    ports = [f"{p['name']} {p['dtype']} {p['shape']}" for p in (*manifest["inputs"], *manifest["outputs"])]
    head = [
        f"{artifact.folder}: {report.metric.name if report.metric else 'metric'} "
        f"{metric_text(report.metric, report.metric.student if report.metric else None)} "
        f"(teacher {metric_text(report.metric, report.metric.teacher if report.metric else None)}), "
        f"{report.size_bytes / 1e3:.0f} kB, for {manifest['target']}, seed {manifest['seed']}",
        f"inputs and outputs: {'; '.join(ports)}",
        f"integer coverage {percent(report.integer_coverage)}; parity {_parity(report)}",
        "every file is as it was written",
    ]
    return Answer(document, ["\n".join(head), attribution_table(report), *describe.passes_done(report)])


# Reference


def passes() -> Answer:
    document = describe.reference()
    return Answer(document, describe.reference_tables(document))


def schema(report: bool) -> Answer:
    document = json.loads(schema_text()) if report else json_schema()
    return Answer(document, [json.dumps(document, indent=2, ensure_ascii=False)])


def doctor() -> Answer:
    document = examine()
    return Answer(document, describe.machine(document))
