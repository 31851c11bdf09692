"""Training: a killed run ends in the same student bit for bit, and a loss that is not finite is survived or told."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pqk.core.run_context import RunContext
from pqk.data.data import ArrayData, Batch, Data, LoaderData
from pqk.errors import InputError, PqkError
from pqk.files import read_tensors
from pqk.models.images import CropFlip
from pqk.target import machine
from pqk.training.trainer import RETRIES, Objective, Training, TrainingLog, fit, optimizer_for, rate

BATCHES, EPOCHS = 5, 3


def images(count: int = 4 * BATCHES) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 6, 6, generator=g), torch.randint(0, 4, (count,), generator=g)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments with the generator that the model's dropout draws from."""

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = images()
        return x[i] + torch.rand(3, 1, 1), y[i]


def array() -> Data:
    return ArrayData(*images(), 4, augment=CropFlip(4 * BATCHES, pad=1), views=2)


def loader() -> Data:
    return LoaderData(DataLoader(Noisy(), batch_size=4, shuffle=True))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class Classify(Objective):
    """Cross-entropy, with a parameter of its own, that dies or goes wrong where a test wants it."""

    def __init__(self, kill: int | None = None, spoil: Callable[[int], bool] = lambda call: False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.own, self.calls, self.kill, self.spoil = nn.Linear(4, 4), 0, kill, spoil
        self.seen: list[float] = []

    def begin(self, progress: float) -> None:
        self.seen.append(progress)

    def forward(self, student: nn.Module, batch: Batch) -> Tensor:
        if self.calls == self.kill:
            raise Killed
        self.calls += 1
        loss = F.cross_entropy(self.own(student(*batch.inputs)), batch.targets, reduction="none")
        return loss * math.inf if self.spoil(self.calls - 1) else loss


def end(student: nn.Module, objective: Objective) -> dict[str, Tensor]:
    return {**student.state_dict(), **{f"objective.{k}": v for k, v in objective.state_dict().items()}}


def train(run: RunContext, data: Data, training: Training, **how: Any) -> tuple[dict[str, Tensor], TrainingLog]:
    student, objective = net(), Classify(**how)
    log = fit(run, student, data, objective, training)
    return end(student, objective), log


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of checkpoints: a killed process does not need them on the disk, only a lost machine does."""
    monkeypatch.setattr(os, "fsync", lambda f: None)


def folder(path: Path) -> RunContext:
    return RunContext(7, path).enter("01-distill")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("make", [array, loader])
def test_killed_anywhere_is_the_same_student(tmp_path: Path, make: Callable[[], Data], optimizer: str) -> None:
    """At the first steps, around the end of an epoch and at the last, with a checkpoint after each.

    Parameters, batch norm, momentum, average and the objective's own are all the same.
    """
    training = Training(
        epochs=EPOCHS, optimizer=optimizer, learning_rate=0.01, average=1.5, clip=1.0, checkpoint_seconds=1e-9
    )
    whole, log = train(RunContext(7).enter("01-distill"), make(), training)
    for kill in (0, 1, BATCHES - 1, BATCHES, BATCHES + 2, EPOCHS * BATCHES - 1):
        run = folder(tmp_path / str(kill))
        with pytest.raises(Killed):
            train(run, make(), training, kill=kill)
        rest, resumed = train(run, make(), training)
        assert_same(rest, whole)
        assert resumed == log and log.steps == EPOCHS * BATCHES and len(log.losses) == EPOCHS


def test_killed_between_checkpoints_and_killed_again(tmp_path: Path) -> None:
    """With checkpoints at the ends of epochs only, and more than one kill."""
    training = Training(epochs=2.5, learning_rate=0.05, checkpoint_seconds=1e9)
    whole, log = train(RunContext(7).enter("01-distill"), array(), training)
    run = folder(tmp_path)
    for kill in (0, 3, 7, 4):  # steps of that process
        with pytest.raises(Killed):
            train(run, array(), training, kill=kill)
    rest, resumed = train(run, array(), training)
    assert_same(rest, whole)
    assert resumed == log and log.steps == 12  # 2.5 epochs of 5
    again, _ = train(run, array(), training, kill=0)  # finished: nothing is trained any more
    assert_same(again, whole)


def test_a_checkpoint_that_was_changed_or_is_of_another_training_is_refused(tmp_path: Path) -> None:
    training = Training(epochs=1, checkpoint_seconds=1e-9)
    for seed in (7, 8):
        with pytest.raises(Killed):
            train(RunContext(seed, tmp_path / str(seed)).enter("01-distill"), array(), training, kill=3)
    paths = [tmp_path / str(seed) / "01-distill.partial" / "checkpoint.safetensors" for seed in (7, 8)]
    content = bytearray(paths[0].read_bytes())
    for spoiled in (paths[1].read_bytes(), bytes(content[:-1]) + bytes([content[-1] ^ 1])):
        paths[0].write_bytes(spoiled)
        with pytest.raises(InputError, match="01-distill: the checkpoint .* was changed, or is of another training"):
            train(folder(tmp_path / "7"), array(), training)
    paths[0].write_bytes(content)
    train(folder(tmp_path / "7"), array(), training)


def test_a_checkpoint_is_written_as_often_as_it_should(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with pytest.raises(Killed):
        train(run, array(), Training(epochs=1, checkpoint_seconds=1e-9), kill=3)
    assert run.scratch is not None
    tensors, metadata = read_tensors(run.scratch / "checkpoint.safetensors")
    assert '"step": 3' in metadata["training"] and "optimizer/0/momentum_buffer" in tensors


def test_the_student_ends_as_it_would_be_loaded(tmp_path: Path) -> None:
    """In eval mode and with contiguous weights: what follows must not depend on whether it was trained here."""
    student = net()
    fit(RunContext(), student, array(), Classify(), Training(epochs=0.4))
    assert not any(m.training for m in student.modules())
    assert all(p.is_contiguous() for p in student.parameters())


def test_a_private_generator_is_refused_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def private() -> Data:
        return LoaderData(DataLoader(Noisy(), 4, shuffle=True, generator=torch.Generator().manual_seed(0)))

    training, run = Training(epochs=2, checkpoint_seconds=1e-9), folder(tmp_path)
    with pytest.raises(Killed):
        train(run, private(), training, kill=3)
    with pytest.raises(InputError, match=r"cannot resume at step 3.*DataLoader has a generator"):
        train(run, private(), training)
    # A loss that is not finite needs no resume: it goes back to the start of the epoch.
    _, log = train(folder(tmp_path / "b"), private(), training, spoil=lambda call: call == 8)
    assert log.retries == 1 and log.steps == 10


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("spoiled", [1, 7])
def test_a_loss_that_is_not_finite_goes_back_at_a_lower_rate(tmp_path: Path, saved: bool, spoiled: int) -> None:
    """In the first epoch and later, with a folder and without: the same as starting there at a quarter of the rate."""
    training = Training(epochs=2, learning_rate=0.05, schedule="constant", warmup=0, average=1)
    run = folder(tmp_path) if saved else RunContext(7).enter("01-distill")
    student, objective = net(), Classify(spoil=lambda call: call == spoiled)
    log = fit(run, student, array(), objective, training)
    assert log.retries == 1 and log.steps == 10
    back = 0 if spoiled < BATCHES else BATCHES
    assert [round(p * 10) for p in objective.seen] == [*range(spoiled + 1), *range(back, 10)]
    if back == 0:
        quarter, _ = train(run.enter("other"), array(), Training(**{**vars_of(training), "learning_rate": 0.0125}))
        reference, _ = train(
            run.enter("01-distill") if not saved else RunContext(7).enter("01-distill"), array(), training
        )
        slow, _ = train(
            RunContext(7).enter("01-distill"), array(), Training(**{**vars_of(training), "learning_rate": 0.0125})
        )
        assert_same(end(student, objective), slow)
        assert any(not torch.equal(reference[k], slow[k]) for k in slow) and quarter.keys() == slow.keys()


def vars_of(training: Training) -> dict[str, Any]:
    return {name: getattr(training, name) for name in training.__dataclass_fields__}


@pytest.mark.parametrize("saved", [True, False])
def test_it_goes_back_three_times_and_then_says_so(tmp_path: Path, saved: bool) -> None:
    run = folder(tmp_path) if saved else RunContext().enter("01-distill")
    for times in (RETRIES, RETRIES + 1):
        wrong = {2 + 3 * i for i in range(times)}
        student, objective = net(), Classify(spoil=wrong.__contains__)
        if times == RETRIES:
            assert fit(run.enter("a"), student, array(), objective, Training(epochs=1)).retries == 3
            continue
        with pytest.raises(
            PqkError, match=r"not finite at step 2 of 5, after 3 retries .* 0\.00078; lower learning_rate"
        ):
            fit(run.enter("b"), student, array(), objective, Training(epochs=1))


def test_the_state_in_memory_survives_being_restored() -> None:
    """Momentum and average of the last good state are copies: training on from them must not change them."""
    training = Training(epochs=2, learning_rate=0.05, schedule="constant", warmup=0, average=1)

    def after(wrong: set[int]) -> dict[str, Tensor]:
        student, objective = net(), Classify(spoil=wrong.__contains__)
        fit(RunContext(7).enter("x"), student, array(), objective, training)
        return end(student, objective)

    # Three failures, at other steps of the second epoch: the last start is at 1/64 of the rate from the same state.
    assert_same(after({6, 7, 8}), after({9, 13, 17}))


@pytest.mark.parametrize("spoiled", [3, BATCHES + 1])
def test_killed_after_a_loss_that_was_not_finite(tmp_path: Path, spoiled: int) -> None:
    """The lower rate is saved with the state that it goes on from: what was infinite once need not be again."""
    training = Training(epochs=2, learning_rate=0.05, checkpoint_seconds=1e9)
    whole, log = train(RunContext(7).enter("01-distill"), array(), training, spoil=lambda call: call == spoiled)
    run = folder(tmp_path)
    with pytest.raises(Killed):
        train(run, array(), training, spoil=lambda call: call == spoiled, kill=spoiled + 3)
    rest, resumed = train(run, array(), training)
    assert_same(rest, whole)
    assert resumed == log and log.retries == 1


@pytest.mark.parametrize("at", [3, BATCHES])
def test_an_infinite_gradient_of_a_finite_loss_is_not_the_last_good_state(at: int) -> None:
    """Neither in a checkpoint amid an epoch nor in the one at its end."""

    class Root(Objective):
        calls = 0

        def forward(self, student: nn.Module, batch: Batch) -> Tensor:
            self.calls += 1
            z = student(*batch.inputs)
            return z.square().sum(1) + ((z.sum(1) * 0).sqrt() if self.calls == at else 0)

    student, training = net(), Training(epochs=2, learning_rate=1e-3, checkpoint_seconds=1e-9)
    log = fit(RunContext(), student, array(), Root(), training)
    assert log.retries == 1 and all(bool(p.isfinite().all()) for p in student.parameters())


KNOWN = [
    ("cosine", 0.0, 0.0, 1.0), ("cosine", 0.0, 0.5, 0.5), ("cosine", 0.0, 1.0, 0.0), ("cosine", 0.2, 0.1, 0.5),
    ("cosine", 0.2, 0.2, 1.0), ("cosine", 0.2, 0.6, 0.5), ("one_cycle", 0.3, 0.0, 0.04), ("one_cycle", 0.3, 0.15, 0.52),
    ("one_cycle", 0.3, 0.3, 1.0), ("one_cycle", 0.3, 1.0, 1e-4), ("constant", 0.5, 0.25, 0.5),
    ("constant", 0.5, 0.9, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "warmup", "progress", "factor"), KNOWN)
def test_schedules_have_known_values(schedule: Any, warmup: float, progress: float, factor: float) -> None:
    assert rate(Training(schedule=schedule, warmup=warmup), progress) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_matrices_and_filters_decay(optimizer: Any) -> None:
    model = net()
    groups = optimizer_for(Training(optimizer=optimizer, weight_decay=0.1), model).param_groups
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {n: decays[id(p)] for n, p in model.named_parameters()} == {
        n: 0.1 if p.dim() >= 2 else 0.0 for n, p in model.named_parameters()
    }
    with pytest.raises(InputError, match="no trainable parameters"):
        optimizer_for(Training(), net().requires_grad_(False))


def test_gradients_are_clipped() -> None:
    """One step of plain SGD moves all that trains by at most rate times norm, and exactly that where it is clipped."""
    training = Training(
        epochs=0.2, learning_rate=1.0, momentum=0, weight_decay=0, schedule="constant", warmup=0, clip=1e-3
    )
    student, objective = net(), Classify()
    before = torch.cat([p.detach().flatten().clone() for m in (student, objective) for p in m.parameters()])
    fit(RunContext(), student, array(), objective, training)
    after = torch.cat([p.detach().flatten() for m in (student, objective) for p in m.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_the_average_is_that_of_the_weights() -> None:
    """Over a horizon longer than the training it is the plain mean of the weights after each step."""
    student, seen = net(), []

    class Watch(Classify):
        def begin(self, progress: float) -> None:
            seen.append(student[7].weight.detach().clone())

    training = Training(epochs=1, learning_rate=0.05, average=100, schedule="constant", warmup=0)
    fit(RunContext(), student, array(), Watch(), training)
    last = net()
    fit(RunContext(), last, array(), Classify(), Training(**{**vars_of(training), "average": 0.0}))
    torch.testing.assert_close(student[7].weight, torch.stack([*seen[1:], last[7].weight.detach()]).mean(0))


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_keeps_float32_weights(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is float32 altogether on a CPU that would be slower for it."""
    monkeypatch.setattr(machine, "bf16_is_slow", lambda: not there)
    student, plain = net(), net()
    fit(RunContext(), plain, array(), Classify(), Training(epochs=0.4))
    fit(RunContext(), student, array(), Classify(), Training(epochs=0.4, precision="bf16"))
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student[7].weight, plain[7].weight) != there


