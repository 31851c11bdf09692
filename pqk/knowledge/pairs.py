"""Where to compare: proposes points of two networks by shape, stage and similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pqk.core.program import Example
from pqk.data.structures import tensors, widened
from pqk.errors import InputError
from pqk.knowledge.taps import tap
from pqk.knowledge.terms.feature import channel_axis

ROWS = 4096
"""positions of all samples on which the similarity is computed, at most"""


@dataclass(frozen=True)
class Pair:
    """Two points, and how alike their features are. `point` and `teacher_point` are fields of feature terms."""

    point: str
    teacher_point: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    cka: float
    """linear CKA, 0 to 1"""
    projector_kind: str
    """of a hint there: "identity" where the shapes are equal; where the compiler cut channels, "slice" is better"""


def suggest_pairs(teacher: nn.Module, student: nn.Module, example: Example) -> list[Pair]:
    """One pair for each stage of the student, in the order of its forward pass.

    A stage is a run of features with the same positions (height and width, tokens, or none). Its last feature is the
    student's point; the teacher's is the most similar one of the same positions, by linear CKA. Both models are run in
    eval mode, without gradients, and left as they were; the student may be captured. With few positions, such as
    vectors, the similarity says something only for an example of many more samples than the default two.
    Raises `InputError` where no stages correspond.
    """
    students, teachers = _features(student, example), _features(teacher, example)
    stages = {_positions(f): path for path, f in students.items()}  # the last one of each
    pairs = []
    for positions, point in stages.items():
        alike = {p: cka(students[point], f) for p, f in teachers.items() if _positions(f) == positions}
        if alike:
            # Of equally similar ones the student's own point, then the deepest.
            best = max(reversed(alike), key=lambda p: (round(alike[p], 6), p == point))
            pairs.append(_pair(point, best, students[point], teachers[best], alike[best]))
    if not pairs:
        here, there = sorted({_positions(f) for f in students.values()}), {_positions(f) for f in teachers.values()}
        raise InputError(
            f"suggest_pairs: the student's features have positions {here} and the teacher's {sorted(there)}; none agree"
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
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            outputs, seen = (
                tap(model, [*model.meta.get("points", {})])(*example)
                if isinstance(model, fx.GraphModule)
                else _called(model, example)
            )
    finally:
        model.train(training)
    answers = {id(t) for t in tensors(outputs)}
    names: dict[int, str] = {}
    for path, t in seen.items():
        if 2 <= t.dim() <= 4 and t.is_floating_point() and id(t) not in answers:
            names[id(t)] = min(names.get(id(t), path), path, key=lambda p: p.count("."))
    return {path: widened(seen[path]) for path in names.values()}


def _called(model: nn.Module, example: Example) -> tuple[Any, dict[str, Tensor]]:
    """(outputs, {path: output}) of all submodules that return a tensor."""
    seen: dict[str, Tensor] = {}

    def keeper(path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if path not in seen and isinstance(output, Tensor):
                seen[path] = output

        return keep

    handles = [module.register_forward_hook(keeper(path)) for path, module in model.named_modules() if path]
    try:
        return model(*example), seen
    finally:
        for handle in handles:
            handle.remove()
