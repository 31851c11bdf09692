"""Spoken digits as a task whose student hears less than its teacher: 10 coarse log-mel bands instead of 40 fine ones.

3,000 recordings of 0 to 9 by six speakers at 8 kHz (Free Spoken Digit Dataset, CC BY-SA 4.0), split as its authors do:
recordings 0 to 4 of every speaker and digit are for evaluation; here 5 to 9 are for validation, the rest for training.
All speakers are in all parts. The teacher sees 40 mel bands in 64 frames of the first second. The student's front end
computes 10 bands in 16 frames, a quarter of the Fourier transforms and a sixteenth of the values, each of which fills
the places of 4 bands and 4 frames, so that both networks take the same shape. The teacher's weights lie beside this
file; `python -m pqk.models.speech DATA` trains them again.
"""

from __future__ import annotations

import logging
import math
import sys
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pqk.data.data import ArrayData
from pqk.data.folders import data_folder
from pqk.data.structures import Inputs
from pqk.data.views import Take, Views
from pqk.errors import InputError
from pqk.task.task import Task

RATE = 8000
WINDOW, BANDS, FRAMES = 256, 40, 64
"""samples of a Fourier transform, and the teacher's picture of one second"""
COARSE = 4
"""bands and frames of the teacher that one of the student's stands for"""
QUIETEST = 1e-6
"""power below which everything is silence"""
MEAN, STD = -6.0, 4.0
"""of log power, roughly: what the network's inputs are shifted and scaled by"""
WEIGHTS = Path(__file__).with_name("speech_teacher.safetensors")

log = logging.getLogger(__name__)