def test_a_cpu_without_bfloat16_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for flags, said in (({"avx2"}, 1), ({"avx2", "avx512_bf16"}, 0), (set(), 0)):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: frozenset(flags))
        machine.bf16_is_slow.cache_clear()
        caplog.clear()
        enabled = [machine.autocast("cpu", "bf16")._enabled for _ in range(2)]
        assert enabled == [not said] * 2 and len(caplog.records) == said
        assert not machine.autocast("cpu", "fp32")._enabled
    machine.bf16_is_slow.cache_clear()


def test_a_training_learns(tmp_path: Path) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    objective = Classify()
    objective.own = nn.Identity()  # type: ignore[assignment]
    log = fit(
        RunContext(), student, ArrayData(x, x[:, :4].argmax(1), 16), objective, Training(epochs=20, learning_rate=0.2)
    )
    assert log.losses[-1] < 0.2 < 1 < log.losses[0]


class Vectors(nn.Module):
    """A norm over the batch whose channels have one position: it cannot train on a single sample."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), norm, nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OwnNorm(nn.Module):
    """Somebody's own: no error of torch's, but NaN for one sample."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt() if self.training else x


def odd(count: int = 17) -> Data:
    """Batches of 4, 4, 4, 4 and 1."""
    return ArrayData(*images(count), 4)


