"""Rows of committed tables that tests measure again: held against what is committed, or written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pqk.files import read_json, write_json


def hold(name: str, row: dict[str, Any], committed: Path, order: Iterable[str]) -> None:
    """Write a row into the file that `PQK_FAMILIES_OUT` names, in this order, or hold it against the committed one."""
    out = os.environ.get("PQK_FAMILIES_OUT")
    if out is None:
        assert row == read_json(committed)[name]
        return
    path = Path(out)
    rows = (json.loads(path.read_text()) if path.exists() else {}) | {name: row}
    write_json(path, {n: rows[n] for n in order if n in rows})
