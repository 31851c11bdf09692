"""The statistics of batch norms after a cut: means over batches, of the cut network, and nothing else changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pqk.core.program import Program
from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData
from pqk.errors import InputError
from pqk.passes import Prune
from pqk.passes.prune.statistics import reestimate_batch_norm
from pqk.target.target import Target
from pqk.task.task import Task


def net(seed: int = 0, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(2 * torch.randn(size, 3, 8, 8, generator=generator) + i,) for i in range(count)]


def test_statistics_are_the_means_over_the_batches() -> None:
    model, data = net(), batches()
    assert reestimate_batch_norm(model, data) == 3
    first, second = model[1], model[5]
    assert isinstance(first, nn.BatchNorm2d) and first.running_mean is not None and first.running_var is not None
    seen = [model[0](x) for (x,) in data]
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(first.running_mean, means)
    torch.testing.assert_close(first.running_var, variances)
    # The second sees the first one's outputs by the statistics of their batch, and no dropout.
    normed = [nn.functional.relu(nn.functional.batch_norm(x, None, None, first.weight, first.bias, True)) for x in seen]
    assert isinstance(second, nn.BatchNorm2d) and second.running_mean is not None
    torch.testing.assert_close(
        second.running_mean, torch.stack([model[4](x).mean((0, 2, 3)) for x in normed]).mean(0), rtol=1e-4, atol=1e-5
    )


def test_nothing_else_changes() -> None:
    model = net()
    model[5].train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    reestimate_batch_norm(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)


@pytest.mark.parametrize(
    ("model", "data"),
    [(net(), []), (net(), batches(2, size=1)), (nn.Sequential(nn.Conv2d(3, 4, 1)), batches())],
    ids=["no batch", "single samples", "no norm"],
)
def test_what_has_no_statistics_is_left_as_it_is(model: nn.Module, data: list[tuple[Tensor, ...]]) -> None:
    before = copy.deepcopy(model.state_dict())
    assert reestimate_batch_norm(model, data) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mode_comes_back_where_a_model_fails() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.zeros(4, 5, 8, 8).split(4)])
    assert not any(m.training for m in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def cut(task: Task, **fields: Any) -> Program:
    teacher = net(dropout=0.0)
    reestimate_batch_norm(teacher, [b.inputs for b in task.evaluation.batches()])
    program = Program.begin(teacher.requires_grad_(False), Target.named("x86-avx2"), RunContext().enter("00-prune"))
    return Prune(macs_ratio=2.0, multiple=4, **fields).apply(program, task)


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(2)
    images, labels = torch.randn(96, 3, 8, 8) + 1, torch.arange(96) % 4
    data = ArrayData(images, labels, 16)
    return Task(data.subset(torch.arange(64), augmented=True), data.subset(torch.arange(64, 96), augmented=False))


def test_a_pruning_estimates_them_where_it_is_asked_to(task: Task) -> None:
    """Whatever the cut took away, each norm's output has mean 0 and variance 1 on the data before scale and shift."""

    def off(program: Program) -> float:
        student = program.student
        seen: list[float] = []
        hooks = [
            m.register_forward_hook(lambda m, args, out: seen.append(float((out.var((0, 2, 3)) - 1).abs().mean())))
            for m in student.modules()
            if isinstance(m, nn.BatchNorm2d)
        ]
        with torch.no_grad():
            student.eval()(*next(task.evaluation.batches()).inputs)
        for hook in hooks:
            hook.remove()
        return max(seen)

    without, again = cut(task), cut(task, batch_norm_batches=4)
    assert again.details["batch_norm_batches"] == 4 and "batch_norm_batches" not in without.details
    assert off(again) < 0.5 * off(without)
    assert all(torch.equal(p, q) for p, q in zip(without.student.parameters(), again.student.parameters(), strict=True))
    once_more = cut(task, batch_norm_batches=4)
    for name, value in again.student.state_dict().items():
        assert torch.equal(value, once_more.student.state_dict()[name]), name


def test_without_training_data_it_is_refused(task: Task) -> None:
    with pytest.raises(InputError, match=r"prune\.batch_norm_batches"):
        cut(Task(None, task.evaluation, validation=task.evaluation), batch_norm_batches=4)


def test_a_recipe_has_it_off_and_a_rehearsal_keeps_it() -> None:
    prune = Prune(macs_ratio=2.0)
    assert prune.batch_norm_batches == 0
    assert replace(prune, batch_norm_batches=8).rehearsal(0.1).batch_norm_batches == 8  # type: ignore[attr-defined]