def fitted(run: RunContext, student: nn.Module, data: Data, **how: Any) -> tuple[dict[str, Tensor], TrainingLog]:
    objective = Classify(**how)
    log = fit(run, student, data, objective, Training(epochs=2, average=1.5, checkpoint_seconds=1e-9))
    return end(student, objective), log


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda width: OwnNorm()])
def test_a_last_batch_too_small_for_a_norm_is_left_out(norm: Any, tmp_path: Path) -> None:
    """And said; each epoch leaves out the sample that its order puts last, and a killed run leaves out the same."""
    whole, log = fitted(RunContext(7).enter("01-distill"), Vectors(norm(8)), odd())
    assert (log.steps, log.left_out, log.notes) == (10, 2, {"left_out": 2}) and all(map(math.isfinite, log.losses))
    for kill in (3, 4, 6):  # the calls of the objective, of which an epoch has four
        with pytest.raises(Killed):
            fitted(folder(tmp_path / str(kill)), Vectors(norm(8)), odd(), kill=kill)
        rest, resumed = fitted(folder(tmp_path / str(kill)), Vectors(norm(8)), odd())
        assert_same(rest, whole)
        assert resumed == log


def test_a_small_last_batch_that_can_be_trained_on_is() -> None:
    """A norm with positions enough in one sample, or none: nothing is left out."""
    for student in (net(), Vectors(nn.LayerNorm(8))):
        _, log = fitted(RunContext(7), student, odd())
        assert (log.steps, log.left_out, log.notes) == (10, 0, {})


