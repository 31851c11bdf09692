"""What becomes of a language model's compile that is killed in each of its passes, and in what comes before and behind.

    python tests/faults/tellings.py [--chains 3] [--seed 0] [--into tests/faults/results.json]

A chain is one compile of `telling.toml`, which is killed in every part of it in turn and goes on with `--resume`: while
the black box is asked, in each pass, and in the evaluation, each time after some of the changes of files there. It must
end in the files of a compile that nothing happened to, and the box must have been asked no question twice that it had
answered. The exit code is 1 where anything was wrong, which is printed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from interruptions import looked, record
from runs import LONGEST, Process, Runner, unlike
from small_languages import directory

ASKED, WORK = "asked", ".work"


class Tellings:
    """The compiles of a language model. `problems` are what was wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.runner, self.folder, self.random = Runner(folder, "telling"), folder, random.Random(seed)
        self.problems: list[str] = []
        self.reference = folder / "reference"
        directory(folder / "model", num_hidden_layers=2)
        self.runner.warm()
        self._forget()
        process = self.runner.compile(self.reference)
        self.changes = Counter(part for part, _ in self._changes(process, self.reference))
        self._ended(process, "the uninterrupted compile")
        self.parts = [ASKED, *sorted(p.name for p in (self.reference / WORK).iterdir() if p.is_dir())]

    def chains(self, count: int) -> dict[str, Any]:
        """Kill compiles in each part of them."""
        killed = Counter[str]()
        for i in range(count):
            out = self.folder / f"chain-{i}"
            self._forget()
            for part in self.parts:
                process = self.runner.compile(out, resume=out.exists())
                after = self.random.randint(1, max(1, self.changes[part] // 2))  # a busy machine sees fewer of them
                if any(seen == (part, after) for seen in self._changes(process, out)):
                    process.kill()
                    killed[part] += 1
                elif process.wait():
                    self._wrong(f"chain {i} ended in {part}: {process.said()[-1500:]}")
            self._ended(self.runner.compile(out, resume=True), f"chain {i}: the last resume")
            for problem in (*unlike(out, self.reference), *self._other_files(out)):
                self._wrong(f"chain {i}: {problem}")
            again = Counter((self.folder / "calls").read_text().splitlines())
            if sum(again.values()) > len(again) + killed[ASKED]:  # the one that a kill cut off is asked again
                self._wrong(f"chain {i}: the box was asked again: {again.most_common(3)}")
            shutil.rmtree(out)
        return {"chains": count, "kills": dict(killed), "changes": {part: self.changes[part] for part in self.parts}}

    def _changes(self, process: Process, out: Path) -> Iterator[tuple[str, int]]:
        """Yields (part, how many changes of its files there were) at each change, until a process ends."""
        roots, counts = (self.folder / ASKED, out / WORK), Counter[str]()
        before = {entry for root in roots for entry in looked(root)}
        while not process.poll() and time.monotonic() - process.began < LONGEST:
            now = {entry for root in roots for entry in looked(root)}
            for part in sorted({self._part(path, out) for path, *_ in now ^ before}):
                counts[part] += 1
                yield part, counts[part]
            before = now
            time.sleep(0.0003)

    def _part(self, path: str, out: Path) -> str:
        """The part of a compile that a file is of: `02-distill` also while it is in the making, hidden or partial."""
        if Path(path).parent == self.folder / ASKED:
            return ASKED
        return Path(path).relative_to(out / WORK).parts[0].lstrip(".").split(".")[0]

    def _other_files(self, out: Path) -> list[str]:
        """Files of the directory that differ, beside reports, which tell times."""
        ours, theirs = ({p.name: p for p in f.iterdir() if p.is_file()} for f in (out, self.reference))
        told = {"manifest.json", "report.json", "report.md", "report.html"}
        changed = [n for n in ours.keys() & theirs.keys() - told if ours[n].read_bytes() != theirs[n].read_bytes()]
        return [f"{name} differs" for name in sorted([*changed, *(ours.keys() ^ theirs.keys())])]

    def _forget(self) -> None:
        shutil.rmtree(self.folder / ASKED, ignore_errors=True)
        (self.folder / "calls").unlink(missing_ok=True)

    def _ended(self, process: Process, what: str) -> None:
        if process.wait() or "Traceback" in process.said():
            self._wrong(f"{what} ended with {process.status}: {process.said()[-1500:]}")

    def _wrong(self, problem: str) -> None:
        print(f"WRONG: {problem}", file=sys.stderr, flush=True)
        self.problems.append(problem.replace(str(self.folder), "…")[:600])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="a JSON file, whose part is written anew")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pqk-faults-") as folder:
        campaign = Tellings(Path(folder), a.seed)
        work: Callable[[], dict[str, Any]] = partial(campaign.chains, a.chains)
        record(campaign.problems, "tellings", work, {"seed": a.seed, "chains": a.chains}, a.into)
    return 1 if campaign.problems else 0


if __name__ == "__main__":
    sys.exit(main())
