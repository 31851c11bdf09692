"""Do two installed copies of pqk compile the same students, bit for bit?

    python same_students.py OLD_SITE NEW_SITE --data DATA [--old-out DIR] [--new-out DIR] [--only demo,cifar,encoder]

A site is a folder that holds the package: `pip install --no-deps --no-build-isolation --target SITE REPOSITORY` makes
one. Each copy compiles, in a process of its own, recipes that are derived from those that it ships:

    demo      digits.toml, as it is
    cifar     resnet20_cifar10.toml on a few images, by MACs instead of a latency, and with widths cut after the blocks
    encoder   minilm_sst2.toml on a few sentences, of a tiny BERT with random weights that is made here

Measured latencies are decisions that differ from run to run. The old copy notes them in its journal; the new one goes
on from a journal that holds these and nothing else: what can be computed, such as a ranking, it computes itself, and
the journals it ends with are compared, too.

`--old-out` keeps what the old copy made: where it is there, only the new copy runs. `--renames FILE` is a JSON table of
strings of the old copy (names of passes, rewrites, terms, fields) and what they are called in the new one. A recipe
that the new copy does not ship is the old one's, with these renames (factories among them); `--recipes old` compiles
the old ones in any case. The exit code is 1 where anything differs.

What is compared: `student.safetensors`, `model.onnx` (the file, and its graph: nodes, attributes, initializers),
`student.pt2`, the plan, the recipe's passes, and the records, metrics, parity and diagnostics of the report without
times and machine. Threads change the order of sums; both copies run with as many (`--threads`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Json = Any

#: without editable installs of pqk in this interpreter, which would lend a site the modules that it does not have
ALONE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
)
#: `pqk` with a proof whose timings are short, in ONNX Runtime alone: no student depends on them, and they take minutes
RUN = (
    ALONE
    + """
import inspect, runpy, warnings
warnings.simplefilter("ignore")
import pqk
pqk.compress  # everything is imported
short = dict(rounds=5, burst=1, warm=1, pause=0.0)
found = set()
try:  # from 0.2 on the evaluation is an object, whose defaults these are
    from pqk.bench.measure import TimingProtocol
    from pqk.evaluation.settings import Evaluation
    TimingProtocol.__init__.__kwdefaults__.update(short)
    Evaluation.__init__.__kwdefaults__["runtimes"] = ()
    found = {"measure", "_elsewhere"}
