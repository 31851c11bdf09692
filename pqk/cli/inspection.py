"""`pqk inspect`: what is in a recipe, in a compile that did not finish, and in an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pqk.cli import views as describe
from pqk.cli.console import CommandAnswer, listed, table
from pqk.core.run_folder import RunFolder, scope_of
from pqk.deploy.artifact import MANIFEST, Artifact
from pqk.errors import InputError
from pqk.files import read_sealed
from pqk.recipe.recipe import TABLES, Recipe
from pqk.recipe.strict import plain
from pqk.report.text import attribution_table, metric_text, percent

OF_ANOTHER = " of a student of another shape, which was given and not cut out of its teacher"


def inspect(where: Path) -> CommandAnswer:
    if not where.exists():
        raise InputError(f"{where}: there is no such file or folder")
    if not where.is_dir():
        return _inspect_recipe(where)
    if RunFolder.of(where).path.is_dir() and not (where / MANIFEST).exists():
        return _inspect_unfinished(where)
    return _inspect_artifact(Artifact.load(where))


def _passes_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [
        {"pass": p.name, "stage": str(stage), "produces": str(p.result_stage(stage)), "settings": plain(p)}
        for p, stage in zip(recipe.passes, recipe.stages(), strict=True)
    ]


def _inspect_recipe(path: Path) -> CommandAnswer:
    recipe = Recipe.load(path)
    specs = {k: None if (s := getattr(recipe, k)) is None else plain(s) for k in TABLES}
    rows = _passes_of(recipe)
    document = {"kind": "recipe", "path": str(path), "seed": recipe.seed, **specs, "passes": rows}
    without = {"student": "cut out of the teacher"}
    values = {k: listed(v, 400) if v else without.get(k, "none given") for k, v in specs.items()}
    head = [f"{k}: {v}" for k, v in {**values, "seed": str(recipe.seed)}.items()]
    cells = [
        [i + 1, r["pass"], f"{r['stage']} → {r['produces']}", listed(r["settings"], 400)] for i, r in enumerate(rows)
    ]
    shown = table(str(path), ("", "pass", "stage", "settings (the rest are defaults)"), cells)
    return CommandAnswer(document, ["\n".join(head), shown])


def _inspect_unfinished(folder: Path) -> CommandAnswer:
    run = RunFolder.of(folder)
    identity = read_sealed(run.identity, ("recipe",))
    recipe = Recipe.loads(str(identity["recipe"]), str(run.identity))
    names = [scope_of(i, p.name) for i, p in enumerate(recipe.passes)]
    done = [scope_of(i, p.name) for i, p in enumerate(recipe.passes) if run.is_finished(i, p.name)]
    given = identity.get("student")
    document: dict[str, Any] = {"kind": "unfinished", "folder": str(folder), "student": given, "finished": done}
    document["passes"] = _passes_of(recipe)
    left = [n for n in names if n not in done]
    shown = [
        f"{folder} is an unfinished compile{OF_ANOTHER if given else ''}: {len(done)} of {len(names)} passes are done",
        f"done: {', '.join(done) or 'none'}",
        f"left: {', '.join(left) or 'the evaluation'}",
        f"continue with: pqk compress RECIPE.toml --out {folder} --resume",
    ]
    return CommandAnswer(document, ["\n".join(shown)])


def _inspect_artifact(artifact: Artifact) -> CommandAnswer:
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
        f"integer coverage {percent(report.integer_coverage)}; parity {describe.parity(report)}",
        *([f"this is a compile{OF_ANOTHER}"] if artifact.given else []),
        "every file is as it was written",
    ]
    shown = [*describe.passes_done(report), *describe.warned(describe.diagnosed(report))]
    return CommandAnswer(document, ["\n".join(head), attribution_table(report), *shown])
