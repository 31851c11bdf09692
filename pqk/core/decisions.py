"""Measured decisions by key, on disk before they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pqk.errors import InputError

Json = Any


class Journal:
    """Measured decisions by key, one JSON line each, flushed to disk before they are used."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.decisions: dict[str, Json] = {}
        if path is not None and path.exists():
            whole = path.read_bytes()
            lines = whole.split(b"\n")
            for line in lines[:-1]:
                try:
                    entry = json.loads(line)
                    self.decisions[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(f"{path} was changed: a line is not a decision ({error}); start anew") from error
            if lines[-1]:  # a killed run can leave half a line; the decision was not used yet
                os.truncate(path, len(whole) - len(lines[-1]))

    def decide(self, key: str, measure: Callable[[], Json]) -> Json:
        """The journaled value of `key`, or `measure()` (JSON), noted first."""
        if key not in self.decisions:
            value = json.loads(json.dumps(measure()))
            if self.path is not None:
                self._append(self.path, json.dumps({"key": key, "value": value}) + "\n")
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
            if path.exists():
                os.truncate(path, before)
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