def mel_filters(bands: int) -> Tensor:
    """[bands, WINDOW / 2 + 1]: triangles of equal width in mel, 2595 log10(1 + f / 700), from 0 Hz to RATE / 2."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.arange(WINDOW // 2 + 1) * (RATE / WINDOW)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    return torch.minimum(rising, falling).clamp_min(0).float()


def log_mel(audio: Tensor, bands: int, frames: int) -> Tensor:
    """[N, RATE] within ±1 -> [N, 1, bands, frames]: the log power of a Hann window around the middle of each frame."""
    hop, filters, window = RATE // frames, mel_filters(bands).T, torch.hann_window(WINDOW)
    padded = F.pad(audio, (WINDOW // 2 - hop // 2, WINDOW)).unfold(1, WINDOW, hop)[:, :frames]
    parts = [torch.fft.rfft(part * window).abs().square() @ filters for part in padded.split(256)]
    return ((torch.cat(parts).clamp_min(QUIETEST).log() - MEAN) / STD).transpose(1, 2)[:, None]


def teachers_view(audio: Tensor) -> Tensor:
    """[N, RATE] -> [N, 1, BANDS, FRAMES]."""
    return log_mel(audio, BANDS, FRAMES)


def students_view(audio: Tensor) -> Tensor:
    """The same shape from a sixteenth of the values: each stands where COARSE bands and COARSE frames would."""
    coarse = log_mel(audio, BANDS // COARSE, FRAMES // COARSE)
    return coarse.repeat_interleave(COARSE, 2).repeat_interleave(COARSE, 3)


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(audio float32 [N, RATE] within ±1, labels int64 [N], recording numbers int64 [N]) of "train" or "test".

    The first second of each recording; what is shorter ends in silence. Raises `InputError` for a missing or
    unreadable file.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            audio, offsets, labels, index = (z[f"{split}_{k}"] for k in ("audio", "offsets", "labels", "index"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; point --data or PQK_DATA at the folder that has it") from error
    seconds = np.zeros((len(labels), RATE), np.float32)
    for i, (start, end) in enumerate(pairwise(offsets)):
        one = audio[start:end][:RATE]
        seconds[i, : len(one)] = one / np.float32(32768)
    return (
        torch.from_numpy(seconds),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(index.astype(np.int64)),
    )


@dataclass(frozen=True)
class TimeShift:
    """Moves pictures [B, 1, bands, frames] by at most `most` frames, all inputs alike; silence comes in.

    The offsets are drawn from (seed, view) for all `samples` at once, in steps of the student's frames.
    """

    samples: int
    most: int = 8
    seed: int = 0

    def __call__(self, inputs: Inputs, ids: Tensor, view: int) -> Inputs:
        places = _offsets(self, view)[ids][:, None] + torch.arange(inputs[0].shape[-1])
        silence = (math.log(QUIETEST) - MEAN) / STD
        padded = [F.pad(t, (self.most, self.most), value=silence) for t in inputs]
        return tuple(t.gather(-1, places[:, None, None].expand(-1, *t.shape[1:3], -1)) for t in padded)


@lru_cache(maxsize=2)
def _offsets(shift: TimeShift, view: int) -> Tensor:
    generator = torch.Generator().manual_seed(shift.seed * 1_000_003 + view)
    return COARSE * torch.randint(0, 2 * shift.most // COARSE + 1, (shift.samples,), generator=generator)


def spoken_digits(
    data: str | Path | None = None,
    *,
    batch_size: int = 64,
    views: int | None = 4,
    cross_modal: bool = True,
    limit: int | None = None,
) -> Task:
    """The spoken digits with shifts of up to an eighth of a second.

    Args:
        data: folder with fsdd.npz.
        batch_size: recordings a step.
        views: distinct shifted views of a recording, so that the teacher's answers are cached; None: unbounded.
        cross_modal: the student sees the coarse view; else what the teacher sees.
        limit: use only so many recordings of each part.
    """
    path = data_folder(data) / "fsdd.npz"
    audio, labels, index = load_split(path, "train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # as stored, it is by label
    shift = TimeShift(len(labels))
    whole = ArrayData(_both(audio), labels, batch_size, augment=shift, views=views)
    held = index[order] < 10
    test_audio, test_labels, _ = load_split(path, "test")
    shuffled = torch.randperm(len(test_labels), generator=torch.Generator().manual_seed(0))[:limit]
    return Task(
        train=whole.subset(order[~held][:limit], augmented=True),
        validation=whole.subset(order[held][:limit], augmented=False),
        evaluation=ArrayData(_both(test_audio[shuffled]), test_labels[shuffled], batch_size),
        views=Views(teacher=Take(0), student=Take(1 if cross_modal else 0)),
        input_names=("log_mel",),
        output_names=("logits",),
        preprocessing={
            "audio": f"first second at {RATE} Hz within ±1, silence after its end",
            "front_end": "pqk.models.speech:students_view" if cross_modal else "pqk.models.speech:teachers_view",
        },
    )


def _both(audio: Tensor) -> Inputs:
    return teachers_view(audio), students_view(audio)


class SpeechNet(nn.Module):
    """[B, 1, 40, 64] -> logits [B, 10]: convolutions with batch norm down to 5 x 8, one over all that is left of the
    frequencies (what matters is where in the spectrum a pattern is, and not when), the mean over time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_layer(1, 32, stride=2), *_layer(32, 32, stride=2), *_layer(32, 64), *_layer(64, 64, stride=2),
            *_layer(64, 64, (BANDS // 8, 3), padding=(0, 1)),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _layer(
    channels: int, width: int, kernel: tuple[int, int] = (3, 3), stride: int = 1, padding: tuple[int, int] = (1, 1)
) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, width, kernel, stride, padding, bias=False), nn.BatchNorm2d(width), nn.ReLU()


def speech_net() -> SpeechNet:
    """The teacher's network: 127,402 parameters, 6.6 MMAC."""
    return SpeechNet()


def train_teacher(task: Task, epochs: int = 12, peak: float = 0.1, seed: int = 0) -> nn.Module:
    """The teacher on its own view, trained from scratch on the labels with SGD and a one-cycle rate, in eval mode."""
    torch.manual_seed(seed)
    model, data = speech_net(), task.need_train("speech")
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * len(data))
    for epoch in range(epochs):
        total = 0.0
        for batch in data.batches(seed + epoch, epoch):
            logits = model.train()(*batch.for_teacher().inputs)
            loss = F.cross_entropy(logits, batch.targets, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        score = task.score(model.eval(), task.teachers(task.validation))
        log.info("epoch %d of %d: loss %.3f, validation %.4f", epoch + 1, epochs, total / len(data), score)
    return model.eval()


def main() -> None:
    """Train the teacher and write its weights beside this file. The argument is the data folder."""
    from safetensors.torch import save_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = spoken_digits(*sys.argv[1:2], views=None)
    teacher = train_teacher(task)
    save_file({k: v.contiguous() for k, v in teacher.state_dict().items()}, WEIGHTS)
    whole, coarse = (task.score(teacher, d) for d in (task.teachers(task.evaluation), task.evaluation))
    log.info("%s: evaluation %.4f on its own view, %.4f on the student's", WEIGHTS, whole, coarse)


if __name__ == "__main__":
    main()