except ImportError:
    pass
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] != "pqk":
        continue
    for key, f in list(vars(module).items()):
        if not inspect.isfunction(f) or f.__module__ != name or key not in ("measure", "_elsewhere"):
            continue
        parameters = inspect.signature(f).parameters.values()
        if key == "_elsewhere":
            setattr(module, key, lambda *a, **k: [])
        elif {p.name for p in parameters} >= set(short):
            f.__defaults__ = tuple(short.get(p.name, p.default) for p in parameters
                                   if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)
            f.__kwdefaults__ = {p.name: short.get(p.name, p.default) for p in parameters
                                if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        else:
            continue
        found.add(key)
if found != {"measure", "_elsewhere"}:
    print("same_students: the timings of the proof are not where they were: they take minutes", file=sys.stderr)
sys.argv[0] = "pqk"
runpy.run_module("pqk", run_name="__main__", alter_sys=True)
"""
)
WHERE = ALONE + "import pqk; print(pqk.__file__)"
DUMP = ALONE + "import pqk; sys.stdout.write(pqk.Recipe.load(sys.argv[1]).dumps())"

SEED, TARGET = 1, "x86-avx2"
LATENCY = re.compile(r"oracle/|\d+-[^/]+/(baseline$|latency/|float/)")
"""keys of a journal whose values are measured times"""
VOLATILE = re.compile(
    r"seconds|latency.*|layer_times|.*_ms|ratio|ratio_low|ratio_high|peak_memory_bytes|machine|significant|break_even"
    r"|conditions|versions|pqk|files|notes"
)
"""keys of reports and manifests whose values are times, tell of them, or say what made the files"""


# ---- recipes


def demo(recipe: Json, folder: Path) -> None:
    pass


def cifar(recipe: Json, folder: Path) -> None:
    sizes = {"limit": 1200, "validation": 200, "evaluation_limit": 300, "batch_size": 64, "views": 2}
    recipe["task"]["arguments"] = sizes
    blocks, *others = recipe["pass"]
    del blocks["latency_ratio"]
    blocks |= {"macs_ratio": 1.3, "samples": 64}
    widths = {"name": "prune", "macs_ratio": 2.0, "importance": "taylor", "multiple": 8, "samples": 64}
    recipe["pass"] = [blocks, widths, *others]
    for p in others:
        if p["name"] == "distill":
            p["epochs"] = 1


def encoder(recipe: Json, folder: Path) -> None:
    for part in ("teacher", "task"):
        recipe[part]["arguments"]["directory"] = str(folder / "tiny_bert")
    recipe["task"]["arguments"] |= {"limit": 800, "evaluation_limit": 200, "views": 2, "timed_lengths": []}
    for p in recipe["pass"]:
        if p["name"] == "distill":
            p["epochs"] = 2 if p["epochs"] > 5 else 1
        if p["name"] == "prune" and p.get("depth"):
            p["protect"] = ["model.bert.encoder.layer.5"]  # a term reads its features


RECIPES: dict[str, tuple[str, Callable[[Json, Path], None]]] = {
    "demo": ("digits", demo),
    "cifar": ("resnet20_cifar10", cifar),
    "encoder": ("minilm_sst2", encoder),
}


def shipped(site: Path, name: str) -> Path | None:
    found = sorted(p for p in (site / "pqk").rglob(name) if "results" not in p.parts)
    return found[0] if found else None


def derived(name: str, site: Path, other: Path, renames: dict[str, str], whose: str, shared: Path, to: Path) -> None:
    """Write the recipe that `site` compiles, and its teacher's weights where it ships them, into the folder `to`."""
    import tomli_w

    stem, change = RECIPES[name]
    own = shipped(site, f"{stem}.toml") if whose == "own" else None
    path = own or shipped(other, f"{stem}.toml")
    if path is None:
        sys.exit(f"neither copy ships {stem}.toml")
    recipe = tomllib.loads(path.read_text())
    change(recipe, shared)
    if own is None:
        recipe = renamed(recipe, renames)
    recipe |= {"seed": SEED, "target": {"name": TARGET}}
    to.mkdir(parents=True, exist_ok=True)
    (to / "recipe.toml").write_text(tomli_w.dumps(recipe))
    weights = recipe["teacher"].get("weights")
    beside = None if weights is None else shipped(site, weights) or shipped(other, weights)
    if beside is not None:
        shutil.copy(beside, to / weights)


def tiny_bert(folder: Path, data: Path) -> None:
    """A Hugging Face directory: six layers, 64 wide, random weights, the 1,500 most frequent words of SST-2."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    texts = (data / "sst2_train.tsv").read_text(encoding="utf-8").lower()
    common = [w for w, _ in sorted(Counter(re.findall(r"[a-z]+", texts)).items(), key=lambda e: (-e[1], e[0]))[:1500]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *common]) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=5 + len(common), hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():  # BERT starts so near to zero that every text means the same
            p.add_(0.1 * torch.randn_like(p))
    model.eval().save_pretrained(folder, safe_serialization=True)


# ---- compiles


def environment(site: Path, threads: int) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PQK_DATA")}
    return {**kept, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"}


def python(site: Path, threads: int, code: str, *arguments: str, cwd: Path) -> str:
    """What a program says that sees this copy of pqk and no other."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment(site, threads), cwd=cwd, capture_output=True, text=True)
    if "same_students:" in done.stderr:
        print(done.stderr.strip().splitlines()[0], flush=True)
    if done.returncode:
        sys.exit(f"with {site}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def check_site(site: Path, cwd: Path) -> None:
    found = Path(python(site, 1, WHERE, cwd=cwd).strip())
    if not found.resolve().is_relative_to(site.resolve()):
        sys.exit(f"{site}: pqk is {found}")


def compile_(site: Path, folder: Path, data: Path, threads: int, before: Path | None = None) -> float:
    """Compile `folder/recipe.toml` into `folder/out`; seconds. `before` is another copy's `out`, whose times hold."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    recipe = str(folder / "recipe.toml")
    arguments = ["compress", recipe, "--out", str(out), "--data", str(data), "--json"]
    times = [] if before is None else [e for e in journal(before) if LATENCY.match(e["key"])]
    if before is not None and times:
        run = json.loads((before / ".work" / "run.json").read_text())
        run["recipe"] = python(site, threads, DUMP, recipe, cwd=folder)
        (out / ".work").mkdir(parents=True)
        (out / ".work" / "run.json").write_text(json.dumps(run))
        (out / ".work" / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in times))
        arguments.append("--resume")
    began = time.perf_counter()
    python(site, threads, RUN, *arguments, cwd=folder)
    return time.perf_counter() - began


def journal(out: Path) -> list[dict[str, Json]]:
    path = out / ".work" / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- comparing


def digest(content: bytes | Json) -> str:
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def renamed(value: Json, renames: dict[str, str]) -> Json:
    """`value` with every string, keys included, that has another name."""
    if isinstance(value, dict):
        return {renames.get(k, k): renamed(v, renames) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, renames) for v in value]
    if not isinstance(value, str):
        return value
    for old, new in renames.items():
        value = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, value)
    return value


def steady(value: Json) -> Json:
    """`value` without what differs from run to run or from machine to machine."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if not VOLATILE.fullmatch(k)}
    return [steady(v) for v in value] if isinstance(value, list) else value


def graph(path: Path) -> Json:
    """What an ONNX file computes, in order, without what it says of its maker."""
    import onnx

    model = onnx.load(path)

    def values(entries: Any) -> list[str]:
        return [digest(e.SerializeToString(deterministic=True)) + e.name for e in entries]

    return {
        "opsets": sorted((o.domain, o.version) for o in model.opset_import),
        "inputs": values(model.graph.input),
        "outputs": values(model.graph.output),
        "initializers": sorted(values(model.graph.initializer)),
        "nodes": [
            [n.domain, n.op_type, [*n.input], [*n.output], sorted(values(n.attribute))] for n in model.graph.node
        ],
    }


def parts(out: Path, renames: dict[str, str]) -> Iterator[tuple[str, bytes | Json]]:
    """(name, content) of everything that is to be the same. JSON is renamed."""

    def load(name: str) -> Json:
        return renamed(json.loads((out / name).read_text()), renames)

    yield "student.safetensors", (out / "student.safetensors").read_bytes()
    if (out / "model.onnx").exists():
        yield "model.onnx (graph)", graph(out / "model.onnx")
        yield "model.onnx (file)", (out / "model.onnx").read_bytes()
    if (out / "student.pt2").exists():
        yield "student.pt2", (out / "student.pt2").read_bytes()
    for name in ("tuning.json", "config.json"):
        if (out / name).exists():
            yield name, load(name)
    yield "student.json (plan)", load("student.json")["plan"]
    recipe = renamed(tomllib.loads((out / "recipe.toml").read_text()), renames)
    yield "recipe.toml (passes)", recipe["pass"]
    report = steady(load("report.json"))
    yield "report.json (records)", report.pop("passes")
    yield "report.json (metrics)", report
    yield "manifest.json", steady(load("manifest.json"))
    decisions = renamed([e for e in journal(out) if not LATENCY.match(e["key"])], renames)
    yield "journal (computed)", {e["key"]: e["value"] for e in decisions}
    yield "journal (measured)", {e["key"]: e["value"] for e in journal(out) if LATENCY.match(e["key"])}


def differences(old: bytes | Json, new: bytes | Json, place: str = "") -> Iterator[str]:
    """Where two contents differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{place}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{place}[{i}]")
    elif old != new:
        yield f"{place or 'content'}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}…"


def inside(name: str, old: Path, new: Path) -> Iterator[str]:
    """Which tensors or records of two files differ."""
    if name == "student.safetensors":
        from safetensors.torch import load_file

        a, b = load_file(old / name), load_file(new / name)
        for key in sorted(a.keys() | b.keys()):
            same = key in a and key in b and a[key].dtype == b[key].dtype and a[key].equal(b[key])
            if not same:
                yield f"{key}: " + ("differs" if key in a and key in b else "only in " + ("old" if key in a else "new"))
    elif name == "student.pt2":
        with zipfile.ZipFile(old / name) as a, zipfile.ZipFile(new / name) as b:
            names = sorted({*a.namelist(), *b.namelist()})
            for key in names:
                there = key in a.namelist() and key in b.namelist()
                if not there or a.read(key) != b.read(key):
                    yield key


def compare(name: str, old: Path, new: Path, renames: dict[str, str]) -> list[tuple[str, str, str, str, bool]]:
    ours, theirs = dict(parts(old, renames)), dict(parts(new, {}))
    rows = []
    for part in dict.fromkeys([*ours, *theirs]):
        hashes = [digest(side[part]) if part in side else "-" for side in (ours, theirs)]
        rows.append((name, part, *(h[:16] for h in hashes), hashes[0] == hashes[1]))
        if hashes[0] != hashes[1]:
            found = [*inside(part, old, new)] or [*differences(ours.get(part), theirs.get(part))]
            print(f"{name}: {part} differs in {len(found)} places:", *found[:8], sep="\n    ", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_SITE")
    parser.add_argument("new", type=Path, metavar="NEW_SITE")
    parser.add_argument("--data", type=Path, required=True, help="cifar10_*.npz, sst2_*.tsv and the CIFAR teacher")
    parser.add_argument(
        "--old-out", type=Path, default=Path("same_students/old"), help="kept, and used where it is there"
    )
    parser.add_argument("--new-out", type=Path, default=Path("same_students/new"), help="overwritten")
    parser.add_argument("--only", default=",".join(RECIPES), metavar="NAME,NAME")
    parser.add_argument("--renames", type=Path, help='JSON: {"old name": "new name"}')
    parser.add_argument("--recipes", choices=("own", "old"), default="own", help="whose recipes the new copy compiles")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    old_site, new_site, data = a.old.resolve(), a.new.resolve(), a.data.resolve()
    old_out, new_out = a.old_out.resolve(), a.new_out.resolve()
    renames = {} if a.renames is None else json.loads(a.renames.read_text())
    names = a.only.split(",")
    if unknown := set(names) - set(RECIPES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("tomli_w") is None:
        parser.error("run it with the interpreter that has pqk's dependencies")
    for folder in (old_out, new_out):
        folder.mkdir(parents=True, exist_ok=True)
    for site in (old_site, new_site):
        check_site(site, new_out)
    if "encoder" in names:
        tiny_bert(old_out / "tiny_bert", data)
    rows = []
    for name in names:
        old, new = old_out / name, new_out / name
        setting = {"seed": SEED, "threads": a.threads, "recipe": _derive(name, old_site, old_site, {}, old_out, old)}
        noted = old / "setting.json"
        cached = (old / "out" / "manifest.json").exists() and noted.exists()
        if not cached or json.loads(noted.read_text()) != setting:
            seconds = compile_(old_site, old, data, a.threads)
            noted.write_text(json.dumps(setting))
            print(f"{name}: the old copy took {seconds:.0f} s", flush=True)
        shutil.rmtree(new, ignore_errors=True)
        derived(name, new_site, old_site, renames, a.recipes, old_out, new)
        seconds = compile_(new_site, new, data, a.threads, before=old / "out")
        print(f"{name}: the new copy took {seconds:.0f} s", flush=True)
        rows += compare(name, old / "out", new / "out", renames)
    print(f"{'recipe':9} {'file':24} {'old':17} {'new':17} same")
    for name, part, *hashes, same in rows:
        print(f"{name:9} {part:24} {hashes[0]:17} {hashes[1]:17} {'yes' if same else 'NO'}")
    return 0 if all(row[-1] for row in rows) else 1


def _derive(name: str, site: Path, other: Path, renames: dict[str, str], shared: Path, to: Path) -> str:
    derived(name, site, other, renames, "own", shared, to)
    return (to / "recipe.toml").read_text()


if __name__ == "__main__":
    sys.exit(main())
