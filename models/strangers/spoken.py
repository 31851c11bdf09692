"""A speech net: convolutions over the waveform, then a GRU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pqk.data.folders import data_folder
from pqk.models.speech import load_split
from pqk.models.strangers.stranger import Samples, Stranger

SHIFT, NOISE = 800, 0.01
"""samples that a copy of a recording begins later, and its noise over full scale"""


class Spoken(nn.Module):
    """1-D convolutions over a second of sound and a GRU over their 25 frames: [B, 1, 8000] -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()

        def layer(channels: int, out: int, kernel: int, stride: int) -> nn.Sequential:
            conv = nn.Conv1d(channels, out, kernel, stride, kernel // 2, bias=False)
            return nn.Sequential(conv, nn.BatchNorm1d(out), nn.ReLU())

        self.features = nn.Sequential(
            layer(1, 48, 40, 10), layer(48, 64, 7, 4), layer(64, 96, 5, 2), layer(96, 96, 3, 2), layer(96, 96, 3, 2)
        )
        self.gru = nn.GRU(96, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames, _ = self.gru(self.features(x).transpose(1, 2))
        return self.head(frames.mean(1))


def recordings(data: Path | None) -> Samples:
    """Spoken digits, float32 [N, 1, 8000] within ±1: each to learn from twice, once later and in noise."""
    path = data_folder(data) / "fsdd.npz"
    (audio, labels, _), (test, test_labels, _) = (load_split(path, part) for part in ("train", "test"))
    generator = torch.Generator().manual_seed(0)
    later = audio.roll(SHIFT, 1) + NOISE * torch.randn(audio.shape, generator=generator)
    order = torch.randperm(2 * len(labels), generator=generator)
    train = torch.cat([audio, later])[order][:, None], labels.repeat(2)[order]
    return Samples(train, (test[:, None], test_labels))


SPOKEN = Stranger(
    "spoken", "1-D convolutions and a GRU on the waveform; spoken digits", Spoken, recordings, epochs=12, rate=3e-3
)
