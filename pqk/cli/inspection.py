"""`pqk inspect`: what is in a recipe, in a compile that did not finish, and in an artifact."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pqk.cli import views as describe
from pqk.cli.console import CommandAnswer, clock, listed, table
from pqk.core.onnxruntime_session import (
    PAST,
    PRESENT,
    Continuing,
    EncoderDecoderSession,
    encoder_of,
    kind_of,
    session,
)
from pqk.core.run_folder import RunFolder, scope_of
from pqk.deploy.artifact import MANIFEST, Artifact, deployed_file
from pqk.documents import parse_json, read_bytes
from pqk.errors import InputError
from pqk.files import read_sealed
from pqk.recipe.contract import Contract
from pqk.recipe.recipe import TABLES, Recipe
from pqk.recipe.strict import plain
from pqk.report.text import attribution_table, metric_text, percent

CANDIDATE = "/candidate/"
"""what stands in a journal before the name of a candidate that was judged"""
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
    if recipe.contract is not None:
        return _inspect_search(folder, recipe, recipe.contract)
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
        f"continue with: pqk compress RECIPE.toml --out {shlex.quote(str(folder))} --resume",
    ]
    return CommandAnswer(document, ["\n".join(shown)])


def _inspect_search(folder: Path, recipe: Recipe, contract: Contract) -> CommandAnswer:
    """Where a search stands that did not finish, by its journal and its folders, which are only read."""
    run = RunFolder.of(folder)
    decisions = list(_decided(run.journal))
    judged = [
        {"name": key.partition(CANDIDATE)[2], "fate": value["fate"], "seconds": value["seconds"]}
        for key, value in decisions
        if CANDIDATE in key
    ]
    seconds = sum(_seconds(key, value) for key, value in decisions)
    making, evaluating = _in_the_making(run.path / "search"), run.unfinished_artifact.is_dir()
    document: dict[str, Any] = {
        "kind": "unfinished search", "folder": str(folder), "contract": plain(contract), "judged": judged,
        "making": making, "seconds": seconds, "budget": contract.budget, "passes": _passes_of(recipe),
    }  # fmt: skip
    ended = "the search is over" if evaluating else f"in the making: {making or 'nothing that is saved yet'}"
    share = "" if math.isinf(contract.seconds) else f", {min(1.0, seconds / contract.seconds):.0%}"
    shown = [
        f"{folder} is an unfinished search for a student that keeps its contract: {len(judged)} candidates are judged",
        f"budget: {contract.budget}; {clock(seconds)} used{share}, beside what was in the making",
        f"judged: {', '.join(c['name'] + (' (does not compile)' if c['fate'] else '') for c in judged) or 'none'}",
        ended,
        f"left: {'' if evaluating else 'the rest of the search, and '}the evaluation",
        f"continue with: pqk compress RECIPE.toml --out {shlex.quote(str(folder))} --resume",
    ]
    return CommandAnswer(document, ["\n".join(shown)])


def _decided(journal: Path) -> Iterator[tuple[str, Any]]:
    """The decisions of a journal, which another process may be writing: half a line at its end is left out."""
    if not journal.exists():
        return
    for number, line in enumerate(read_bytes(journal).split(b"\n")[:-1], 1):
        entry = parse_json(line, f"{journal}, line {number}")
        if not isinstance(entry, dict) or not {"key", "value"} <= entry.keys():
            raise InputError(f"{journal}, line {number} was changed: it is not a decision")
        yield str(entry["key"]), entry["value"]


def _seconds(key: str, value: Any) -> float:
    """What a decision took of the budget."""
    if isinstance(value, dict):
        return float(value.get("seconds", 0.0))
    return float(value) if "/together/" in key else 0.0


def _in_the_making(search: Path) -> str:
    """The pass that runs, or was stopped, with a checkpoint; "" where nothing is saved of it."""
    partial = sorted(search.glob("*/*.partial"), key=lambda p: p.stat().st_mtime)
    if not partial:
        return ""
    number, _, name = partial[-1].name.removesuffix(".partial").partition("-")
    return f"{name.partition('/')[0]}, pass {int(number) + 1} of a candidate, of which a checkpoint is saved"


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
        *_kept_text(deployed_file(artifact.folder)),
        f"integer coverage {percent(report.integer_coverage)}; parity {describe.parity(report)}",
        *([f"this is a compile{OF_ANOTHER}"] if artifact.given else []),
        "every file is as it was written",
    ]
    shown = [*describe.passes_done(report), *describe.warned(describe.diagnosed(report))]
    return CommandAnswer(document, ["\n".join(head), attribution_table(report), *shown])


def _kept_text(path: Path) -> list[str]:
    """What a file that continues texts takes, and gives, beside the inputs and outputs of its artifact: a line."""
    run = session(path) if path.is_file() else None
    if isinstance(run, EncoderDecoderSession):
        return [
            f"{encoder_of(path).name} reads the source, and {path.name} takes {PAST}*, too, and gives {PRESENT}*: "
            "pqk generate makes targets with both"
        ]
    if not isinstance(run, Continuing):
        return []
    shown = {i.name for i in run.get_inputs()}
    kept = [i for i in run.inner.get_inputs() if i.name.startswith(PAST)]
    others = [f"{i.name} {i.shape}" for i in run.inner.get_inputs() if i.name not in shown and i not in kept]
    shapes = " or ".join(dict.fromkeys(str(i.shape) for i in kept))
    dtype = np.dtype(kind_of(kept[0])).name
    beside = [*others, f"{kept[0].name} to {kept[-1].name} {dtype} {shapes}"]
    return [
        f"{path.name} takes {' and '.join(beside)}, too, and gives {PRESENT}*: pqk generate continues texts with it"
    ]
