"""What an artifact's `manifest.json` must hold, checked before any of it is used.

`format`, `files` (sha256 and bytes of every other file), `target`, `seed`, `inputs` and `outputs` are needed, in these
forms; whatever else a version adds is let through. The document is sealed: it states the digest of its own values.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pqk.deploy.cascade import CASCADE_TEACHER
from pqk.documents import digest_of_file
from pqk.errors import InputError
from pqk.files import read_json, read_sealed

FORMAT = 2
FORMATS = (1, FORMAT)
"""those that are read; a manifest of format 1 does not state its own digest"""
LARGEST_INPUT = 1 << 28
"""values that one sample of an input may have"""

AxisSize = Annotated[int, Field(ge=0, le=LARGEST_INPUT)]
Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


class ManifestPart(BaseModel):
    """Base of the parts: numbers are numbers, and keys of later versions are let through."""

    model_config = ConfigDict(extra="allow", strict=True)


class FileEntry(ManifestPart):
    """One file of the artifact."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class Port(ManifestPart):
    """An input or output; what is free in its shape is a text."""

    name: str
    shape: list[AxisSize | str]
    dtype: Annotated[str, Field(pattern="^(u?int(8|16|32|64)|float(16|32|64)|bool)$")]
    range: tuple[Int64, Int64] | None = None
    """the least and the largest integer that was seen"""


class AxisEntry(ManifestPart):
    """The sizes that a free axis may have."""

    least: AxisSize
    most: Int64 | None
    step: Annotated[int, Field(ge=1)]
    example: AxisSize
    equals: str | None = None
    """another axis that has the same size"""


class CascadeEntry(ManifestPart):
    """The routing of a cascade: when the student's answer is taken."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    threshold: Annotated[float, Field(ge=0, le=1)]


class ManifestForm(ManifestPart):
    """The whole document."""

    files: dict[str, FileEntry]
    target: str
    seed: int
    inputs: list[Port]
    outputs: list[Port]
    axes: dict[str, AxisEntry] = {}
    teacher_files: dict[str, str] = {}
    cascade: CascadeEntry | None = None
    """null where the student answers everything"""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file.

    Raises:
        InputError: it is of another format, was changed, or something in it is not what it must be.
    """
    document = read_json(path)
    kind = document.get("format") if isinstance(document, dict) else None
    if type(kind) is not int or kind not in FORMATS:
        raise InputError(f"{path} is not a manifest of format {FORMAT} or before; it needs another pqk version")
    manifest = read_sealed(path, (), unsealed=kind == 1)
    try:
        # As JSON, where a list may fill a tuple however strict numbers are.
        form = ManifestForm.model_validate_json(json.dumps(manifest))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path} was changed: {where}: {first['msg']} (got {str(first['input'])[:60]})") from error
    for port in form.inputs:
        sizes = [form.axes[n].example if isinstance(n, str) and n in form.axes else n for n in port.shape]
        if math.prod(n for n in sizes if isinstance(n, int)) > LARGEST_INPUT:
            raise InputError(f"{path} was changed: a sample of {port.name} has more than {LARGEST_INPUT} values")
        if port.range is not None and port.range[0] > port.range[1]:
            raise InputError(f"{path} was changed: the integers of {port.name} are from {port.range[0]} to less")
    if form.cascade is not None:
        if CASCADE_TEACHER not in form.files:
            raise InputError(f"{path} was changed: it has a cascade and does not list {CASCADE_TEACHER}")
        if len(form.outputs) != 1 or len(form.outputs[0].shape) != 2 or not form.outputs[0].dtype.startswith("float"):
            raise InputError(f"{path} was changed: a cascade has one output of logits [B, C]")
    return manifest


def check_file(path: Path, entry: dict[str, Any]) -> None:
    """Raises `InputError` where a file is not what its entry says; its size first, which costs nothing."""
    if path.stat().st_size != entry["bytes"] or digest_of_file(path) != entry["sha256"]:
        raise InputError(f"{path} was changed after the compile: its sha256 is not the manifest's; copy it again")
