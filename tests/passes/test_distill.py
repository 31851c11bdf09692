"""The distill pass: what it hands to the trainer, and hints after real cuts."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk.core.program import Program, Rewrite, Stage
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.knowledge import CrossEntropy, Hint, KLDivergence, LogitMSE
from pqk.knowledge.taps import tap
from pqk.models.images import CropFlip
from pqk.models.resnet import resnet
from pqk.passes import Capture, Distill, Prune, Quantize
from pqk.passes.distill.keep_best import scorer
from pqk.passes.prune.cuts import kept_channels
from pqk.passes.prune.survivors import surviving_channels
from pqk.quant.fake_quant import quantizers
from pqk.recipe.fit import fit_recipe
from pqk.recipe.recipe import Recipe
from pqk.target.target import Target
from pqk.task.task import Task
from pqk.training.trainer import Training, TrainingLog


def task(count: int = 16) -> Task:
    g = torch.Generator().manual_seed(0)
    whole = ArrayData(
        torch.randn(count, 3, 8, 8, generator=g), torch.arange(count) % 4, 4, augment=CropFlip(count, pad=1), views=2
    )
    held = whole.subset(torch.arange(8), augmented=False)
    return Task(whole, held, validation=held)


def program(teacher: nn.Module, folder: Path | None = None) -> Program:
    teacher = teacher.eval().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Program(teacher, student, Stage.MODULE, Target.named("x86-avx2"), RunContext(1, folder).enter("00-distill"))


def small() -> nn.Module:
    torch.manual_seed(0)
    return resnet((1, 1, 1), width=4, classes=4)


def pruned(steps: int = 1) -> Program:
    return Prune(macs_ratio=1.5, multiple=1, scope="per_layer", steps=steps).apply(program(small()), task())


@pytest.mark.parametrize("steps", [1, 3])
def test_every_point_knows_its_surviving_channels(steps: int) -> None:
    """Layers, blocks, stages: the student's feature, pruned but not trained, is the masked teacher's at those channels.

    By the law of pruning that is what a teacher computes in which every layer puts zero into its pruned channels.
    """
    done = pruned(steps)
    masked, narrowed = copy.deepcopy(done.teacher), set()
    for name, layer in masked.named_modules():
        if (kept := kept_channels(done.plan, name)) is not None:
            narrowed.add(name.partition(".")[0])

            def zero(module: nn.Module, inputs: Any, output: Tensor, kept: list[int] = kept) -> Tensor:
                mask = torch.zeros(output.shape[1]).index_fill(0, torch.tensor(kept), 1.0)
                return output * mask[:, None, None]

            layer.register_forward_hook(zero)
    assert narrowed >= {"layer1", "layer2", "layer3"}
    points = ["bn1", "layer1", "layer1.0", "layer1.0.bn1", "layer1.0.bn2", "layer2", "layer2.0", "layer3"]
    _, want = tap(masked, points)(*task().example)
    _, have = tap(done.student, points)(*task().example)
    for point in points:
        kept = surviving_channels(done, task().example, point)
        assert point == "layer1.0.bn1" or (kept is not None and len(kept) < want[point].shape[1]), point
        kept = range(want[point].shape[1]) if kept is None else kept  # a budget in steps spares the first layer
        torch.testing.assert_close(have[point], want[point][:, kept], msg=point)


def test_a_record_says_what_was_left_out() -> None:
    """13 samples in batches of 4, for a network whose batch norm sees vectors; also of a recovery in steps."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)]
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), *head)
    done = Distill(terms=(CrossEntropy(),), epochs=2).apply(program(teacher), task(13))
    assert (done.details["steps"], done.details["left_out"]) == (8, 2)
    done = Prune(macs_ratio=1.4, multiple=1, steps=2, recovery_epochs=1).apply(program(teacher), task(13))
    assert done.details["left_out"] == 2
    assert "left_out" not in Distill(terms=(CrossEntropy(),), epochs=2).apply(program(teacher), task(14)).details


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(8, 4)
        self.join = Join(self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(x).mean((2, 3)))


