"""Data that a teacher makes: labels it is sure of, and inputs whose statistics it remembers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pqk
from pqk.data.data import ArrayData, LoaderData
from pqk.data.synthesis import Prior, pseudo_labels, statistics_gap, synthesize
from pqk.errors import InputError
from pqk.models.images import CropFlip
from pqk.recipe.factories import load_task
from pqk.recipe.recipe import TaskSpec


class Net(nn.Module):
    """[B, 3, 6, 6] -> logits [B, 3]."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body = nn.Sequential(norm(3), nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def real(count: int = 192) -> tuple[Tensor, Tensor]:
    """Each class is bright in a channel of its own, around a mean that is not 0."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    bright = nn.functional.one_hot(labels, 3)[:, :, None, None]
    return torch.randn(count, 3, 6, 6, generator=g) + 4 * bright + 2, labels


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    model, (x, y) = Net(), real()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    assert float((model.eval()(x).argmax(1) == y).float().mean()) > 0.95
    return model.eval()


# ---- inputs


@pytest.mark.slow
def test_statistics_move_to_those_that_the_teacher_remembers(teacher: nn.Module) -> None:
    """More steps, nearer; real data is nearer than noise, which is what the measure is worth."""
    x, _ = real()
    noise = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    made = {steps: synthesize(teacher, x[:2], 64, steps, learning_rate=0.3) for steps in (1, 20, 150)}
    gaps = [statistics_gap(teacher, t) for t in (noise, *(d.inputs[0] for d in made.values()))]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.05 * gaps[0]
    assert statistics_gap(teacher, x) < 0.2 * gaps[0]
    torch.testing.assert_close(made[150].inputs[0].mean((0, 2, 3)), x.mean((0, 2, 3)), atol=0.05, rtol=0.01)


@pytest.mark.slow
def test_the_classes_are_drawn_evenly_and_the_label_is_the_teachers(teacher: nn.Module) -> None:
    made = synthesize(teacher, torch.zeros(2, 3, 6, 6), 50, 150, batch_size=20)
    assert made.targets is not None and (made.samples, made.batch_size) == (50, 20)
    with torch.no_grad():
        assert torch.equal(made.targets, teacher(made.inputs[0]).argmax(1))
    assert int(made.targets.bincount(minlength=3).min()) >= 10


def test_a_seed_is_one_data_set_and_the_teacher_is_untouched(teacher: nn.Module) -> None:
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    one, again, other = (synthesize(teacher, torch.zeros(2, 3, 6, 6), 8, 3, seed).fingerprint() for seed in (1, 1, 2))
    assert one == again != other
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters()) and not teacher._forward_pre_hooks


@pytest.mark.slow
def test_each_part_of_the_prior_does_what_it_says(teacher: nn.Module) -> None:
    def made(steps: int = 40, **weights: float) -> Tensor:
        alone = Prior(**{"classes": 0.0, "statistics": 0.0, "variation": 0.0, "energy": 0.0, **weights})
        return synthesize(teacher, torch.zeros(2, 3, 6, 6), 12, steps, prior=alone).inputs[0]

    noise = made()  # nothing moves it
    torch.testing.assert_close(noise, torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert float(made(energy=1.0).norm()) < 0.5 * float(noise.norm())
    assert float(made(variation=1.0).diff(dim=3).norm()) < 0.5 * float(noise.diff(dim=3).norm())
    with torch.no_grad():  # which a caller's context must not hinder
        aimed = teacher(made(steps=150, classes=1.0)).argmax(1)
    assert aimed.bincount().tolist() == [4, 4, 4] != teacher(noise).argmax(1).bincount(minlength=3).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: synthesize(nn.Linear(4, 3), torch.zeros(2, 4)), "no batch norm.*pseudo_labels"),
        (
            lambda t: synthesize(Net(lambda c: nn.GroupNorm(1, c)), torch.zeros(2, 3, 6, 6)),
            r"no batch norm with running statistics \(it has GroupNorm\)",
        ),
        (
            lambda t: synthesize(Net(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), torch.zeros(2, 3, 6, 6)),
            r"it has BatchNorm2d",
        ),
        (lambda t: synthesize(t, torch.zeros(2, 3, dtype=torch.long)), r"one float tensor.*int64"),
        (lambda t: synthesize(t, (torch.zeros(2, 3), torch.zeros(2, 3))), "one float tensor"),
        (lambda t: synthesize(t, torch.zeros(2, 3, 6, 6), samples=1), "samples=1"),
        (lambda t: synthesize(t, torch.zeros(2, 3, 6, 6), steps=0), "steps=0"),
        (lambda t: synthesize(t, torch.zeros(2, 3, 6, 6), 4, 2, learning_rate=float("nan")), "learning_rate=nan"),
        (lambda t: Prior(statistics=float("nan")), "prior: statistics: .*finite"),
        (lambda t: Prior(statistics=-1.0), "every weight must be finite and at least 0"),
        (lambda t: synthesize(nn.Sequential(nn.BatchNorm2d(3)), torch.zeros(2, 3, 6, 6), 4, 2), "not finite logits"),
    ],
)
def test_what_cannot_be_synthesized_is_refused(
    make: Callable[[nn.Module], object], message: str, teacher: nn.Module
) -> None:
    with pytest.raises(InputError, match=message):
        make(teacher)


# ---- labels


class Sure(nn.Module):
    """[B, 2] -> its inputs, as log-probabilities of three classes: the third takes the rest."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 1 - x.sum(1, keepdim=True)], 1).clamp_min(1e-9).log()


