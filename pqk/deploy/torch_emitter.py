"""Fused student → `student.pt2`: one file that runs wherever torch, Triton and `pqk.kernels` are, and holds no pickle.

`torch.export.save` writes a zip of JSON and raw tensor bytes, and the sample inputs as a pickle. That one record is
emptied, which `torch.export.load` reads as "no sample inputs". The exporter's notes about the sources it ran on are
taken out; each launch keeps the name of its layer, in the node's `custom` metadata.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx

from pqk.core.graph import StructuredCode, quiet_export, same_graph
from pqk.data.structures import Outputs, restructured, tensors
from pqk.deploy.torch_archive import MODEL, SAMPLES, checked_archive, why_not_plain
from pqk.errors import InputError
from pqk.files import write_whole
from pqk.task.axes import Axes, free_axes

NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""the date of every record: the same student is the same file"""


def emit_torch(fused: fx.GraphModule, example: tuple[Tensor, ...], path: Path, axes: Axes | None = None) -> None:
    """Write a fused student to `path`, whole or not at all.

    `example` are inputs whose first axis is the batch (at least 2), which stays free, as does what `axes` names. Raises
    `InputError` where the module cannot be exported, and for a full disk.
    """
    example = tuple(t.clone() for t in example)  # one tensor twice would be one input to the exporter
    free = free_axes(fused, example, axes)
    fused = _plain_outputs(fused)
    try:
        with quiet_export(), torch.no_grad():
            exported = torch.export.export(fused, example, dynamic_shapes=free, strict=False)
    except Exception as error:  # whatever the tracer raised
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"emit_torch: the fused student cannot be exported: {reason}") from error
    _annotate(exported.graph, fused.graph)
    buffer = io.BytesIO()
    with quiet_export():
        torch.export.save(exported, buffer)
    write_whole(Path(path), lambda partial: _write_records(partial, buffer))


def _plain_outputs(fused: fx.GraphModule) -> fx.GraphModule:
    """`fused` with the plain containers of its graph, as a reader of the file need not have the model's."""
    return same_graph(fused) if isinstance(fused.graph._codegen, StructuredCode) else fused


def load_student(path: Path | str, device: str | torch.device = "cpu") -> fx.GraphModule:
    """The fused student in a `student.pt2`: a module that takes a batch of any size, in eval mode.

    On a CPU the operators run their reference bodies, on a CUDA device the Triton kernels. Raises `InputError` for a
    file that is missing, damaged, or holds anything but JSON and tensors; nothing in it is ever unpickled or evaluated.
    """
    import pqk.kernels  # noqa: F401 (the operators that the file calls)

    archive = checked_archive(Path(path))
    try:
        with quiet_export():
            module = torch.export.load(archive).module(check_guards=False)
    except Exception as error:  # damaged JSON, another torch
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} cannot be loaded by torch {torch.__version__}: {reason}") from error
    assert isinstance(module, fx.GraphModule)
    return module.to(device)


def load_like(path: Path | str, like: Outputs) -> Callable[..., Outputs]:
    """The student in a `student.pt2` as a function whose outputs have the structure of `like`, the model's outputs."""
    student = load_student(path)
    return lambda *inputs: restructured(like, iter(tensors(student(*inputs))))


def _write_records(path: Path, saved: io.BytesIO) -> None:
    with zipfile.ZipFile(saved) as source:
        program = json.loads(source.read(next(n for n in source.namelist() if n.endswith(f"/{MODEL}"))))
    reason = next(why_not_plain(program), None)
    if reason is not None:
        raise InputError(f"emit_torch: the fused student holds {reason}, which no student.pt2 may")
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for info in source.infolist():
            record = info.filename.partition("/")[2]
            content = b"" if record == SAMPLES else source.read(info)
            out.writestr(zipfile.ZipInfo(f"student/{record}", EPOCH), content)


def _annotate(exported: fx.Graph, fused: fx.Graph) -> None:
    """Drop the exporter's notes, and give each operator of pqk its layer's name: both graphs have them in order."""
    for node in exported.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    sides = [[n for n in g.nodes if n.op == "call_function" and "pqk" in str(n.target)] for g in (exported, fused)]
    for node, original in zip(*sides, strict=True):
        node.meta["custom"] = {"layer": original.meta["layer"]}
