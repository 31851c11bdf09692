"""Files appear whole or not at all, and what is not safetensors is refused for what it is."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pqk import files
from pqk.errors import InputError
from pqk.files import read_json, read_tensors, write_json, write_tensors, write_whole


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(path: Path) -> None:
    path.write_text("half of")
    full()


def test_round_trips(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(2, 3, 2, 2)
    tensors = {"a": base.to(memory_format=torch.channels_last), "b": base[:, 1], "tied": base, "n": torch.tensor(3)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    found, metadata = read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"note": "x"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    write_json(tmp_path / "v.json", {"mean": 0.1, "text": "µs"})
    assert read_json(tmp_path / "v.json") == {"mean": 0.1, "text": "µs"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.safetensors", "v.json"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    if before is not None:
        path.write_text(before)
    monkeypatch.setattr(files, "save_file", full)
    for write in (lambda: write_whole(path, half), lambda: write_tensors(path, {"a": torch.ones(2)})):
        with pytest.raises(InputError, match=r"cannot write .*No space left on device; nothing was left half-written"):
            write()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_json(path, 3)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_a_foreign_error_leaves_nothing_half_written_either(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "x", fails)
    assert not [*tmp_path.iterdir()]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize(
    "write",
    [
        lambda p: torch.save({"a": torch.ones(2)}, p),
        lambda p: torch.save({"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False),
        lambda p: p.write_bytes(pickle.dumps(Trap())),
    ],
)
def test_a_pickle_is_named_and_never_opened(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth is a pickle .*can run code.*safetensors only"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path: Path, first: int) -> None:
    """The file begins with that length: 128 reads like a pickle's first byte, 0x4b50 like a zip's first two."""
    lengths = set()
    for size in range(2000 if first == 0x50 else 64):
        if first == 0x50:
            size = 0x4B50 - 200 + size % 200
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)}, {"note": "x" * size})
        head = (tmp_path / "t.safetensors").read_bytes()[:2]
        lengths.add(head[0] if first == 0x80 else head)
        assert read_tensors(tmp_path / "t.safetensors")[0]["a"] == 1
        if (first if first == 0x80 else b"PK") in lengths:
            return
    pytest.fail("no header of that length was tried")


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(64)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_tensors(path)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*gone"):
        read_tensors(tmp_path / "gone")
    with pytest.raises(InputError, match="cannot read .*gone"):
        read_json(tmp_path / "gone")
    (tmp_path / "bad").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="cannot read .*bad"):
        read_json(tmp_path / "bad")
    with pytest.raises(json.JSONDecodeError):
        json.loads("{")