SHARES = torch.tensor([[0.95, 0.05], [0.5, 0.4], [0.05, 0.9], [0.0, 0.0], [0.3, 0.3]])


@pytest.mark.parametrize("confidence", [0.0, 0.6, 0.92, 0.99])
@pytest.mark.parametrize("kind", ["array", "loader"])
def test_who_is_kept_is_who_the_teacher_is_sure_of(kind: str, confidence: float) -> None:
    wrong = torch.ones(5, dtype=torch.long)
    data = ArrayData(SHARES, wrong, 2) if kind == "array" else LoaderData([(SHARES[:3], wrong[:3]), SHARES[3:]])
    found = pseudo_labels(Sure(), data, confidence)
    top = torch.tensor([0.95, 0.5, 0.9, 1.0, 0.4])
    kept = torch.tensor([0, 0, 1, 2, 2])[top >= confidence]
    batches = [*found.data.batches()]
    assert torch.cat([b.targets for b in batches]).tolist() == kept.tolist()
    assert torch.equal(torch.cat([b.inputs[0] for b in batches]), SHARES[top >= confidence])
    assert (found.kept, found.samples) == (len(kept), 5) and str(found).startswith(f"{len(kept)} of 5 unlabelled")


def test_augmentation_views_and_keys_stay() -> None:
    """So the teacher's answers are cached for these samples, too."""
    x = torch.rand(6, 1, 8, 8)
    whole = ArrayData(x, None, 2, augment=CropFlip(6, pad=1), views=3)
    part = whole.subset(torch.tensor([1, 3, 5]), augmented=True)

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 5 * torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], 1)

    found = pseudo_labels(Bright(), part, 0.0).data
    assert found.ids.tolist() == [1, 3, 5] and found.key_count == 18 and found.augment is whole.augment
    want = {int(k): t for b in part.batches(4, 1) for k, t in zip(b.keys, b.inputs[0], strict=True)}
    for batch in found.batches(4, 1):
        for key, t, y in zip(batch.keys, batch.inputs[0], batch.targets, strict=True):
            assert torch.equal(want[int(key)], t) and int(y) == int(x[int(key) // 3, 0, 0, 0] < 0.5)


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_confidence_is_a_probability(confidence: float) -> None:
    with pytest.raises(InputError, match="from 0 to 1"):
        pseudo_labels(Sure(), ArrayData(SHARES, None), confidence)


def test_nobody_kept_and_no_classes_are_refused() -> None:
    with pytest.raises(InputError, match=r"of 2 samples none is kept at confidence=0.9.*0\.500"):
        pseudo_labels(Sure(), ArrayData(SHARES[[1, 4]], None), 0.9)
    with pytest.raises(InputError, match=r"\(5, 1\) is not finite logits"):
        pseudo_labels(nn.Linear(2, 1), ArrayData(SHARES, None))


# ---- in a recipe

FACTORY = """
import torch
import pqk
from pqk.data.data import ArrayData


def unlabelled(data=None, *, teacher, confidence=0.5):
    x = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + 3
    found = pqk.pseudo_labels(teacher, ArrayData(x, None, 8), confidence)
    return pqk.Task(found.data, ArrayData(x, None, 8), notes=(str(found),))


def nothing(data=None, *, teacher, samples=16):
    made = pqk.synthesize(teacher, torch.zeros(2, 3, 6, 6), samples, steps=2)
    return pqk.Task(None, made, validation=made)


def plain(data=None):
    x = torch.zeros(4, 3, 6, 6)
    return pqk.Task(None, ArrayData(x, None), validation=ArrayData(x, None))
"""


def test_a_recipes_task_can_be_made_by_its_teacher(tmp_path: Path, teacher: nn.Module) -> None:
    (tmp_path / "made_by_teacher.py").write_text(FACTORY)

    def task(name: str, **arguments: Any) -> pqk.Task:
        return load_task(TaskSpec(factory=f"made_by_teacher:{name}", arguments=arguments), None, tmp_path, teacher)

    labelled = task("unlabelled", confidence=0.4)
    assert labelled.train is not None and labelled.notes[0].endswith(
        "of 32 unlabelled samples carry the teacher's label"
    )
    assert task("nothing", samples=12).validation.samples == 12
    assert task("plain").validation.samples == 4
    with pytest.raises(InputError, match="teacher"):  # it asks for one, and there is none
        load_task(TaskSpec(factory="made_by_teacher:nothing"), None, tmp_path)
