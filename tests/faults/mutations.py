"""What becomes of files that are damaged, exchanged, or made to do harm: a seeded campaign over everything pqk reads.

    python tests/faults/mutations.py [--count 10000] [--seed 0] [--only N] [--into tests/faults/results.json]

Each mutation changes one file (bytes flipped, cut, put in, exchanged with another artifact's; values of a document
replaced by huge, negative, missing, deeply nested ones, by NaN and names with `..`; links, pipes and folders in the
place of files) and lets pqk read it as its commands do. What may come of it:

    refused   an error in words: one of pqk's own classes
    right     what was read is what was read before, or, of a file that nothing seals (a recipe, a report or tuning
              alone, a teacher's weights), what the file says
    forged    the file was changed *and* every digest that protects it was made to fit: there is no right value, and
              what counts is that pqk does not end in an error of Python's, run anything, write anywhere or take memory

Everything else is wrong: another exception, another value, a file opened for writing outside the case's folder, a
module of a factory imported, a process started, a pickle opened, no end, or half a GiB of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import small
import tomli_w
import torch
from safetensors.torch import load_file

from pqk import Artifact, Evaluation, Recipe, compress
from pqk.cli.inspection import inspect
from pqk.core.decisions import Journal
from pqk.core.pipeline import load
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.core.run_folder import RunFolder
from pqk.deploy.torch_emitter import load_student
from pqk.deploy.tuning import Tuning
from pqk.documents import digest_of_file, digest_of_values
from pqk.errors import PqkError
from pqk.files import read_sealed, write_json, write_tensors
from pqk.knowledge.sources import artifact_model
from pqk.knowledge.teachers.cache import LogitCache
from pqk.passes import REWRITES
from pqk.recipe.factories import load_weights
from pqk.report.schema import Report
from pqk.target.machine import machine_fingerprint
from pqk.target.target import Target
from pqk.training.checkpoint import Checkpoint, TrainingState

HERE = Path(__file__).parent
MOST_SECONDS = 20
MOST_MEMORY = 1 << 29
"""bytes that reading may add to the largest memory of the process"""
Rng = random.Random

# ---- mutations of bytes and of values


def flipped(rng: Rng, content: bytes, other: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: Rng, content: bytes, other: bytes) -> bytes:
    at, size = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64))
    block = rng.choice((b"\x00" * size, b"\xff" * size, rng.randbytes(size), b"9" * size))
    return (content[:at] + block + content[at + size :])[: max(len(content), at + size)]


def cut(rng: Rng, content: bytes, other: bytes) -> bytes:
    return content[: rng.choice((0, 1, 8, len(content) - 1, rng.randrange(len(content))))]


def cut_out(rng: Rng, content: bytes, other: bytes) -> bytes:
    first, last = sorted((rng.randrange(len(content)), rng.randrange(len(content) + 1)))
    return content[:first] + content[last:]


def put_in(rng: Rng, content: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    block = rng.choice(
        (rng.randbytes(rng.choice((1, 16, 4096))), b"[" * 100_000, b'{"a":' * 20_000, b" \n", b"-", b"1e999")
    )
    return content[:at] + block + content[at:]


def exchanged(rng: Rng, content: bytes, other: bytes) -> bytes:
    return other


def spliced(rng: Rng, content: bytes, other: bytes) -> bytes:
    first, last = sorted((rng.randrange(len(content)), rng.randrange(len(content) + 1)))
    return content[:first] + other[first:last] + content[last:]


def long_header(rng: Rng, content: bytes, other: bytes) -> bytes:
    return rng.choice((1 << 63, (1 << 64) - 1, 1 << 40, 1 << 31, 0, 7)).to_bytes(8, "little") + content[8:]


BYTES = (flipped, flipped, flipped, overwritten, cut, cut_out, put_in, exchanged, spliced, long_header)


def nested(depth: int) -> Any:
    value: Any = 0
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def hostile(rng: Rng) -> Any:
    """A value that no document of pqk's has there."""
    return rng.choice(
        (
            None, True, False, 0, -1, 1, 2, 10**30, -(2**63), 2**63, 2**31, 1e308, float("nan"), float("inf"), -0.5, "",
            "../../secret", "/etc/passwd", "..", "a\x00b", "\ud800", "x" * 100_000, [], {}, [[]], {"a": 1}, nested(50),
            nested(500), ["../secret"], "__import__('os').getcwd()", "torch.os.getcwd", [10**12], "1", "NaN",
        )
    )  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a document."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def changed_values(rng: Rng, document: Any) -> None:
    """Change a document of lists and tables at a random place or two."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = [*places(document)]
        if not found:
            return
        holder, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("../secret", "/etc/passwd", "", "\ud800", "extra", f"{key} ", "x" * 5000))] = holder.pop(
                key
            )
        elif kind == 2:
            holder[key] = rng.choice(found)[0]
            holder[key] = json.loads(json.dumps(holder[key])) if not _cyclic(holder[key]) else 0
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((-holder[key], holder[key] * 2, holder[key] + 1, holder[key] * 10**9))
        else:
            holder[key] = hostile(rng)


def _cyclic(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


# ---- what is read


@dataclass(frozen=True)
class Subject:
    """Something that pqk reads: where it lies, how it is read, and what the result may be."""

    name: str
    weight: int
    source: Path
    """the folder that is copied for each case"""
    files: tuple[str, ...]
    """the files of it that are mutated"""
    read: Callable[[Path], Any]
    """the case's folder -> what was read, as something that can be compared"""
    says: Callable[[Path], Any] | None = None
    """what the files say themselves, where nothing seals them; None: the result is that of before"""
    forge: Callable[[Path, str], None] | None = None
    """makes all digests fit again after a file was changed; then there is no right value"""
    documents: bool = True
    """whether values of documents are changed, too, and not bytes alone"""


