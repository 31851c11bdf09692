"""What becomes of a compile that is killed, runs out of disk, is started twice, may not write, or sees clocks jump.

    python tests/faults/interruptions.py [--kills 100] [--whole 10] [--onnx 20] [--sizes 4096] [--twice 10]
                                         [--closed 10] [--clocks 6] [--seed 0] [--into tests/faults/results.json]

Each compile is of `small.toml`. After every fault, what is left is read, and a run that goes on with `--resume` must
end in the artifact of a run that nothing happened to: `runs.unlike` says how it may not differ. The exit code is 1
where anything was wrong, which is printed.

    kills    SIGKILL at random moments: half of them at a random time, half when a file has just changed. A run is
             killed up to three times. `--whole` of the kills are of new processes of `python -m pqk`, the others of
             forked ones; `--onnx` of them of compiles for a CPU, whose ONNX files take most of the time
    disk     a file system in memory of a page, which grows by `--sizes` bytes whenever the disk is full, until the
             compile is done. Needs root, or user namespaces
    twice    two processes with one OUT, the second after a random time: one ends, the other is refused
    closed   the directory turns read-only at a random moment, and back after the process has ended
    clocks   `time.time` jumps by up to a day to and fro, the clocks that cannot go back by up to an hour on
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from runs import CPU, GPU, LONGEST, TARGETS, Process, Runner, drop_privileges, turn, unlike, wrong

from pqk.files import write_json
from pqk.target.machine import machine_fingerprint

REFUSED = (2, 3)
"""exit codes of what a user is told in words"""
CLOCKS = ("time", "monotonic", "perf_counter")


class Campaign:
    """The faults, one kind a method. `problems` are what was wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.runner, self.random, self.folder = Runner(folder), random.Random(seed), folder
        self.problems: list[str] = []
        self.runner.warm()
        self.events, self.seconds = {}, {}
        for target in TARGETS:
            out, began = folder / target, time.monotonic()
            process = self.runner.compile(out, target)
            self.events[target] = len([*changes(process, out)])
            self._ended(process, "the uninterrupted compile", (0,))
            self.seconds[target] = time.monotonic() - began
        again = folder / "again"
        self._ended(self.runner.compile(again, GPU), "the second compile", (0,))
        self._finished(again, GPU, "uninterrupted")
        shutil.rmtree(again)

    def kills(self, count: int, whole: int, onnx: int) -> dict[str, Any]:
        """Kill compiles until `count` of them were."""
        done, runs, when = 0, 0, Counter[str]()
        while done < count:
            out, resume, runs = self.folder / f"kill-{runs}", False, runs + 1
            target = CPU if done < onnx else GPU
            for _ in range(self.random.choice((1, 1, 2, 3))):
                process = self.runner.compile(out, target, resume=resume, whole=done >= count - whole)
                how = self._kill(process, out, target)
                if how is not None:
                    done += 1
                    when[how] += 1
                    resume = True
                    self._nothing_wrong(out, target, f"kill {done}, {how}")
                if how is None or done == count:
                    break
            self._ended(self.runner.compile(out, target, resume=True), f"kill {done}: the resume", (0,))
            self._finished(out, target, f"kill {done}")
            shutil.rmtree(out, ignore_errors=True)
        kinds = {"of whole processes": min(whole, done), f"of compiles for {CPU}": min(onnx, done)}
        return {"kills": done, **kinds, "runs": runs, "moments": dict(when)}

    def _kill(self, process: Process, out: Path, target: str) -> str | None:
        """Kill a process at a random moment; how it was chosen. None: it had ended before."""
        if self.random.random() < 0.5:
            until = process.began + self.random.uniform(0, self.seconds[target])
            while time.monotonic() < until and not process.poll():
                time.sleep(0.001)
            how = "at a random time"
        else:
            how, wanted = "when a file had changed", self.random.randrange(self.events[target])
            for i, _ in enumerate(changes(process, out)):
                if i == wanted:
                    break
        if process.poll():
            self._ended(process, "a compile that was to be killed", (0,))
            return None
        process.kill()
        return how

    def disk(self, step: int) -> dict[str, Any]:
        """Let the disk grow until a compile is done: by `step` for a fused student, by four times as much for both."""
        return {target: self._grown(target, step * (4 if target == CPU else 1)) for target in TARGETS}

    def _grown(self, target: str, step: int) -> dict[str, Any]:
        full, size = Counter[str](), step
        with mounted(self.folder / f"disk-{target}", size) as disk:
            if disk is None:
                return {"skipped": "no file system of a small size can be mounted here: neither root nor namespaces"}
            folder, grow = disk
            out, before = folder / "out", partial(os.environ.__setitem__, "TMPDIR", str(folder))
            while True:
                process = self.runner.compile(out, target, resume=True, before=before)
                code = process.wait()
                said = process.said()
                if code == 0:
                    break
                if code != 2 or "No space left" not in said or "Traceback" in said:
                    self._wrong(f"disk of {size} bytes: exit code {code}: {said[-1500:]}")
                full[_named(said, out)] += 1
                self._nothing_wrong(out, target, f"disk of {size} bytes")
                size += step
                grow(size)
            self._finished(out, target, "a disk that was full")
        return {
            "sizes": sum(full.values()) + 1,
            "step in bytes": step,
            "last size": size,
            "full while writing": dict(full),
        }

    def twice(self, count: int) -> dict[str, Any]:
        """Start two processes with one OUT."""
        for i in range(count):
            out, both = self.folder / f"twice-{i}", []
            for delay in (0.0, self.random.uniform(0, self.seconds[GPU]) if i % 2 else self.random.uniform(0, 0.1)):
                time.sleep(delay)
                both.append(self.runner.compile(out, GPU, resume=bool(i % 3)))
            codes = sorted(process.wait() for process in both)
            said = "".join(process.said() for process in both)
            if codes not in ([0, 2], [0, 0]) or "Traceback" in said or (codes == [0, 0] and i % 3 == 0):
                self._wrong(f"two processes, {i}: exit codes {codes}: {said[-1500:]}")
            self._finished(out, GPU, f"two processes, {i}")
            shutil.rmtree(out)
        return {"pairs": count}

    def closed(self, count: int) -> dict[str, Any]:
        """Take the right to write away at a random moment."""
        outcomes = Counter[str]()
        for i in range(count):
            out = self.folder / f"closed-{i}"
            target = TARGETS[i % 5 != 0]
            process = self.runner.compile(out, target, before=drop_privileges if os.geteuid() == 0 else None)
            wanted = self.random.randrange(self.events[target])
            for n, _ in enumerate(changes(process, out)):
                if n == wanted:
                    break
            if not process.poll():
                permit(out, False)
            code = process.wait()
            permit(out, True)
            outcomes["refused in words" if code == 2 else f"exit code {code}"] += 1
            if code not in (0, 2) or "Traceback" in process.said():
                self._wrong(f"read-only, {i}: exit code {code}: {process.said()[-1500:]}")
            self._nothing_wrong(out, target, f"read-only, {i}")
            self._ended(self.runner.compile(out, target, resume=True), f"read-only, {i}: the resume", (0,))
            self._finished(out, target, f"read-only, {i}")
            shutil.rmtree(out)
        return {"directories": count, "outcomes": dict(outcomes)}

    def clocks(self, count: int) -> dict[str, Any]:
        """Compile while clocks jump; one in three in a process of its own."""
        for i in range(count):
            out, clock, target = self.folder / f"clock-{i}", CLOCKS[i % 3], TARGETS[i < 3]
            if i % 3 == 0:
                process = self.runner.compile(out, target, whole=True, environment=self._jumping(clock, i))
            else:
                process = self.runner.compile(out, target, before=partial(turn, clock, i))
            self._ended(process, f"the clock {clock} jumps", (0,))
            self._finished(out, target, f"the clock {clock} jumps")
            report = json.loads((out / "report.json").read_text())
            for where, value in numbers(report):
                if value < 0 and ("second" in where or where.endswith("_ms")):
                    self._wrong(f"the clock {clock} jumps: {where} is {value}")
            shutil.rmtree(out)
        return {"compiles": count, "clocks": list(CLOCKS[: min(count, 3)])}

    def _jumping(self, clock: str, seed: int) -> dict[str, str]:
        """The environment of a process whose clock jumps from its first line on."""
        folder = self.folder / f"site-{seed}"
        folder.mkdir(exist_ok=True)
        # The function alone: its module imports all of pqk.
        source = (Path(__file__).parent / "runs.py").read_text()
        function = source[source.index("def turn(") : source.index("# ---- what is left")]
        (folder / "sitecustomize.py").write_text(
            f"import time\nimport numpy as np\n{function}\nturn({clock!r}, {seed})\n"
        )
        return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

    # what must be true

    def _ended(self, process: Process, what: str, codes: tuple[int, ...]) -> None:
        code = process.wait()
        if code not in codes or "Traceback" in process.said():
            self._wrong(f"{what} ended with {code}: {process.said()[-1500:]}")

    def _finished(self, out: Path, target: str, what: str) -> None:
        for problem in unlike(out, self.folder / target):
            self._wrong(f"{what}: {problem}")

    def _nothing_wrong(self, out: Path, target: str, what: str) -> None:
        for problem in wrong(out, self.folder / target) if out.exists() else ():
            self._wrong(f"{what}: {problem}")

    def _wrong(self, problem: str) -> None:
        print(f"WRONG: {problem}", file=sys.stderr, flush=True)
        self.problems.append(problem.replace(str(self.folder), "…")[:600])


