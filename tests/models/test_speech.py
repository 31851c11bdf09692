"""The spoken digits: an honest split, a front end that is what it says, and two views of one second."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pqk.data.data import ArrayData
from pqk.data.views import TwoViews
from pqk.errors import InputError
from pqk.models.speech import (
    BANDS,
    COARSE,
    FRAMES,
    RATE,
    TimeShift,
    load_split,
    log_mel,
    mel_filters,
    speech_net,
    spoken_digits,
    students_view,
    teachers_view,
    train_teacher,
)
from pqk.recipe.factories import load_teacher
from pqk.recipe.recipe import Recipe

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "models" / "speech_fsdd.toml"


def written(folder: Path) -> Path:
    """A data file as the real one: 3 digits by 2 speakers, tones of a pitch of their own; 12 recordings, 2 for test."""
    arrays: dict[str, NDArray[np.generic]] = {"sample_rate": np.array(RATE)}
    for split, numbers in (("train", range(2, 12)), ("test", range(2))):
        rows = [(d, s, i) for d in range(3) for s in range(2) for i in numbers]
        tones = [np.sin(np.arange(3000 + 900 * i) * 2 * math.pi * (400 + 600 * d + 30 * s) / RATE) for d, s, i in rows]
        arrays |= {
            f"{split}_audio": (12000 * np.concatenate(tones)).astype(np.int16),
            f"{split}_offsets": np.cumsum([0, *map(len, tones)]).astype(np.int64),
            f"{split}_labels": np.array([d for d, _, _ in rows]),
            f"{split}_index": np.array([i for _, _, i in rows]),
        }
    path = folder / "fsdd.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_recordings_are_cut_padded_and_scaled(tmp_path: Path) -> None:
    audio, labels, index = load_split(written(tmp_path), "train")
    assert audio.shape == (60, RATE) and audio.dtype == torch.float32 and 0.3 < float(audio.abs().max()) < 0.4
    assert labels.bincount().tolist() == [20, 20, 20] and sorted(set(index.tolist())) == list(range(2, 12))
    silent = (audio.flip(1) == 0).int().cumprod(1).sum(1)  # at the end
    assert torch.equal(silent > 0, 3000 + 900 * index < RATE)


def test_the_split_is_by_recording(tmp_path: Path) -> None:
    written(tmp_path)
    task = spoken_digits(tmp_path, batch_size=8, views=2)
    index = load_split(tmp_path / "fsdd.npz", "train")[2]
    parts = []
    for data in (task.train, task.validation):
        assert isinstance(data, TwoViews) and isinstance(data.data, ArrayData)
        parts.append(index[data.data.ids])
    assert bool((parts[0] >= 10).all() and (parts[1] < 10).all()) and len(parts[0]) + len(parts[1]) == 60
    task.check(speech_net())
    assert task.evaluation.samples == 12 and spoken_digits(tmp_path, limit=5).evaluation.samples == 5


def test_filters_are_triangles_that_share_the_spectrum() -> None:
    for bands in (10, 40):
        filters = mel_filters(bands)
        centres = filters.argmax(1)
        assert filters.shape == (bands, 129) and bool((filters >= 0).all()) and float(filters.max()) <= 1
        assert bool((centres.diff() > 0).all())
        inside = filters[:, centres[0] + 1 : centres[-1]].sum(0)
        torch.testing.assert_close(inside, torch.ones_like(inside))  # each frequency counts once


def test_a_tone_is_where_its_pitch_and_time_are() -> None:
    """In both views, at the same place: the student's value stands where the teacher's bands and frames are."""
    audio = torch.zeros(3, RATE)
    for i, hertz in enumerate((300, 1000, 2800)):
        audio[i, 2000:6000] = torch.sin(torch.arange(4000) * 2 * math.pi * hertz / RATE)
    fine, coarse = teachers_view(audio), students_view(audio)
    assert fine.shape == coarse.shape == (3, 1, BANDS, FRAMES)
    tops = [v[..., FRAMES // 2].argmax(2)[:, 0] for v in (fine, coarse)]
    assert bool((tops[0].diff() > 0).all()) and bool(((tops[0] - tops[1]).abs() <= COARSE + 2).all())
    sounding = fine.amax(2)[:, 0] > 0
    assert bool(sounding[:, 17:47].all()) and not bool(sounding[:, :14].any() or sounding[:, 50:].any())
    blocks = coarse.unfold(2, COARSE, COARSE).unfold(3, COARSE, COARSE)
    assert bool((blocks == blocks[..., :1, :1]).all())
    torch.testing.assert_close(log_mel(audio, BANDS // COARSE, FRAMES // COARSE), blocks[..., 0, 0])
    assert bool(log_mel(torch.zeros(1, RATE), 4, 4).isfinite().all())


def test_a_shift_moves_both_views_alike() -> None:
    x = torch.randn(5, 1, 6, 32)
    moved = TimeShift(5)((x, x), torch.arange(5), view=3)
    assert torch.equal(*moved) and torch.equal(moved[0][2:], TimeShift(5)((x[2:],), torch.arange(2, 5), 3)[0])
    padded = torch.nn.functional.pad(x, (8, 8), value=float("nan"))
    for i in range(5):
        places = [padded[i, :, :, s : s + 32] for s in range(0, 17, COARSE)]
        assert any(bool(((moved[0][i] == p) | p.isnan()).all()) for p in places)
    assert len({TimeShift(5)((x[:1],), torch.tensor([0]), v)[0].numpy().tobytes() for v in range(12)}) > 2


def test_a_file_that_is_no_such_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*fsdd.npz.*PQK_DATA"):
        spoken_digits(tmp_path)
    np.savez(tmp_path / "fsdd.npz", other=np.zeros(1))
    with pytest.raises(InputError, match="cannot read"):
        spoken_digits(tmp_path)


def test_the_teacher_can_be_trained(tmp_path: Path) -> None:
    """The command that made the weights, in small: the same seed gives the same weights, and they have learnt."""
    written(tmp_path)
    task = spoken_digits(tmp_path, batch_size=6, views=None)
    first, second = (train_teacher(task, epochs=4, peak=0.02, seed=3) for _ in range(2))
    same = second.state_dict()
    assert all(torch.equal(t, same[k]) for k, t in first.state_dict().items())
    batch = next(task.need_train("test").batches()).for_teacher()
    with torch.no_grad():
        losses = [task.loss(m.train()(*batch.inputs), batch.targets).mean() for m in (speech_net(), first)]
    assert losses[1] < 0.8 * losses[0]


def test_the_teacher_is_good_and_hears_less_in_the_students_view(data_file: Callable[[str], Path]) -> None:
    recipe = Recipe.load(RECIPE)
    assert recipe.teacher is not None
    teacher, task = load_teacher(recipe.teacher, beside=RECIPE.parent), spoken_digits(data_file("fsdd.npz").parent)
    task.check(teacher)
    assert task.train is not None
    assert [d.samples for d in (task.train, task.validation, task.evaluation)] == [2400, 300, 300]
    assert task.score(teacher, task.teachers(task.evaluation)) >= 0.98
    assert task.score(teacher, task.evaluation) < 0.95