def tensors_of(module: torch.nn.Module) -> dict[str, Any]:
    return {k: (str(v.dtype), v.tolist()) for k, v in module.state_dict().items()}


def read_artifact(folder: Path) -> Any:
    """All that is read of an artifact by `inspect`, `run` and from Python, and what it computes."""
    artifact = Artifact.load(folder)
    shown = inspect(folder).document
    x = np.linspace(-1, 2, 3 * 64, dtype=np.float32).reshape(3, 1, 8, 8)
    return [
        artifact.manifest, artifact.report.dumps(), artifact.recipe.dumps(), [str(r) for r in artifact.plan],
        artifact.target.name, artifact.run(x).tolist(), {k: v for k, v in shown.items() if k != "folder"},
    ]  # fmt: skip


def read_forged(folder: Path) -> Any:
    """An artifact without its ONNX file's own arithmetic, which is ONNX Runtime's."""
    artifact = Artifact.load(folder)
    return [
        artifact.report,
        artifact.recipe,
        artifact.plan,
        artifact.target,
        artifact.example(2),
        inspect(folder).document,
    ]


def seal_again(folder: Path, name: str) -> None:
    """Make the manifest say the present digest of a file, and of itself."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if name != "manifest.json":
        manifest["files"][name] = {"sha256": digest_of_file(folder / name), "bytes": (folder / name).stat().st_size}
    with contextlib.suppress(AttributeError, TypeError, RecursionError):
        manifest.pop("sha256", None)
        manifest = {"sha256": digest_of_values(manifest), **manifest}
    path.write_text(json.dumps(manifest))


def read_rebuilt(folder: Path) -> Any:
    return tensors_of(Artifact.load(folder).rebuild(small.teacher()))


def read_teacher(folder: Path) -> Any:
    return artifact_model(folder).read_bytes().hex()


def read_fused(folder: Path) -> Any:
    student = load_student(folder / "student.pt2")
    return [student.code, tensors_of(student)]


def says_recipe(folder: Path) -> Any:
    return tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))


def read_recipe(folder: Path) -> Any:
    """What a recipe's file says, as far as the recipe says it, too."""
    recipe = Recipe.load(folder / "recipe.toml")
    if Recipe.loads(recipe.dumps()) != recipe:
        raise AssertionError("a recipe is another when it is written and read")
    table = says_recipe(folder)
    said = tomllib.loads(recipe.dumps())
    for given, p in zip(table.get("pass", []), recipe.passes, strict=True):
        for key, value in given.items():
            have = p.name if key == "name" else getattr(p, key)
            if not isinstance(value, list | dict) and unlike(have, value) is not None:
                raise AssertionError(f"{key} is {value!r} in the file and {have!r} in the recipe")
    return {**table, "seed": said.get("seed", 0)} if "seed" in table else table


def read_weights(folder: Path) -> Any:
    model = small.teacher()
    load_weights(model, folder / "teacher.safetensors")
    return tensors_of(model)


