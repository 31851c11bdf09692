"""What is deployed computes what the trained graph computes, also at sizes of free axes other than the example's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.onnxruntime_session import OnnxModel
from pqk.core.trial import Trial
from pqk.data.structures import tensors
from pqk.errors import Reason, first_line
from pqk.report.schema import LayerParity
from pqk.task.axes import BATCH, Sizes, resized, sizes_of
from pqk.task.task import Task
from pqk.verify.fused_parity import check_launches
from pqk.verify.no_samples import takes_no_samples
from pqk.verify.parity import check_layers_of
from pqk.verify.verdict import divergence_of

SUSPICIOUS = 0.05
"""of the outputs' RMS: from there on every layer is looked at, as roundings may add up to more"""


def why_not_at_other_sizes(
    teacher: nn.Module,
    graph: fx.GraphModule,
    task: Task,
    *,
    onnx: Path | None = None,
    fused: fx.GraphModule | None = None,
    optimized: bool = True,
) -> Reason | None:
    """Why what is deployed of the INT8 `graph` is wrong at two other sizes of a free axis; None where it is not.

    `onnx` and `fused` are its file and its launches. The graph has the teacher's shapes there, and the forms of it the
    graph's values: where outputs differ by more than roundings may, the layer that breaks the contract is named.
    """
    forms: list[tuple[str, Callable[..., Any], Callable[[tuple[Tensor, ...]], list[LayerParity]]]] = []
    if onnx is not None:
        file = _opened(graph, onnx, task, optimized)
        forms.append((onnx.name, file, lambda inputs: check_layers_of(graph, onnx, task, inputs, optimized=optimized)))
    if fused is not None:
        forms.append(("the fused student", fused, lambda inputs: check_launches(graph, fused, inputs)))
    for form, deployed, layers_of in forms:
        trial = Trial(graph, deployed, task.example, task.axes, SUSPICIOUS, slack=4.0)
        for sizes in other_sizes(graph.meta["sizes"], sizes_of(task.example, task.axes)):
            result, inputs = trial.run(sizes), resized(task.example, task.axes, sizes)
            reason = result.words if result.outcome in ("graph", "shape") else None
            if result.outcome == "value":
                reason = _why_not_by_layers(layers_of, inputs)
                reason = reason and f"{result.words}; {reason}"
            if reason is not None:
                return f"{form} is wrong at {_said(sizes)}: {reason}"
            if (reason := _why_not_shaped(teacher, graph, inputs)) is not None:
                return f"the student is wrong at {_said(sizes)}: {reason}"
    return None


def _why_not_by_layers(
    layers_of: Callable[[tuple[Tensor, ...]], list[LayerParity]], inputs: tuple[Tensor, ...]
) -> Reason | None:
    """The first layer that breaks the contract, or that cannot be held to it; None where roundings have added up."""
    try:
        broken = next((layer for layer in layers_of(inputs) if not layer.passed), None)
    except Exception as error:  # layers of other shapes are not even compared
        return f"its layers are not the graph's ({first_line(error, 120)})"
    return None if broken is None else divergence_of(broken)


def why_not_the_teacher(teacher: nn.Module, path: Path, task: Task, sizes: Mapping[str, Sizes]) -> Reason | None:
    """Why the teacher's float file is wrong at two other sizes of a free axis; None where it is not."""
    trial = Trial(teacher, _opened(teacher, path, task, optimized=False), task.example, task.axes)
    for at in other_sizes(sizes, sizes_of(task.example, task.axes)):
        result = trial.run(at)
        if result.outcome not in ("same", "model"):
            return f"{path.name} is wrong at {_said(at)}: {result.words}"
    return None


@torch.no_grad()
def answers_none(graph: nn.Module, onnx: Path, task: Task) -> bool:
    """Whether the file answers a batch of none by none, as the graph does."""
    inputs = resized(task.example, task.axes, {BATCH: 0})
    described = {
        name: (list(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in zip(task.input_names, inputs, strict=True)
    }
    try:
        answers = tensors(graph(*inputs))
    except Exception:  # such as a range that is taken at run time: none has none
        return False
    return takes_no_samples(onnx, described, [list(t.shape) for t in answers])


def other_sizes(sizes: Mapping[str, Sizes], example: Mapping[str, int]) -> list[dict[str, int]]:
    """Two other sizes of every free axis, one step more and about the double, or less where there is a limit.

    Several lengths are also doubled together, as a model may take them in one proportion only.
    """
    chosen: list[dict[str, int]] = []
    for name, allowed in sizes.items():
        size, step = example[name], allowed.step
        candidates = [size + step, size + step * -(-size // step), size - step, size - 2 * step]
        fitting = dict.fromkeys(n for n in candidates if n > 0 and n in allowed)
        group = [name, *(other for other in sizes if sizes[other].equals == name)]
        chosen += [dict.fromkeys(group, n) for n in list(fitting)[:2] if allowed.equals is None]
    together = {name: 2 * size for name, size in example.items() if name != BATCH}
    if len(together) > 1 and all(n in sizes[name] for name, n in together.items()):
        chosen.append(together)
    return chosen


def _said(sizes: Mapping[str, int]) -> str:
    return " and ".join(f"{name} {size}" for name, size in sizes.items())


def _opened(module: nn.Module, path: Path, task: Task, optimized: bool) -> OnnxModel:
    with torch.no_grad():
        return OnnxModel(path, module(*task.example), optimized=optimized)


@torch.no_grad()
def _why_not_shaped(teacher: nn.Module, graph: nn.Module, inputs: tuple[Tensor, ...]) -> Reason | None:
    try:
        want = [tuple(t.shape) for t in tensors(teacher(*inputs))]
    except Exception:  # the teacher does not take this size either
        return None
    try:
        got = [tuple(t.shape) for t in tensors(graph(*inputs))]
    except Exception as error:
        return f"it fails there ({first_line(error, 120)}), and the teacher does not"
    return None if want == got else f"its outputs are {got} and the teacher's {want}"
