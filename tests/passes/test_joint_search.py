"""The PQK pass: its laws, what is carried over when it ends, resume, and the way to ONNX."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from evaluations import TABLE
from torch import Tensor, fx, nn

from pqk import Recipe, compress
from pqk.core.costs import count_macs, count_parameters
from pqk.core.decisions import Journal
from pqk.core.pipeline import rebuild
from pqk.core.program import Program, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch
from pqk.errors import InputError
from pqk.models.resnet import resnet
from pqk.passes import REWRITES, JointSearch
from pqk.passes.joint import joint_search as module_of_the_pass
from pqk.passes.joint.joint_search import MutualPhase, PruningRounds, SlimPhase
from pqk.passes.joint.slimmable import Mask
from pqk.quant.fake_quant import WeightFakeQuant, quantizers, set_mode
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Objective, Training, fit

pytestmark = pytest.mark.slow


class Plain(nn.Module):
    """Biases before batch norms, a depthwise layer, no batch norm, and one that follows no layer: [B, 3, 8, 8] -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.before = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(16, 24, 1), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.before(self.depthwise(self.first(x))))
        return self.head(self.hidden(x.mean((2, 3))))


def data(count: int) -> ArrayData:
    g = torch.Generator().manual_seed(count)
    patterns = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 4
    return ArrayData(patterns[labels] + 0.7 * torch.randn(count, 3, 8, 8, generator=g), labels, 32)


TASK = Task(data(192), data(64), validation=data(96))
SOME = next(data(64).batches()).inputs


class Labels(Objective):
    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        return TASK.loss(student(*batch.inputs), batch.targets)


@functools.cache
def network(name: str) -> nn.Module:
    """A trained network, some of whose batch norms have negative scales."""
    torch.manual_seed(0)
    model = resnet((1, 1), width=16, classes=4) if name == "resnet" else Plain()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            with torch.no_grad():
                module.weight[::3] *= -1
    fit(RunContext(), model, data(192), Labels(), Training(epochs=4, learning_rate=0.02, clip=1.0))
    return model.eval().requires_grad_(False)


def program(name: str, folder: Path | None = None) -> Program:
    teacher = copy.deepcopy(network(name))
    student = copy.deepcopy(teacher).requires_grad_(True)
    journal = Journal(None if folder is None else folder / "journal.jsonl")
    run = RunContext(1, folder, journal).enter("00-pqk")
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), run)


CONFIG = JointSearch(epochs=2, rounds=2, macs_ratio=2.0, multiple=4, samples=64)


@functools.cache
def narrowed(name: str) -> PruningRounds:
    """Phase 1 is over; the full width has begun with what the slim one learned. Not to be changed: copy it."""
    rounds = PruningRounds(CONFIG, program(name), TASK)
    fit(RunContext(), rounds.widths.graph, data(192), SlimPhase(rounds), CONFIG.training_of(0.5))
    rounds.widths.widen()
    return rounds


def fresh(name: str) -> PruningRounds:
    return copy.deepcopy(narrowed(name))


def answers(rounds: PruningRounds, width: Any) -> Tensor:
    rounds.widths.show(width)
    with torch.no_grad():
        return rounds.widths.graph.eval()(*SOME)


def gone(rounds: PruningRounds) -> list[tuple[Tensor, int, list[int]]]:
    """(weight, axis, indices) of all weights that go with pruned channels."""
    weights, graph = [], rounds.widths.graph
    for path, layer in rounds.module.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        weight = graph.get_parameter(f"{path}.weight")
        kept = rounds.kept(path, CONFIG.rounds)
        if kept is not None:
            weights.append((weight, 0, sorted(set(range(len(weight))) - set(kept))))
    assert weights
    return weights


names = pytest.mark.parametrize("name", ["resnet", "plain"])


