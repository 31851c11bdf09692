"""A teacher's answers on disk: the live ones, of one teacher on one data, and never a wrong one."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.data.structures import Inputs
from pqk.data.views import Take, Views
from pqk.errors import InputError
from pqk.knowledge import CallableTeacher, CrossEntropy, FrozenTeacher, LogitMSE
from pqk.knowledge.teachers import base as teachers
from pqk.knowledge.teachers import cache
from pqk.knowledge.teachers.base import cache_for
from pqk.knowledge.teachers.cache import LogitCache
from pqk.models.images import CropFlip
from pqk.passes import Distill
from pqk.task.task import Task

KEY = "0" * 64


class Net(nn.Module):
    """[B, 3, 6, 6] -> logits [B, 5]."""

    def __init__(self, seed: int = 0, stride: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def images(count: int = 8, views: int | None = 3, pad: int = 2, **options: Any) -> ArrayData:
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, 6, 6, generator=g)
    return ArrayData(inputs, torch.arange(count) % 5, 4, augment=CropFlip(count, pad=pad), views=views, **options)


def halved(inputs: Inputs) -> Inputs:
    return tuple(t / 2 for t in inputs)


def doubled(inputs: Inputs) -> Inputs:
    return tuple(t * 2 for t in inputs)


def made(folder: Path | None, model: nn.Module, data: Any = None, precision: str = "fp32") -> LogitCache:
    found = cache_for(folder, model, images() if data is None else data, precision)
    assert isinstance(found, LogitCache), found
    return found


def test_cached_answers_are_the_live_ones(tmp_path: Path) -> None:
    model, data = Net().eval(), images()
    cached, live, calls = FrozenTeacher(model, cache=made(tmp_path, model)), FrozenTeacher(model), []
    model.register_forward_hook(lambda *a: calls.append(1))
    for epoch in range(6):
        for batch in data.batches(seed=1, epoch=epoch):  # the same batches: sums may round otherwise in others
            before = len(calls)
            answer, _ = cached(batch)
            assert len(calls) - before == (1 if epoch < 3 else 0)
            assert torch.equal(answer, live(batch)[0])
    assert bool(made(tmp_path, Net().eval()).get(torch.arange(24))[1].all())


class Several(Net):
    """Two outputs by name."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "twice": 2 * super().forward(x)}


def test_of_several_outputs_the_one_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    model, data = Several().eval(), images()
    kept = [cache_for(tmp_path, model, data, "fp32", name) for name in ("logits", "twice")]
    batch = next(data.batches(seed=1))
    live = FrozenTeacher(model)(batch)[0]
    for name, found in zip(("logits", "twice"), kept, strict=True):
        assert isinstance(found, LogitCache)
        for _ in range(2):
            answer, _features = FrozenTeacher(model, cache=found)(batch)
            assert list(answer) == [name] and torch.equal(answer[name], live[name])
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    assert "let all terms name one" in str(cache_for(tmp_path, model, data, "fp32", "logit"))
    single = cache_for(tmp_path, Net().eval(), data, "fp32", "logits")
    assert isinstance(single, LogitCache) and single.output is None


def test_distill_asks_for_one_output_where_all_terms_name_it() -> None:
    one, other = (LogitMSE(output=name) for name in ("logits", "twice"))
    pairs = ((one, CrossEntropy()), (one, other), (one, LogitMSE()))
    assert [Distill(terms=terms).cached_output() for terms in pairs] == ["logits", None, None]
    assert Distill(terms=(LogitMSE(output="logits", gate="teacher_confidence"),)).cached_output() is None


def test_answers_that_are_not_there_or_damaged_are_computed(tmp_path: Path) -> None:
    """A killed run's cache is merely less full; half an answer, a changed one and one in another's place are none."""
    model, data = Net().eval(), images()
    kept = made(tmp_path, model)
    batch = next(data.batches(seed=1))
    want, _ = FrozenTeacher(model)(batch)
    taught = FrozenTeacher(model, cache=kept)
    assert batch.keys is not None and not bool(kept.get(batch.keys)[1].any())
    taught(batch)
    places = batch.keys.tolist()
    kept.array["answer"][places[0], 2:] = 0
    kept.array["answer"][places[1], 0] += 1e-6
    kept.array[places[2]] = kept.array[places[3]]
    assert kept.get(batch.keys)[1].tolist() == [False, False, False, True]
    assert torch.equal(taught(batch)[0], want) and bool(kept.get(batch.keys)[1].all())


def test_a_cache_is_of_one_teacher_one_data_one_view_and_one_precision(tmp_path: Path) -> None:
    caches = [
        made(tmp_path, Net()), made(tmp_path, Net(seed=1)), made(tmp_path, Net(stride=2)),
        made(tmp_path, Net(), images(pad=1)), made(tmp_path, Net(), images(views=2)),
        made(tmp_path, Net(), images(prepare=halved)), made(tmp_path, Net(), images(prepare=doubled)),
        made(tmp_path, Net(), precision="bf16"), made(tmp_path, FrozenTeacher(Net(), students_view=True)),
    ]  # fmt: skip
    held = images(views=1)
    for shown in (Views(doubled, halved), Views(halved, doubled)):
        train = Task(images(), held, held, views=shown).train
        caches.append(made(tmp_path, Net(), train))
    assert len({c.path for c in caches}) == len(caches) == 11
    assert made(tmp_path, Net()).path == made(tmp_path, FrozenTeacher(Net())).path == caches[0].path


