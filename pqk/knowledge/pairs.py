"""Where to compare: proposes points of two networks by shape, stage and similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.calls import version_of, watch
from pqk.core.modes import evaluating
from pqk.core.program import Example
from pqk.data.structures import tensors, widened
from pqk.errors import InputError
from pqk.knowledge.taps import tap
from pqk.knowledge.terms.feature import channel_axis

ROWS = 4096
"""positions of all samples on which the similarity is computed, at most"""


@dataclass(frozen=True)
class Pair:
    """Two points, and how similar their features are. `point` and `teacher_point` are fields of feature terms."""

    point: str
    """module path of the student"""
    teacher_point: str
    """module path of the teacher"""
    student_shape: tuple[int, ...]
    """of the student's feature, the batch first"""
    teacher_shape: tuple[int, ...]
    """of the teacher's feature, the batch first"""
    cka: float
    """linear CKA, 0 to 1"""
    projector_kind: str
    """of a hint there: "identity" where the shapes are equal; where the compiler cut channels, "slice" is better"""


def suggest_pairs(teacher: nn.Module, student: nn.Module, example: Example) -> list[Pair]:
    """Proposes where to compare two networks: one pair for each stage of the student, in the order of its forward pass.

    A stage is a run of features with the same positions (height and width, tokens, or none). Its last feature is the
    student's point; the teacher's is the most similar one of the same positions, by linear CKA (Kornblith et al., ICML
    2019, arXiv:1905.00414). Both models are run in eval mode, without gradients, and left as they were.

    Args:
        teacher: the trained network.
        student: the network that learns; it may be captured.
        example: inputs of both, each [B, …]. With few positions, such as vectors, the similarity says something only
            for many more samples than two.

    Returns:
        The pairs.

    Raises:
        InputError: no stages correspond.
    """
    students, teachers = _features(student, example), _features(teacher, example)
    stages = {_positions(f): path for path, f in students.items()}  # the last one of each
    pairs = []
    for positions, point in stages.items():
        similarity = {p: cka(students[point], f) for p, f in teachers.items() if _positions(f) == positions}
        if similarity:
            # Of equally similar ones the student's own point, then the deepest.
            best = max(reversed(similarity), key=lambda p: (round(similarity[p], 6), p == point))
            pairs.append(_pair(point, best, students[point], teachers[best], similarity[best]))
    if not pairs:
        sides = [sorted({_positions(f) for f in features.values()}) for features in (students, teachers)]
        raise InputError(
            f"suggest_pairs: the student's features have positions {sides[0]} and the teacher's {sides[1]}; none agree"
        )
    return pairs


def _pair(point: str, teacher_point: str, s: Tensor, t: Tensor, similarity: float) -> Pair:
    kind = "identity" if s.shape == t.shape else "conv1x1" if s.dim() == 4 else "linear"
    return Pair(point, teacher_point, tuple(s.shape), tuple(t.shape), similarity, kind)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two features with the same positions (Kornblith et al. 2019, equation 5).

    0 to 1; positions of all samples are its examples. 0 where a feature is constant.
    """
    x, y = (_rows(f) for f in (x, y))
    x, y = (f - f.mean(0) for f in (x, y))
    shared, size = (x.T @ y).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(shared / size) if float(size) > 0 else 0.0


def _rows(feature: Tensor) -> Tensor:
    rows = feature.movedim(channel_axis(feature), -1).flatten(0, -2).double()
    return rows[:: -(-len(rows) // ROWS)]


def _positions(feature: Tensor) -> tuple[int, ...]:
    return tuple(feature.shape[2:] if feature.dim() == 4 else feature.shape[1:-1])


def _features(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Module path -> its first output, in the order of the forward pass; of modules with one output the outermost."""
    with evaluating(model), torch.no_grad():
        outputs, features = (
            _node_outputs(model, example) if isinstance(model, fx.GraphModule) else _module_outputs(model, example)
        )
    model_outputs = {(id(t), version_of(t)) for t in tensors(outputs)}
    names: dict[Identity, str] = {}
    for path, (t, identity) in features.items():
        if 2 <= t.dim() <= 4 and t.is_floating_point() and identity not in model_outputs:
            names[identity] = min(names.get(identity, path), path, key=lambda p: p.count("."))
    return {path: widened(features[path][0]) for path in names.values()}


Identity = tuple[int, int | None]
"""of a value: which tensor held it, and how often that had been written to"""


def _node_outputs(graph: fx.GraphModule, example: Example) -> tuple[Any, dict[str, tuple[Tensor, Identity]]]:
    """(outputs, {path: its output and which value that is}) of all modules that a captured graph remembers."""
    outputs, features = tap(graph, [*graph.meta.get("points", {})])(*example)
    return outputs, {path: (t, (id(t), version_of(t))) for path, t in features.items()}


def _module_outputs(model: nn.Module, example: Example) -> tuple[Any, dict[str, tuple[Tensor, Identity]]]:
    """(outputs, {path: first output and which value that is}) of all submodules that return a tensor."""
    modules = {path: module for path, module in model.named_modules() if path}
    with watch(modules, kept="first") as calls:
        outputs = model(*example)
    features: dict[str, tuple[Tensor, Identity]] = {}
    for path, call in calls.items():
        value, holder = (o[0] if isinstance(o, tuple) else o for o in (call.output.values, call.output.structure))
        if isinstance(value, Tensor):
            features[path] = (value, (id(holder), call.output.versions[0]))
    return outputs, features