def changes(process: Process, folder: Path) -> Iterator[int]:
    """Yields whenever a file below `folder` has appeared, gone or changed, until the process ends."""
    before: set[tuple[str, int, int]] = set()
    while not process.poll():
        now = set(looked(folder))
        if now != before:
            before = now
            yield len(now)
        if time.monotonic() - process.began > LONGEST:
            return
        time.sleep(0.0003)


def looked(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(path, size, time of the last change) of every file, as far as they stay while they are looked at."""
    try:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from looked(Path(entry.path))
            else:
                status = entry.stat(follow_symlinks=False)
                yield entry.path, status.st_size, status.st_mtime_ns
    except OSError:
        return


def permit(folder: Path, writing: bool) -> None:
    """Let the owner write into a directory and all below it, or not."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink():
            continue
        with suppress(FileNotFoundError):  # a compile that is still ending moves what it has written
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IWUSR if writing else mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Any]:
    """A file system in memory of `size` bytes; its folder with a function that resizes it, or None."""
    folder.mkdir()
    options = f"size={size}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder, lambda now: subprocess.run(["mount", "-o", f"remount,size={now}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _named(said: str, out: Path) -> str:
    """The file that a message says could not be written, without what differs from run to run."""
    words = (w.rstrip(":;,") for w in said.split() if str(out) in w)
    path = Path(next(words, "?"))
    return f"cache/…{path.suffix}" if path.parent.name == "cache" else str(path).removeprefix(str(out)) or "."