def test_a_file_under_another_teachers_name_answers_nothing(tmp_path: Path) -> None:
    one, other = made(tmp_path, Net()), made(tmp_path, Net(seed=1))
    keys = torch.arange(24)
    one.put(keys, torch.ones(24, 5))
    other.path.write_bytes(one.path.read_bytes())
    assert not bool(made(tmp_path, Net(seed=1)).get(keys)[1].any()) and bool(one.get(keys)[1].all())


def test_what_changed_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """A function's identity is the user's word for it."""
    first, second = Net().eval(), Net(seed=1).eval()
    named = CallableTeacher(lambda x: first(x), identity="the service")
    named.cache = made(tmp_path, named)
    for batch in images().batches(seed=5):
        named(batch)
    made(tmp_path, named)
    with pytest.raises(InputError, match="not this teacher's: they lie .* apart.*another `identity`"):
        cache_for(tmp_path, CallableTeacher(lambda x: second(x), identity="the service"), images(), "fp32")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other shape"])
def test_a_file_that_is_no_cache_is_refused(damage: str, tmp_path: Path) -> None:
    path = made(tmp_path, Net()).path
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "foreign":
        path.write_bytes(b"no array")
    else:
        np.save(path, np.zeros((24, 5), np.float32))
    with pytest.raises(InputError, match="delete it"):
        cache_for(tmp_path, Net(), images(), "fp32")


def test_later_runs_share_a_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run itself saves nothing."""
    assert cache_for(None, Net(), images(), "fp32") == "nothing is saved in this run"
    monkeypatch.setenv("PQK_CACHE", str(tmp_path / "shared" / "answers"))
    model = Net().eval()
    first = made(tmp_path / "run 1", model)
    list(map(FrozenTeacher(model, cache=first), images().batches(seed=1)))
    later = made(None, Net().eval())
    assert later.path == first.path and later.path.parent == tmp_path / "shared" / "answers"
    assert bool(later.get(torch.arange(24) // 3 * 3)[1].all()) and not (tmp_path / "run 1").exists()


WRITER = f"""
import sys, torch
from pathlib import Path
from pqk.knowledge.teachers.cache import LogitCache
cache = LogitCache(Path(sys.argv[1]) / "{KEY}.npy", 64, (5,))
print("ready", flush=True)
sys.stdin.readline()
keys = torch.arange(int(sys.argv[2]), 64, 2)
for _ in range(20):
    cache.put(keys, keys[:, None].expand(-1, 5))
    cache.put(torch.arange(64), torch.arange(64)[:, None].expand(-1, 5))
"""


@pytest.mark.slow
def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """They make it at the same time, and map the same one."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=120)
        assert writer.returncode == 0
    rows, there = LogitCache(tmp_path / f"{KEY}.npy", 64, (5,)).get(torch.arange(64))
    assert bool(there.all()) and torch.equal(rows, torch.arange(64.0)[:, None].expand(-1, 5))
    assert [p.name for p in tmp_path.iterdir()] == [f"{KEY}.npy"]


def test_who_is_second_maps_the_file_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made between the look whether it is there and the making."""
    path, blank = tmp_path / f"{KEY}.npy", cache.write_blank
    first: list[LogitCache] = []

    def slow(own: Path, rows: int, record: Any) -> None:
        monkeypatch.setattr(cache, "write_blank", blank)
        first.append(LogitCache(path, rows, (5,)))
        blank(own, rows, record)

    monkeypatch.setattr(cache, "write_blank", slow)
    second = LogitCache(path, 8, (5,))
    first[0].put(torch.tensor([3]), torch.ones(1, 5))
    assert second.get(torch.tensor([3, 4]))[1].tolist() == [True, False]


def test_what_cannot_be_kept_says_why(tmp_path: Path) -> None:
    assert "views=N" in str(cache_for(tmp_path, Net(), images(views=None), "fp32"))
    pair = CallableTeacher(lambda x: (x.mean((2, 3)),), identity="pair")
    assert "only single tensors" in str(cache_for(tmp_path, pair, images(), "fp32"))
    double = CallableTeacher(lambda x: x.mean((2, 3)).double(), identity="double")
    assert "kept in float32" in str(cache_for(tmp_path, double, images(), "fp32"))


def test_a_full_disk_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *how: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "write_blank", full)
    with pytest.raises(InputError, match="No space left"):
        cache_for(tmp_path, Net(), images(), "fp32")
    assert not [*(tmp_path / "cache").iterdir()]
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda p: type("U", (), {"free": 100}))
    assert "free" in str(cache_for(tmp_path, Net(), images(), "fp32"))


def test_two_views_are_cached_as_the_teacher_sees_them(tmp_path: Path) -> None:
    held = ArrayData((torch.ones(4, 3, 6, 6), torch.zeros(4, 3, 6, 6)), torch.arange(4), 4)
    two = ArrayData((images().inputs[0], torch.zeros(8, 3, 6, 6)), images().targets, 4)
    train = Task(two, held, held, views=Views(teacher=Take(0), student=Take(1))).train
    assert train is not None
    model = Net().eval()
    cached, live = FrozenTeacher(model, cache=made(tmp_path, model, train)), FrozenTeacher(model)
    for _ in range(2):
        for batch in train.batches(seed=1):
            assert not bool(batch.inputs[0].any())
            want = model(images().inputs[0][batch.keys])
            assert torch.equal(cached(batch)[0], live(batch)[0]) and torch.equal(live(batch)[0], want)
    students = FrozenTeacher(model, students_view=True)
    assert torch.equal(students(batch)[0], model(batch.inputs[0]))
