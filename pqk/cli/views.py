"""In words and tables: the passes and their fields, what passes did and declined, a rehearsal, a machine."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter
from rich.console import RenderableType

from pqk.cli.console import clock, listed, table
from pqk.core.run_folder import scope_of
from pqk.knowledge import TERMS
from pqk.knowledge.answers.catalogue import AUTHORS
from pqk.knowledge.retention import Retention
from pqk.knowledge.sources import SOURCES
from pqk.passes import PASSES
from pqk.recipe.strict import documentation
from pqk.report.schema import LatencyRow, Report
from pqk.report.text import NOT_COMPARED, declined_rows, metric_text, percent

BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}

# Passes and terms


def reference() -> dict[str, Any]:
    """Every pass, distillation term, source of a teacher and author of answers.

    With its fields: name, type, default, documentation.
    """
    passes = [
        {
            "name": p.name,
            "documentation": inspect.getdoc(p) or "",
            "consumes": [str(stage) for stage in sorted(p.consumes)],
            "produces": None if p.produces is None else str(p.produces),
            "fields": _fields(p),
        }
        for p in PASSES
    ]
    terms = []
    for kind in TERMS:
        entries = _fields(kind)
        name = next(f["default"] for f in entries if f["name"] == "term")
        about = {"name": name, "documentation": inspect.getdoc(kind) or "", "needs_teacher": kind.needs_teacher}
        terms.append({**about, "fields": [f for f in entries if f["name"] != "term"]})
    sources, authors = ([_named(kind, key) for kind in kinds] for key, kinds in (("source", SOURCES), ("by", AUTHORS)))
    retention = {"name": "retain", "documentation": inspect.getdoc(Retention) or "", "fields": _fields(Retention)}
    return {"passes": passes, "terms": terms, "sources": sources, "authors": authors, "tables": [retention]}


def _named(kind: type[Any], key: str) -> dict[str, Any]:
    """A table that says in `key` what it is."""
    entries = _fields(kind)
    name = next(f["default"] for f in entries if f["name"] == key)
    others = [f for f in entries if f["name"] != key]
    return {"name": name, "documentation": inspect.getdoc(kind) or "", "fields": others}


def _fields(kind: type[Any]) -> list[dict[str, Any]]:
    schema = TypeAdapter(kind).json_schema()
    required, entries, documents = schema.get("required", []), schema.get("properties", {}), documentation(kind)
    return [
        {
            "name": f.name,
            "type": type_text(entries[f.name]),
            "default": entries[f.name].get("default"),
            "required": f.name in required,
            "documentation": documents.get(f.name, ""),
        }
        for f in fields(kind)
    ]


def type_text(schema: dict[str, Any]) -> str:
    """A property of a JSON Schema as a person writes it: `number > 0`, `"a" or "b"`, `list of string`."""
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(dict.fromkeys(type_text(s) for s in schema.get("anyOf") or schema["oneOf"]))
    if "$ref" in schema:
        return "table"
    if "enum" in schema or "const" in schema:
        return " or ".join(f'"{v}"' for v in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        inner = type_text(schema["items"]) if isinstance(schema.get("items"), dict) else "any"
        return f"list of {inner}"
    words = {"null": "none", "object": "table"}
    limits = " and ".join(f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema)
    if "pattern" in schema:
        limits = f"matching {schema['pattern']}"
    return f"{words.get(kind, kind)} {limits}".strip()


def reference_tables(document: dict[str, Any]) -> list[RenderableType]:
    shown: list[RenderableType] = []
    for p in document["passes"]:
        stages = " or ".join(p["consumes"]) + (f" → {p['produces']}" if p["produces"] else ", which it keeps")
        shown += [f"[[pass]] {p['name']}: {p['documentation']}\nstage: {stages}", _field_table(p["fields"]), ""]
    for t in document["terms"]:
        teacher = "" if t["needs_teacher"] else " (needs no teacher)"
        shown += [f'term = "{t["name"]}": {t["documentation"]}{teacher}', _field_table(t["fields"]), ""]
    for s in document["sources"]:
        shown += [f'teacher = {{ source = "{s["name"]}" }}: {s["documentation"]}', _field_table(s["fields"]), ""]
    for a in document["authors"]:
        shown += [f'answers = {{ by = "{a["name"]}" }}: {a["documentation"]}', _field_table(a["fields"]), ""]
    for o in document["tables"]:
        shown += [f"{o['name']} = {{ … }}: {o['documentation']}", _field_table(o["fields"]), ""]
    return shown


def _field_table(entries: Sequence[dict[str, Any]]) -> RenderableType:
    rows = []
    for f in entries:
        default = "required" if f["required"] else default_text(f["default"])
        rows.append([f["name"], f["type"], default, f["documentation"]])
    return table(None, ("field", "type", "default", "what it is"), rows) if rows else "no fields"


def default_text(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(str(v.get("term", v)) for v in value)
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or value == []:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


# What passes did


def passes_done(report: Report) -> list[RenderableType]:
    """What each pass of a compile did, and what it left alone."""
    rows = [
        [
            scope_of(r.index, r.pass_name),
            r.stage,
            clock(r.seconds),
            f"{r.parameters / 1e3:.0f} k",
            f"{r.macs / 1e6:.1f} M",
            metric_text(report.metric, r.metric),
            "; ".join(f"{k}: {listed(v)}" for k, v in r.details.items() if v not in ([], {}, ())),
        ]
        for r in report.passes
    ]
    header = ("pass", "stage", "time", "parameters", "MACs", "on validation data", "what it did")
    shown: list[RenderableType] = [table("Passes", header, rows, right=(2, 3, 4, 5))]
    declined = declined_table((d.pass_name, d.layer, d.reason) for d in report.declined)
    return [*shown, declined or "nothing was declined"]


def declined_table(entries: Iterable[tuple[str, str, str]]) -> RenderableType | None:
    """`(pass, layer, reason)`, the layers of one reason together; None where there are none."""
    rows = declined_rows(entries)
    return table("Left alone, and why", ("pass", "layers", "reason"), rows) if rows else None


def warned(texts: Sequence[str]) -> list[RenderableType]:
    return [f"warning: {text}" for text in texts]


def diagnosed(report: Report) -> list[str]:
    return [] if report.diagnostics is None else list(report.diagnostics.warnings)


def parity(report: Report) -> str:
    if report.parity is None:
        return f"not checked: {report.parity_reason or 'no reason given'}"
    if not report.parity.compared:
        return NOT_COMPARED
    if report.parity.passed:
        return f"met, {percent(report.parity.agreement)} of {report.parity.samples} samples decided alike"
    return f"BROKEN: {report.parity.first_divergence}"


# A rehearsal

BEGINNING = (
    "the contract names no passes: those below are the first student that the search cuts, rehearsed to show what "
    "would stand in the way; which student ships, and how it is made, is decided by what is measured within the budget"
)


def findings(found: dict[str, Any]) -> list[RenderableType]:
    """What `pqk check` shows, from its document."""
    teacher = found["teacher"]
    shown: list[RenderableType] = [
        f"teacher: {teacher['parameters']} parameters, {teacher['macs'] / 1e6:.1f} MMAC, "
        f"{teacher['float_bytes'] / 1e6:.2f} MB in FP32; target {found['target']}, seed {found['seed']}",
        *([_given(found["given"], teacher)] if found["given"] else []),
        *([BEGINNING] if found["begins_search"] else []),
        _prunable(found),
    ]
    rows = []
    for r in found["passes"]:
        training = f"{r['steps']} × {r['step_ms']:.0f} ms" if r["step_ms"] else ""
        time = None if r["seconds"] is None else clock(r["seconds"])
        did = "; ".join(f"{k}: {listed(v)}" for k, v in r["details"].items())
        rows.append([f"{r['index'] + 1} {r['name']}", r["stage"], time, training, r["problem"] or did])
    title = "What the search begins with" if found["begins_search"] else "Passes"
    shown.append(table(title, ("pass", "stage", "time", "training", "what it does"), rows, right=(2,)))
    groups = [("prune", g["name"], g["reason"]) for g in found["groups"] if g["reason"]]
    blocks = [("prune", name, why) for name, why in found["blocks"].get("declined", {}).items()]
    others = [
        (r["name"], d["layer"], d["reason"]) for r in found["passes"] for d in r["declined"] if r["name"] != "prune"
    ]
    declined = declined_table([*groups, *blocks, *others])
    shown += [declined] if declined else []
    shown.append(_expected(found))
    shown += [f"warning: {w}" for w in found["warnings"]]
    shown += [f"problem: {p}" for p in found["problems"]]
    shown.append(_conclusion(found))
    return shown


def _given(given: dict[str, int], teacher: dict[str, int]) -> str:
    shares = (f"{100 * given[k] / max(1, teacher[k]):.0f} %" for k in ("parameters", "macs"))
    return (
        f"student of another shape, not cut out of its teacher: {given['parameters']} parameters, "
        f"{given['macs'] / 1e6:.1f} MMAC, {' and '.join(shares)} of the teacher's"
    )


def _conclusion(found: dict[str, Any]) -> str:
    if found["problems"]:
        return "this will fail"
    return f"it compiles, but gains nothing: {found['no_gain']}" if found["no_gain"] else "nothing stands in the way"


def _prunable(found: dict[str, Any]) -> str:
    free = [g for g in found["groups"] if g["reason"] is None]
    held = "zeroing and cutting them agree" if free else "none"
    blocks = found["blocks"].get("removable", [])
    return (
        f"channel groups that can be cut: {len(free)} of {len(found['groups'])} ({held}); "
        f"blocks that can be left out: {len(blocks)}"
    )


def _expected(found: dict[str, Any]) -> str:
    lines = []
    if found["latency"]:
        la = found["latency"]
        lines.append(
            f"expected latency, ONNX Runtime, batch 1, two threads: {la['student_ms']:.3f} ms against the teacher's "
            f"{la['teacher_ms']:.3f} ms, {la['ratio']:.2f}x ({la['ratio_low']:.2f} to {la['ratio_high']:.2f}); "
            f"integer coverage {percent(found['integer_coverage'])}"
        )
    elif found["latency_reason"]:
        lines.append(f"latency not measured: {found['latency_reason']}")
    if found["student"]:
        s = found["student"]
        lines.append(f"student: {s['macs'] / 1e6:.1f} MMAC, model.onnx {s['size_bytes'] / 1e3:.0f} kB")
    whose = "these" if found["begins_search"] else "the"
    lines.append(
        f"time: about {clock(found['seconds'])} for {whose} passes, and minutes for the evaluation; "
        f"memory: {found['memory_bytes'] / 1e9:.2f} GB at the highest"
    )
    return "\n".join(lines)


# A machine


def machine(found: dict[str, Any]) -> list[RenderableType]:
    """What `pqk doctor` shows, from its document."""
    here = found["machine"]
    memory = "unknown" if here["memory_bytes"] is None else f"{here['memory_bytes'] / 1e9:.0f} GB"
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    lines = [
        f"pqk {found['pqk']}, Python {here['python']}, {here['os']}",
        f"CPU: {here['cpu']}, {here['cores']} cores usable, memory {memory}",
        f"instruction sets: {' '.join(here['isa']) or 'unknown'}; target: {found['target'] or 'none'}",
        f"GPU: {here['gpu'] or 'none'}; C++ compiler: {found['compiler'] or 'none, so no torch.compile row'}",
        f"versions: {versions}",
    ]
    targets = [
        [
            t["name"],
            t["activation"],
            f"{t['weight_range'][0]} to {t['weight_range'][1]}",
            t["channel_multiple"],
            t["runtime"],
            "yes" if t["runs_here"] else t["reason"],
        ]
        for t in found["targets"]
    ]
    header = ("target", "activations", "weights", "channels in", "runtime", "runs here")
    extras = [
        [e["extra"], ", ".join(e["missing"]), e["without"], e["install"]] for e in found["extras"] if e["missing"]
    ]
    shown: list[RenderableType] = ["\n".join(lines), table("Targets", header, targets)]
    if extras:
        shown.append(table("Extras that are not installed", ("extra", "missing", "without it", "to install"), extras))
    problems = [f"problem: {p}" for p in found["problems"]]
    return [*shown, *(problems or ["pqk can work here"])]


def gpu(found: dict[str, Any]) -> list[RenderableType]:
    """What `pqk benchmark --device cuda` measured: latencies, shares of the device's ceilings, what was left out."""
    shares, rows = {s["batch"]: s for s in found["shares"]}, []
    for row in (LatencyRow(**r) for r in found["latency"]):
        share = shares[row.batch] if row.runtime == "triton" else None
        rows.append(
            [
                row.variant.partition("_")[0],
                row.runtime,
                row.batch,
                f"{1e3 * row.median_ms:.1f} µs",
                f"{1e3 * row.p05_ms:.1f} to {1e3 * row.p95_ms:.1f} µs",
                row.verdict,
                share and percent(share["bandwidth"]),
                share and percent(share["integer"]),
            ]
        )
    header = ("network", "runtime", "batch", "median", "5 % to 95 %", "against the teacher", "bandwidth", "int8 rate")
    device, ceilings, gate = found["device"], found["ceilings"], found["gate"]
    noise = "equal outputs" if gate["sqnr_db"] is None else f"SQNR {gate['sqnr_db']:.1f} dB"
    return [
        table(f"{found['artifact']}, compiled for {found['target']}", header, rows, right=range(2, len(header))),
        f"{device['name']}, compute capability {device['capability']}, CUDA {device['cuda']}; shares are of "
        f"{ceilings['bandwidth'] / 1e9:.0f} GB/s and {ceilings['integer'] / 1e12:.1f} TOPS, measured just before",
        f"on the device and on the CPU: {noise}, {gate['alike']} of {gate['samples']} random samples decided alike",
        *(f"left out: {s['variant']} in {s['runtime']}: {s['reason']}" for s in found["skipped"]),
        found["protocol"],
    ]