def numbers(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """(place, number) of every number in a JSON document."""
    if isinstance(value, dict):
        for k, v in value.items():
            yield from numbers(v, f"{where}.{k}")
    elif isinstance(value, list):
        for v in value:
            yield from numbers(v, where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield where, value


def in_a_namespace() -> None:
    """Where this is no root's process, let it mount file systems that nobody else sees, if the system does that."""
    if os.geteuid() == 0 or "--in-a-namespace" in sys.argv:
        return
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        os.execvp("unshare", ["unshare", "-rm", sys.executable, *sys.argv, "--in-a-namespace"])


def record(
    problems: list[str], name: str, work: Callable[[], dict[str, Any]], options: dict[str, int], into: Path | None
) -> None:
    """Do one part, and write what came of it; those of before stay, each with what it was run with."""
    had, began = len(problems), time.monotonic()
    document = work()
    found = problems[had:]
    document |= {"wrong": len(found), "problems": found, "options": options}
    document |= {"minutes": round((time.monotonic() - began) / 60, 1), "machine": machine_fingerprint()}
    print(f"{name}: {json.dumps(document)}", flush=True)
    if into is not None:
        whole = json.loads(into.read_text()) if into.exists() else {}
        write_json(into, {**whole, "interruptions": {**whole.get("interruptions", {}), name: document}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {"kills": 100, "whole": 10, "onnx": 20, "sizes": 4096, "twice": 10, "closed": 10, "clocks": 6, "seed": 0}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--into", type=Path, help="a JSON file, whose parts that are run are written anew")
    parser.add_argument("--in-a-namespace", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pqk-faults-") as folder:
        campaign = Campaign(Path(folder), a.seed)
        parts = {
            "kills": (partial(campaign.kills, a.kills, a.whole, a.onnx), ("kills", "whole", "onnx")),
            "disk": (partial(campaign.disk, a.sizes), ("sizes",)),
            "twice": (partial(campaign.twice, a.twice), ("twice",)),
            "closed": (partial(campaign.closed, a.closed), ("closed",)),
            "clocks": (partial(campaign.clocks, a.clocks), ("clocks",)),
        }
        for name, (work, options) in parts.items():
            if getattr(a, options[0]):
                record(campaign.problems, name, work, {o: getattr(a, o) for o in ("seed", *options)}, a.into)
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    in_a_namespace()
    sys.exit(main())
