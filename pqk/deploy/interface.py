"""The inputs and outputs of a student, as its manifest says them, and inputs held against that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from numpy.typing import NDArray
from torch import fx

from pqk.core.aten import GATHER_NBITS, aten
from pqk.core.graph import arguments, shape
from pqk.core.onnxruntime_session import MASK
from pqk.data.structures import tensors
from pqk.errors import InputError
from pqk.task.axes import Sizes, sizes_of
from pqk.task.decoder_form import DecoderForm
from pqk.task.task import Task

SEEN = 64
"""validation samples whose integers say in which range inputs are"""
LOOKUPS: dict[Any, str] = {aten.embedding.default: "weight", GATHER_NBITS: "table"}
"""operators that take rows of a table by number -> their argument that is the table"""


def describe_interface(student: fx.GraphModule, task: Task) -> dict[str, Any]:
    """The inputs, outputs and free axes of the student as the manifest has them.

    Inputs and outputs have names, shapes and dtypes; what is free in a shape is a name, or an expression of names.
    Inputs of integers have the least and the largest value that was seen, and `below` what they must be, where each is
    the number of a row of a table, such as a token's, or the mask of one text. Free axes have the sizes that they may
    have, with the example's. Seen are the example, what is timed, and some validation samples.
    """
    samples = [task.example, *task.timed.values(), *task.calibration(SEEN)]
    rows = table_rows(student)
    inputs = []
    for i, (name, t, axes) in enumerate(zip(task.input_names, task.example, task.axes, strict=True)):
        shape = [axis or size for axis, size in zip(axes, t.shape, strict=True)]
        entry = _describe(name, shape, t)
        if not t.is_floating_point() and all(x[i].numel() for x in samples):
            entry["range"] = [min(int(x[i].min()) for x in samples), max(int(x[i].max()) for x in samples)]
        if i in rows or (task.generates and name == MASK):
            entry["below"] = rows.get(i, 2)  # in a file that generates a row is one text, whatever a batch packed
        inputs.append(entry)
    with torch.no_grad():
        outputs = student(*task.example)
    named = zip(task.signature.names_of(outputs), student.meta["outputs"], tensors(outputs), strict=True)
    sizes = sizes_of(task.example, task.axes)
    axes_of = {name: _describe_axis(found, sizes[name]) for name, found in student.meta["sizes"].items()}
    described = [_describe(*each) for each in named]
    form = {} if task.decoder_form == DecoderForm() else {"decoder_form": asdict(task.decoder_form)}
    if task.decoder_form.logits == "last":
        described[0]["shape"][1] = 1
    return {"inputs": inputs, "outputs": described, "axes": axes_of, **form}


def _describe_axis(sizes: Sizes, example: int) -> dict[str, Any]:
    described = asdict(sizes) | {"example": example}
    return {key: value for key, value in described.items() if key != "equals" or value is not None}


def _describe(name: str, shape: Sequence[int | str], t: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": str(t.dtype).removeprefix("torch.")}


def table_rows(student: fx.GraphModule) -> dict[int, int]:
    """For each input whose values are numbers of rows of tables, by its place: how many the smallest table has."""
    found: dict[int, int] = {}
    for i, placeholder in enumerate(student.graph.find_nodes(op="placeholder")):
        for reader in placeholder.users:
            a = arguments(reader) if reader.target in LOOKUPS else {}
            if a.get("indices") is placeholder:
                rows = shape(a[LOOKUPS[reader.target]])[0]
                assert rows is not None
                found[i] = min(rows, found.get(i, rows))
    return found


def checked_feeds(manifest: Mapping[str, Any], arrays: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Arrays by the names that a manifest gives them. Raises `InputError` for those that the student does not take."""
    specs = manifest["inputs"]
    if len(arrays) != len(specs):
        raise InputError(f"run: {len(arrays)} inputs given; the model takes {[s['name'] for s in specs]}")
    given: dict[str, tuple[str, int, str]] = {}
    for x, s in zip(arrays, specs, strict=True):
        fits = len(x.shape) == len(s["shape"]) and all(
            isinstance(want, str) or want == have for want, have in zip(s["shape"], x.shape, strict=True)
        )
        if not fits or str(x.dtype) != s["dtype"]:
            raise InputError(f"run: {s['name']} is {x.dtype} {list(x.shape)}; it must be {s['dtype']} {s['shape']}")
        for axis, size in zip(s["shape"], x.shape, strict=True):
            if isinstance(axis, str):
                _check_size(manifest, axis, size, s["name"], given)
        if (below := s.get("below")) is not None and x.size and not 0 <= x.min() <= x.max() < below:
            raise InputError(
                f"run: {s['name']} has values from {x.min()} to {x.max()}, and the student takes 0 to {below - 1}"
                + (": a row is one text" if s["name"] == MASK else "; are they of this artifact's tokenizer?")
            )
    return {s["name"]: x for s, x in zip(specs, arrays, strict=True)}


def _check_size(
    manifest: Mapping[str, Any], axis: str, size: int, where: str, given: dict[str, tuple[str, int, str]]
) -> None:
    """Raises `InputError` where a free axis has a size that the model does not take, or two sizes at once."""
    entry = manifest.get("axes", {}).get(axis, {})  # artifacts of before have no sizes
    first, known, there = given.setdefault(entry.get("equals", axis), (axis, size, where))
    if known != size:
        other = f"{size}" if axis == first else f"{axis} is {size}"
        raise InputError(f"run: {first} is {known} in {there} and {other} in {where}; it must be the same")
    if entry and size not in (sizes := Sizes(entry["least"], entry["most"], entry["step"])):
        raise InputError(f"run: {axis} is {size} in {where}; the model takes {sizes}")