def test_a_loader_leaves_out_what_it_must_too() -> None:
    x, y = images(9)
    batches = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]  # a small one anywhere
    _, log = fitted(RunContext(7), Vectors(nn.BatchNorm1d(8)), LoaderData(batches))
    assert (log.steps, log.left_out) == (6, 2)


@pytest.mark.parametrize("data", [ArrayData(*images(4), 1), ArrayData(*images(1), 8)])
def test_batches_of_one_are_refused_before_the_training(data: Data) -> None:
    student = Vectors(nn.BatchNorm1d(8))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(InputError, match=r"leave one sample to a step.*more than 1 value.*batches of at least 2"):
        fitted(RunContext(7), student, data)
    assert_same(dict(student.state_dict()), before)
    assert fitted(RunContext(7), net(), data)[1].left_out == 0


TWO = """
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from pathlib import Path
from pqk.core.decisions import Journal
from pqk.core.run_context import RunContext
from pqk.training.trainer import Training, accelerator, fit
import importlib.util
spec = importlib.util.spec_from_file_location("law", {this!r}); law = importlib.util.module_from_spec(spec)
sys.modules["law"] = law; spec.loader.exec_module(law)
rank = accelerator().process_index
assert accelerator().num_processes == 2
journal = Journal(Path({out!r}) / "journal.jsonl" if rank == 0 else None)
run = RunContext(7, Path({out!r}), journal).enter("01-distill")
decided = run.decide("rank", lambda: rank + 10)
student, objective = law.net(), law.Classify(kill={kill})
try:
    log = fit(run, student, law.array(), objective, Training(epochs=2, learning_rate=0.05, average=1, clip=1.0,
                                                             checkpoint_seconds=1e-9))
except law.Killed:
    sys.exit(0)
from pqk.files import write_tensors, write_json
odd = fit(RunContext(7), law.Vectors(torch.nn.BatchNorm1d(8)), law.odd(19), law.Classify(), Training(epochs=1))
write_tensors(Path({out!r}) / f"rank{{rank}}.safetensors", law.end(student, objective))
write_json(Path({out!r}) / f"rank{{rank}}.json", {{"decided": decided, "losses": log.losses, "steps": log.steps,
                                                             "left_out": odd.left_out}})
"""


