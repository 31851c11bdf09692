"""Documents: bounded in size and depth, of plain files, and sealed against changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pqk.documents import DEEPEST, parse_json
from pqk.errors import InputError
from pqk.files import read_json, read_sealed, read_tensors, write_json, write_sealed

VALUES = {"recipe": "seed = 3", "sizes": [1, 2.5, None, True], "nested": {"µ": "x"}}


def nested(depth: int) -> Any:
    value: Any = 0
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def test_a_sealed_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_sealed(path, {**VALUES, "tuple": (1, 2)})
    assert read_sealed(path, ("recipe",)) == {**VALUES, "tuple": [1, 2]}
    assert next(iter(json.loads(path.read_text()))) == "sha256", "whatever cuts it off cuts off what follows, too"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8) + "\n\n")
    assert read_sealed(path, ()) == {**VALUES, "tuple": [1, 2]}, "the layout says nothing"


def test_no_change_of_a_byte_gives_other_values(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_sealed(path, VALUES)
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        for bit in (0, 3, 6):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                found = read_sealed(path, ("recipe",))
            except InputError as error:
                assert "d.json" in str(error)
                refused += 1
            else:
                assert {k: v for k, v in found.items() if k in VALUES} == VALUES
    assert refused > 2 * len(content)


def test_a_document_of_before_has_no_seal(tmp_path: Path) -> None:
    write_json(tmp_path / "d.json", VALUES)
    assert read_sealed(tmp_path / "d.json", ("recipe",), unsealed=True) == VALUES
    with pytest.raises(InputError, match="was changed or is of another version of pqk: it has no sha256"):
        read_sealed(tmp_path / "d.json", ("recipe",))


@pytest.mark.parametrize("value", [[], "x", None, {"other": 1}])
def test_what_is_needed_is_named(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "d.json", value)
    with pytest.raises(InputError, match=r"d\.json was changed or is of another version of pqk: it has no recipe"):
        read_sealed(tmp_path / "d.json", ("recipe",), unsealed=True)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, json.dumps(nested(DEEPEST + 2)).encode()])
def test_depth_is_bounded(content: bytes) -> None:
    with pytest.raises(InputError, match="cannot read it: it is nested too deeply"):
        parse_json(content, "it")
    assert parse_json(json.dumps(nested(DEEPEST - 2)).encode(), "it") == nested(DEEPEST - 2)


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with path.open("wb") as f:
        f.truncate(1 << 40)  # no byte of it is on the disk
    with pytest.raises(InputError, match="it has 1099511627776 bytes, and 268435456 at most are expected"):
        read_json(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "zero in the name"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "d"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = tmp_path / "a\0b"
    for read in (read_json, read_tensors):
        with pytest.raises(InputError, match="cannot read|not a whole safetensors file"):
            read(path)
