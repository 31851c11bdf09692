"""Compiles as processes that can be killed, and what must be true of what they leave.

A `Runner` imports pqk once and forks a process for each compile, which then is `pqk compress` from its arguments to its
exit code; some compiles are whole new processes of `python -m pqk`. Both die by a real SIGKILL.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from pqk import Artifact
from pqk.cli import commands
from pqk.cli.app import run as pqk
from pqk.core.decisions import Journal
from pqk.documents import digest_of_values
from pqk.errors import InputError
from pqk.files import read_json, read_sealed, read_tensors
from pqk.knowledge.teachers.cache import LogitCache

assert commands  # all that a command needs is imported before the first fork
HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "support"))  # which a script has not
VOLATILE = {
    "seconds", "latency", "latency_ms", "median_ms", "p05_ms", "p95_ms", "ratio", "ratio_low", "ratio_high",
    "peak_memory_bytes", "machine", "significant", "break_even", "conditions", "versions", "pqk", "notes",
    "teacher_per_second", "student_per_second", "teacher_first_ms", "student_first_ms",
}  # fmt: skip
"""keys of reports and records whose values are times, tell of them, or of the machine"""
CPU, GPU = TARGETS = ("x86-avx2", "cuda-sm80")
"""what is compiled for: an ONNX file and a fused student, or, in a third of the time, a fused student alone"""
SHIPPED = ("model.onnx", "student.pt2", "tuning.json", "student.safetensors", "student.json", "recipe.toml")
"""files that are the same bytes whenever the compile is the same"""
LONGEST = 600
"""seconds after which a compile is taken to hang"""


class Process:
    """A compile that runs, forked or a program of its own."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.began = pid, log, time.monotonic()
        self.status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self) -> int:
        """Its exit code; negative: the signal that ended it. Raises `TimeoutError` where it hangs."""
        while not self.poll():
            if time.monotonic() - self.began > LONGEST:
                self.kill()
                raise TimeoutError(f"it hangs: {self.said()}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        """SIGKILL, waited for."""
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            while not self.poll():
                time.sleep(0.001)

    def said(self) -> str:
        """What it has written to its terminal."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Runner:
    """Starts compiles of `small.toml`, or of another recipe here, in a folder of their own."""

    def __init__(self, folder: Path, recipe: str = "small") -> None:
        self.folder, self.recipe = folder, recipe
        folder.mkdir(parents=True, exist_ok=True)
        for name in (f"{recipe}.py", f"{recipe}.toml"):
            shutil.copy(HERE / name, folder / name)
        self.count = 0
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"

    def warm(self) -> None:
        """Import whatever a compile imports on its way, so that forked ones need not."""
        before, names = set(sys.modules), self.folder / "modules.json"

        def noted() -> None:
            names.write_text(json.dumps(sorted(set(sys.modules) - before)))

        self.compile(self.folder / "warm", after=noted).wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in json.loads(names.read_text()):
                if name != self.recipe:
                    with contextlib.suppress(Exception):  # modules that are made while others are imported
                        importlib.import_module(name)
        shutil.rmtree(self.folder / "warm")

    def arguments(self, out: Path, target: str, resume: bool) -> list[str]:
        again = ["--resume"] if resume else []
        recipe, to = str(self.folder / f"{self.recipe}.toml"), ["--out", str(out), "--target", target]
        return ["compress", recipe, *to, "--evaluation", "quick", *again]

    def compile(
        self,
        out: Path,
        target: str = CPU,
        *,
        resume: bool = False,
        whole: bool = False,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """Start a compile into `out`; `whole` starts `python -m pqk`, else this process is forked."""
        self.count += 1
        log = self.folder / f"log-{self.count}"
        if whole:
            command = [sys.executable, "-m", "pqk", *self.arguments(out, target, resume)]
            given = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
            with log.open("wb") as f:
                process = subprocess.Popen(command, cwd=self.folder, env=given, stdout=f, stderr=f)
            process.returncode = 0  # it is waited for by its id
            return Process(process.pid, log)
        pid = os.fork()
        if pid:
            return Process(pid, log)
        code = 99
        try:
            terminal = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(terminal, 1)
            os.dup2(terminal, 2)
            os.chdir(self.folder)
            os.environ.update(environment or {})
            if before is not None:
                before()
            code = pqk(self.arguments(out, target, resume))
            if after is not None:
                after()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code)


def drop_privileges() -> None:
    """This process may no longer write where the permissions say no, though it is root's."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)(0, 0, 0, 0, 0, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def turn(clock: str, seed: int) -> None:
    """Let a clock of this process jump: `time` a day to and fro, and the others, which cannot go back, an hour on."""
    real, state = getattr(time, clock), {"at": 0.0, "random": np.random.default_rng(seed)}

    def jumping() -> float:
        if state["random"].random() < 0.05:  # type: ignore[attr-defined]
            step = float(state["random"].uniform(-1, 1)) * 86400  # type: ignore[attr-defined]
            state["at"] = step if clock == "time" else state["at"] + abs(step) / 24  # type: ignore[operator]
        return float(real() + state["at"])

    setattr(time, clock, jumping)


# ---- what is left


def steady(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return [steady(v) for v in value] if isinstance(value, list) else value


def unlike(out: Path, reference: Path) -> list[str]:
    """How a finished artifact differs from another of the same compile."""
    found = []
    try:
        manifests = [Artifact.load(folder).manifest for folder in (out, reference)]
    except InputError as error:
        return [str(error)]
    for name in SHIPPED:
        if (reference / name).exists() and (out / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name} differs")
    for manifest in manifests:
        manifest["files"] = sorted(manifest["files"])
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, reference)]
    for name, documents in {"manifest.json": manifests, "report.json": reports}.items():
        ours, theirs = map(steady, documents)
        found += [f"{name}: {k} differs" for k in ours | theirs if ours.get(k) != theirs.get(k)]
    return [*found, *wrong(out, reference)]


def wrong(out: Path, reference: Path) -> Iterator[str]:
    """What in the directory of a compile can be read and is not what the uninterrupted compile left there.

    Hidden names, and those that are in the making, are no files yet; what is refused when it is read is not wrong.
    """
    visible = [p for p in out.rglob("*") if not any(part.startswith(".") for part in _parts(p, out))]
    finished = (out / "manifest.json").exists()
    for path in (p for p in visible if p.is_file()):
        name = path.relative_to(out).as_posix()
        if path.parent == out and not finished and name in SHIPPED:
            if path.read_bytes() != (reference / name).read_bytes():
                yield f"{name} is there and is not what it must be"
        elif name.startswith(".work/"):
            yield from _wrong_state(path, name, reference)


def _parts(path: Path, out: Path) -> tuple[str, ...]:
    return tuple(part for part in path.relative_to(out).parts if part != ".work")


def _wrong_state(path: Path, name: str, reference: Path) -> Iterator[str]:
    other = reference / name
    if path.parent.name == "proof" and not other.exists():  # what ships has left it in a finished run
        other = reference / path.name
    try:
        if path.suffix == ".jsonl":
            identity = digest_of_values(read_sealed(path.with_name("run.json"), ()))
            ours, theirs = _decisions(path, identity), _decisions(other, identity)
            yield from (f"{name}: {k} differs" for k in ours if ours[k] != theirs.get(k))
        elif path.name in ("run.json", "program.json"):
            if steady(read_sealed(path, ())) != steady(read_sealed(other, ())):
                yield f"{name} differs"
        elif path.suffix == ".npy":
            yield from _wrong_answers(path, name, other)
        elif path.name == "checkpoint.safetensors":
            read_tensors(path)
        elif path.suffix == ".onnx" and other.exists():
            if onnx.load(path) != onnx.load(other):
                yield f"{name} differs"
        elif path.name in SHIPPED and path.read_bytes() != other.read_bytes():
            yield f"{name} differs"
        elif path.suffix == ".json":
            read_json(path)
    except InputError:
        return
    except Exception as error:  # a reader that says it without words
        yield f"{name}: {type(error).__name__}: {error}"


def _decisions(path: Path, identity: str) -> dict[str, Any]:
    """Without the half line that a killed process may have left, of which a reader of its own would rid the file."""
    with tempfile.TemporaryDirectory() as elsewhere:  # the disk of the run may be full
        copy = Path(elsewhere) / "journal.jsonl"
        shutil.copy(path, copy)
        return Journal(copy, identity).decisions


def _wrong_answers(path: Path, name: str, other: Path) -> Iterator[str]:
    if not other.exists():
        yield f"{name}: no such cache is in the uninterrupted run"
        return
    form = np.load(other, allow_pickle=False)
    shape = form.dtype["answer"].shape
    keys = torch.arange(len(form))
    (ours, here), (theirs, _) = (LogitCache(p, len(form), shape).get(keys) for p in (path, other))
    if not torch.equal(ours[here], theirs[here]):
        yield f"{name}: answers differ"
