"""Every kind of network the whole way: prune, distill, capture, quantize, distill, convert, ONNX, the parity contract.

Or it is refused, with the reason, by `pqk check`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import UNTIMED
from torch import Tensor, nn
from zoo import NETWORKS, Network, block

from pqk import Artifact, Recipe, Task, compress
from pqk.check import check
from pqk.core.costs import count_parameters
from pqk.errors import InputError
from pqk.knowledge import CrossEntropy, KLDivergence, LogitMSE
from pqk.passes import Capture, Convert, Distill, Prune, Quantize
from pqk.passes.prune.law import check_groups
from pqk.recipe.recipe import TargetSpec
from pqk.target.target import TARGETS

pytestmark = pytest.mark.slow

SMALLER = 1.2
FLOAT_LAYERS = {
    "transposed": {"1.0"},
    "attention": {"one", "two", "gelu", "add", "add_1"},
    "linear": {"4"},
}
"""what of a network has no integer kernel, or no use for one"""
CUT = {
    "plain": {"0.0", "2.0"}, "residual": {"one.0"}, "dense": {"stem", "norm"}, "separable": {"stem.0", "deep.0"},
    "gated": {"less", "stem.0"}, "silu": {"0.0", "2.0"}, "grouped": {"1.0", "2.0", "3.0"}, "transposed": {"0.0", "1.0"},
    "several": {"a.0", "b.0", "c.0"}, "attention": {"up"}, "linear": {"0", "3"}, "tokens": {"0", "2"},
}  # fmt: skip
"""layers that may lose channels, one of which does"""


def recipe(network: Network) -> Recipe:
    teacher = LogitMSE(weight=0.9) if network.classes == 1 else KLDivergence(weight=0.9)
    terms = (CrossEntropy(weight=0.1), teacher)
    return Recipe(
        passes=(
            Prune(parameters_ratio=SMALLER, multiple=4),
            Distill(epochs=0.5, terms=terms),
            Capture(),
            Quantize(samples=16),
            Distill(epochs=0.5, learning_rate=1e-3, terms=terms),
            Convert(),
        )
    )


QUICK = {"residual", "separable", "several", "attention"}
"""networks of the default run: others are compiled in `make test-full`, and meet ONNX Runtime in test_emit_onnx"""


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in NETWORKS])
def test_a_network_is_compiled_and_keeps_the_contract(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    teacher = network.teacher()
    task = network.task(teacher)
    artifact = compress(teacher, task, recipe(network), "x86-avx2", tmp_path / "out", evaluation=UNTIMED)
    report = artifact.report
    parity = report.parity
    assert parity is not None and parity.passed and parity.samples == 16
    assert all(layer.passed for layer in parity.layers) and parity.first_divergence is None
    assert {layer.name for layer in parity.layers} >= set(task.input_names), "inputs are called as the task calls them"
    pruned = report.passes[0]
    assert pruned.parameters * SMALLER <= count_parameters(teacher)
    assert set(pruned.details["widths"]) & CUT[name] and pruned.details["budget"]["reached"] >= SMALLER
    left = {d.layer for d in report.declined if d.pass_name == "quantize"}
    assert left >= FLOAT_LAYERS.get(name, set()) and (name in FLOAT_LAYERS) == bool(left)
    assert all(d.reason for d in report.declined)
    if report.integer_coverage is not None:  # on another machine than the target it is not known
        assert (report.integer_coverage == 1) == (name != "transposed")
    answers_like_its_student(artifact, teacher, task)


def test_a_student_taught_as_a_graph_has_its_row_too(tmp_path: Path) -> None:
    """Captured first, so that dropout is gone, then distilled in float."""
    network = NETWORKS["linear"]
    teacher = network.teacher()
    task = network.task(teacher)
    _, distill, *rest = recipe(network).passes
    capture, *later = rest
    with_steps = replace(UNTIMED, steps_between=True)
    taught = Recipe(passes=(capture, distill, *later))
    artifact = compress(teacher, task, taught, "x86-avx2", tmp_path / "out", evaluation=with_steps)
    rows = {row.variant: row for row in artifact.report.attribution}
    assert rows["pruned_distilled"].metric is not None and rows["pruned_distilled"].macs == rows["student"].macs
    assert rows["pruned"].metric is None and "before it quantizes" in rows["pruned"].reasons["metric"]


def answers_like_its_student(artifact: Artifact, teacher: nn.Module, task: Task) -> None:
    """The file says what the rebuilt INT8 graph says, in the teacher's structure."""
    with torch.no_grad():
        want: Any = artifact.rebuild(teacher)(*task.example)
        like: Any = teacher(*task.example)
    got = artifact.run(*task.example)
    assert type(want) is type(like)
    names = [o["name"] for o in artifact.manifest["outputs"]]
    if isinstance(like, dict):
        assert names == list(like) == list(want)
    parts = list(want.values()) if isinstance(want, dict) else [want] if isinstance(want, Tensor) else list(want)
    assert len(parts) == len(names)
    for key, part in zip(names, parts, strict=True):
        ours, theirs = part.numpy(), got[key] if isinstance(got, dict) else got
        assert ours.shape == theirs.shape
        close = np.isclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert close.mean() > 0.9, f"{key}: more than a few values fell on the other side of a tie"


class Padded(nn.Module):
    """Nothing in it can be cut: its one width is tied to the output by a shortcut that pads channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = block(3, 8), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(y.mean((2, 3)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = block(3, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(x if x.sum() > 0 else -x)


REFUSED = {
    "nothing to cut": (Padded, r"pass 1 prune: parameters_ratio = 1\.2 cannot be met: no channel group can be cut"),
    "a branch on values": (Branching, r"pass 3 capture: torch.export cannot trace Branching.*test_zoo.py:\d+: 'return"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused_by_check(name: str) -> None:
    build, problem = REFUSED[name]
    network = Network(build)
    teacher = network.teacher()
    found = check(teacher, network.task(teacher), recipe(network))
    assert len(found.problems) == 1 and re.search(problem, found.problems[0]), found.problems


def test_channels_that_are_padded_on_the_way_are_no_group() -> None:
    """torch-pruning maps them straight through, onto channels that do not exist."""
    network = Network(Padded)
    teacher = network.teacher()
    groups = {g.name: g.reason for g in check_groups(teacher, network.task(teacher).example)}
    assert all(groups.values())
    assert any("has 8 channels and the tracer sees more" in str(r) for r in groups.values()), groups


def test_speed_on_another_machine_is_refused_before_anything_runs(tmp_path: Path) -> None:
    other = next(t.name for t in TARGETS if t.runtime == "onnxruntime" and t.why_not_here())
    network = NETWORKS["tokens"]
    teacher = network.teacher()
    fast = Recipe(passes=(Capture(), Quantize(faster_float=True), Convert()), target=TargetSpec(name=other))
    reason = f"quantize.faster_float times layers, but target {other} is not this machine"
    with pytest.raises(InputError, match=reason):
        compress(teacher, network.task(teacher), fast, out=tmp_path / "out", evaluation=UNTIMED)
    assert not (tmp_path / "out").exists()
    problems = check(teacher, network.task(teacher), fast).problems
    assert any(p.startswith(reason) for p in problems)
