"""Measured decisions by key, on disk before they are used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.documents import SEAL, digest_of_values, parse_json, read_bytes
from pqk.errors import InputError

Json = Any


class Journal:
    """Measured decisions by key, one JSON line each, flushed to disk before they are used.

    Each line states a digest of itself and of `identity`, the run that it belongs to. Raises `InputError` for a file
    with lines that are no decisions of this run.
    """

    def __init__(self, path: Path | None = None, identity: str = "") -> None:
        self.path, self.identity = path, identity
        self.decisions: dict[str, Json] = {}
        if path is not None and path.is_symlink():  # the journal is cut and added to: never another file
            raise InputError(f"{path} is a link, and a journal is a file of its own; put the file in its place")
        if path is not None and path.exists():
            whole = read_bytes(path)
            lines = whole.split(b"\n")
            for number, line in enumerate(lines[:-1], 1):
                key, value = self._parsed(line, f"{path}, line {number}")
                self.decisions[key] = value
            if lines[-1]:  # a killed run can leave half a line; the decision was not used yet
                try:
                    os.truncate(path, len(whole) - len(lines[-1]))
                except OSError as error:
                    raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    def _parsed(self, line: bytes, where: str) -> tuple[str, Json]:
        entry = parse_json(line, where)
        decision = isinstance(entry, dict) and {"key", "value"} <= entry.keys() <= {"key", "value", SEAL}
        if not decision or not isinstance(entry["key"], str):
            raise InputError(f"{where} was changed: it is not a decision; start anew")
        if entry.get(SEAL, seal := self._seal(entry["key"], entry["value"])) != seal:
            raise InputError(f"{where} was changed, or is a decision of another run; start anew")
        return entry["key"], entry["value"]

    def _seal(self, key: str, value: Json) -> str:
        return digest_of_values([self.identity, key, value])

    def decide(self, key: str, measure: Callable[[], Json]) -> Json:
        """The journaled value of `key`, or `measure()` (JSON), noted first."""
        if key not in self.decisions:
            value = json.loads(json.dumps(measure()))
            if self.path is not None:
                entry = {SEAL: self._seal(key, value), "key": key, "value": value}
                self._append(self.path, json.dumps(entry) + "\n")
            self.decisions[key] = value
        return self.decisions[key]

    @staticmethod
    def _append(path: Path, line: str) -> None:
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab", buffering=0) as f:
                f.write(line.encode())
                os.fsync(f.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):  # where not even that may be written, there is no half line either
                os.truncate(path, before)
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
