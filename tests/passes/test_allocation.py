"""Laws of cutting by a table: budgets hold, what is cheapest goes, plans rebuild, a resume measures nothing again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import data, program_of, task_of, trained
from torch import Tensor, nn
from zoo import NETWORKS

from pqk.core.costs import count_macs
from pqk.core.decisions import Journal
from pqk.core.program import Rewrite, replay
from pqk.core.run_context import TimesByWidth
from pqk.errors import InputError
from pqk.models.resnet import resnet
from pqk.passes.prune.allocation import settling
from pqk.passes.prune.cuts import drop_block
from pqk.passes.prune.law import masked
from pqk.passes.prune.prune import Prune

SHAPE = (3, 16, 16)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(resnet((2, 2, 2), 16))


class Machine:
    """An oracle whose milliseconds are MACs of networks, and whose table is off by a factor."""

    def __init__(self, off: float = 1.0) -> None:
        self.off, self.measured, self.asked = off, 0, 0
        self.example = (data(SHAPE)[:1],)

    def _milliseconds(self, student: nn.Module) -> float:
        return 1e-6 * count_macs(student, self.example)

    def latency(self, student: nn.Module) -> float:
        self.measured += 1
        return self._milliseconds(student)

    def baseline(self) -> float:
        return 1.5 * self._milliseconds(trained(resnet((2, 2, 2), 16)))

    def float_gain(self, *_: Any) -> tuple[float, float, float]:
        raise AssertionError

    def layer_times(self, student: nn.Module, channels: Mapping[str, Sequence[tuple[int, int]]]) -> TimesByWidth:
        self.asked += 1
        made: dict[str, float] = {}
        handles = [
            student.get_submodule(path).register_forward_hook(
                lambda m, args, out, path=path: made.__setitem__(path, out.numel() / out.shape[1] * 9e-6)
            )
            for path in channels
        ]
        with torch.no_grad():
            student(*self.example)
        for handle in handles:
            handle.remove()
        return TimesByWidth({p: [self.off * made[p] * r * m for r, m in pairs] for p, pairs in channels.items()}, 0.0)


@pytest.mark.parametrize(("budget", "goal"), [("macs", 2.0), ("parameters", 2.0), ("size", 8.0)])
def test_a_budget_holds_and_the_plan_rebuilds(budget: str, goal: float, network: nn.Module) -> None:
    task = task_of(network, SHAPE)
    before = copy.deepcopy(network.state_dict())
    config = Prune(**{f"{budget}_ratio": goal}, allocation="table", depth=True, multiple=4)
    after = config.apply(program_of(network), task)
    assert goal <= after.details["budget"]["reached"]
    plan = json.loads(json.dumps([[r.function, r.arguments] for r in after.plan]))
    rewrites = {f.__name__: f for f in Prune.rewrites}
    again = replay(copy.deepcopy(network), task.example, [Rewrite(*r) for r in plan], rewrites)
    assert_equal(again.state_dict(), after.student.state_dict())
    assert_equal(before, network.state_dict())
    assert json.loads(json.dumps(after.details["ranking"]))


def test_what_is_cut_was_zero(network: nn.Module) -> None:
    """The student answers as the teacher does with the channels zero and the blocks replaced that the plan names."""
    task, x = task_of(network, SHAPE), data(SHAPE)
    after = Prune(macs_ratio=2.5, allocation="table", depth=True, multiple=4).apply(program_of(network), task)
    cuts = [c for r in after.plan if r.function == "cut_channels" for c in r.arguments["cuts"]]
    blocks = [r.arguments["block"] for r in after.plan if r.function == "drop_block"]
    assert cuts and blocks
    teacher = copy.deepcopy(network)
    outside = [c for c in cuts if not c["module"].startswith(tuple(f"{block}." for block in blocks))]
    with torch.no_grad(), masked(teacher, outside):
        for block in blocks:
            drop_block(teacher, task.example, block=block)
        torch.testing.assert_close(after.student(x), teacher(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "gated"])
def test_channels_of_other_networks_are_cut(name: str) -> None:
    """Layers that read a concatenation are of several groups; depthwise ones have one number of channels."""
    model = trained(NETWORKS[name].teacher())
    task = NETWORKS[name].task(model)
    after = Prune(macs_ratio=1.3, allocation="table", multiple=2).apply(program_of(model), task)
    assert count_macs(model, task.example) >= 1.3 * count_macs(after.student, task.example)


def test_a_block_that_does_nothing_goes_first(network: nn.Module) -> None:
    model = copy.deepcopy(network)
    idle = model.get_submodule("layer2.1")
    with torch.no_grad():
        idle.bn2.weight.zero_()  # type: ignore[union-attr, operator]
        idle.bn2.bias.zero_()  # type: ignore[union-attr, operator]
    after = Prune(macs_ratio=1.1, allocation="table", width=False, depth=True).apply(
        program_of(model), task_of(model, SHAPE)
    )
    assert after.details["blocks_removed"] == ["layer2.1"]
    assert after.details["ranking"][0]["cost"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("off", [1.0, 3.0, 0.5])
def test_a_latency_holds_however_far_off_the_table_is(off: float, network: nn.Module) -> None:
    machine = Machine(off)
    config = Prune(latency_ratio=3.0, allocation="table", depth=True, multiple=4)
    after = config.apply(program_of(network, oracle=machine), task_of(network, SHAPE))
    assert after.details["budget"]["reached"] >= 3.0
    assert machine.asked == 1 and machine.measured <= 6


def test_a_resumed_prune_measures_nothing_again(network: nn.Module, tmp_path: Path) -> None:
    task, machine = task_of(network, SHAPE), Machine()
    config = Prune(latency_ratio=3.0, allocation="table", depth=True, multiple=4)
    first = config.apply(program_of(network, oracle=machine, journal=Journal(tmp_path / "j")), task)
    measured, asked = machine.measured, machine.asked
    again = config.apply(program_of(network, oracle=machine, journal=Journal(tmp_path / "j")), task)
    assert again.plan == first.plan and (machine.measured, machine.asked) == (measured, asked)


def test_a_rehearsal_looks_nothing_up(network: nn.Module) -> None:
    machine = Machine()
    config = Prune(latency_ratio=3.0, allocation="table", depth=True, multiple=4)
    after = config.apply(program_of(network, oracle=machine, rough=True), task_of(network, SHAPE))
    assert machine.asked == 0 and machine.measured == 1, "only the whole student is timed"
    assert after.details["budget"]["reached"] >= 3.0 and after.details["estimated"]["candidates"] >= 1


def test_what_is_protected_stays(network: nn.Module) -> None:
    task = task_of(network, SHAPE)
    config = Prune(
        macs_ratio=50.0, allocation="table", depth=True, multiple=4, best_effort=True, protect=("layer1.*",),
        keep_blocks={"layer2": 2}, ignore=("layer3.1.conv1",), floor=0.5,
    )  # fmt: skip
    after = config.apply(program_of(network), task)
    assert after.details["blocks_removed"] == ["layer3.1"]
    assert after.student.get_submodule("layer1.0.conv1").out_channels == 8
    with pytest.raises(InputError, match="cannot be met"):
        Prune(macs_ratio=50.0, allocation="table", depth=True).apply(program_of(network), task)


def test_places_and_costs_do_not_mix() -> None:
    with pytest.raises(InputError, match="goes by places"):
        Prune(macs_ratio=2.0, allocation="table", blocks="every_other", width=False, depth=True)


def test_settled_norms_go_by_the_batch_and_keep_their_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    x: Tensor = 5 + 3 * data((3, 4, 4))
    before = copy.deepcopy(model[1].running_mean)
    with torch.no_grad():
        out = settling(model)(x)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.equal(model[1].running_mean, before)
