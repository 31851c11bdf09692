"""Files at the edges: what exporters lose is corrected or refused by name before training, and leaves no trace."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import UNTIMED
from torch import Tensor, nn

from pqk import Recipe, Task, compress
from pqk.check import check
from pqk.core.program import Stage
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.knowledge import KLDivergence
from pqk.passes import Capture, Convert, Distill, Quantize
from pqk.recipe.recipe import TargetSpec
from pqk.rehearsal import rehearse, untouched_randomness
from pqk.target.target import Target

PASSES = (
    Distill(epochs=1, terms=(KLDivergence(),)),
    Capture(),
    Quantize(samples=8),
    Distill(epochs=1, learning_rate=1e-3, terms=(KLDivergence(),)),
    Convert(),
)
RECIPE = Recipe(passes=PASSES, target=TargetSpec(name="x86-avx2"))
TARGET = Target.named("x86-avx2")


pytestmark = pytest.mark.slow


class Net(nn.Module):
    """A convolution, something with pixels, and a head."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()), middle
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.middle(self.first(x)).mean((2, 3)))
        return result


class Antialiased(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(6, 5), mode="bilinear", align_corners=True, antialias=True)


class Unknown(nn.Module):
    """ONNX has no operator for what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(x)


def teacher(middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Net(middle).eval().requires_grad_(False)


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 4
    data = ArrayData(torch.randn(48, 1, 9, 7, generator=generator) + labels.view(-1, 1, 1, 1), labels, 8)
    return Task(train=data, evaluation=data, validation=data)


class Pools(nn.Module):
    """Exported without a divisor, with another at the edges, or as a file that no runtime takes."""

    def __init__(self) -> None:
        super().__init__()
        self.divisor = nn.AvgPool2d(3, 2, divisor_override=2)
        self.hanging = nn.AvgPool2d(2, 2, padding=1, ceil_mode=True)
        self.bare = nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False)
        self.largest = nn.MaxPool2d(2, 2, padding=1, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        pools = (self.divisor, self.hanging, self.bare, self.largest)
        result: Tensor = sum(pool(x).mean((2, 3), keepdim=True) for pool in pools)  # type: ignore[assignment]
        return result


def test_pools_at_the_edge_are_right_in_both_files() -> None:
    assert rehearse(teacher(Pools()), task(), PASSES, TARGET).stage == Stage.INT8


def test_an_operator_that_is_exported_as_another_is_named() -> None:
    with pytest.raises(
        InputError, match=r"off by 0\.\d+ of its largest output.*middle \(aten\._upsample_bilinear2d_aa"
    ):
        rehearse(teacher(Antialiased()), task(), PASSES, TARGET)


def test_nothing_is_trained_where_the_end_would_refuse(tmp_path: Path) -> None:
    settings = dataclasses.replace(UNTIMED, rehearsal=True)
    with pytest.raises(InputError, match=r"i0e.*nothing was trained"):
        compress(teacher(Unknown()), task(), RECIPE, out=tmp_path / "out", evaluation=settings)
    assert not list((tmp_path / "out" / ".work").glob("0*")), "no pass ran, not even in part"


def test_check_says_the_same() -> None:
    found = check(teacher(Unknown()), task(), RECIPE)
    assert found.problems and all("i0e" in problem for problem in found.problems)


def test_draws_meanwhile_do_not_count() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with untouched_randomness():
        random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(7, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.lstm(x[:, 0])[0][:, -1])
        return result


def test_a_recurrent_network_compiles_and_is_counted(tmp_path: Path) -> None:
    """A number for the report refused it after all training."""
    torch.manual_seed(0)
    artifact = compress(Recurrent().eval(), task(), RECIPE, out=tmp_path / "out", evaluation=UNTIMED)
    report = artifact.report
    assert report.macs == 9 * 4 * 8 * (7 + 8) + 8 * 4
    assert report.integer_coverage is not None and report.parity is not None and report.parity.passed


def test_a_student_is_the_same_with_and_without(tmp_path: Path) -> None:
    files = []
    for rehearsal in (False, True):
        settings = dataclasses.replace(UNTIMED, rehearsal=rehearsal)
        artifact = compress(teacher(nn.ReLU()), task(), RECIPE, out=tmp_path / str(rehearsal), evaluation=settings)
        files.append((artifact.folder / "model.onnx").read_bytes())
    assert files[0] == files[1]
