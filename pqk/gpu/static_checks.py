"""What can be proven of the GPU kernels on a machine without a GPU: their machine code and their traffic.

For every launch of a student, or of the cases that the kernels are tested on, and for every architecture: the launch
that would run there is planned, compiled (`pqk.gpu.codegen`), traced (`pqk.gpu.traffic`) and set against the peaks of
the GPU (`pqk.gpu.roofline`). That the kernels compute the right numbers is the kernels' own
test, in Triton's interpreter.

Planning and tracing need Triton's interpreter, compiling needs the opposite, so either has a process of its own;
`python -m pqk.gpu_proof` is the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pqk.core.progress import Observer, Silent
from pqk.deploy.artifact import Artifact
from pqk.errors import InputError, PqkError
from pqk.gpu.codegen import Code, CompileJob, answer, compile_all, job, worker
from pqk.gpu.roofline import ARCHES, arch_named, least_time
from pqk.gpu.traffic import Traffic, trace, why_not_traced
from pqk.kernels import KERNELS, on_cuda
from pqk.kernels.common.gpu import planning_for
from pqk.kernels.common.launch import Launch, collecting
from pqk.kernels.common.triton import TRITON_MISSING
from pqk.passes.fuse.fuse import LaunchedOp, launches
from pqk.target.machine import installed

MOST_TRAFFIC = 1.1
"""times a layer's inputs, weights and outputs: the bar"""


@dataclass(frozen=True)
class Planned:
    """One operator of a network, or one case of a kernel, with its launches as planned for each architecture."""

    layers: tuple[str, ...]
    """all that launch the same"""
    op: str
    plans: Mapping[str, tuple[Launch, ...]]
    """by architecture; none where the operator is not one of our kernels"""

    @property
    def key(self) -> str:
        """The same for operators whose launches are alike but for their tensors' values."""
        return json.dumps([self.op, [[name, [_looks(r) for r in runs]] for name, runs in self.plans.items()]])


def _looks(run: Launch) -> Any:
    arguments = [
        [n, [list(v.shape), v.stride(), str(v.dtype)] if isinstance(v, Tensor) else v] for n, v in run.args.items()
    ]
    return [run.name, run.grid, run.num_warps, run.num_stages, arguments, sorted(run.constexprs.items())]


# Planning and tracing, where Triton is interpreted


def of_cases(arches: Sequence[str]) -> list[Planned]:
    """Every case of every kernel."""
    rows = []
    for module in KERNELS:
        stem = module.__name__.rpartition(".")[2]
        for i, case in enumerate(module.CASES):
            plans = {}
            for name in arches:
                with _planning(name):
                    plans[name] = (module.specialize(case, "cpu"),)
            rows.append(Planned((f"case {i}",), stem, plans))
    return rows


def of_student(called: Sequence[LaunchedOp], arches: Sequence[str]) -> list[Planned]:
    """What the operators of a fused student, as they were called, launch on each architecture; those alike once."""
    rows: dict[str, Planned] = {}
    for each in called:
        each_planned = Planned((each.layer,), each.op, {name: planned(each, name) for name in arches})
        equal = rows.get(each_planned.key)
        rows[each_planned.key] = each_planned if equal is None else replace(equal, layers=(*equal.layers, each.layer))
    return list(rows.values())


def planned(called: LaunchedOp, arch: str) -> tuple[Launch, ...]:
    """The launches of an operator on a GPU, from CPU tensors; none where it is not one of ours.

    It runs what torch would run on a CUDA device, with launches collected in place of done.
    """
    kernel = on_cuda(called.op)
    if kernel is None:
        return ()
    with _planning(arch), collecting() as collected, torch.no_grad():
        kernel(*called.arguments.values())
    return tuple(collected)


def _planning(arch: str) -> Any:
    return planning_for(arch_named(arch).planned)


def _trace_all(request: dict[str, Any]) -> Iterator[Any]:
    """The worker: first how many rows there are, then each with its jobs and its traffic; or a reason, in words."""
    arches = request["arches"]
    if request["folder"] is None:
        rows = of_cases(arches)
    else:
        artifact = Artifact.load(request["folder"])
        inputs = tuple(torch.from_numpy(x) for x in artifact.example(request["batch"]).values())
        rows = of_student(launches(artifact.student(), inputs), arches)
    yield len(rows)
    for row in rows:
        yield _traced(row)


def _traced(row: Planned) -> dict[str, Any]:
    traffic: dict[str, Any] = {}
    traces: dict[str, Any] = {}
    for name, runs in row.plans.items():
        key = json.dumps([_looks(r) for r in runs])
        if key not in traces:
            reason = why_not_traced(runs) if runs else f"{row.op} is not a kernel of pqk"
            traces[key] = reason if reason is not None else asdict(trace(runs))
        traffic[name] = traces[key]
    jobs = {name: [asdict(job(r, name)) for r in runs] for name, runs in row.plans.items()}
    grids = {name: [list(r.grid) for r in runs] for name, runs in row.plans.items()}
    return {"layers": row.layers, "op": row.op, "jobs": jobs, "grids": grids, "traffic": traffic}


# The proof


