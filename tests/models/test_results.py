"""The committed students: on any x86 they are right on exactly as many images as their reports say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pqk.core.onnxruntime_session import session
from pqk.files import read_json
from pqk.models.cifar import MEAN, STD, load_split
from pqk.models.images import Normalize

RESULTS = Path(__file__).parents[2] / "models" / "results"


def test_estimates_of_check_are_near_what_the_passes_took() -> None:
    """Whatever the estimate is of: the digits as their recipe is, and two recipes with less training."""
    document = read_json(RESULTS / "check_estimates.json")
    assert document["bound"] == 1.5 and len(document["recipes"]) == 3
    for name, row in document["recipes"].items():
        took = sum(p["took_s"] for p in row["passes"].values())
        estimated = sum(p["estimated_s"] for p in row["passes"].values())
        assert 1 / 1.5 <= estimated / took <= 1.5, name
        assert row["ratio"] == pytest.approx(estimated / took)
    assert document["recipes"]["digits"]["epochs_of_trainings"] == {}


def test_training_on_the_grid_halves_what_weights_of_four_bits_cost() -> None:
    """`disagreement_left` is the share of the tokens decided otherwise that training leaves."""
    document = read_json(RESULTS / "stories260k_grid.json")
    left = {}
    for width in ("8 bits", "4 bits"):
        before, after = (1 - document[width][when]["agreement"] for when in ("before", "after"))
        assert document[width]["disagreement_left"] == pytest.approx(after / before, abs=1e-3)
        left[width] = after / before
    assert left["4 bits"] <= 0.5 and left["8 bits"] < 1


def test_steps_on_the_grid_win_back_most_of_what_four_bits_cost_a_larger_model() -> None:
    """Nine tenths of the nats, and more than half of the tokens that are decided otherwise."""
    document = read_json(RESULTS / "smollm2_grid.json")
    row, nats = document["4 bits"], document["float"]["nats_per_token"]
    before, after = (1 - row[when]["agreement"] for when in ("before", "after"))
    assert row["disagreement_left"] == pytest.approx(after / before, abs=1e-3) and after / before <= 0.5
    lost, left = (row[when]["nats_per_token"] - nats for when in ("before", "after"))
    assert left < 0.1 * lost


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_cifar10", pytest.param("resnet56_cifar10", marks=pytest.mark.full)])
def test_a_committed_student_scores_what_its_report_says(name: str, data_file: Callable[[str], Path]) -> None:
    """On the grid of x86-avx2 no product saturates, so that no instruction set gives other integers."""
    images, labels = load_split(data_file("cifar10_test.npz"))
    student = session(RESULTS / f"{name}.onnx", threads=1)
    (given,) = student.get_inputs()
    (images,) = Normalize(MEAN, STD)((images,))
    right = sum(
        int((torch.from_numpy(student.run(None, {given.name: x.numpy()})[0]).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    report = read_json(RESULTS / f"{name}.json")
    (row,) = (r for r in report["attribution"] if r["variant"] == "student")
    assert right == round(row["metric"] * len(labels))