def launch(out: Path, kill: int | None = None) -> None:
    """Two processes over gloo, as torch starts them and accelerate finds them."""
    out.mkdir(exist_ok=True)
    script = out / "script.py"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), this=__file__, out=str(out), kill=kill))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.slow
def test_two_processes_train_one_student(tmp_path: Path) -> None:
    """Both end with the same tensors, and decisions are those of rank 0."""
    import json

    launch(tmp_path / "whole")
    sides = [read_tensors(tmp_path / "whole" / f"rank{r}.safetensors")[0] for r in (0, 1)]
    logs = [json.loads((tmp_path / "whole" / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert_same(*sides)
    assert logs[0]["left_out"] == 3  # the last batch, of which one of the two would get a single sample
    assert logs[0] == logs[1] and logs[0]["decided"] == 10 and logs[0]["steps"] == 2 * BATCHES
    assert all(map(math.isfinite, logs[0]["losses"])) and logs[0]["losses"][1] < logs[0]["losses"][0]


@pytest.mark.full
def test_two_processes_that_are_killed_go_on(tmp_path: Path) -> None:
    """To the tensors of two that were not."""
    launch(tmp_path / "whole")
    launch(tmp_path / "killed", kill=7)
    launch(tmp_path / "killed")
    assert_same(*(read_tensors(tmp_path / name / "rank0.safetensors")[0] for name in ("whole", "killed")))


def test_progress_counts_steps_once() -> None:
    """Also where a retry goes back."""
    total = 0

    class Bar:
        def task(self, description: str, steps: int) -> Any:
            from contextlib import nullcontext

            def advance(count: int, text: str = "") -> None:
                nonlocal total
                total += count

            return nullcontext(advance)

    began = time.monotonic()
    run = RunContext(observer=Bar()).enter("x")
    fit(run, net(), array(), Classify(spoil=lambda call: call == 3), Training(epochs=1))
    assert total == BATCHES and time.monotonic() - began < 60