def check_launches_statically(
    folder: Path | None,
    arches: Sequence[str],
    *,
    batch: int = 1,
    workers: int | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Everything that `pqk kernels` says, as JSON, of an artifact's student or (`folder` None) of the kernels' cases.

    `arches` are names of `ARCHES`, `batch` the size that the student is planned for. `problems` are the bars missed.
    Raises `InputError` where there is no Triton, no such architecture, or no `student.pt2`.
    """
    known = [arch_named(name) for name in arches] or list(ARCHES)
    if TRITON_MISSING is not None:
        raise InputError(f"kernels: {TRITON_MISSING}")
    if folder is not None:
        Artifact.load(folder).student()  # what is wrong with it is said here, not in the other process
    observer = observer or Silent()
    rows = _rows(
        {"folder": None if folder is None else str(folder), "arches": [a.name for a in known], "batch": batch}, observer
    )
    jobs = [CompileJob(**each) for row in rows for of_arch in row["jobs"].values() for each in of_arch]
    total = len({each.key for each in jobs})
    with observer.task("compiling", total) as advance:
        codes = compile_all(jobs, workers or os.cpu_count() or 1, lambda n: advance(n, ""))
    found = dict(zip([each.key for each in jobs], codes, strict=True))
    layers = [_layer(row, found) for row in rows]
    return {
        "artifact": None if folder is None else str(folder),
        "batch": None if folder is None else batch,
        "triton": installed("triton"),
        "predictions_assume": [a.document() for a in known],
        "layers": layers,
        "problems": [p for layer in layers for p in problems(layer)],
    }


def _rows(request: dict[str, Any], observer: Observer) -> list[dict[str, Any]]:
    """The answers of the process that plans and traces."""
    with worker("pqk.gpu.static_checks", request, interpreted=True) as (lines, died):
        first = next(iter(lines), None)
        if first is None:
            raise PqkError(f"no launch was planned: {died()}")
        rows: list[dict[str, Any]] = []
        with observer.task("tracing", json.loads(first)) as advance:
            for line in lines:
                rows.append(json.loads(line))
                advance(1, rows[-1]["layers"][0])
        if len(rows) != json.loads(first):
            raise PqkError(f"{len(rows)} of {json.loads(first)} layers were traced: {died()}")
    return rows


def _layer(row: dict[str, Any], results: Mapping[str, Code | str]) -> dict[str, Any]:
    """One entry of the document: an operator, and on each architecture its code, traffic and prediction."""
    on = {}
    for name, jobs in row["jobs"].items():
        arch, traced = arch_named(name), row["traffic"][name]
        traffic = Traffic(**traced) if isinstance(traced, dict) else None
        codes = []
        for each, grid in zip(jobs, row["grids"][name], strict=True):
            result = results[CompileJob(**each).key]
            code = result if isinstance(result, Code) else None
            codes.append(
                {
                    "kernel": each["kernel"].partition(":")[2],
                    "grid": grid,
                    "warps": each["num_warps"],
                    "reason": None if code else result,
                    "shared_limit": arch.shared,
                    "integer": code.integer if code else [],
                    **(asdict(code) if code else {}),
                }
            )
        predicted = traffic and least_time(arch, traffic.moved, traffic.int8_macs, traffic.float_macs, traffic.programs)
        on[name] = {
            "launches": codes,
            "traffic": {**asdict(traffic), "moved": traffic.moved, "ratio": traffic.ratio} if traffic else None,
            "traffic_reason": None if traffic else traced,
            "predicted": asdict(predicted) if predicted else None,
        }
    return {"layers": row["layers"], "op": row["op"], "on": on}


def problems(layer: Mapping[str, Any]) -> list[str]:
    """The bars that a layer of the document misses: no spills, no wasted traffic, integer products in matrix units."""
    texts = []
    for name, entry in layer["on"].items():
        where, traffic = f"{layer['op']} ({layer['layers'][0]}), {name}", entry["traffic"]
        for code in entry["launches"]:
            if code["reason"] is not None:
                texts.append(f"{where}: did not compile: {code['reason']}")
                continue
            if code["spills"]:
                texts.append(f"{where}: {code['spills']} spills; choose smaller blocks or more warps")
            if code["shared"] > code["shared_limit"]:
                texts.append(f"{where}: {code['shared']} bytes of shared memory; a program has {code['shared_limit']}")
            elif not code["occupancy"]:
                texts.append(
                    f"{where}: no program fits on a core: {code['registers']} registers, {code['warps']} warps"
                )
        if traffic and traffic["ratio"] > MOST_TRAFFIC:
            texts.append(f"{where}: moves {traffic['ratio']:.2f} times its tensors; at most {MOST_TRAFFIC}")
        if traffic and traffic["stray"]:
            texts.append(f"{where}: {traffic['stray']} accesses outside of its tensors")
        compiled = all(code["reason"] is None for code in entry["launches"])
        if traffic and compiled and traffic["int8_macs"] and not any(code["integer"] for code in entry["launches"]):
            texts.append(f"{where}: integer products without an integer matrix instruction")
    return texts


if __name__ == "__main__":
    answer(_trace_all)
