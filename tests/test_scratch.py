"""Folders of processes that were killed are removed by the next; those of living ones, and of others, are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pqk.scratch import ScratchFolder

pytest.importorskip("fcntl")
HOLDING = """
import sys, time
from pqk.scratch import ScratchFolder
folder = ScratchFolder("test")
print(folder.name, flush=True)
time.sleep(600)
"""


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = tmp_path / "pqk-test-of-nobody"
    other.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert process.stdout is not None
    held = Path(process.stdout.readline().strip())
    try:
        (held / "weights").write_text("many")
        with ScratchFolder("test") as name:
            assert held.is_dir() and Path(name).is_dir()
            with ScratchFolder("test"):
                assert Path(name).is_dir(), "one of the same process lives"
        assert not Path(name).exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with ScratchFolder("other"):
        assert held.is_dir(), "of another kind"
    with ScratchFolder("test"):
        assert not held.exists() and other.is_dir()


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ScratchFolder("first") as name:
        (tmp_path / "pqk-test-link").symlink_to(name)
        with ScratchFolder("test"):
            assert Path(name).is_dir()