def says_weights(folder: Path) -> Any:
    own = tensors_of(small.teacher())
    return own | {k: (str(v.dtype), v.tolist()) for k, v in load_file(folder / "teacher.safetensors").items()}


def says_document(name: str) -> Callable[[Path], Any]:
    return lambda folder: json.loads((folder / name).read_text(encoding="utf-8"))


def read_report(folder: Path) -> Any:
    """The report's values for what its file says; what the file leaves out has its default."""
    have, said = json.loads(Report.load(folder / "report.json").dumps()), says_document("report.json")(folder)
    return _as_said(have, said)


def _as_said(have: Any, said: Any) -> Any:
    if isinstance(have, dict) and isinstance(said, dict):
        return {k: _as_said(have[k], v) for k, v in said.items() if k in have}
    if isinstance(have, list) and isinstance(said, list) and len(have) == len(said):
        return [_as_said(h, s) for h, s in zip(have, said, strict=True)]
    return have


def says_tuning(folder: Path) -> Any:
    document = says_document("tuning.json")(folder)
    return document.get("tuning", document)


def read_tuning(folder: Path) -> Any:
    return _as_said(Tuning.load(folder / "tuning.json").document(), says_tuning(folder))


class State:
    """A run's state, and the readers that a resume goes through, one by one."""

    def __init__(self, out: Path) -> None:
        self.identity = read_sealed(out / ".work" / "run.json", ())
        self.digest = digest_of_values(self.identity)
        (self.answers,) = (p.name for p in (out / ".work" / "cache").glob("*.npy"))
        self.teacher, self.task = small.teacher().eval().requires_grad_(False), small.task()

    def run(self, folder: Path) -> Any:
        with RunFolder.of(folder).opened(self.identity, resume=True):
            return "the run goes on"

    def shown(self, folder: Path) -> Any:
        return inspect(folder).document["passes"]

    def journal(self, folder: Path) -> Any:
        return Journal(folder / ".work" / "journal.jsonl", self.digest).decisions

    def program(self, name: str) -> Callable[[Path], Any]:
        def read(folder: Path) -> Any:
            run = RunContext(3, folder / ".work", identity=self.digest)
            bare = Program(self.teacher, self.teacher, Stage.MODULE, Target.named("x86-avx2"), run)
            program = load(bare, self.task, folder / ".work" / name, REWRITES)
            return [tensors_of(program.student), str(program.plan), str(program.records), str(program.stage)]

        return read

    def cache(self, folder: Path) -> Any:
        """The answers that are there; those that are not are computed again, and right."""
        path = folder / ".work" / "cache" / self.answers
        answers, present = LogitCache(path, 96, [4]).get(torch.arange(96))
        return [answers[present].tolist(), present.tolist()]


def read_checkpoint(folder: Path) -> Any:
    checkpoint = a_checkpoint(folder / "checkpoint.safetensors")
    state = checkpoint.restore("01-distill")
    return (
        state if state is None else [str(state), tensors_of(checkpoint.student), str(checkpoint.optimizer.state_dict())]
    )


def a_checkpoint(path: Path, seed: int = 0) -> Checkpoint:
    """The checkpoint of a training of the small network, which has made no step yet."""
    student = small.teacher()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    average = {k: torch.zeros_like(v) for k, v in student.state_dict().items()}
    train = small.task().train
    assert train is not None
    return Checkpoint(path, train, student, torch.nn.Identity(), optimizer, f"run {seed}/3/01-distill", average)


def write_checkpoint(path: Path, seed: int) -> None:
    """The checkpoint after a step of that training."""
    torch.manual_seed(seed)
    checkpoint = a_checkpoint(path, seed)
    for p in checkpoint.student.parameters():
        p.grad = torch.randn_like(p)
    checkpoint.optimizer.step()
    for t in checkpoint.average.values():
        t.copy_(torch.rand(t.shape))
    checkpoint.save(TrainingState(step=1, losses=[0.5 + seed]))


# ---- the campaign


class Watch:
    """What the interpreter does while a file is read: opened for writing elsewhere, started, imported, unpickled."""

    FORBIDDEN = (
        "os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pickle.find_class",
    )  # fmt: skip
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.FORBIDDEN or (event == "import" and arguments[0] in ("small", "secret")):
            self.seen.append(f"{event} {str(arguments)[:100]}")
        elif event in self.CHANGES or (event == "open" and self._writes(*arguments)):
            self._inside(event, arguments[0])

    @staticmethod
    def _writes(path: Any, mode: str | None, flags: int) -> bool:
        if not isinstance(path, str | bytes | Path):
            return False
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) if mode is None else bool(set("wax+") & set(mode))

    def _inside(self, event: str, path: Any) -> None:
        place = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | Path) else str(path)
        if not place.startswith((f"{self.folder}/", "/dev/null")):
            self.seen.append(f"{event} {place[:100]}")


