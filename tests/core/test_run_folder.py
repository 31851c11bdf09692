"""A run's folder is one process's at a time, and of one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pqk.core.run_folder import RunFolder
from pqk.errors import InputError

IDENTITY = {"recipe": "seed = 1", "teacher": "a"}
HOLDER = """
import sys, time
from pathlib import Path
from pqk.core.run_folder import RunFolder
with RunFolder.of(Path(sys.argv[1])).opened({"recipe": "seed = 1", "teacher": "a"}, resume=False):
    print("held", flush=True)
    time.sleep(600)
"""


def go_on(out: Path, resume: bool = True) -> None:
    with RunFolder.of(out).opened(IDENTITY, resume):
        pass


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_one_is_refused(tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "out"
    message = "another process runs in .*out; wait for it" if resume else "is not empty"
    with RunFolder.of(out).opened(IDENTITY, resume=False), pytest.raises(InputError, match=message):
        go_on(out, resume)
    go_on(out)


@pytest.mark.slow
def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another process runs in"):
        go_on(out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    go_on(out)


def test_two_that_begin_at_once_are_one(tmp_path: Path) -> None:
    """The second looked before the first had made anything."""
    out = tmp_path / "out"
    with RunFolder.of(out).held(), pytest.raises(InputError, match=r"another process runs in|is not empty"):
        go_on(out, resume=False)
    go_on(out)


@pytest.mark.parametrize("spoil", ["a", "seed = 1"])
def test_a_changed_identity_is_refused(tmp_path: Path, spoil: str) -> None:
    go_on(tmp_path / "out", resume=False)
    path = RunFolder.of(tmp_path / "out").identity
    path.write_text(path.read_text().replace(f'"{spoil}"', '"other"'))
    with pytest.raises(InputError, match=r"run\.json was changed after it was written"):
        go_on(tmp_path / "out")
    document = json.loads(path.read_text())
    del document["sha256"]  # as versions before the digest wrote it
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="holds a run with another (recipe|teacher)"):
        go_on(tmp_path / "out")


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "out" / ".work").mkdir(parents=True)
    (tmp_path / "out" / ".work" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="cannot make"):
        go_on(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()
