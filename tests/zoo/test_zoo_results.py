"""The committed results of the zoo, and the zoo itself: nothing fails, and every network does what is written of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_zoo import RECIPE, RESULTS, check_one, compile_one, run_one, task_of
from specimens import CLASSES, SITE, ZOO, Specimen, shorten, spread
from torch import Tensor, nn

from pqk import Recipe

HERE = Path(__file__).parent
INSTALLED = all((SITE / name).is_dir() for name in ("timm", "torchvision", "PIL"))
NEEDED = "timm, torchvision and pillow are not installed: `make zoo` does it"


def committed() -> dict[str, Any]:
    networks: dict[str, Any] = json.loads(RESULTS.read_text())["networks"]
    return networks


def test_every_network_has_a_row_and_none_failed() -> None:
    rows = committed()
    assert list(rows) == list(ZOO) and not json.loads(RESULTS.read_text())["not_run"]
    outcomes = [row["outcome"] for row in rows.values()]
    assert {*outcomes} <= {"compiled", "refused"} and len(outcomes) >= 120
    assert outcomes.count("compiled") >= 105


def test_what_compiled_keeps_the_contract_and_what_was_refused_says_why() -> None:
    for name, row in committed().items():
        if row["outcome"] == "compiled":
            parity = row["parity"]
            assert parity["layers"] and parity["max_lsb"] <= 1 and parity["least_exact"] >= 0.999, name
            assert row["coverage"] is not None or row["coverage_reason"], name
        elif row["outcome"] == "refused":
            assert row["stage"] in ("arguments", "rehearsal", "prune", "capture", "quantize") and row["reason"], name


def test_most_networks_are_really_pruned() -> None:
    compiled = [row for row in committed().values() if row["outcome"] == "compiled"]
    assert sum(row["macs"][0] >= 1.1 * row["macs"][1] for row in compiled) >= max(90, 0.8 * len(compiled))


def test_the_rows_were_made_with_the_recipe_that_is_here() -> None:
    document = json.loads(RESULTS.read_text())
    assert Recipe.loads(document["conditions"]["recipe"]) == Recipe.loads(RECIPE)
    for requirement in (HERE / "requirements.txt").read_text().splitlines():
        name, equals, version = requirement.partition("==")
        if equals and name in document["conditions"]["versions"]:
            assert document["conditions"]["versions"][name].partition("+")[0] == version


@pytest.mark.skipif(not INSTALLED, reason=NEEDED)
def test_no_family_of_timm_is_left_out() -> None:
    """A family is a module of timm that registers models; timm is not imported into this process."""
    files = (SITE / "timm" / "models").glob("[!_]*.py")
    families = {path.stem for path in files if "\n@register_model\n" in path.read_text()}
    assert {s.family for s in ZOO.values() if s.package == "timm"} == families


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO)
def test_a_network_does_what_is_written_of_it(name: str) -> None:
    if ZOO[name].package != "transformers" and not INSTALLED:
        pytest.skip(NEEDED)
    row = run_one(name)
    assert row["outcome"] == committed()[name]["outcome"], row


# ---- how networks are made smaller


class Repeated(nn.Module):
    """Blocks that repeat, behind a scale that is next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5)))
        self.gamma, self.head = nn.Parameter(torch.full((8, 1, 1), 1e-6)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head((x + self.gamma * self.blocks(x)).mean((2, 3)))


def test_blocks_are_taken_out_and_parameters_that_start_alike_differ() -> None:
    module = Repeated()
    before = module.stem.weight.clone()
    shorten(module, {"blocks": 2}, ("blocks.0",))
    assert [name for name, _ in module.blocks.named_children()] == ["1"]
    spread(module)
    assert torch.equal(module.stem.weight, before)
    for value in (module.gamma, module.norm.weight, module.norm.bias):
        assert value.std() > 0.01 and bool((value > 0).any())
    with pytest.raises(AssertionError, match="no module is called nothing"):
        shorten(module, {"nothing": 1}, ())


def test_inputs_and_labels_are_those_of_the_kind() -> None:
    words = Specimen("transformers", "BertForSequenceClassification", "bert", shape=(12,), kind="text")
    ids, mask = words.inputs(4, 0)
    assert ids.shape == mask.shape == (4, 12) and bool((ids[mask == 0] == 1).all())
    task = task_of(Specimen("torchvision", "fcn_resnet50", "fcn", shape=(3, 8, 8), kind="map"))
    assert next(task.train.batches()).targets.shape == (8, 8, 8) and task.class_axis_of(torch.zeros(2, 10, 8, 8)) == 1


def test_what_cannot_be_built_is_a_failure_with_its_words() -> None:
    row = compile_one(Specimen("transformers", "NoSuchModel", "none"))
    assert row["outcome"] == "failed" and row["stage"] == "build" and "NoSuchModel" in row["reason"]


@pytest.mark.full
@pytest.mark.slow
def test_check_of_a_network_is_timed() -> None:
    assert 0 < check_one(ZOO["transformers/ResNetForImageClassification"])["check_seconds"] < 240