class Campaign:
    """Mutations by number, each of its own seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.watch = folder.resolve(), seed, Watch()
        self.problems: list[str] = []
        self.outcomes: Counter[tuple[str, str]] = Counter()
        (self.folder / "secret").write_text("nobody reads or writes this")
        self.subjects = self._subjects()
        self.right = {s.name: s.read(s.source) for s in self.subjects}
        for s in self.subjects:
            if s.says is None and json.dumps(s.read(s.source), default=str) != json.dumps(
                self.right[s.name], default=str
            ):
                raise AssertionError(f"{s.name} is not the same when it is read twice")
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _subjects(self) -> tuple[Subject, ...]:
        one, other = (self._compiled(i) for i in range(2))
        self.other = {one: other}
        shipped = tuple(sorted(p.name for p in one.iterdir() if p.is_file()))
        bare = self._copied(one, "artifact", shipped)
        state = State(one)
        alone = self._alone(one)
        passes = ("00-prune", "01-distill", "02-capture")
        files = {n: (f".work/{n}/program.json", f".work/{n}/student.safetensors") for n in passes}
        cache = (f".work/cache/{state.answers}",)
        work = self._work(one)
        rebuilt, program = ("student.json", "student.safetensors"), ("student.pt2",)
        documents = ("report.json", "student.json", "recipe.toml", "tuning.json", "student.safetensors")
        return (
            Subject("artifact", 30, bare, shipped, read_artifact),
            Subject("artifact, sealed again", 12, bare, ("manifest.json", *documents), read_forged, forge=seal_again),
            Subject("artifact, rebuilt", 1, bare, rebuilt, read_rebuilt, forge=seal_again),
            Subject("artifact as a teacher", 4, bare, ("manifest.json", "model.onnx"), read_teacher),
            Subject("student.pt2 alone", 2, alone, program, read_fused),
            Subject("student.pt2, its program changed", 3, alone, program, read_fused, forge=lambda f, n: None),
            Subject("recipe", 12, alone, ("recipe.toml",), read_recipe, says=says_recipe),
            Subject("report alone", 6, alone, ("report.json",), read_report, says=says_document("report.json")),
            Subject("tuning", 6, alone, ("tuning.json",), read_tuning, says=says_tuning),
            Subject("teacher's weights", 4, alone, ("teacher.safetensors",), read_weights, says=says_weights),
            Subject("checkpoint", 4, alone, ("checkpoint.safetensors",), read_checkpoint),
            Subject("run.json", 4, work, (".work/run.json",), state.run),
            Subject("run.json, inspected", 4, work, (".work/run.json",), state.shown),
            Subject("journal", 8, work, (".work/journal.jsonl",), state.journal),
            Subject("teacher's answers", 6, work, cache, state.cache, documents=False),
            *(Subject(f"pass {n}", 4 - 3 * (n == passes[2]), work, files[n], state.program(n)) for n in passes),
        )  # fmt: skip

    def _compiled(self, seed: int) -> Path:
        """A compile of the small network; each seed another teacher."""
        out = self.folder / f"compiled-{seed}"
        evaluation = replace(Evaluation.quick(), rehearsal=False)
        compress(
            small.teacher(seed=seed), small.task(), Recipe.load(HERE / "small.toml"), out=out, evaluation=evaluation
        )
        return out

    def _copied(self, one: Path, name: str, files: tuple[str, ...]) -> Path:
        """What ships of both compiles, without the runs' state."""
        for source, to in ((one, name), (self.other[one], f"{name}-other")):
            (self.folder / to).mkdir()
            for file in files:
                shutil.copy(source / file, self.folder / to / file)
        self.other[self.folder / name] = self.folder / f"{name}-other"
        return self.folder / name

    def _alone(self, one: Path) -> Path:
        """Files that are given by themselves."""
        alone = self._copied(one, "alone", ("student.pt2", "recipe.toml", "report.json", "tuning.json"))
        for seed, folder in enumerate((alone, self.other[alone])):
            write_tensors(folder / "teacher.safetensors", small.teacher(seed=seed).state_dict())
            write_checkpoint(folder / "checkpoint.safetensors", seed)
            shutil.copy(HERE / "small.toml", folder / "recipe.toml")
        recipe = (self.other[alone] / "recipe.toml").read_text()
        (self.other[alone] / "recipe.toml").write_text(recipe.replace("seed = 3", "seed = 4").replace("1.5", "1.25"))
        return alone

    def _work(self, one: Path) -> Path:
        """The states of both runs, without their artifacts."""
        for source, to in ((one, "work"), (self.other[one], "work-other")):
            shutil.copytree(source / ".work", self.folder / to / ".work", ignore=shutil.ignore_patterns("proof"))
        caches = [sorted((self.folder / to / ".work" / "cache").glob("*.npy")) for to in ("work", "work-other")]
        for ours, theirs in zip(*caches, strict=True):  # each has its own name, and is exchanged under the other's
            theirs.rename(theirs.with_name(ours.name))
        self.other[self.folder / "work"] = self.folder / "work-other"
        return self.folder / "work"

    def mutate(self, number: int) -> str:
        """Make and read one mutation; how it ended."""
        rng = Rng(f"{self.seed}/{number}")
        subject = rng.choices(self.subjects, [s.weight for s in self.subjects])[0]
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(subject.source, case, symlinks=True)
        name = rng.choice(subject.files)
        what = self._spoil(rng, subject, case, name)
        before = self._outside()
        outcome, detail = self._read(subject, case)
        if self._outside() != before:
            outcome, detail = "wrong", "something outside the case's folder was changed"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (memory - self.memory) * 1024 > MOST_MEMORY:
            outcome, detail = "wrong", f"{(memory - self.memory) >> 10} MiB more memory than before"
            self.memory = memory
        self.outcomes[subject.name, outcome] += 1
        if outcome == "wrong":
            said = f"mutation {number}: {subject.name}, {name} {what}: {detail}".replace(str(self.folder), "…")
            print(said, file=sys.stderr, flush=True)
            self.problems.append(said[:600])
        return outcome

    def _outside(self) -> list[tuple[str, int]]:
        return sorted((p.name, p.stat().st_mtime_ns) for p in self.folder.iterdir() if p.name != "case")

    def _read(self, subject: Subject, case: Path) -> tuple[str, str]:
        """("refused", "right", "forged" or "wrong", and why)."""
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(MOST_SECONDS)
        self.watch.seen, self.watch.folder = [], case
        try:
            found, error = subject.read(case), None
        except PqkError as refused:
            found, error = None, refused
        except BaseException as raw:
            return "wrong", f"{type(raw).__name__}: {str(raw)[:300]}"
        finally:
            self.watch.folder = None
            signal.alarm(0)
        if self.watch.seen:
            return "wrong", f"while it was read: {self.watch.seen[0]}"
        if error is not None:
            return ("refused", "") if str(error).strip() else ("wrong", "an error without words")
        if subject.forge is not None:
            return "forged", ""
        other = self._unlike(subject, case, found)
        return ("right", "") if other is None else ("wrong", f"another value: {other}")

    def _unlike(self, subject: Subject, case: Path, found: Any) -> str | None:
        """Where what was read is not what it must be; None: nowhere."""
        want = self.right[subject.name] if subject.says is None else subject.says(case)
        if subject.name == "teacher's answers":
            return None if _answers_agree(found, want) else "an answer"
        if subject.name == "checkpoint" and found is None:  # there is none any more: the training begins anew
            return None
        if subject.name == "journal":  # the last line may be gone, half written: it is measured again
            want = {k: v for k, v in want.items() if k in found}
        if subject.name == "student.pt2 alone" and _same_bytes(case, self.other[subject.source], subject.files[0]):
            want = subject.read(self.other[subject.source])  # another's, whole: it is what it says
        return unlike(found, want)

    def _spoil(self, rng: Rng, subject: Subject, case: Path, name: str) -> str:
        path, other = case / name, self.other[subject.source] / name
        if subject.name == "student.pt2, its program changed":
            return _change_program(rng, path)
        if subject.forge is None and rng.random() < 0.08:
            return self._replaced(rng, path)
        content, theirs = path.read_bytes(), other.read_bytes()
        if subject.documents and path.suffix in (".json", ".toml") and rng.random() < 0.5:
            what = _change_document(rng, path)
        else:
            change = rng.choice(BYTES)
            path.write_bytes(change(rng, content, theirs))
            what = change.__name__
        if subject.forge is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                subject.forge(case, name)
        return what

    def _replaced(self, rng: Rng, path: Path) -> str:
        """Something else in the place of a file."""
        kind = rng.choice(("a link outside", "a link to itself", "a link to a device", "a folder", "a pipe", "nothing"))
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        elif kind == "a pipe":
            os.mkfifo(path)
        elif kind != "nothing":
            targets = {"a link outside": self.folder / "secret", "a link to itself": path}
            path.symlink_to(targets.get(kind, Path("/dev/zero")))
        return f"is {kind}"

    def run(self, count: int) -> dict[str, Any]:
        """Mutations 0 to `count`; how they ended, by subject."""
        for number in range(count):
            self.mutate(number)
            if number % 500 == 499:
                print(f"{number + 1}: {len(self.problems)} wrong", file=sys.stderr, flush=True)
        names = [s.name for s in self.subjects]
        kinds = ("refused", "right", "forged", "wrong")
        return {name: {k: n for k in kinds if (n := self.outcomes[name, k])} for name in names}


