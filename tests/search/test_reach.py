"""Clauses about time that nothing could keep: refused, or given up before anything is trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pqk import ArrayData, Contract, InputError, Task
from pqk.bench.baselines import float_files
from pqk.bench.statistics import Ratio
from pqk.core.onnxruntime_session import session
from pqk.search.attempts import Attempts
from pqk.search.candidates import forms
from pqk.search.judge import Worth
from pqk.search.reach import refuse_out_of_reach, why_not_in_reach, write_nothing
from pqk.search.spending import Spending
from pqk.search.verdict import Terms, Tried


class Two(nn.Module):
    """[B, 3] -> [B, 4] and [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y.sum(1)


DATA = ArrayData(torch.randn(64, 3), torch.arange(64) % 3, 8)
TASK = Task(None, DATA, validation=DATA)


def attempts(contract: Contract, folder: Path, cuts: dict[str, float], nothing: float = 200.0) -> Attempts:
    """Attempts at a teacher of 2 ms, whose form in integers is 1.5 times as fast; `cuts` are the ratios of students."""
    float_files(nn.Linear(3, 4), TASK, folder)

    def smallest(passes: Any, shape: str | None = None) -> Any:
        prune = passes[0]
        return "both" if prune.width and prune.depth else "width" if prune.width else "depth"

    def timed(program: Any) -> Ratio:
        return Ratio(cuts[program], 0.9 * cuts[program], cuts[program])

    judge: Any = SimpleNamespace(
        timed=True, teacher_ms=2.0, folder=folder, teacher_files=(folder / "teacher.onnx",), speed_up_of=timed,
        speed_up=lambda path: Ratio(nothing, nothing, nothing),
    )  # fmt: skip
    context: Any = SimpleNamespace(decide=lambda key, measure: measure())
    runs: Any = SimpleNamespace(program=smallest)
    found = Attempts(
        TASK, torch.zeros(8, 4), context, runs, judge, Terms(contract, 0.01, share=True), Spending(contract, 8),
        lambda steps, text="": None,
    )  # fmt: skip
    worth = Worth(0.9, 0.0, 0.002, 1.5, 1.4, 1.6, 2 / 1.4, 1000, 1000)
    found.tried.append(Tried(forms(nn.Identity())[0], worth, 1.0))
    return found


SLOW = {"width": 4.0, "depth": 6.0, "both": 5.0}


@pytest.mark.parametrize(
    ("contract", "out"),
    [
        (Contract(min_speedup=1000), True),
        (Contract(min_speedup=199), False),
        (Contract(max_latency_ms=0.001), True),
        (Contract(max_latency_ms=0.02), False),
        (Contract(), False),
    ],
)
def test_less_time_than_a_network_takes_that_computes_nothing_is_refused(
    contract: Contract, out: bool, tmp_path: Path
) -> None:
    made = attempts(contract, tmp_path, SLOW)
    if not out:
        refuse_out_of_reach(made)
    else:
        with pytest.raises(InputError, match=r"is out of reach .* takes 0.01 ms for a call and is 200 times as fast"):
            refuse_out_of_reach(made)
    assert not (tmp_path / "nothing.onnx").exists()


@pytest.mark.parametrize("contract", [Contract(min_speedup=20), Contract(max_latency_ms=0.1)])
def test_where_the_smallest_students_are_too_slow_none_is_trained_and_it_is_said(
    contract: Contract, tmp_path: Path
) -> None:
    made = attempts(contract, tmp_path, SLOW)
    reason = why_not_in_reach(made, forms(nn.Identity())[0])
    assert reason == (
        "no student that is cut out of the teacher is that fast; the fastest is smallest by depth: 6x at most, "
        "0.333 ms at least"
    )
    rows = {t.candidate.name: t.fate for t in made.tried if t.worth is None}
    assert list(rows) == ["smallest by width", "smallest by depth", "smallest by both"]
    assert rows["smallest by width"].startswith("not trained, as it is 4x at most, 0.5 ms at least; the contract asks")


@pytest.mark.parametrize("contract", [Contract(min_speedup=5.5), Contract(max_latency_ms=0.3), Contract(max_drop=1)])
def test_one_that_may_be_fast_enough_is_looked_for(contract: Contract, tmp_path: Path) -> None:
    made = attempts(contract, tmp_path, SLOW)
    assert why_not_in_reach(made, forms(nn.Identity())[0]) is None
    fast = attempts(Contract(min_speedup=1.55), tmp_path, {})  # a form is: nothing is cut
    assert why_not_in_reach(fast, forms(nn.Identity())[0]) is None


def test_a_network_that_computes_nothing_has_the_inputs_and_outputs_of_the_teacher(tmp_path: Path) -> None:
    teacher, _ = float_files(Two().eval(), TASK, tmp_path)
    write_nothing(teacher, tmp_path / "nothing.onnx", TASK.feeds(1))
    real, nothing = session(teacher), session(tmp_path / "nothing.onnx")
    assert [i.name for i in nothing.get_inputs()] == [i.name for i in real.get_inputs()]
    assert [o.name for o in nothing.get_outputs()] == [o.name for o in real.get_outputs()]
    other = {name: 2 * value for name, value in TASK.feeds(1).items()}
    for want, got in zip(real.run(None, TASK.feeds(1)), nothing.run(None, other), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