@names
def test_the_masked_student_is_the_sliced_one(name: str) -> None:
    """In float as far as floats go; quantized, the weights are the same integers and the outputs a rounding away."""
    rounds = fresh(name)
    assert any(not bool(m.kept.all()) for m in rounds.widths.masks.values())
    masked = answers(rounds, "slim")
    done = CONFIG.finish(rounds, TASK, ())
    student = done.student.eval()
    with torch.no_grad():
        sliced = student(*SOME)
    # A bias's rounding moves few activations by a step.
    assert float((masked - sliced).abs().mean()) < 0.02 * float(masked.std())
    same, total = 0, 0
    slim, learned = rounds.student(CONFIG.rounds), rounds.widths.quantizers()
    for path, layer in slim.named_modules():
        quantizer = quantizers(student).get(f"quantizers.{path.replace('.', '_')}_weight")
        if quantizer is None or not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        old, kept = learned[f"quantizers.{path.replace('.', '_')}_weight"], rounds.kept(path, CONFIG.rounds)
        assert isinstance(quantizer, WeightFakeQuant)
        norm = slim.get_submodule(rounds.widths.norms[path]) if path in rounds.widths.norms else None
        sign = torch.ones(len(layer.weight)) if norm is None else norm.weight.sign()  # type: ignore[union-attr,operator]
        steps = old.qparams().scale if kept is None else old.qparams().scale[kept]
        wide = [-1] + [1] * (layer.weight.dim() - 1)
        limit = quantizer.grid.qmax
        before = (layer.weight / steps.view(wide)).round().clamp(-limit, limit) * sign.view(wide)
        after = (student.get_parameter(f"{path}.weight") / quantizer.scale.view(wide)).round().clamp(-limit, limit)
        same, total = same + int((before == after).sum()), total + after.numel()
        assert norm is None or bool((sign < 0).any())
    assert total > 500 and same >= 0.999 * total
    for model in (rounds.widths.graph, student):
        set_mode(model, "off")
    with torch.no_grad():
        torch.testing.assert_close(answers(rounds, "slim"), student(*SOME), rtol=1e-4, atol=1e-4)


@names
def test_pruned_weights_are_the_teachers_alone(name: str) -> None:
    """Perturbed, they change the teacher and not a bit of the student."""
    rounds = fresh(name)
    before = {width: answers(rounds, width) for width in ("full", "slim")}
    with torch.no_grad():
        for weight, axis, indices in gone(rounds):
            weight.index_fill_(axis, torch.tensor(indices), 3.0)
        for path, mask in rounds.widths.masks.items():  # and those that read pruned channels
            for reader, axis in readers(rounds, path):
                reader.index_fill_(axis, (~mask.kept).nonzero().flatten(), 3.0)
    assert torch.equal(answers(rounds, "slim"), before["slim"])
    assert not torch.allclose(answers(rounds, "full"), before["full"])


def readers(rounds: PruningRounds, path: str) -> list[tuple[Tensor, int]]:
    """The weights whose inputs are the channels of `path`, in the networks of this file."""
    after = {"layer1.0.bn1": "layer1.0.conv2", "layer2.0.bn1": "layer2.0.conv2", "hidden.1": "head",
             "point.0": "hidden.0", "depthwise.1": "point.0"}  # fmt: skip
    return [(rounds.widths.graph.get_parameter(f"{after[path]}.weight"), 1)] if path in after else []


@names
def test_the_students_loss_gives_pruned_weights_no_gradient(name: str) -> None:
    """Nor the teacher anything: its norms and ranges hear of L_t alone."""
    rounds = fresh(name)
    widths, batch = rounds.widths, next(data(32).batches())
    objective = MutualPhase(CONFIG, TASK, widths, ())
    for which in (1, 0):
        widths.graph.train().zero_grad()
        objective.losses(widths.graph, batch)[which].mean().backward()
        grads = [w.grad.index_select(a, torch.tensor(i)) for w, a, i in gone(rounds) if w.grad is not None]
        grads += [w.grad[:, ~widths.masks[p].kept] for p in widths.masks for w, _ in readers(rounds, p)]  # type: ignore[index]
        assert len(grads) > 3 and [bool((g != 0).any()) for g in grads if g.numel()].count(True) == (
            0 if which else sum(bool(g.numel()) for g in grads)
        )
        own = {n: p for n, p in widths.graph.named_parameters() if ".full" in n and p.requires_grad}
        assert own and any(p.grad is not None for p in own.values()) == (which == 0)