def _late(*_: Any) -> None:
    raise TimeoutError(f"no end after {MOST_SECONDS} s")


def _same_bytes(case: Path, other: Path, name: str) -> bool:
    return (case / name).read_bytes() == (other / name).read_bytes()


def unlike(a: Any, b: Any, place: str = "") -> str | None:
    """The first place where two values differ, else None; 1 is 1.0, and true is neither."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((found for k in a if (found := unlike(a[k], b[k], f"{place}.{k}")) is not None), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((found for i, (x, y) in pairs if (found := unlike(x, y, f"{place}.{i}")) is not None), None)
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
    if numbers and isinstance(a, float) != isinstance(b, float):  # a field of floats has 1e30 for 10**30
        a, b = float(a), float(b)
    same = (numbers or type(a) is type(b)) and (a == b or (a != a and b != b))
    return None if same else f"{place}: {str(a)[:80]} for {str(b)[:80]}"


def _answers_agree(found: Any, want: Any) -> bool:
    """Whether all answers that are still there are those of before."""
    have, (there, present) = iter(found[0]), want
    kept = dict(zip((i for i, p in enumerate(present) if p), there, strict=True))
    return all(kept.get(i) == next(have) for i, p in enumerate(found[1]) if p)


def _change_document(rng: Rng, path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    changed_values(rng, document)
    try:
        changed = (
            tomli_w.dumps(document) if path.suffix == ".toml" else json.dumps(document, indent=rng.choice((None, 1)))
        )
    except (TypeError, ValueError, RecursionError, AttributeError):  # TOML has no null
        changed = text.replace("=", "= [", 1) if path.suffix == ".toml" else "[" * 100_000
    path.write_bytes(changed.encode("utf-8", "surrogatepass"))
    return "has other values"


def _change_program(rng: Rng, path: Path) -> str:
    """Other values in the program of a `student.pt2`, or other records, in an archive that is whole."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    kind = rng.randrange(6)
    if kind == 0:
        records[rng.choice(("../secret", "student/../secret", "/etc/x", "student/data/weights/weight_0/../x"))] = b"x"
    elif kind == 1:
        records.pop(rng.choice([*records]))
    else:
        name = rng.choice([n for n in records if n.endswith(".json")])
        document = json.loads(records[name])
        changed_values(rng, document)
        with contextlib.suppress(RecursionError):
            records[name] = json.dumps(document).encode()
    stored = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", stored) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return "has another program or other records"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutation, which is made alone")
    parser.add_argument("--into", type=Path, help="a JSON file; the part `mutations` of it is written anew")
    a = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="pqk-faults-") as folder:
        campaign = Campaign(Path(folder), a.seed)
        if a.only is not None:
            print(campaign.mutate(a.only))
            return 1 if campaign.problems else 0
        outcomes = campaign.run(a.count)
    total = Counter[str]()
    for row in outcomes.values():
        total.update(row)
    document = {
        "command": "python tests/faults/mutations.py",
        "options": {"count": a.count, "seed": a.seed},
        "outcomes": dict(total),
        "by subject": outcomes,
        "problems": campaign.problems,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "machine": machine_fingerprint(),
    }
    print(json.dumps(document, indent=1))
    if a.into is not None:
        whole = json.loads(a.into.read_text()) if a.into.exists() else {}
        write_json(a.into, {**whole, "mutations": document})
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
