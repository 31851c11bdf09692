"""Whether a float network's ONNX file computes what the network computes, and if not, which operator differs.

An exporter may lose an argument or know an operator by another definition than torch's, most often at the edges. The
file of a float network, which no integers excuse, is held against it on inputs that do not hide that: as the task has
them, and with values that are not centred, so that padding counts. Where outputs differ by more than the network's own
rounding, its captured graph is exported with all values as outputs, and the first operator that differs while all
before it agree is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from pqk.copies import copy_of
from pqk.core.graph import is_float
from pqk.core.modes import fused_layers
from pqk.core.onnxruntime_session import of_every_token, session
from pqk.data.structures import Inputs, tensors
from pqk.deploy.onnx_emitter import emit_onnx
from pqk.errors import PqkError, Reason
from pqk.passes.capture.capture import capture
from pqk.task.task import Task

FLOAT_TOLERANCE = 1e-4
"""how far an output may be off, over its largest value; what reorders float32 sums moves it by a hundredth of that"""
ROUNDING = 10
"""or so many times as far as the network's outputs are in float32 from those in float64"""


def why_not_as_torch(module: nn.Module, path: Path, task: Task) -> Reason | None:
    """Why the ONNX file at `path`, made of the float `module` for `task`, is not the module; None where it is.

    `module` is in eval mode. ONNX Runtime runs without its optimizations, so that the file is judged, not the machine.
    """
    for inputs in _inputs(task):
        with torch.no_grad(), fused_layers(False):
            expected = tensors(module(*inputs))
        worst = max(differences(_run(path, inputs), expected), default=0.0)
        if worst > FLOAT_TOLERANCE and worst > ROUNDING * _own_rounding(module, inputs, expected):
            where = _first_difference(module, inputs, task, path.with_name("traced.onnx"))
            return (
                f"the ONNX file of {type(module).__name__} is off by {worst:.2g} of its largest output (allowed "
                f"{FLOAT_TOLERANCE:g}): {where}"
            )
    return None


def differences(got: Sequence[Tensor], expected: Sequence[Tensor]) -> Iterator[float]:
    """For each output the largest difference over the largest finite value; of integers, the share that differs."""
    for ours, theirs in zip(got, expected, strict=True):
        if ours.shape != theirs.shape:
            yield float("inf")
        elif theirs.is_floating_point():
            finite = theirs.isfinite()
            size = max(float(theirs[finite].abs().amax()), 1e-30) if finite.any() else 1.0
            delta = (ours.double() - theirs.double())[finite].abs().nan_to_num(nan=float("inf"))
            same = torch.equal(ours[~finite].nan_to_num(), theirs[~finite].nan_to_num())
            yield (float(delta.amax()) / size if delta.numel() else 0.0) if same else float("inf")
        else:
            yield float((ours != theirs).double().mean()) if theirs.numel() else 0.0


def _inputs(task: Task) -> Iterator[Inputs]:
    """A few of the task's own inputs, and the same with float inputs that are nowhere near zero on average."""
    own = next(task.calibration(4, teacher=True))
    yield own
    generator = torch.Generator().manual_seed(0)
    yield tuple(_uncentred(t, generator) for t in own)


def _uncentred(t: Tensor, generator: torch.Generator) -> Tensor:
    if not t.is_floating_point() or t.numel() < 2 or len(t.unique()) <= 2:  # as masks are
        return t
    spread = float(t.std()) or 1.0
    noise = torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t.dtype)
    return t.mean() + spread * (1 + noise)


def _run(path: Path, inputs: Inputs) -> list[Tensor]:
    run = of_every_token(session(path, optimized=False))
    feeds = {i.name: t.contiguous().numpy() for i, t in zip(run.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in run.run(None, feeds)]


def _own_rounding(module: nn.Module, inputs: Inputs, expected: Sequence[Tensor]) -> float:
    """How far the outputs in float32 are from those in float64; 0 where the network takes no float64."""
    try:
        with torch.no_grad(), fused_layers(False):
            wide = copy_of(module).double()
            exact = tensors(wide(*(t.double() if t.is_floating_point() else t for t in inputs)))
        return max(differences([t.to(e.dtype) for t, e in zip(exact, expected, strict=True)], expected), default=0.0)
    except Exception:  # the user's code, in a type that it may not know
        return 0.0


def _first_difference(module: nn.Module, inputs: Inputs, task: Task, path: Path) -> str:
    """The first operator of the captured graph that the exporter writes differently, in words."""
    try:
        with torch.random.fork_rng(devices=[]):
            student = copy_of(module).requires_grad_(True)
            graph = capture(student, task.example, input_names=task.input_names, axes=task.axes)
        assert isinstance(graph, fx.GraphModule)
        nodes = [n for n in graph.graph.nodes if n.op == "call_function" and is_float(n)]
        graph.graph.output_node().args = (tuple(nodes),)
        graph.recompile()
        names = [f"value_{i}" for i in range(len(nodes))]
        emit_onnx(graph, task.example, path, task.input_names, names, task.axes)
        with torch.no_grad():
            expected = tensors(graph(*inputs))
        for node, worst in zip(nodes, differences(_run(path, inputs), expected), strict=True):
            if worst > FLOAT_TOLERANCE:
                return (
                    f"{node.meta['layer']} ({node.target}) is the first operator that the exporter writes with another "
                    f"result, off by {worst:.2g}, and pqk has no other form of it; replace it in the model"
                )
    except PqkError as error:
        return f"no operator can be named ({error})"
    return "no operator of the captured graph differs, so that it is the exporter's view of the module; simplify it"