class Join(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.left, self.right = a, b

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def test_where_it_cannot_be_told_it_is_refused() -> None:
    done = Prune(macs_ratio=1.3, multiple=1).apply(program(Cat()), task())
    assert surviving_channels(done, task().example, "join") is None
    with pytest.raises(InputError, match="not known which teacher channels the student has"):
        Distill(terms=(Hint(point="join"),)).apply(done, task())
    with pytest.raises(InputError, match='layer "layer1.0.conv1" is gone: pruning removed block "layer1.0"'):
        plan = (Rewrite("drop_block", {"block": "layer1.0"}),)
        surviving_channels(replace(done, plan=plan), task().example, "layer1.0.conv1")


@pytest.mark.parametrize("point", ["layer2", "layer2.0.bn1"])
def test_a_slice_hint_trains_after_a_prune_and_in_a_captured_graph(point: str) -> None:
    """At the start of it, and with the learning rate at nothing, its loss is that of the surviving channels."""
    start = pruned()
    distill = Distill(epochs=1, learning_rate=1e-9, terms=(Hint(point=point),), warmup=0)
    losses = []
    for stage in range(2):
        if stage:
            start = replace(Capture().apply(start, task()), stage=Stage.GRAPH)
        done = distill.apply(
            replace(start, student=copy.deepcopy(start.student) if not stage else start.student), task()
        )
        losses.append(done.details["losses"][0])
        assert done.details["teacher"] == "live: the terms compare features"
    assert losses[0] > 0 and losses[1] > 0
    # batch norm trains on batches at MODULE and is folded in the graph: near, not equal
    assert losses[1] == pytest.approx(losses[0], rel=0.9)


def test_it_trains_every_stage_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    start = program(small(), tmp_path)
    before = {k: v.clone() for k, v in start.teacher.state_dict().items()}
    distill = Distill(epochs=1, learning_rate=0.01)
    done = distill.apply(start, task())
    assert done.details["teacher"] == "cached" and done.details["steps"] == 4 and len(done.details["losses"]) == 1
    done = replace(Capture().apply(done, task()), stage=Stage.GRAPH)
    done = distill.apply(replace(done, run=done.run.enter("02-distill")), task())
    done = replace(Quantize(samples=8).apply(done, task()), stage=Stage.FAKE_QUANT)
    weights = {k: v.clone() for k, v in done.student.state_dict().items()}
    learned = {k: q.scale.requires_grad for k, q in quantizers(done.student).items()}
    done = distill.apply(replace(done, run=done.run.enter("04-distill")), task())
    moved = [k for k, v in done.student.state_dict().items() if not torch.equal(v, weights[k])]
    assert any("scale" in k for k in moved) and any("weight" in k for k in moved)
    assert {k: q.scale.requires_grad for k, q in quantizers(done.student).items()} == learned
    assert all(torch.equal(v, before[k]) for k, v in start.teacher.state_dict().items())
    assert len([*(tmp_path / "cache").glob("*.npy")]) == 1  # of all three


@pytest.mark.slow
def test_scales_stand_still_from_where_they_should() -> None:
    start = program(small())
    start = replace(Capture().apply(start, task()), stage=Stage.GRAPH)
    start = replace(Quantize(samples=8).apply(start, task()), stage=Stage.FAKE_QUANT)

    def scales(freeze_from: float) -> list[Tensor]:
        student = copy.deepcopy(start.student)
        config = Distill(epochs=1, learning_rate=0.01, freeze_from=freeze_from)
        done = config.apply(replace(start, student=student), task())
        return [q.scale.detach() for q in quantizers(done.student).values()]

    before = [q.scale.detach() for q in quantizers(start.student).values()]
    assert all(map(torch.equal, scales(0.0), before))
    assert not all(map(torch.equal, scales(0.5), before))
    assert not all(map(torch.equal, scales(0.5), scales(1.0)))


@pytest.mark.parametrize("quantized", [False, True])
def test_what_is_frozen_stands_still_and_is_free_again(quantized: bool) -> None:
    before = program(small())
    if quantized:
        before = Quantize(samples=8).apply(Capture().apply(before, task()), task())
    old = {n: p.detach().clone() for n, p in before.student.named_parameters()}
    held, free = {n for n in old if n.startswith("layer1.") or n == "linear.bias"}, {"linear.weight", "conv1.weight"}
    steps = sorted({f"{n}.scale" for n in quantizers(before.student)} & set(old))
    assert len(held) > 2 and bool(steps) == quantized
    held, free = held | set(steps[:1]), free | set(steps[1:2])
    frozen = ("layer1", "linear.bias", *steps[:1])
    done = Distill(epochs=1, learning_rate=1e-3, optimizer="adamw", frozen=frozen).apply(before, task())
    new = dict(done.student.named_parameters())
    assert all(torch.equal(new[n], old[n]) for n in held)
    assert not any(torch.equal(new[n], old[n]) for n in free)
    assert all(p.requires_grad for p in new.values())
    with pytest.raises(InputError, match=r'frozen = "layer9": the student has no parameters there \(did you mean "l'):
        Distill(epochs=1, frozen=("layer9",)).apply(done, task())


def calibrated(deep: tuple[int, ...] = (2, 2, 2)) -> tuple[Program, Task]:
    """A random teacher, its own answers as labels, and its quantized student before any training: 16 steps an epoch."""
    torch.manual_seed(0)
    teacher = resnet(deep, width=8, classes=4)
    x = torch.randn(192, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(30):  # batch norm's statistics are of this data
        teacher(x)
    whole = ArrayData(x, teacher.eval()(x).argmax(1), 8)
    held = whole.subset(torch.arange(128, 192), augmented=False)
    own = Task(whole.subset(torch.arange(128), augmented=True), held, validation=held)
    graph = replace(Capture().apply(program(teacher), own), stage=Stage.GRAPH)
    return replace(Quantize(samples=64).apply(graph, own), stage=Stage.FAKE_QUANT), own


@pytest.mark.slow
def test_a_short_training_does_not_lose_a_calibrated_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen steps. At a rate of 0.01 at most two of 64 answers get worse; at 0.05, the default, the loss stays where
    it is without clipped gradients and bounded steps at least twice that."""
    start, own = calibrated()
    terms = (CrossEntropy(weight=0.1), KLDivergence(weight=0.9, temperature=2.0))
    before = own.score(start.student.eval(), own.validation)

    def trained(rate: float, **fields: Any) -> tuple[float, float]:
        distill = Distill(epochs=1, learning_rate=rate, terms=terms, **fields)
        done = distill.apply(replace(start, student=copy.deepcopy(start.student)), own)
        return own.score(done.student, own.validation), done.details["losses"][0]

    assert trained(0.01)[0] >= before - 2 / 64 and before > 0.9
    stable = trained(0.05)[1]
    monkeypatch.setattr("pqk.training.trainer.bounded_steps", lambda student, share: nullcontext())
    assert stable < 0.14 and trained(0.05, clip=1e9)[1] > 2 * stable


@pytest.mark.slow
def test_gradients_are_clipped_from_capture_on_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []

    def fit(run: RunContext, student: nn.Module, data: Any, objective: Any, training: Training) -> TrainingLog:
        seen.append(training.clip)
        return TrainingLog()

    monkeypatch.setattr("pqk.passes.distill.distill.fit", fit)
    start, own = calibrated((1, 1))
    for stage in (Stage.MODULE, Stage.GRAPH, Stage.FAKE_QUANT):
        for clip in (None, 7.0):
            Distill(clip=clip).apply(replace(start, stage=stage), own)
    assert seen == [None, 7.0, 1.0, 7.0, 1.0, 7.0]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["metric", "teacher"])
def test_the_best_converted_student_is_kept(keep: Any) -> None:
    """What comes out is worth, as integers, the best of the start and every epoch, and is that very student."""
    start, own = calibrated((1, 1))
    score = scorer(own, start.teacher, keep)
    ruinous = Distill(epochs=2, learning_rate=9.0, clip=1e9, warmup=0, schedule="constant", terms=(CrossEntropy(),))
    lost = ruinous.apply(replace(start, student=copy.deepcopy(start.student)), own)
    assert score(lost.student) < score(start.student) and "kept_epoch" not in lost.details
    kept = replace(ruinous, keep=keep).apply(replace(start, student=copy.deepcopy(start.student)), own)
    assert kept.details["kept_epoch"] == 0 and score(kept.student) == score(start.student)
    for name, value in start.student.state_dict().items():
        assert torch.equal(value, kept.student.state_dict()[name]), name
    with torch.no_grad():
        next(p for n, p in start.student.named_parameters() if n.endswith("linear.bias")).add_(torch.randn(4) * 3)
    spoiled = score(start.student)
    done = Distill(epochs=3, learning_rate=0.05, keep=keep).apply(start, own)
    assert 1 <= done.details["kept_epoch"] <= 3 and score(done.student) > spoiled


@pytest.mark.parametrize("stage", [Stage.MODULE, Stage.GRAPH])
def test_before_quantization_the_best_student_is_kept_in_float(stage: Stage) -> None:
    """A training that ruins gives the student back as it was, and says so; one that helps ends in its best epoch."""
    own, start = task(), program(small())
    if stage == Stage.GRAPH:
        start = replace(Capture().apply(start, own), stage=stage)
    score, terms = scorer(own, start.teacher, "teacher"), (CrossEntropy(weight=0.1), KLDivergence(weight=0.9))
    ruinous = Distill(epochs=2, learning_rate=9.0, clip=1e9, warmup=0, schedule="constant", terms=terms)
    lost = ruinous.apply(replace(start, student=copy.deepcopy(start.student)), own)
    assert score(lost.student) < score(start.student) and not {"kept", "kept_epoch"} & set(lost.details)
    kept = replace(ruinous, keep="teacher").apply(replace(start, student=copy.deepcopy(start.student)), own)
    assert kept.details["kept_epoch"] == 0 and "as it was before the training" in kept.details["kept"]
    assert not kept.student.training
    for name, value in start.student.state_dict().items():
        assert torch.equal(value, kept.student.state_dict()[name]), name
    with torch.no_grad():
        next(p for n, p in start.student.named_parameters() if n.endswith("linear.bias")).add_(torch.randn(4) * 3)
    spoiled = score(start.student.eval())
    done = Distill(epochs=3, learning_rate=0.05, keep="teacher", terms=terms).apply(start, own)
    assert done.details["kept_epoch"] >= 1 and "kept" not in done.details and score(done.student) > spoiled


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_training_does_not_ruin_a_small_network(seed: int) -> None:
    """After all passes of the default recipe but pruning, it is worth no less in integers than without training."""
    start, own = calibrated((1, 1))
    begun = program(start.teacher)
    begun = replace(begun, run=RunContext(seed).enter("00-distill"))
    recipe = fit_recipe(Recipe.default(True), start.teacher, own)
    done = {}
    for name, trains in (("untrained", False), ("trained", True)):
        after = replace(begun, student=copy.deepcopy(begun.student))
        for p in recipe.passes[1:]:
            if trains or not p.training_epochs:
                after = replace(p.apply(after, own), stage=p.result_stage(after.stage))
        done[name] = (
            own.score(after.student, own.validation),
            own.distance(after.student(*own.example), start.teacher(*own.example)),
        )
    assert done["trained"][0] >= done["untrained"][0] - 1 / 64 and done["untrained"][0] > 0.9


@pytest.mark.slow
def test_a_killed_training_keeps_the_same_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, own = calibrated((1, 1))
    config = Distill(epochs=3, learning_rate=0.05, keep="teacher", checkpoint_seconds=1e-9)

    def state(folder: Path | None) -> tuple[Any, dict[str, Tensor]]:
        run = RunContext(1, folder).enter("04-distill")
        done = config.apply(replace(start, run=run, student=copy.deepcopy(start.student)), own)
        return done.details["kept_epoch"], done.student.state_dict()

    class Killed(Exception):
        """Stands for a kill."""

    calls, scored = 0, scorer

    def dying(*args: Any) -> Any:
        score = scored(*args)

        def count(student: nn.Module) -> list[float]:
            nonlocal calls
            calls += 1
            if calls == 4:  # the start and two epochs are judged; killed before the last one is
                raise Killed
            return score(student)

        return count

    live = state(None)
    monkeypatch.setattr("pqk.passes.distill.keep_best.scorer", dying)
    with pytest.raises(Killed):
        state(tmp_path)
    monkeypatch.setattr("pqk.passes.distill.keep_best.scorer", scored)
    resumed = state(tmp_path)
    assert resumed[0] == live[0]
    assert not [k for k, v in live[1].items() if not torch.equal(v, resumed[1][k])]


def test_no_knowledge_is_plain_training_bit_for_bit() -> None:
    def state(*terms: Any) -> dict[str, Tensor]:
        return Distill(epochs=1, terms=terms).apply(program(small()), task()).student.state_dict()

    plain, other = state(CrossEntropy()), state(CrossEntropy(), KLDivergence(weight=0), LogitMSE(weight=0))
    assert not [k for k in plain if not torch.equal(plain[k], other[k])]


def test_cached_and_live_training_are_the_same(tmp_path: Path) -> None:
    def state(folder: Path | None) -> dict[str, Tensor]:
        return Distill(epochs=4).apply(program(small(), folder), task()).student.state_dict()

    cached, live = state(tmp_path), state(None)
    for k in cached:  # a view comes back in other batches, where sums may round otherwise
        torch.testing.assert_close(cached[k], live[k], rtol=1e-4, atol=1e-5)


def test_what_cannot_train_is_refused() -> None:
    held = task().validation
    with pytest.raises(InputError, match="no training data"):
        Distill().apply(program(small()), Task(None, held, validation=held))
    start = program(small())
    with pytest.raises(InputError, match="bfloat16 is coarser than the INT8 grid"):
        Distill(precision="bf16").apply(replace(start, stage=Stage.FAKE_QUANT), task())
    with pytest.raises(InputError, match="average = 2 blends those of many"):
        Distill(keep="metric", average=2.0)
    with pytest.raises(InputError, match=r'no module "layer9".*"layer'):
        Distill(terms=(Hint(point="layer9"),)).apply(start, task())
    for terms in ((), (CrossEntropy(weight=0),)):
        with pytest.raises(InputError, match="no term has a weight above 0"):
            Distill(terms=terms)