def test_statistics_of_the_two_widths_are_apart() -> None:
    rounds = fresh("resnet")
    widths, batch = rounds.widths, next(data(32).batches())
    state = {k: v.clone() for k, v in widths.graph.state_dict().items()}
    widths.show("full")
    widths.graph.train()(*batch.inputs)
    moved = {k for k, v in widths.graph.state_dict().items() if not torch.equal(v, state[k])}
    assert moved and all(".full." in k and ("running" in k or "tracked" in k) for k in moved)


def test_rounds_only_take_away() -> None:
    rounds = fresh("resnet")
    costs = [count_macs(rounds.student(i), TASK.example) for i in range(CONFIG.rounds + 1)]
    assert costs[0] > costs[1] > costs[2] and 2 * costs[2] <= costs[0] and 1.41 * costs[1] <= costs[0]
    for path in rounds.widths.masks:
        kept_by_round = [rounds.kept(path, i) for i in range(CONFIG.rounds + 1)]
        sets = [set(range(1000)) if kept is None else set(kept) for kept in kept_by_round]
        assert sets[2] <= sets[1] <= sets[0]
    rounds.mask(1)  # a training that goes back to an earlier state shows its mask
    path, mask = next((p, m) for p, m in rounds.widths.masks.items() if rounds.kept(p, 1) != rounds.kept(p, 2))
    kept = rounds.kept(path, 1)
    assert mask.kept.nonzero().flatten().tolist() == (kept if kept is not None else [*range(len(mask.kept))])


def test_a_norm_that_follows_no_layer_stands_still_and_says_so() -> None:
    rounds = fresh("plain")
    reasons = {d.layer: d.reason for d in rounds.program.declined if d.pass_name == "pqk"}
    assert any("before" in layer for layer in reasons) and all("not trained" in reason for reason in reasons.values())
    trained = rounds.widths.trained(rounds.module)
    assert torch.equal(trained.before[1].weight, rounds.module.before[1].weight)  # type: ignore[union-attr,index]
    assert not torch.equal(trained.first[1].weight, rounds.module.first[1].weight)  # type: ignore[union-attr,index]


def test_what_is_infinite_is_masked_too() -> None:
    mask = Mask(3, 1)
    mask.kept[1] = False
    x = torch.tensor([[1.0, float("inf"), 3.0]], requires_grad=True)
    y = mask(x)
    y.sum().backward()
    assert y.tolist() == [[1, 0, 3]] and x.grad is not None and x.grad.tolist() == [[1, 0, 1]]
    mask.width = "full"
    assert mask(x) is x


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize(
    ("phase", "at"),
    [
        pytest.param(SlimPhase, 0.3, marks=pytest.mark.full),
        (SlimPhase, 0.7),
        pytest.param(MutualPhase, 0.5, marks=pytest.mark.full),
    ],
)
def test_a_killed_run_ends_in_the_same_student(
    phase: type, at: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda f: None)
    config = JointSearch(epochs=2, rounds=2, macs_ratio=2.0, multiple=4, samples=64, checkpoint_seconds=1e-9)
    whole = config.apply(program("resnet"), TASK)
    begin = phase.begin  # type: ignore[attr-defined]

    def kill(self: Any, progress: float) -> None:
        if progress >= at:
            raise Killed
        begin(self, progress)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(phase, "begin", kill)
        config.apply(program("resnet", tmp_path), TASK)
    rest = config.apply(program("resnet", tmp_path), TASK)
    one, other = whole.student.state_dict(), rest.student.state_dict()
    assert one.keys() == other.keys() and not [k for k in one if not torch.equal(one[k], other[k])]
    assert rest.plan == whole.plan and rest.details["losses"] == whole.details["losses"]


def test_it_learns_and_the_plan_rebuilds_it() -> None:
    done = JointSearch(epochs=6, learning_rate=0.02, rounds=2, macs_ratio=2.0, multiple=4, samples=64).apply(
        program("resnet"), TASK
    )
    assert [r.function for r in done.plan] == ["cut_channels", "cut_channels", "capture", "insert_fake_quant"]
    losses = done.details["losses"]
    assert len(losses) == 6 and losses[2] < losses[0] and losses[5] < losses[3] and done.details["steps"] == 36
    costs = done.details["before"]["macs"], done.details["after"]["macs"]
    assert done.details["budget"]["reached"] >= 2 and costs[0] >= 2 * costs[1]
    assert TASK.score(done.student.eval(), TASK.evaluation) > 0.9
    assert isinstance(done.student, fx.GraphModule)
    again = rebuild(done.teacher, TASK.example, done.plan, REWRITES, done.student.state_dict())
    assert torch.equal(again(*TASK.example), done.student(*TASK.example))
    assert all(q.scale.requires_grad for q in quantizers(done.student).values())


RECIPE = """
[target]
name = "x86-avx2"
[[pass]]
name = "pqk"
epochs = 4
learning_rate = 0.02
rounds = 2
parameters_ratio = 2.0
multiple = 4
samples = 64
[[pass]]
name = "convert"
"""


@pytest.mark.full
def test_the_artifact_has_the_sliced_size(tmp_path: Path) -> None:
    """Through `compress`, whose parity check would raise; nothing of the masks or the full width is in the file."""
    teacher = network("resnet")
    artifact = compress(teacher, TASK, Recipe.loads(RECIPE), out=tmp_path / "out", evaluation=TABLE)
    report = artifact.report
    assert report.parity.passed and report.metric is not None and report.metric.student > 0.8
    assert count_parameters(teacher) >= 2 * report.parameters
    weights = {t.name: t.dims for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    widths = next(r.details["widths"] for r in report.passes if r.pass_name == "pqk")
    assert widths and not any("mask" in name or ".full" in name for name in weights)
    assert sum(torch.Size(dims).numel() for dims in weights.values()) < 0.55 * count_parameters(teacher)
    again = artifact.rebuild(teacher)
    with torch.no_grad():
        want = torch.from_numpy(artifact.run(TASK.example[0]))
        torch.testing.assert_close(again(*TASK.example), want, rtol=0, atol=0.05 * float(want.std()))


def test_the_name_of_older_scripts_is_the_same_pass() -> None:
    from pqk.passes import PQK

    assert PQK is JointSearch and PQK.name == "pqk"
    (joint, _) = Recipe.loads(RECIPE).passes
    assert isinstance(joint, PQK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "pqk: exactly one of macs_ratio"),
        ({"macs_ratio": 2.0, "size_ratio": 3.0}, "macs_ratio and size_ratio are given"),
        ({"macs_ratio": 2.0, "floor": 1.5}, "pqk: floor = 1.5"),
        ({"macs_ratio": 2.0, "phase1": 1.0}, "less than 1"),
        ({"macs_ratio": 2.0, "ce_weight": 0, "kd_weight": 0}, "both 0"),
    ],
)
def test_configurations_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        JointSearch(**fields)


def test_what_cannot_be_done_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_the_pass, "fit", None)
    with pytest.raises(InputError, match="cannot be met"):
        JointSearch(macs_ratio=500.0, multiple=4, samples=64).apply(program("resnet"), TASK)
    with pytest.raises(InputError, match="bfloat16 is coarser"):
        JointSearch(macs_ratio=2.0, precision="bf16").apply(program("resnet"), TASK)
    held = TASK.validation
    with pytest.raises(InputError, match="no training data"):
        JointSearch(macs_ratio=2.0).apply(program("resnet"), Task(None, held, validation=held))
